"""What the kernels ask of CuPy: compiled modules, arrays without copies, the caller's stream.

CuPy is looked for in ``sys.modules`` and imported only when an array on a CUDA device of another
library arrives. Tests put another machine in the place of :data:`current`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.resources
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mfac_core._arrays import (
    Array,
    is_cupy_array,
    is_jax_array,
    is_torch_array,
    is_traced,
)
from mfac_core._warn import warn

STORAGE = {
    "float32": "float",
    "float64": "double",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
}
"""The dtypes kernels read and write, and their names in CUDA."""


ALWAYS_SHARED = 48 * 1024
"""Bytes of shared memory a block of threads has on every device; more must be asked for."""


LITTLE_FLOAT64 = 16
"""Ratio of the two rates from which on sums in two float32 take less time than the memory does."""


def dtype_name(dtype: Any) -> str:
    """Return a dtype's name without its library: ``torch.float32`` is ``float32``."""
    return str(dtype).rsplit(".", 1)[-1]


@functools.cache
def source(name: str) -> str:
    """Return a kernel's source with the shared header inlined.

    CuPy's cache of compiled kernels knows the text it is given, not what that text includes.
    ``#line`` keeps the compiler's messages pointing at the real files.
    """
    kernels = importlib.resources.files("mfac_core._ops").joinpath("kernels")
    include = '#include "common.cuh"\n'
    before, after = kernels.joinpath(name).read_text(encoding="utf-8").split(include)
    header = kernels.joinpath("common.cuh").read_text(encoding="utf-8")
    return (
        f'#line 1 "{name}"\n{before}#line 1 "common.cuh"\n{header}'
        f'#line {before.count(chr(10)) + 2} "{name}"\n{after}'
    )


def options(macros: dict[str, Any]) -> tuple[str, ...]:
    """Return the compiler's options for a kernel with these macros."""
    given = [f"-D{key}={value}" for key, value in macros.items()]
    if "__half" in macros.values():
        given.append("-DUSE_FP16")
    if "__nv_bfloat16" in macros.values():
        given.append("-DUSE_BF16")
    return ("-std=c++17", *given)


class Machine:
    """CuPy and the device behind it."""

    def holds(self, x: Array) -> bool:
        """Whether ``x`` is in the memory of a CUDA device and CuPy is there to reach it."""
        if is_cupy_array(x):
            return True
        if is_torch_array(x):
            # What PyTorch calls CUDA may be ROCm.
            cuda = x.is_cuda and sys.modules["torch"].version.hip is None
            return cuda and self._cupy() is not None
        if is_jax_array(x) and not is_traced(x):
            first, *others = x.devices()
            cuda = first.platform == "gpu" and "cuda" in first.client.platform_version
            return cuda and not others and self._cupy() is not None
        return False

    @functools.cached_property
    def _imported(self) -> Any:
        with contextlib.suppress(ImportError):
            return importlib.import_module("cupy")
        return None

    def _cupy(self) -> Any:
        return sys.modules.get("cupy") or self._imported

    def device(self) -> int:
        """Return the number of the current device."""
        return int(self._cupy().cuda.runtime.getDevice())

    def shared_bytes(self) -> int:
        """Return the most shared memory a block of threads can ask for."""
        attributes = self._cupy().cuda.Device().attributes
        return int(attributes["MaxSharedMemoryPerBlockOptin"])

    def has_little_float64(self) -> bool:
        """Whether the current device multiplies float64 many times more slowly than float32.

        NVIDIA's cards for data centres do half as many, all others a 32nd or less.
        """
        runtime = self._cupy().cuda.runtime
        ratio = runtime.cudaDevAttrSingleToDoublePrecisionPerfRatio
        return bool(runtime.deviceGetAttribute(ratio, runtime.getDevice()) >= LITTLE_FLOAT64)

    def module(self, code: str, given: tuple[str, ...]) -> Any:
        """Compile a source for the current device; CuPy keeps the result on disk."""
        return self._cupy().RawModule(code=code, options=given)

    def compiles(self, dtype: str, x: Array) -> bool:
        """Whether a kernel of this dtype can be compiled here, for the device of ``x``.

        That takes NVRTC and, for the 16-bit types, CUDA's headers. Where they are missing, a
        warning says once what to install.
        """
        if dtype not in self._compiled:
            macros = {"X_T": STORAGE[dtype], "OUT_T": STORAGE[dtype]}
            try:
                with self.at(x):
                    self.module(source("sum.cu"), options(macros)).compile()
                self._compiled[dtype] = True
            except Exception as error:  # of NVRTC, of the loader, of the file system
                self._compiled[dtype] = False
                reason = f"{type(error).__name__}: {str(error).strip()[-500:]}"
                warn(
                    f"CUDA kernels for {dtype} cannot be compiled, and the array library's own "
                    "products take their place; install CuPy with what its compiler needs: "
                    "python -m pip install 'cupy-cuda12x[ctk]' or 'cupy-cuda13x[ctk]', whichever "
                    f"fits your driver. {reason}",
                    RuntimeWarning,
                )
        return self._compiled[dtype]

    @functools.cached_property
    def _compiled(self) -> dict[str, bool]:
        return {}

    def borrow(self, x: Array) -> Any:
        """View an array on the device as CuPy's, by DLPack, without a copy; only inside ``at``."""
        if is_cupy_array(x):
            return x
        if is_torch_array(x):
            if dtype_name(x.dtype) == "bfloat16":  # kernels read only its bits
                x = x.view(sys.modules["torch"].int16)
            # The stream is PyTorch's own: nothing to wait for. (PyTorch refuses the per-thread
            # default stream, which CuPy's from_dlpack may name for the null stream.)
            return self._cupy().from_dlpack(x.__dlpack__(stream=-1))
        # CuPy's stream waits for JAX's; DLPack writes 1 for the null stream.
        stream = self._cupy().cuda.get_current_stream().ptr or 1
        lent = self._cupy().from_dlpack(x.__dlpack__(stream=stream))
        self._loans.taken.append(lent)
        return lent

    @functools.cached_property
    def _loans(self) -> _Loans:
        return _Loans()

    def contiguous(self, x: Array) -> Array:
        """Return an array on the device C-contiguous, copied only where it is not."""
        if is_torch_array(x):
            return x.contiguous()
        return self._cupy().ascontiguousarray(x) if is_cupy_array(x) else x

    def receive(self, x: Array) -> Any:
        """View an array as CuPy's, C-contiguous: copied only where it is not, or is NumPy's."""
        if self.holds(x):
            return self.borrow(self.contiguous(x))
        return self._cupy().asarray(x, order="C")

    def empty(self, shape: tuple[int, ...], dtype: str, like: Array) -> Array:
        """Return an array for results, of the caller's library, or of CuPy where it cannot be.

        JAX's arrays are not to be written to.
        """
        if is_torch_array(like):
            torch = sys.modules["torch"]
            return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
        if dtype == "bfloat16":
            return self._cupy().empty(shape, importlib.import_module("ml_dtypes").bfloat16)
        return self._cupy().empty(shape, dtype)

    def give_back(self, x: Array, like: Array) -> Array:
        """Return a result in the caller's library."""
        if is_jax_array(like):
            return sys.modules["jax"].numpy.from_dlpack(x)
        return x

    def later(self, x: Array) -> Callable[[], Any]:
        """Start copying a small array to the host; calling what is returned waits for it.

        It waits for what was launched before this call, not for what was launched since.
        """
        import cupyx

        with self.at(x):
            self.refuse_capture()
            there = cupyx.empty_pinned(x.shape, dtype_name(x.dtype))
            self.borrow(x).get(out=there, blocking=False)
            event = self._cupy().cuda.Event(block=True, disable_timing=True)
            event.record()

        def look() -> Any:
            event.synchronize()
            return there

        return look

    def refuse_capture(self) -> None:
        """Raise where the stream is being captured into a CUDA graph; only inside ``at``."""
        if self._cupy().cuda.get_current_stream().is_capturing():
            msg = (
                "a step of a window cannot be captured into a CUDA graph: the host looks at what "
                "the device found, and chooses where the next gradient goes; capture what comes "
                "before and after the step"
            )
            raise RuntimeError(msg)

    @contextlib.contextmanager
    def at(self, x: Array) -> Iterator[None]:
        """Launch on the device of ``x``, and on the stream its library is using there."""
        cuda = self._cupy().cuda
        if is_cupy_array(x):
            with cuda.Device(x.device.id):
                yield
        elif is_torch_array(x):
            theirs = sys.modules["torch"].cuda.current_stream(x.device)
            with (
                cuda.Device(x.device.index),
                cuda.Stream.from_external(_Lent(theirs.cuda_stream)),
            ):
                yield
        else:  # JAX orders its own streams with CuPy's where arrays change hands
            with (
                cuda.Device(next(iter(x.devices())).local_hardware_id),
                self._loans.until_read(cuda),
            ):
                yield


class _Lent:
    """A stream of another library, by CUDA's stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class _Loans(threading.local):
    """Buffers of JAX, each held until the kernels that read it have run.

    JAX frees a buffer for its own stream as soon as nobody holds it, and does not know of CuPy's.
    """

    def __init__(self) -> None:
        self.taken: list[Any] = []
        self._being_read: list[tuple[Any, list[Any]]] = []

    @contextlib.contextmanager
    def until_read(self, cuda: Any) -> Iterator[None]:
        """Hold what is taken inside until the current stream has come to where this ends."""
        self._being_read = [loan for loan in self._being_read if not loan[0].done]
        outer, self.taken = self.taken, []
        try:
            yield
        finally:
            taken, self.taken = self.taken, outer
            if taken:
                event = cuda.Event(disable_timing=True)
                event.record()
                self._being_read.append((event, taken))


current = Machine()


@functools.cache
def kernel(
    where: Machine, device: int, file: str, name: str, macros: tuple[tuple[str, Any], ...]
) -> Any:
    """Return a kernel, compiled when it is first asked for on a device."""
    return where.module(source(file), options(dict(macros))).get_function(name)


def launch(
    file: str,
    name: str,
    macros: dict[str, Any],
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
    shared_bytes: int = 0,
) -> None:
    """Launch a kernel on what ``Machine.at`` has chosen.

    CuPy checks nothing: arrays must be contiguous and of the types the macros name, and numbers
    NumPy scalars of the width the kernel declares.
    """
    found = kernel(current, current.device(), file, name, tuple(macros.items()))
    if shared_bytes > ALWAYS_SHARED:
        found.max_dynamic_shared_size_bytes = shared_bytes
    found(grid, block, arguments, shared_mem=shared_bytes)
