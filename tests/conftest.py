"""Array libraries as parameters: one test body runs on all of them."""

import os
import sys
from dataclasses import dataclass
from typing import Any

if "gpu" in sys.argv:  # pytest -m gpu: JAX on the device, beside others that need its memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import array_api_strict
import hypothesis
import jax.numpy
import numpy as np
import pytest
import torch

from mfac_core._arrays import to_numpy

# The same examples in every run, so that what fails is the change at hand. New ones are drawn by
# python -m pytest --hypothesis-profile=explore
hypothesis.settings.register_profile("explore", deadline=None, max_examples=50)
hypothesis.settings.register_profile("default", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("default")


def pytest_collection_modifyitems(config, items):
    """Leave tests on a CUDA device to those who ask for them."""
    if "gpu" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("gpu")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]
    config.stash[LEFT_FOR_GPU] = len(left)


def pytest_terminal_summary(terminalreporter, config):
    """Say why tests were deselected."""
    if left := config.stash.get(LEFT_FOR_GPU, 0):
        line = f"{left} tests need a CUDA device: run them on one with 'python -m pytest -m gpu'"
        terminalreporter.write_line(line)


LEFT_FOR_GPU = pytest.StashKey[int]()


@dataclass(frozen=True)
class Backend:
    """An array library, with the device its arrays are made on."""

    name: str
    xp: Any
    device: Any = None

    def asarray(self, x: np.ndarray, dtype: str = "float32") -> Any:
        """Make an array of this library from a NumPy one; NumPy's own come read-only."""
        if self.xp is np:
            copy = np.array(x, dtype=dtype)
            copy.setflags(write=False)
            return copy
        options = {} if self.device is None else {"device": self.device}
        return self.xp.asarray(np.array(x, dtype=dtype), **options)

    def dtypes(self) -> tuple[str, ...]:
        """Floating dtypes the library has as it stands."""
        return ("float32",) if self.name == "jax" else ("float32", "float64")


BACKENDS = [
    Backend("numpy", np),
    Backend("torch", torch),
    Backend("jax", jax.numpy),
    Backend("strict", array_api_strict),
    Backend("strict-device1", array_api_strict, array_api_strict.Device("device1")),
]

CASES = [
    pytest.param(backend, dtype, id=f"{backend.name}-{dtype}")
    for backend in BACKENDS
    for dtype in backend.dtypes()
]


def numpy64(x: Any) -> np.ndarray:
    """Bring any array to NumPy as float64."""
    return to_numpy(x).astype(np.float64)


def relative_error(actual: Any, expected: np.ndarray) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(numpy64(actual) - expected) / np.linalg.norm(expected))


@pytest.fixture
def rng() -> np.random.Generator:
    """Return a seeded generator."""
    return np.random.default_rng(20211107)
