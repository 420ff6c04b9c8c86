"""The Fisher matrix of the weights that are kept, F_RR, part by part.

The parameters come in *parts*: the whole of them or one long block, or batches of short diagonal
blocks. All offer the same acts on float64 vectors of the part's length, in the home of blocks, in
which removed weights are simply zero. With R the kept and S the removed weights, the best change
of the kept ones is δ_R = F_RR⁻¹F_RS w_S.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from mfac_core._arrays import Array
from mfac_core._operators.digits import warn_few_digits
from mfac_core._operators.online import BlockFisher
from mfac_core._operators.primal import fisher_blocks
from mfac_core._operators.stacks import finite
from mfac_core._ops import blocks as ops
from mfac_core._rows.base import Rows
from mfac_core._rows.plan import WIDE_BYTES, Batch, Positions, batches, gathered, read
from mfac_core.pruning._blocks import BlockPart, FisherPart, RowsPart, StackPart
from mfac_core.pruning._full import FullPart
from mfac_core.pruning._groups import Labels, Rises

Vector: TypeAlias = Array
"""Float64, in the home of blocks."""

Mask: TypeAlias = Array
"""Bool, in the home of blocks: True where a weight is kept."""

KEPT_BYTES = 1 << 28
"""Size of the blocks' Fisher matrices that are kept from pass to pass."""

Result = TypeVar("Result")


class Part(Protocol):
    """What a part of the parameters is asked."""

    @property
    def doubtful(self) -> bool:
        """Whether some results have few digits."""

    def diagonal(self) -> Vector:
        """Return diag F_RR⁻¹; infinite at removed weights."""

    def rises(self, weights: Vector, labels: Labels) -> list[Rises]:
        """Return ½ w_Qᵀ([F_RR⁻¹]_QQ)⁻¹w_Q for each label's kept weights Q, in addends."""

    def apply(self, x: Vector) -> Vector:
        """Return F_RR⁻¹x_R."""

    def joint(self, weights: Vector) -> Vector:
        """Return the best weights: w_R + F_RR⁻¹F_RS w_S, and zeros."""

    def quadratic(self, x: Vector) -> float:
        """Return xᵀFx."""


Visit: TypeAlias = Callable[[Part, slice], Result]
"""What is done with a part, and which parameters it covers; it may be in a thread of its own."""


class KeptFisher:
    """The Fisher matrix of the kept weights, over all parts of the parameters.

    Parameters
    ----------
    rows : Rows
        G of F = λI + GᵀG/m.
    damping : float
        λ.
    sizes : sequence of int, optional
        Lengths of F's diagonal blocks; None for the whole of F.
    """

    def __init__(
        self, rows: Rows | BlockFisher, damping: float, sizes: Sequence[int] | None
    ) -> None:
        self.home = ops.home(rows.like)
        self._damping = damping
        if isinstance(rows, BlockFisher):
            self._stretches: list[tuple[int, Stretch]] = [(0, SummedStretch(rows, damping))]
        else:
            self._stretches = list(_stretches(rows, damping, sizes))
        self._kept: Mask = None

    def restrict(self, kept: Mask) -> None:
        """Let F_RR be that of the kept weights from now on."""
        self._kept = kept
        for start, stretch in self._stretches:
            if isinstance(stretch, FullPart):
                stretch.restrict(kept[start : start + stretch.length])

    def visit(self, work: Visit[Result]) -> list[Result]:
        """Return what ``work`` returns for each part, in order: one pass over the gradients."""
        results, doubtful = [], False
        for start, stretch in self._stretches:
            here = slice(start, start + stretch.length)
            if isinstance(stretch, FullPart):
                results.append(work(stretch, here))
                doubtful |= stretch.doubtful
            else:
                some, doubts = stretch.visit(work, self._kept[here], start)
                results += some
                doubtful |= doubts
        if doubtful:
            warn_few_digits("F⁻¹ of the kept weights", self._damping)
        return results

    def diagonal(self) -> Vector:
        """See :class:`Part`."""
        return self._joined(lambda part, here: part.diagonal())

    def apply(self, x: Vector) -> Vector:
        """See :class:`Part`."""
        return self._joined(lambda part, here: part.apply(x[here]))

    def joint(self, weights: Vector) -> Vector:
        """See :class:`Part`."""
        return self._joined(lambda part, here: part.joint(weights[here]))

    def quadratic(self, x: Vector) -> float:
        """See :class:`Part`."""
        return sum(self.visit(lambda part, here: part.quadratic(x[here])))

    def _joined(self, act: Visit[Vector]) -> Vector:
        result = self.home.zeros(int(self._kept.shape[0]))

        def work(part: Part, here: slice) -> None:
            result[here] = act(part, here)

        self.visit(work)
        return result


class BlockStretch:
    """Consecutive blocks, batch by batch.

    Those no longer than the rows are many are kept as the matrices that they are, as far as
    ``KEPT_BYTES`` goes; of the others nothing is kept.
    """

    def __init__(self, rows: Rows, sizes: Sequence[int], damping: float) -> None:
        self.length = rows.shape[1]
        self._rows, self._damping = rows, damping
        self._home = ops.home(rows.like)
        m = rows.shape[0]
        # A kernel goes from the gradients to the inverses at once.
        by_kernel = ops.inverts(self._home, rows.like, max(sizes))
        self._short = max(sizes) <= m and not by_kernel
        self._plan = batches(sizes, m, ops.batch_bytes(self._home))
        self._fishers: list[list[Array]] = []
        self._room = 0
        if self._short:
            bytes_needed = np.cumsum(8 * np.square(np.asarray(sizes, np.int64)))
            blocks = int(np.searchsorted(bytes_needed, KEPT_BYTES, side="right"))
            reached = sum(sizes[:blocks])
            self._room = sum(batch.columns.stop <= reached for batch in self._plan)

    def visit(self, work: Visit[Result], kept: Mask, start: int) -> tuple[list[Result], bool]:
        """Return what ``work`` returns for each batch, and whether some results have few digits."""

        def on_batch(item: tuple[Batch, bool, list[Array] | None, Array]) -> Any:
            batch, keep, fishers, block = item
            if self._short and fishers is None:
                fishers = [self._fisher(block, *group) for group in batch.groups]
            groups: list[StackPart] = []
            for i, (size, positions) in enumerate(batch.groups):
                mask = gathered(self._home, kept[batch.columns], size, positions)
                if fishers is not None:
                    groups.append(FisherPart(self._home, fishers[i], mask, self._damping))
                    continue
                groups.append(RowsPart(self._home, block, size, positions, mask, self._damping))
            part = BlockPart(self._home, batch, groups)
            here = slice(start + batch.columns.start, start + batch.columns.stop)
            return work(part, here), part.doubtful, fishers if keep else None

        with finite(self._rows):
            done = ops.each(self._home, self._items(), on_batch)
        if len(self._fishers) < self._room:
            self._fishers = [fishers for _, _, fishers in done[: self._room]]
        return [result for result, _, _ in done], any(doubt for _, doubt, _ in done)

    def _fisher(self, block: Array, size: int, positions: Positions | None) -> Array:
        g = ops.split(self._home, block, size, positions)
        return fisher_blocks(self._home, g, self._damping)

    def _items(self) -> Iterator[tuple[Batch, bool, list[Array] | None, Array]]:
        """Yield batches, whether to keep and what is known of them, or their columns."""
        known = len(self._fishers)
        for batch, fishers in zip(self._plan[:known], self._fishers, strict=True):
            yield batch, True, fishers, None
        if self._plan[known:]:
            columns = read(self._rows, self._plan[known:], self._home)
            for number, (batch, block) in enumerate(columns, known):
                yield batch, number < self._room, None, block


class SummedStretch:
    """Blocks that were summed as gradients arrived."""

    def __init__(self, sums: BlockFisher, damping: float) -> None:
        self.length = sums.shape[1]
        self._sums, self._damping = sums, damping
        self._home = ops.home(sums.like)

    def visit(self, work: Visit[Result], kept: Mask, start: int) -> tuple[list[Result], bool]:
        """See :class:`BlockStretch`."""

        def on_batch(item: tuple[Batch, list[Array]]) -> Any:
            batch, fishers = item
            groups = [
                FisherPart(
                    self._home,
                    fisher,
                    gathered(self._home, kept[batch.columns], *group),
                    self._damping,
                )
                for fisher, group in zip(fishers, batch.groups, strict=True)
            ]
            part = BlockPart(self._home, batch, groups)
            return work(part, batch.columns), part.doubtful

        done = ops.each(self._home, self._sums.matrices(self._damping), on_batch)
        return [result for result, _ in done], any(doubt for _, doubt in done)


Stretch: TypeAlias = FullPart | BlockStretch | SummedStretch
"""Parts of one kind, side by side."""


def _stretches(
    rows: Rows, damping: float, sizes: Sequence[int] | None
) -> Iterator[tuple[int, Stretch]]:
    """Yield where each stretch begins, and it: blocks treated alike, or one long block."""
    start, m = 0, rows.shape[0]
    if sizes is None:
        yield 0, FullPart(rows, damping)
        return

    def kind(size: int) -> str:
        if (len(sizes) == 1 and size >= m) or 8 * size * m > WIDE_BYTES:
            return "long"
        return "short" if size <= m else "dual"

    for name, group in groupby(sizes, kind):
        some = list(group)
        whole = start == 0 and sum(some) == rows.shape[1]
        if name != "long":
            # Without ranks: blocks are one rank's.
            alone = whole and rows.reduce is None
            here = rows if alone else rows.stretch(start, start + sum(some))
            yield start, BlockStretch(here, some, damping)
            start += sum(some)
            continue
        for size in some:
            here = rows if whole and len(some) == 1 else rows.stretch(start, start + size)
            yield start, FullPart(here, damping)
            start += size
