"""The CPU in the place of a CUDA device: the library's own launches, on the host executor."""

import contextlib
from collections import Counter

import ml_dtypes
import numpy as np
import torch
from cuda_on_cpu import Module, host_array, host_view

from mfac_core import _arrays
from mfac_core._arrays import Home, is_cupy_array, is_torch_array
from mfac_core._ops import blocks, rows
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._rows import base

NUMPY_DTYPES = {
    "float32": np.dtype("float32"),
    "float64": np.dtype("float64"),
    "float16": np.dtype("float16"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype("int32"),
}


class DeviceHome:
    """A home on the device: what launches ask of one, and that it is not NumPy."""

    is_numpy = False

    def receive(self, x):
        return x


class HostMachine(cuda_machine.Machine):
    """Takes CuPy arrays over host memory, and PyTorch's CPU tensors as if they were on a device."""

    def __init__(self, mode):
        self.mode = mode
        self.order = "forward"
        self.seed = 0
        self.little_float64 = False
        self.launches = Counter()
        self.waits = 0

    def holds(self, x):
        return is_cupy_array(x) or is_torch_array(x)

    def device(self):
        return 0

    def shared_bytes(self):
        return 99 * 1024  # of sm_86, sm_89 and sm_120

    def has_little_float64(self):
        return self.little_float64

    def module(self, code, given):
        return _Recording(
            self, Module(code, given, self.mode), " twofold" * ("-DTWOFOLD=1" in given)
        )

    def borrow(self, x):
        if is_cupy_array(x):
            assert x.flags.c_contiguous
            return x
        assert x.is_contiguous()
        if x.dtype == torch.bfloat16:
            x = x.view(torch.int16)
        return host_array(x.numpy())

    def contiguous(self, x):
        if is_torch_array(x):
            return x.contiguous()
        return host_array(host_view(x))

    def receive(self, x):
        return self.borrow(self.contiguous(x))

    def empty(self, shape, dtype, like):
        if is_torch_array(like):
            fill = -1 if dtype == "int32" else float("nan")
            return torch.full(shape, fill, dtype=getattr(torch, dtype))
        fill = -1 if dtype == "int32" else np.nan
        return host_array(np.full(shape, fill, NUMPY_DTYPES[dtype]))

    def refuse_capture(self):
        pass

    def later(self, x):
        there = np.array(host_view(self.borrow(x)))

        def look():
            self.waits += 1
            return there

        return look

    @contextlib.contextmanager
    def at(self, x):
        yield


class _Recording:
    """A module whose kernels run in the machine's order and are counted."""

    def __init__(self, machine, module, variant):
        self.machine, self.module, self.variant = machine, module, variant

    def compile(self):
        pass

    def get_function(self, name):
        return _RecordingKernel(self.machine, name + self.variant, self.module.get_function(name))


class _RecordingKernel:
    def __init__(self, machine, name, kernel):
        self.machine, self.name, self.kernel = machine, name, kernel
        self.max_dynamic_shared_size_bytes = kernel.max_dynamic_shared_size_bytes

    def __call__(self, grid, block, arguments, *, shared_mem=0):
        self.machine.launches[self.name] += 1
        self.kernel.order, self.kernel.seed = self.machine.order, self.machine.seed
        self.kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        self.kernel(grid, block, arguments, shared_mem=shared_mem)


def torch_machine(monkeypatch):
    """Put a machine that holds PyTorch's tensors in the device's place, with a home of theirs."""
    from array_api_compat import torch as namespace

    def home_of(x):
        there = is_torch_array(x)
        return Home(namespace, torch.device("cpu")) if there else _arrays.home_of(x)

    machine = HostMachine("check")
    monkeypatch.setattr(cuda_machine, "current", machine)
    for module in (base, rows, blocks):
        monkeypatch.setattr(module, "home_of", home_of)
    return machine


def tensor(x, dtype):
    """Make a tensor of a dtype by its name."""
    return torch.from_numpy(np.array(x, dtype="float64")).to(getattr(torch, dtype))
