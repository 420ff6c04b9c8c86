"""What differs between array libraries: detection, devices, and moving small arrays to float64.

The m-sized half of every algorithm runs in float64 in a *home*: in the gradients' own library and
on their device, and in NumPy where these have no float64, as JAX by default. PyTorch's and NumPy's
threads go on spinning for a while after a product and take the cores from one another's: so what
comes from PyTorch stays there on the host, too. Nothing here imports an array library other than
NumPy.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_array_api_obj,
    is_cupy_array,
    is_dask_array,
    is_jax_array,
    is_ndonnx_array,
    is_numpy_array,
    is_pydata_sparse_array,
    is_torch_array,
    to_device,
)

Array: TypeAlias = Any
"""An array of any library that follows the Python array API standard."""

__all__ = [
    "Array",
    "Home",
    "array_namespace",
    "device",
    "has_float64",
    "home_of",
    "is_array_api_obj",
    "is_cupy_array",
    "is_dask_array",
    "is_floating",
    "is_jax_array",
    "is_lazy",
    "is_numpy_array",
    "is_torch_array",
    "is_traced",
    "is_untried",
    "itemsize",
    "library_name",
    "promote",
    "send",
    "to_device",
    "to_numpy",
    "widen",
]


def is_traced(*arrays: Array) -> bool:
    """Whether any array is a JAX tracer, that is, a value inside ``jit``, ``vmap`` or ``grad``."""
    jax = sys.modules.get("jax")
    return jax is not None and any(isinstance(a, jax.core.Tracer) for a in arrays)


def is_lazy(x: Array) -> bool:
    """Whether an array holds no values yet, or not all of them: Dask, ndonnx, pydata/sparse."""
    return is_dask_array(x) or is_ndonnx_array(x) or is_pydata_sparse_array(x)


def is_untried(x: Array) -> bool:
    """Whether an array is of a library of array-api-compat's that nobody has tried this with."""
    return array_namespace(x).__name__.partition(".")[0] in ("dpnp", "mparray")


def library_name(x: Array) -> str:
    """Return what people call an array's library: PyTorch, not array_api_compat.torch."""
    name = array_namespace(x).__name__.removeprefix("array_api_compat.").partition(".")[0]
    return {"numpy": "NumPy", "cupy": "CuPy", "torch": "PyTorch", "jax": "JAX"}.get(name, name)


def is_floating(x: Array) -> bool:
    """Whether the dtype is real floating, the 16-bit extensions of a library included."""
    xp = array_namespace(x)
    if is_jax_array(x):  # isdtype knows bfloat16 only through JAX's own lattice
        return bool(xp.issubdtype(x.dtype, xp.floating))
    if is_numpy_array(x):  # the standard leaves float16 out, longdouble too
        return x.dtype in (np.float16, np.float32, np.float64)
    if is_cupy_array(x) and x.dtype.name == "bfloat16":  # of ml_dtypes, which isdtype refuses
        return True
    return bool(xp.isdtype(x.dtype, "real floating"))


def itemsize(dtype: Any) -> int:
    """Bytes of one element of a floating dtype."""
    size = getattr(dtype, "itemsize", None)
    if size is None:  # array-api-strict wraps NumPy's dtype
        size = np.dtype(str(dtype).rsplit(".", 1)[-1]).itemsize
    return int(size)


def has_float64(x: Array) -> bool:
    """Whether float64 arrays can live beside ``x``."""
    if is_jax_array(x):
        return bool(sys.modules["jax"].config.jax_enable_x64)
    if is_torch_array(x):
        return bool(x.device.type != "mps")
    return True


def widen(x: Array) -> Array:
    """Return ``x`` as float64, in NumPy where its library has none."""
    if not has_float64(x):
        return to_numpy(x).astype(np.float64)
    xp = array_namespace(x)
    return xp.astype(x, xp.float64, copy=False)


def promote(x: Array, dtype: Any) -> Any:
    """Return the dtype of results that mix ``x`` with arrays of ``dtype``."""
    if x.dtype == dtype:
        return dtype
    xp = array_namespace(x)
    if is_torch_array(x):
        return sys.modules["torch"].promote_types(x.dtype, dtype)
    return xp.result_type(x.dtype, dtype)


def to_numpy(x: Array) -> np.ndarray[Any, Any]:
    """View (or, off the host, copy) an array as NumPy, widening dtypes NumPy does not have."""
    if is_torch_array(x):
        x = x.detach()
        if x.dtype == sys.modules["torch"].bfloat16:
            x = x.float()
        return x.cpu().numpy()  # type: ignore[no-any-return]
    if is_cupy_array(x):
        return x.get()  # type: ignore[no-any-return]
    if is_numpy_array(x) or is_jax_array(x):
        return np.asarray(x)
    return np.from_dlpack(x, device="cpu")


@dataclass(frozen=True)
class Home:
    """The namespace and device that hold the m-sized float64 arrays."""

    xp: Any
    device: Any

    is_numpy: bool = field(init=False)
    """Whether the m-sized arrays are NumPy's."""

    is_host: bool = field(init=False)
    """Whether to look at a number here costs no wait for a device."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_numpy", self.xp is np)
        object.__setattr__(self, "is_host", str(self.device).partition(":")[0] == "cpu")

    def receive(self, x: Array) -> Array:
        """Bring an array here as float64; it may share memory with ``x``."""
        if self.is_numpy:
            return np.asarray(to_numpy(x), dtype=np.float64)
        if is_numpy_array(x):
            return self.xp.asarray(x, dtype=self.xp.float64, device=self.device)
        x = self.xp.astype(x.detach() if is_torch_array(x) else x, self.xp.float64, copy=False)
        return x if device(x) == self.device else to_device(x, self.device)

    def zeros(self, shape: int | tuple[int, ...]) -> Array:
        """Return float64 zeros."""
        return self.xp.zeros(shape, dtype=self.xp.float64, device=self.device)

    def eye(self, n: int) -> Array:
        """Return the float64 identity of size n."""
        return self.xp.eye(n, dtype=self.xp.float64, device=self.device)

    def __reduce__(self) -> tuple[Any, ...]:
        # Modules are pickled by name only inside of what imports them.
        return _home_by_name, (self.xp.__name__, self.device)


def _home_by_name(name: str, device: Any) -> Home:
    return Home(importlib.import_module(name), device)


def home_of(x: Array) -> Home:
    """Choose the home for gradients like ``x``."""
    if is_numpy_array(x) or is_jax_array(x) or not has_float64(x):
        return Home(np, "cpu")
    return Home(array_namespace(x), device(x))


def send(c: Array, like: Array, dtype: Any) -> Array:
    """Bring a home array beside ``like``, in its library, on its device, as ``dtype``."""
    xp = array_namespace(like)
    if is_numpy_array(like):
        return np.asarray(c, dtype=dtype)
    if is_torch_array(like):
        torch = sys.modules["torch"]
        return torch.as_tensor(c).to(device=like.device, dtype=dtype)
    if is_jax_array(like):
        if not is_numpy_array(c):
            return xp.astype(c, dtype)
        # Narrow on the host: JAX would warn about float64. Gradients sharded over several
        # devices have no one device to send to; what is uncommitted goes with any of them.
        one = len(like.devices()) == 1
        return xp.asarray(c.astype(dtype), device=device(like) if one else None)
    if is_numpy_array(c):
        return xp.asarray(c, dtype=dtype, device=device(like))
    c = xp.astype(c, dtype, copy=False)
    return c if device(c) == device(like) else to_device(c, device(like))
