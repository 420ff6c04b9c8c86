"""What is said where a package that somebody may not have is missing."""

import subprocess
import sys

import pytest

MISSING = """
import sys
import warnings
sys.modules[{name!r}] = None  # as if it were not installed
{code}
"""


def run(name, code):
    script = MISSING.format(name=name, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("mfac_core.torch", "torch", "torch"),
        ("mfac_core.jax", "jax", "jax"),
        ("mfac_core.functional", "jax", "jax"),
        ("mfac_core.optax", "optax", "optax"),
    ],
)
def test_the_extra_is_named(module, name, extra):
    error = run(name, f"import {module}").stderr
    assert f"needs {name}, which is not installed: python -m pip install" in error
    assert f'"mfac_core[{extra}]"' in error


def test_a_bar_that_cannot_be_shown_is_mentioned_once():
    done = run(
        "tqdm",
        """
sys.modules["tqdm.auto"] = None
import numpy as np
import mfac_core as mfac
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        mfac.InverseFisher(np.ones((2, 3)), damping=1.0, progress=True).diagonal()
print([(str(w.message), w.category.__name__, w.filename) for w in caught])
""",
    )
    words = "progress=True shows nothing without tqdm: python -m pip install tqdm"
    assert done.stdout.strip() == str([(words, "UserWarning", "<string>")]), done.stderr
