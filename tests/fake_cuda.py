"""A CUDA runtime of two devices in host memory, in which nothing runs before somebody waits.

It stands behind CuPy's module: streams are queues, kernels run on the host executor when their
stream is waited for, and then only what was queued there. Whoever launches on another stream, or
looks too early, finds what was in memory before. Arrays are CuPy's own, over host memory, and come
through CuPy's own DLPack; PyTorch's are tensors that say they are on a CUDA device.
"""

import ctypes
import itertools
import types
import warnings

import cupy
import cupyx
import numpy as np
import torch
from cuda_on_cpu import Module, host_view

DEVICES = 2
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.restype = ctypes.c_void_p
_pointer_of.argtypes = [ctypes.py_object, ctypes.c_char_p]


class Misuse(AssertionError):
    """What a device or a library would refuse, or get wrong."""


def on_device(x, device=0):
    """CuPy's array over a copy of NumPy's, as if on a device."""
    x = np.array(x, order="C")
    memory = cupy.cuda.UnownedMemory(x.ctypes.data, max(x.nbytes, 1), x, device)
    return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0))


def cuda_capsule(x, device):
    """A DLPack capsule of a tensor on the host that says it is on a device."""
    capsule = x.__dlpack__()
    where = (ctypes.c_int32 * 2).from_address(_pointer_of(capsule, b"dltensor") + 8)
    where[:] = (2, device)  # kDLCUDA
    return capsule


class Stream:
    """A queue of work; entered, the current stream of the current device."""

    numbers = itertools.count(4096)

    def __init__(self, runtime, device, pointer=None):
        self.runtime, self.device = runtime, device
        self.ptr = next(self.numbers) if pointer is None else pointer
        self.queue, self.capturing = [], False

    def __enter__(self):
        if self.device != self.runtime.device:
            raise Misuse("the stream is of another device than the current one")
        self.runtime.current[self.device].append(self)

    def __exit__(self, *_):
        self.runtime.current[self.device].pop()

    @property
    def cuda_stream(self):  # as PyTorch calls it
        return self.ptr

    def is_capturing(self):
        return self.capturing

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()


class Runtime:
    """Two devices, the current one, and the current streams of each and of PyTorch."""

    def __init__(self):
        self.device = 0
        self.default_pointer = 1  # 2: CuPy's per-thread default stream
        self.null = [Stream(self, i, pointer=0) for i in range(DEVICES)]
        self.current = [[stream] for stream in self.null]
        self.torch_current = list(self.null)
        self.streams = []
        self.waits = 0
        self.ratios = [2, 32]  # of float32's rate to float64's: one of a data centre, and another

    def stream(self, device):
        self.streams.append(Stream(self, device))
        return self.streams[-1]

    def here(self):
        return self.current[self.device][-1]

    def by_pointer(self, pointer):
        known = [*self.streams, self.null[self.device]]
        return next(stream for stream in known if stream.ptr == pointer)

    def enqueue(self, work):
        self.here().queue.append(work)


class Event:
    def __init__(self, runtime):
        self.runtime, self.stream, self.done = runtime, None, True

    def record(self):
        self.stream, self.done = self.runtime.here(), False
        self.runtime.enqueue(lambda: setattr(self, "done", True))

    def synchronize(self):
        self.runtime.waits += 1
        while not self.done:
            self.stream.queue.pop(0)()


class Kernel:
    """A kernel of the host executor, of the device it was first launched on."""

    def __init__(self, runtime, kernel):
        self.runtime, self.kernel, self.device = runtime, kernel, None
        self.max_dynamic_shared_size_bytes = kernel.max_dynamic_shared_size_bytes

    def __call__(self, grid, block, arguments, *, shared_mem=0):
        if self.device is None:
            self.device = self.runtime.device
        if self.device != self.runtime.device:
            raise Misuse("the kernel was loaded on another device")
        for x in arguments:
            if isinstance(x, cupy.ndarray) and x.data.device_id != self.runtime.device:
                raise Misuse("an array is on another device")
        self.kernel.max_dynamic_shared_size_bytes = self.max_dynamic_shared_size_bytes
        self.runtime.enqueue(lambda: self.kernel(grid, block, arguments, shared_mem=shared_mem))


def fake_cupy(runtime):
    """What of CuPy's module needs a driver, on the fake runtime."""

    class RawModule:
        def __init__(self, code, options):
            self.module = Module(code, options, "check")

        def compile(self):
            pass

        def get_function(self, name):
            return Kernel(runtime, self.module.get_function(name))

    class Device:
        attributes = types.MappingProxyType({"MaxSharedMemoryPerBlockOptin": 99 * 1024})

        def __init__(self, number=None):
            self.number = number

        def __enter__(self):
            self.before, runtime.device = runtime.device, self.number

        def __exit__(self, *_):
            runtime.device = self.before

    def deprecated(pointer):
        warnings.warn("ExternalStream is deprecated", DeprecationWarning, stacklevel=2)
        return runtime.by_pointer(pointer)

    def from_dlpack(x):
        if hasattr(x, "__dlpack_device__"):  # as CuPy does, on the stream it calls its own
            x = x.__dlpack__(stream=runtime.here().ptr or runtime.default_pointer)
        return cupy.from_dlpack(x)

    def empty(shape, dtype):
        return on_device(np.full(np.prod(shape), -1.0).astype(dtype).reshape(shape), runtime.device)

    def ascontiguousarray(x):
        result = empty(x.shape, x.dtype)
        runtime.enqueue(lambda: np.copyto(host_view(result), host_view(x)))
        return result

    cuda = types.SimpleNamespace(
        Device=Device,
        Event=lambda **_: Event(runtime),
        ExternalStream=deprecated,
        Stream=types.SimpleNamespace(
            from_external=lambda x: runtime.by_pointer(x.__cuda_stream__()[1]),
            null=runtime.null[0],
        ),
        get_current_stream=runtime.here,
        runtime=types.SimpleNamespace(
            getDevice=lambda: runtime.device,
            cudaDevAttrSingleToDoublePrecisionPerfRatio=87,
            deviceGetAttribute=lambda which, device: {87: runtime.ratios[device]}[which],
        ),
    )
    return types.SimpleNamespace(
        RawModule=RawModule,
        asarray=lambda x, order: on_device(x, runtime.device),
        ascontiguousarray=ascontiguousarray,
        cuda=cuda,
        empty=empty,
        from_dlpack=from_dlpack,
    )


def tensors(runtime):
    """Classes of PyTorch's tensors that say they are on the devices."""

    def of_device(number):
        class OnDevice(torch.Tensor):
            is_cuda = True
            device = torch.device("cuda", number)

            def __dlpack_device__(self):
                return 2, number

            def __dlpack__(self, *, stream=-1):
                if number != runtime.device:
                    raise BufferError("Can't export tensors on a different CUDA device index")
                if stream == 2:
                    raise BufferError("per-thread default stream is not supported.")
                if self.dtype == torch.bfloat16:
                    raise NotImplementedError("CuPy did not always know bfloat16")
                return cuda_capsule(self.as_subclass(torch.Tensor), number)

        return OnDevice

    return [of_device(number) for number in range(DEVICES)]


def install(monkeypatch):
    """Put the runtime behind CuPy and PyTorch; return it, CuPy's module and the tensor classes."""
    runtime = Runtime()
    classes, plain_empty = tensors(runtime), torch.empty

    def empty(shape, *, dtype, device):
        bits = plain_empty(shape, dtype=dtype).fill_(-1)
        return bits.as_subclass(classes[device.index])

    def get(self, *, out, blocking):
        assert not blocking
        runtime.enqueue(lambda: np.copyto(out, host_view(self)))
        return out

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: runtime.torch_current[d.index])
    monkeypatch.setattr(cupy.ndarray, "get", get)
    monkeypatch.setattr(cupyx, "empty_pinned", lambda shape, dtype: np.full(shape, -1, dtype))
    return runtime, fake_cupy(runtime), classes
