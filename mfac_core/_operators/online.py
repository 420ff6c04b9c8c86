"""Diagonal blocks of F from gradients that are seen once and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array
from mfac_core._operators.digits import warn_few_digits
from mfac_core._operators.primal import Found, PrimalBlocks, all_inverses
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Reduce
from mfac_core._rows.plan import Batch, batches, read
from mfac_core._rows.protocol import AnyGradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import BlockSize

if TYPE_CHECKING:
    from mfac_core._operators.blocked import BlockInverseFisher


class BlockFisher:
    """The diagonal blocks of GᵀG, summed as gradients arrive: d·B numbers for any number of rows.

    For more gradients than can be kept. Where ``gradients`` are asked for, :func:`~.pruning.prune`
    and its siblings take it, and :meth:`inverse` gives the operator.

    Parameters
    ----------
    block_size : int or sequence of int
        Length of every block, a shorter one at the end allowed; or the lengths of all blocks.
    reduce : callable, optional
        For columns that are spread over ranks, no block across two of them: see
        :class:`BlockInverseFisher`.

    Attributes
    ----------
    count : int
        Number of rows that were added.
    block_sizes : tuple of int
        The lengths of the blocks; empty before the first rows.

    See Also
    --------
    BlockInverseFisher : From gradients that are at hand.

    Notes
    -----
    Adding m rows costs d·B·m multiplications; sums are float64, beside the first gradients.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> fisher = mfac.BlockFisher(block_size=2)
    >>> for row in np.array([[1.0, 1.0, 2.0], [1.0, -1.0, 0.0]]):
    ...     fisher.add(row[None, :])
    >>> fisher.inverse(damping=1.0).diagonal()
    array([0.5       , 0.5       , 0.33333333])
    """

    def __init__(self, *, block_size: BlockSize, reduce: Reduce | None = None) -> None:
        self._block_size = block_size
        check.reduce_argument(reduce)
        self.reduce = reduce
        self.count = 0
        self.block_sizes: tuple[int, ...] = ()
        self.like: Array = None
        self._plan: list[Batch] = []
        self._sums: list[list[Array]] = []

    @property
    def shape(self) -> tuple[int, int]:
        """(m, d): rows added, and parameters."""
        return self.count, sum(self.block_sizes)

    def __repr__(self) -> str:
        return f"<BlockFisher of {self.count} rows of {self.shape[1]} parameters>"

    def add(self, gradients: AnyGradients) -> None:
        """Add gradients.

        Parameters
        ----------
        gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
            One gradient per row, of the library and device of the first.

        Raises
        ------
        TypeError, ValueError
            If they are not gradients, of another library, device or length than before, or not
            finite; nothing is added then.
        """
        rows = rows_of(gradients)
        if not self.count:
            self._start(rows)
        check.beside(rows.like, "gradients", self.like)
        if rows.shape[1] != self.shape[1]:
            msg = f"gradients must have {self.shape[1]} columns as before, got {rows.shape[1]}"
            raise ValueError(msg)
        home, m = ops.home(self.like), rows.shape[0]
        if nonfinite := rows.nonfinite():
            raise ValueError(check.nonfinite_message(nonfinite, m))

        def add(item: tuple[tuple[Batch, Array], list[Array]]) -> None:
            (batch, block), sums = item
            for (size, positions), total in zip(batch.groups, sums, strict=True):
                g = ops.split(home, block, size, positions)
                total += ops.square(home, ops.transposed(g))

        ops.each(home, zip(read(rows, self._plan, home), self._sums, strict=True), add)
        self.count += m

    def _start(self, rows: Any) -> None:
        sizes = check.block_sizes(self._block_size, rows.shape[1])
        home = ops.home(rows.like)
        self.block_sizes, self.like = sizes, rows.like[:0, :0]
        self._plan = batches(sizes, max(sizes), ops.batch_bytes(home))
        self._sums = []
        for batch in self._plan:
            width = batch.columns.stop - batch.columns.start
            shapes = [
                (width // size if positions is None else len(positions), size, size)
                for size, positions in batch.groups
            ]
            self._sums.append([home.zeros(shape) for shape in shapes])

    def matrices(self, damping: float) -> Iterator[tuple[Batch, list[Array]]]:
        """Yield λI + G_bᵀG_b/m batch by batch.

        Parameters
        ----------
        damping : float
            λ.

        Yields
        ------
        tuple of Batch, list of array
            Blocks, and their matrices (n, B, B) by length.
        """
        home = ops.home(self.like)
        for batch, sums in zip(self._plan, self._sums, strict=True):
            yield batch, [ops.shifted(home, total / self.count, damping) for total in sums]

    def inverse(self, damping: float) -> BlockInverseFisher:
        """Return the inverse of λI plus the mean of what was added.

        Parameters
        ----------
        damping : float
            λ > 0.

        Returns
        -------
        BlockInverseFisher
            d·B numbers of its own; gradients that are added later do not change it.

        Raises
        ------
        ValueError
            If nothing was added, or ``damping`` is not finite and positive.
        """
        from mfac_core._operators.blocked import BlockInverseFisher

        damping = check.damping(damping)
        self.asked()
        return BlockInverseFisher._of_sums(self, damping)

    def asked(self) -> None:
        """Refuse to be asked before anything was added.

        Raises
        ------
        ValueError
            If nothing was added.
        """
        if not self.count:
            msg = "a BlockFisher must be given gradients by add(...) before it is asked"
            raise ValueError(msg)

    def inverted(self, damping: float) -> PrimalBlocks:
        """Return the inverses of the blocks.

        Parameters
        ----------
        damping : float
            λ.

        Returns
        -------
        PrimalBlocks
            The operator over this rank's columns.
        """
        home = ops.home(self.like)
        found = Found(home, self._plan)

        def invert(item: tuple[Batch, list[Array]]) -> tuple[list[Array], bool]:
            results, doubtful = all_inverses(home, item[1], damping)
            return found.put(item[0], results), doubtful

        done = ops.each(home, self.matrices(damping), invert)
        if any(doubt for _, doubt in done):
            warn_few_digits("A block of F⁻¹", damping)
        return found.blocks([kept for kept, _ in done], self.like)

    def summed_numbers(self, *numbers: float) -> list[float]:
        """Sum numbers over ranks.

        Parameters
        ----------
        *numbers : float
            This rank's.

        Returns
        -------
        list of float
            The sums.
        """
        if self.reduce is None:
            return list(numbers)
        return [float(x) for x in self.reduce(np.array(numbers, dtype=np.float64))]
