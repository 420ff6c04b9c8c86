"""The tests for a card whose bodies the host executor can run: that they say what they mean."""

import contextlib
import types

import pytest
import test_gpu
from cuda_on_cpu import host_array, host_view
from host_machine import DeviceHome, HostMachine

from mfac_core._ops.cuda import machine as cuda_machine


@pytest.fixture
def cupy(monkeypatch):
    """What these tests use of CuPy, over host memory; kernels run on the host executor."""
    machine = HostMachine("fast")
    machine.little_float64 = True
    monkeypatch.setattr(cuda_machine, "current", machine)
    monkeypatch.setattr(test_gpu, "home_of", lambda x: DeviceHome())
    monkeypatch.setattr(test_gpu, "numpy64", lambda x: host_view(x).astype("float64"))
    cuda = types.SimpleNamespace(
        Device=contextlib.nullcontext, runtime=types.SimpleNamespace(getDeviceCount=lambda: 1)
    )
    yield types.SimpleNamespace(asarray=host_array, cuda=cuda)
    assert machine.launches


def test_sparse_products(cupy, monkeypatch, rng):
    for columns in (1, 3):
        test_gpu.test_sparse_products_are_those_of_the_host_executor(
            cupy, monkeypatch, rng, "float32", columns
        )


@pytest.mark.parametrize("columns", [None, 4])
def test_sums_in_two_float32(cupy, monkeypatch, rng, columns):
    for dtype in ("float32", "float16", "bfloat16"):
        test_gpu.test_sums_in_two_float32(cupy, monkeypatch, rng, dtype, columns)


def test_products(cupy, monkeypatch, rng):
    cuda_machine.current.little_float64 = False
    test_gpu.test_products_are_those_of_the_host_executor(cupy, monkeypatch, rng, "float32", 1000)
