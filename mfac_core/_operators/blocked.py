"""Block-diagonal operators: blocks of parameters that are taken to be independent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Self, overload

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, device, to_numpy
from mfac_core._operators.base import Indices, SymmetricOperator
from mfac_core._operators.damping import damping_of
from mfac_core._operators.dual_blocks import dual_blocks
from mfac_core._operators.online import BlockFisher
from mfac_core._operators.primal import inverse_primal
from mfac_core._operators.spectra import Blocks
from mfac_core._operators.static import InverseFisher
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.plan import WIDE_BYTES, batches
from mfac_core._rows.protocol import AnyGradients, Gradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import ArrayT, BlockSize, Damping, GivenT, NDArray, Sliceable, Stored


class BlockDiagonal(SymmetricOperator[ArrayT]):
    """The direct sum of operators: each acts on its own stretch of the parameters.

    Parameters
    ----------
    stretches : sequence of operators
        Of one array library and dtype, in the order of the parameters.
    reduce : callable, optional
        Sum over ranks, where the stretches are this rank's.
    """

    def __init__(
        self, stretches: Sequence[SymmetricOperator[ArrayT]], reduce: Reduce | None = None
    ) -> None:
        self._stretches = list(stretches)
        self._reduce = reduce
        self._stops = np.cumsum([stretch.shape[0] for stretch in self._stretches])

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (int(self._stops[-1]),) * 2

    @property
    def dtype(self) -> Any:
        """The dtype of the gradients."""
        return self._stretches[0].dtype

    @property
    def device(self) -> Any:
        """The device of the gradients."""
        return device(self._like())

    def logdet(self) -> float:
        """Return the sum of the blocks' log-determinants.

        Returns
        -------
        float
            The logarithm of the determinant.
        """
        return super().logdet()

    def _logdet(self) -> float:
        return self._summed(sum(stretch._ask(stretch._logdet) for stretch in self._stretches))

    def power(self, p: float) -> BlockDiagonal[ArrayT]:
        """Return a real power, block by block.

        Parameters
        ----------
        p : float
            Any real number, relative to this operator.

        Returns
        -------
        BlockDiagonal
            With the same queries.
        """
        return super().power(p)  # type: ignore[return-value]

    def _power(self, p: float) -> BlockDiagonal[ArrayT]:
        powers: list[Any] = [stretch._ask(stretch._power, p) for stretch in self._stretches]
        return BlockDiagonal(powers, self._reduce)

    def _like(self) -> Array:
        return self._stretches[0]._like()

    def _pieces(self, x: Array) -> list[tuple[SymmetricOperator[ArrayT], Array]]:
        starts = [0, *self._stops[:-1]]
        return [
            (stretch, x[int(start) : int(stop), ...])
            for stretch, start, stop in zip(self._stretches, starts, self._stops, strict=True)
        ]

    def _apply(self, x: Any) -> Any:
        pieces = self._pieces(x)
        products = [stretch._ask(stretch._apply, piece) for stretch, piece in pieces]
        if len(products) == 1:
            return products[0]
        return array_namespace(x).concat(products, axis=0)

    def _diagonal(self) -> Array:
        return np.concatenate(
            [to_numpy(stretch._ask(stretch._diagonal)) for stretch in self._stretches]
        )

    def _entries(self, rows: Indices, cols: Indices) -> Array:
        values = np.zeros(len(rows))
        owner = np.searchsorted(self._stops, rows, side="right")
        same = owner == np.searchsorted(self._stops, cols, side="right")
        for k in np.unique(owner[same]):
            here = np.flatnonzero(same & (owner == k))
            start = int(self._stops[k]) - self._stretches[k].shape[0]
            stretch = self._stretches[k]
            inner = stretch._ask(stretch._entries, rows[here] - start, cols[here] - start)
            values[here] = to_numpy(inner)
        return values

    def _submatrix(self, indices: Indices) -> Array:
        dense = np.zeros((len(indices), len(indices)))
        owner = np.searchsorted(self._stops, indices, side="right")
        for k in np.unique(owner):
            here = np.flatnonzero(owner == k)
            start = int(self._stops[k]) - self._stretches[k].shape[0]
            stretch = self._stretches[k]
            inner = stretch._ask(stretch._submatrix, indices[here] - start)
            dense[np.ix_(here, here)] = to_numpy(inner)
        return dense

    def _quadratic(self, x: Any) -> Array:
        total = sum(
            to_numpy(stretch._ask(stretch._quadratic, piece)) for stretch, piece in self._pieces(x)
        )
        return np.asarray(total) if self._reduce is None else self._reduce(np.array(total))

    def _sample(self, n: int, rng: np.random.Generator) -> Array:
        draws = [stretch._ask(stretch._sample, n, rng) for stretch in self._stretches]
        return array_namespace(draws[0]).concat(draws, axis=0)

    def _summed(self, number: float) -> float:
        return number if self._reduce is None else float(self._reduce(np.array([number]))[0])


class BlockInverseFisher(BlockDiagonal[ArrayT]):
    """The inverse of the diagonal blocks of F = λI + GᵀG/m, as an operator.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`InverseFisher` takes. Blocks of up to 2m
        are inverted at once and need the gradients no more; longer ones hold them.
    damping : float or "auto"
        λ > 0; or that of :func:`choose_damping` for these blocks, to be read from ``damping``
        afterwards.
    block_size : int or sequence of int
        Length of every block, a shorter one at the end allowed; or the lengths of all blocks,
        such as the sizes of layers, summing to d.
    reduce : callable, optional
        For columns that are spread over ranks, no block across two of them: sums a float64 NumPy
        array over ranks, for ``logdet`` and ``quadratic``; nothing else needs other ranks.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.

    Attributes
    ----------
    damping : float
        λ.
    block_sizes : tuple of int
        The lengths of the blocks.

    Raises
    ------
    TypeError
        If an argument is not of its type.
    ValueError
        If the gradients are not finite or not (m, d), if ``damping`` is not finite and positive,
        if a block length is not positive, or if the lengths do not sum to d.

    See Also
    --------
    InverseFisher : One block.

    Notes
    -----
    A block of length B ≤ 2m is the B × B matrix λI + G_bᵀG_b/m, inverted in float64: in all d·B·m
    multiplications, d·B numbers of float64 kept, and products that cost those. A longer one goes
    by its dual, as :class:`InverseFisher` does. Blocks are worked on many at a time, on the host
    in as many threads as there are cores (``OMP_NUM_THREADS`` where it is less), in products so
    small that BLAS adds no threads of its own. With fewer rows than the parameters'
    own dimension asks for, small blocks are often the better estimate of the curvature.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> G = np.array([[1.0, 1.0, 2.0], [1.0, -1.0, 0.0]])
    >>> inverse = mfac.BlockInverseFisher(G, damping=1.0, block_size=[2, 1])
    >>> inverse.to_dense()
    array([[0.5       , 0.        , 0.        ],
           [0.        , 0.5       , 0.        ],
           [0.        , 0.        , 0.33333333]])
    """

    @overload
    def __init__(
        self: BlockInverseFisher[NDArray],
        gradients: Stored,
        *,
        damping: Damping,
        block_size: BlockSize,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: BlockInverseFisher[GivenT],
        gradients: Gradients[GivenT],
        *,
        damping: Damping,
        block_size: BlockSize,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: BlockInverseFisher[NDArray],
        gradients: Sliceable,
        *,
        damping: Damping,
        block_size: BlockSize,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    def __init__(
        self,
        gradients: Any,
        *,
        damping: Damping,
        block_size: BlockSize,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None:
        given = check.damping_or_auto(damping)
        rows = rows_of(gradients, progress=progress)
        self.block_sizes = check.block_sizes(block_size, rows.shape[1])
        if given is None:
            shared = rows_of(gradients, reduce=reduce, progress=progress)
            given = damping_of(Blocks(shared, self.block_sizes))
        self.damping = given
        super().__init__(list(_inverses(rows, self.block_sizes, self.damping)), reduce)

    def _of_what(self) -> str:
        return f" of {len(self.block_sizes)} blocks, damping {self.damping:g},"

    @classmethod
    def accumulate(
        cls, gradients: Iterable[AnyGradients], *, damping: float, block_size: BlockSize
    ) -> Self:
        """Make the operator from gradients that are seen once and never stored.

        Parameters
        ----------
        gradients : iterable of arrays of shape (m, d)
            Any number of them, such as a generator over batches; each as the class takes.
        damping : float
            λ > 0.
        block_size : int or sequence of int
            See the class.

        Returns
        -------
        BlockInverseFisher
            The inverse of λI plus the mean of all rows' gᵀg, in blocks.

        Raises
        ------
        TypeError, ValueError
            See the class.

        See Also
        --------
        BlockFisher : The sums, to be added to or pruned from.
        """
        damping = check.damping(damping)
        check.iterable_argument(gradients, "gradients", "arrays of gradients")
        sums = BlockFisher(block_size=block_size)
        for some in gradients:
            sums.add(some)
        sums.asked()
        return cls._of_sums(sums, damping)

    @classmethod
    def _of_sums(cls, sums: BlockFisher, damping: float) -> Self:
        operator = cls.__new__(cls)
        operator.damping, operator.block_sizes = damping, sums.block_sizes
        BlockDiagonal.__init__(operator, [sums.inverted(damping)], sums.reduce)
        return operator


def _kinds(sizes: Sequence[int], m: int) -> Iterator[tuple[str, list[int]]]:
    """Yield consecutive blocks that are treated alike, and how: "primal", "dual" or "wide".

    A block of B weights is cheaper as a matrix of its own up to about B = 2m: to multiply by its
    B² numbers takes as long as by its 2·B·m and m².
    """

    def kind(size: int) -> str:
        if size <= 2 * m and (len(sizes) > 1 or size < m):
            return "primal"
        return "wide" if len(sizes) == 1 or 8 * size * m > WIDE_BYTES else "dual"

    for name, group in groupby(sizes, kind):
        yield name, list(group)


def _inverses(rows: Rows, sizes: Sequence[int], damping: float) -> Iterator[SymmetricOperator]:
    """Yield the inverses of consecutive blocks, many or one at a time."""
    start, m = 0, rows.shape[0]
    limit = ops.batch_bytes(ops.home(rows.like))
    for kind, some in _kinds(sizes, m):
        stop = start + sum(some)
        here = rows if stop - start == rows.shape[1] else rows.stretch(start, stop)
        plan = batches(some, m, limit)
        if kind == "primal":
            yield inverse_primal(here, plan, damping)
        elif kind == "dual":
            yield dual_blocks(here, plan, damping, -1.0)
        else:
            stops = np.cumsum(some)
            for size, end in zip(some, stops, strict=True):
                one = here if len(some) == 1 else here.stretch(int(end) - size, int(end))
                yield InverseFisher._of_rows(one, damping)
        start = stop
