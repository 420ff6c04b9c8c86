"""The package as a package."""

import re
import subprocess
import sys
from pathlib import Path

import mfac_core


def test_importing_it_imports_no_framework():
    code = (
        "import sys, mfac_core; "
        "print({'torch', 'jax', 'optax', 'cupy', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_every_public_name_is_there():
    for name in mfac_core.__all__:
        assert getattr(mfac_core, name).__module__.startswith("mfac_core")


def test_it_is_typed():
    assert (Path(mfac_core.__file__).parent / "py.typed").is_file()


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
