"""The d-sized half: the gradients, and what is ever asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import array_api_extra as xpx
import numpy as np

from mfac_core._arrays import Array, Home, array_namespace, device, home_of, is_jax_array, itemsize
from mfac_core._ops import rows as ops

FLOAT32_ROUNDING = 2.0**-21
"""Error of a product of two rows in float32, summed as in ``_ops``, relative to their norms.

Seen on nearly parallel rows, where the rounding errors of the sum are most of one sign; on random
rows it is twenty times less.
"""

FLOAT32_UNDERFLOW = 2.0**-126
"""Error of a product of two numbers whose square is too small for float32."""


class Rows:
    """Gradients as the rows of one array G, shape (m, d).

    Four acts suffice for both algorithms: ``gram`` GGᵀ, ``project`` GX, ``combine`` GᵀC and
    ``write``; plus columns, block by block. What is m-sized comes and goes as float64 in the
    ``home``. With ``exact`` set, products of narrower dtypes run in float64.
    """

    def __init__(self, array: Array, used: int | None = None) -> None:
        self.array = array
        self.used: int = array.shape[0] if used is None else used  # the leading rows in use
        self.home: Home = home_of(array)
        self.exact = False

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d) of the rows in use."""
        return self.used, int(self.array.shape[1])

    @property
    def xp(self) -> Any:
        """The array namespace of the gradients."""
        return array_namespace(self.array)

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self.array.dtype

    @property
    def device(self) -> Any:
        """The device of the gradients."""
        return device(self.array)

    @property
    def rounding(self) -> float:
        """Relative rounding error of the products: 0 once they are exact in float64."""
        return 0.0 if self.exact or itemsize(self.dtype) == 8 else FLOAT32_ROUNDING

    def gram(self) -> Array:
        """G Gᵀ, float64 (m, m)."""
        gram = ops.gram(self._in_use, exact=self.exact, home=self.home)
        return gram[: self.used, : self.used]

    def project(self, x: Array) -> Array:
        """G x, float64 (m,) or (m, k); in float64 products when x is float64."""
        exact = self.exact or itemsize(x.dtype) == 8
        return ops.project(self._in_use, x, exact=exact, home=self.home)[: self.used, ...]

    def combine(
        self,
        c: Array,
        base: Array | None,
        alpha: float,
        *,
        dtype: Any,
        exact: bool | None = None,
    ) -> Array:
        """alpha·base + Gᵀc in the gradients' library as ``dtype``, (d,) or (d, k)."""
        exact = (self.exact if exact is None else exact) or itemsize(dtype) == 8
        return self._combine(c, base, alpha, dtype, exact)

    def combine_wide(self, c: Array, base: Array | None, alpha: float) -> Array:
        """alpha·base + Gᵀc as float64, in NumPy where the gradients' library lacks it."""
        return self._combine(c, base, alpha, None, True)

    def _combine(
        self, c: Array, base: Array | None, alpha: float, dtype: Any, exact: bool
    ) -> Array:
        rows = self._in_use
        if unused := rows.shape[0] - self.used:
            c = xpx.pad(c, [(0, unused), *[(0, 0)] * (c.ndim - 1)], xp=self.home.xp)
        return ops.combine(rows, c, base, alpha, dtype=dtype, exact=exact)

    @property
    def _in_use(self) -> Array:
        """The rows in use, and the empty ones too where taking a part would be a copy."""
        if self.used == self.array.shape[0] or is_jax_array(self.array):
            return self.array
        return self.array[: self.used, :]

    def write(self, i: int, row: Array) -> None:
        """Set row i, and use it from now on."""
        self.used = max(self.used, i + 1)
        self.array = ops.write(self.array, i, row)

    def exchange(self, i: int, row: Array, norm2: float) -> Array:
        """Set row i to a finite row of square norm ``norm2`` and return the Gram's row of it."""
        if self.exchanges(row):
            return self.exchange_unseen(i, row)[0]
        with np.errstate(over="ignore", invalid="ignore"):
            products = self.project(row)
        if not bool(self.home.xp.all(self.home.xp.isfinite(products))):
            self.exact = True  # finite rows whose products overflow float32
            products = self.project(row)
        used = self.used
        self.write(i, row)
        of_gram = self.home.zeros(self.used)
        of_gram[:used] = products
        of_gram[i] = norm2
        return of_gram

    def exchanges(self, row: Array) -> bool:
        """Whether :meth:`exchange_unseen` takes a row."""
        return not self.home.is_numpy and ops.exchanges(self.array, row)

    def exchange_unseen(self, i: int, row: Array) -> tuple[Array, Array]:
        """Do as :meth:`exchange` on a device, without waiting; also return ‖row‖², shape (1,).

        Where that is not finite, the row that was there stays, and is exchanged for itself.
        """
        self.used = max(self.used, i + 1)
        return ops.exchange(self._in_use, i, row, self.home)

    def wide_blocks(self) -> Iterator[tuple[slice, Array]]:
        """Yield the columns of G block by block as float64 in the home."""
        for columns, block in ops.wide_blocks(self._in_use, self.home):
            yield columns, block[: self.used, :]

    def nonfinite(self) -> list[int]:
        """Return the indices of rows that hold a NaN or an infinity."""
        xp = self.xp
        m = self.shape[0]
        return [i for i in range(m) if not bool(xp.all(xp.isfinite(self.array[i, :])))]
