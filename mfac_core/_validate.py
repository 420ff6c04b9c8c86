"""Checks of arguments. Each error names the argument, what was expected, and what came."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mfac_core._arrays import (
    Array,
    array_namespace,
    device,
    is_array_api_obj,
    is_floating,
    is_jax_array,
    is_lazy,
    is_numpy_array,
    is_torch_array,
    is_untried,
    itemsize,
    library_name,
    to_numpy,
)

LARGEST_DAMPING = 1e100
"""Damping, and its inverse, beyond which its powers may leave float64."""

LARGEST_ASYMMETRY = 2.0**-18
"""Difference of [GGᵀ]ᵢⱼ and [GGᵀ]ⱼᵢ beside ‖gᵢ‖‖gⱼ‖ that float32 products may cause."""


class NonFiniteError(ValueError):
    """A gradient holds a NaN or an infinity; raised before anything has changed."""


def array_argument(x: Any, name: str) -> Array:
    """Return ``x`` when it is a real floating array, without its subclass or autograd history."""
    if not is_array_api_obj(x) or isinstance(x, type):
        msg = (
            f"{name} must be an array of NumPy, CuPy, PyTorch, JAX or another array-API library, "
            f"got {type(x).__name__}; convert it first, for example with numpy.asarray"
        )
        raise TypeError(msg)
    if is_lazy(x):
        msg = (
            f"{name} must hold its values in memory, got {type(x).__module__}.{type(x).__name__}; "
            "compute it first, or make it dense, as an array of NumPy, PyTorch or JAX (a single "
            "Dask array of gradients is read in slices, beside NumPy vectors)"
        )
        raise TypeError(msg)
    if is_untried(x):
        msg = (
            f"{name} must be of a library that this package is tested with, got "
            f"{type(x).__module__}.{type(x).__name__}; convert it to NumPy, PyTorch, JAX or CuPy"
        )
        raise TypeError(msg)
    if isinstance(x, np.ma.MaskedArray):
        msg = f"{name} must be a plain array, got a masked array; fill it first with .filled()"
        raise TypeError(msg)
    if is_numpy_array(x) or isinstance(x, np.generic):
        x = np.asarray(x)
        if not x.dtype.isnative:
            x = x.astype(x.dtype.newbyteorder("="))
    if is_torch_array(x) and (x.layout != sys.modules["torch"].strided or x.is_meta):
        msg = f"{name} must be a dense tensor with values, got {x.layout} on device {x.device}"
        raise TypeError(msg)
    if not is_floating(x):
        msg = (
            f"{name} must be real floating point, got dtype {x.dtype}; convert it first, "
            "for example to float32"
        )
        raise TypeError(msg)
    return x.detach() if is_torch_array(x) else x


def function_argument(value: Any, name: str, of: str) -> None:
    """Check what is to be called."""
    if not callable(value):
        msg = f"{name} must be a function of {of}, got {value!r}"
        raise TypeError(msg)


def reduce_argument(value: Any) -> None:
    """Check a sum over ranks, which may be None."""
    if value is not None:
        function_argument(value, "reduce", "a small NumPy array that returns its sum over ranks")


def iterable_argument(value: Any, name: str, of: str) -> None:
    """Check what is to be gone through."""
    if not isinstance(value, Iterable):
        msg = f"{name} must be an iterable of {of}, got {value!r}"
        raise TypeError(msg)


def generator(rng: Any) -> np.random.Generator:
    """Return a source of randomness, from a seed or as it is."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError):
        msg = f"rng must be a numpy.random.Generator, or a seed of at least 0, got {rng!r}"
        raise TypeError(msg) from None


def gradients_argument(gradients: Any, name: str = "gradients") -> Array:
    """Check an (m, d) array of gradients; finiteness is checked where they are first read."""
    g = array_argument(gradients, name)
    gradients_shape(g.shape, name)
    return g


def gradients_shape(shape: tuple[int, ...], name: str) -> None:
    """Check that a shape is (m, d), with something in it."""
    if len(shape) != 2:
        msg = (
            f"{name} must have shape (m, d), one gradient per row, got shape {tuple(shape)}; "
            "for a single gradient g pass g[None, :]"
        )
        raise ValueError(msg)
    if shape[0] < 1 or shape[1] < 1:
        msg = f"{name} must have at least one row and one column, got shape {tuple(shape)}"
        raise ValueError(msg)


def sliceable_argument(source: Any) -> None:
    """Check gradients that are not an array but can be read by slices."""
    gradients_shape(tuple(source.shape), "gradients")
    try:
        is_real = np.dtype(source.dtype) in (np.float16, np.float32, np.float64)
    except TypeError:
        is_real = False
    if not is_real:
        msg = f"gradients must be of dtype float16, float32 or float64, got {source.dtype}"
        raise TypeError(msg)


def gram_argument(gram: Any, m: int, name: str = "gram") -> Array:
    """Check a finite (m, m) matrix that is symmetric but for rounding."""
    gram = array_argument(gram, name)
    values = to_numpy(gram).astype(np.float64, copy=False)
    if values.shape != (m, m) or not np.all(np.isfinite(values)):
        msg = f"{name} must be a finite matrix of shape {(m, m)}, got shape {values.shape}"
        raise ValueError(msg)
    lengths = np.sqrt(np.abs(np.diagonal(values)))
    largest = LARGEST_ASYMMETRY if itemsize(gram.dtype) > 2 else 2.0**-6
    apart = np.abs(values - values.T) > largest * lengths[:, None] * lengths
    if np.any(apart):
        i, j = (int(k) for k in np.argwhere(apart)[0])
        msg = (
            f"{name} must be symmetric, got {values[i, j]:g} at ({i}, {j}) and {values[j, i]:g} at "
            f"({j}, {i}); for a triangle T pass T + T.T - diag(diag(T))"
        )
        raise ValueError(msg)
    return gram


def nonfinite_message(rows: list[int], m: int) -> str:
    """Say which of m gradients hold a NaN or an infinity, or that none does but its square."""
    if not rows:
        return "gradients are too large: their squared norms overflow float64; scale them down"
    which = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
    return (
        f"gradients must be finite, got NaN or infinity in {len(rows)} of {m} rows, "
        f"at index {which}; drop those rows"
    )


def beside(x: Array, name: str, like: Array) -> None:
    """Refuse an array of another library or device than the gradients ``like``."""
    if array_namespace(x) is not array_namespace(like):
        msg = (
            f"{name} must be an array of the gradients' library {library_name(like)}, "
            f"got one of {library_name(x)}; convert one of them"
        )
        raise TypeError(msg)
    if is_jax_array(x):  # JAX checks placement itself, and knows shardings
        return
    if device(x) != device(like):
        msg = (
            f"{name} must be on the gradients' device {device(like)}, got {device(x)}; "
            "move one of them"
        )
        raise ValueError(msg)


def vector_argument(x: Any, name: str, length: int, *, ndim: tuple[int, ...] = (1,)) -> Array:
    """Check a vector (d,) or, where ``ndim`` allows 2, a matrix (d, k) of columns."""
    x = array_argument(x, name)
    if x.ndim not in ndim or x.shape[0] != length:
        shapes = {1: f"({length},)", 2: f"({length}, k)"}
        expected = " or ".join(shapes[n] for n in ndim)
        msg = f"{name} must have shape {expected}, got {tuple(x.shape)}"
        raise ValueError(msg)
    return x


def _float(value: Any, expected: str) -> float:
    try:
        if not isinstance(value, (bool, str)):
            return float(value)
    except (TypeError, ValueError):
        pass
    msg = f"{expected}, got {value!r}"
    raise TypeError(msg)


def positive_number(value: Any, name: str) -> float:
    """Return ``value`` as a finite float above zero."""
    number = _float(value, f"{name} must be a positive number")
    if not 0.0 < number < math.inf:
        msg = f"{name} must be finite and positive, got {number!r}"
        raise ValueError(msg)
    return number


def damping(value: Any) -> float:
    """Return λ as a float whose products and quotients stay within float64."""
    number = positive_number(value, "damping")
    if not 1.0 / LARGEST_DAMPING <= number <= LARGEST_DAMPING:
        msg = (
            f"damping must lie between {1.0 / LARGEST_DAMPING:g} and {LARGEST_DAMPING:g}, "
            f"got {number!r}; scale the gradients, and it by the square of that"
        )
        raise ValueError(msg)
    return number


def damping_or_auto(value: Any) -> float | None:
    """Return λ, or None for "auto"."""
    return None if isinstance(value, str) and value == "auto" else damping(value)


def finite_number(value: Any, name: str) -> float:
    """Return ``value`` as a finite float."""
    number = _float(value, f"{name} must be a number")
    if not math.isfinite(number):
        msg = f"{name} must be finite, got {number!r}"
        raise ValueError(msg)
    return number


def integer(value: Any, name: str, *, minimum: int) -> int:
    """Return ``value`` as an int of at least ``minimum``."""
    try:
        number = operator.index(value)
    except TypeError:
        msg = f"{name} must be an integer, got {value!r}"
        raise TypeError(msg) from None
    if isinstance(value, bool) or number < minimum:
        msg = f"{name} must be an integer of at least {minimum}, got {value!r}"
        raise ValueError(msg)
    return number


def index(value: Any, name: str, length: int) -> int:
    """Return a position in ``range(length)``; negative values count from the end."""
    try:
        position = operator.index(value)
    except TypeError:
        msg = f"{name} must be an integer, got {value!r}"
        raise TypeError(msg) from None
    if not -length <= position < length:
        held = f"0 to {length - 1}" if length else "nothing: it is empty"
        msg = f"{name} {position} is out of range; the window holds {held}"
        raise IndexError(msg)
    return position % length


def finite_norm(norm2: float, dtype: Any, *, late: bool = False) -> None:
    """Refuse a gradient of this squared norm; ``late`` for one of the call before."""
    if np.isfinite(norm2):
        return
    msg = (
        f"g must be finite in the window's dtype {dtype}, with a squared norm within float64, "
        "got a NaN, an infinity or an overflow; skip or scale this gradient"
    )
    if late:
        msg = f"the append_matvec before, with check_finite=False: {msg}, and repeat this call"
    raise NonFiniteError(msg)


def indices(
    value: Any, name: str, length: int, *, ndim: tuple[int, ...] | None = None
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return positions in ``range(length)`` as NumPy; negative values count from the end."""
    array = to_numpy(value) if is_array_api_obj(value) else np.asarray(value)
    if array.size == 0 and not is_array_api_obj(value):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        msg = f"{name} must be integers, got dtype {array.dtype}"
        raise TypeError(msg)
    if ndim is not None and array.ndim not in ndim:
        msg = f"{name} must have {ndim[0]} dimensions, got shape {array.shape}"
        raise ValueError(msg)
    outside = (array < -length) | (array >= length)
    if outside.any():
        msg = f"{name} {int(array[outside].flat[0])} is out of range for {length} parameters"
        raise IndexError(msg)
    return np.where(array < 0, array + length, array).astype(np.int64)


def block_sizes(block_size: Any, d: int) -> tuple[int, ...]:
    """Return the lengths of blocks, from one length or from all of them."""
    if isinstance(block_size, Sequence) or getattr(block_size, "ndim", 0) == 1:
        lengths = [
            integer(length, f"block_size[{i}]", minimum=1) for i, length in enumerate(block_size)
        ]
        if sum(lengths) != d:
            msg = f"block_size must sum to the number of parameters {d}, got {sum(lengths)}"
            raise ValueError(msg)
        return tuple(lengths)
    size = integer(block_size, "block_size", minimum=1)
    return tuple(min(size, d - start) for start in range(0, d, size))


def block_sizes_by_layer(
    block_size: Any, lengths: Sequence[int]
) -> list[tuple[int, ...]] | list[None]:
    """Return the lengths of blocks within each layer; None for each where there are none."""
    if block_size is None:
        return [None] * len(lengths)
    if not isinstance(block_size, Sequence) and getattr(block_size, "ndim", 0) != 1:
        return [block_sizes(block_size, length) for length in lengths]
    sizes = block_sizes(block_size, sum(lengths))
    stops, ends = np.cumsum(sizes), np.cumsum(lengths)
    if not np.all(np.isin(ends, stops)):
        end = int(ends[~np.isin(ends, stops)][0])
        msg = f"block_size must have no block across two layers, got one across column {end}"
        raise ValueError(msg)
    cuts = [0, *(np.searchsorted(stops, ends) + 1)]
    return [sizes[first:last] for first, last in pairwise(cuts)]


def layer_shapes(layers: Sequence[Any], d: int) -> list[tuple[int, ...]]:
    """Return the shapes of layers that sum to d weights; (length,) where only that is given."""
    iterable_argument(layers, "layers", "lengths or shapes")
    shapes = []
    for i, given in enumerate(layers):
        numbers = given if isinstance(given, Sequence) else [given]
        shapes.append(tuple(integer(n, f"layers[{i}]", minimum=1) for n in numbers))
    total = sum(math.prod(shape) for shape in shapes)
    if total != d:
        msg = f"layers must sum to the number of weights {d}, got {total}"
        raise ValueError(msg)
    return shapes
