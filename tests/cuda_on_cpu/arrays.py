"""Arrays of CuPy over host memory, and arrays with guard zones around them."""

import ctypes
import mmap

import numpy as np

GUARD = 256
"""Bytes watched on either side of an array."""

UNTOUCHED_BYTES = 1 << 27
"""Size of arrays that are not copied between guard zones: of zeros nobody has written."""


def untouched(shape, dtype):
    """Return zeros of any size, which take memory only where they are written to or read."""
    size = int(np.prod(shape, dtype="int64")) * np.dtype(dtype).itemsize
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return np.frombuffer(mmap.mmap(-1, size, flags=private), dtype).reshape(shape)


def host_array(x):
    """Return a real ``cupy.ndarray`` over the memory of a NumPy array; it needs no GPU."""
    import cupy

    x = np.ascontiguousarray(x)
    memory = cupy.cuda.UnownedMemory(x.ctypes.data, max(x.nbytes, 1), x, 0)
    return cupy.ndarray(x.shape, x.dtype, cupy.cuda.MemoryPointer(memory, 0))


def host_view(x):
    """Return the NumPy view of such an array; anything else as it is."""
    if type(x).__module__.split(".")[0] != "cupy":
        return x
    if x.size == 0:
        return np.empty(x.shape, x.dtype)
    bytes_ = (ctypes.c_char * x.nbytes).from_address(x.data.ptr)
    bytes_.owner = x  # the view keeps the memory alive
    flat = np.frombuffer(bytes_, np.uint8).view(x.dtype)
    return np.lib.stride_tricks.as_strided(flat, x.shape, x.strides)


class Guarded:
    """A copy of an argument between guard zones, at the alignment the argument has.

    Around inputs the zones are NaN, so that a value read from there spoils the result; around
    outputs a pattern, so that a change shows.
    """

    def __init__(self, x, writable):
        self.original = x
        self.writable = writable
        self.fill = 0xA5 if writable else 0xFF
        self.storage = np.full(x.nbytes + 3 * GUARD, self.fill, np.uint8)
        address = self.storage.ctypes.data + GUARD
        self.start = GUARD + -address % GUARD + (x.ctypes.data % 16 if x.nbytes else 0)
        self.end = self.start + x.nbytes
        self.storage[self.start : self.end] = x.reshape(-1).view(np.uint8)
        self.address = self.storage.ctypes.data + self.start

    def finish(self):
        """Take results over; return whether the zones are as they were."""
        if self.writable:
            flat = self.original.reshape(-1).view(np.uint8)
            flat[:] = self.storage[self.start : self.end]
        zones = (self.storage[: self.start], self.storage[self.end :])
        return all((zone == self.fill).all() for zone in zones)
