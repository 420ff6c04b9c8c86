"""The choice of λ from the gradients themselves: one eigenvalue problem of size m for every λ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import numpy as np

from mfac_core import _validate as check
from mfac_core._operators.spectra import Blocks, NDArray, mean_square_of
from mfac_core._rows.base import Reduce
from mfac_core._rows.protocol import AnyGradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import BlockSize, Layers, Method

METHODS = ("leave-one-out", "ledoit-wolf", "oas")

SMALLEST, LARGEST = 1e-10, 100.0
"""Where λ is looked for: in mean squares of a block's rows, and of the gradients' entries.

Below the first, float64 would have few digits left of F⁻¹; the second is nearly λI.
"""

PER_DECADE = 10
"""Dampings tried in each power of ten."""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class DampingCurve:
    """How well each damping predicts a gradient from the others.

    Attributes
    ----------
    dampings : numpy.ndarray, shape (k,)
        Increasing.
    scores : numpy.ndarray, shape (k,)
        The mean over the rows i of log det F₋ᵢ + gᵢᵀF₋ᵢ⁻¹gᵢ: twice the negative logarithm of the
        likelihood of row i under N(0, F₋ᵢ), but for a constant. Lower is better.
    """

    dampings: NDArray
    scores: NDArray

    @property
    def best(self) -> float:
        """λ of the lowest score, between the dampings by a parabola in log λ."""
        k = int(np.argmin(self.scores))
        if k in (0, len(self.scores) - 1):
            return float(self.dampings[k])
        x = np.log(self.dampings[k - 1 : k + 2])
        curvature, slope, _ = np.polyfit(x - x[1], self.scores[k - 1 : k + 2] - self.scores[k], 2)
        if not curvature > 0.0:
            return float(self.dampings[k])
        return float(np.exp(np.clip(x[1] - slope / (2.0 * curvature), x[0], x[2])))


@overload
def damping_curve(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: None = None,
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> DampingCurve: ...
@overload
def damping_curve(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: Layers,
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> list[DampingCurve]: ...
def damping_curve(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: Layers | None = None,
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> DampingCurve | list[DampingCurve]:
    """Return how well each λ predicts every gradient from the others.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`InverseFisher` takes.
    block_size : int or sequence of int, optional
        Of the diagonal blocks of F of these lengths, see :class:`BlockInverseFisher`; by default
        of the whole of F.
    layers : sequence of int or of tuple of int, optional
        Lengths or shapes of layers, in all d weights, for a curve of each; an int ``block_size``
        then cuts within a layer.
    dampings : sequence of float, optional
        λ > 0 to try. By default ten in every power of ten, from 1e-10 of the mean square norm
        of a row, or of its part in a block, to 100 times the mean square of an entry. For blocks
        shorter than the rows are many they begin at 1/√m of the latter, the standard error of
        an element of GᵀG/m: many rows explain one another in short blocks, and without that limit
        the weakest direction of all blocks would choose for the others.
    reduce : callable, optional
        For columns that are spread over ranks, no block or layer across two of them, see
        :class:`InverseFisher`. A curve of all is that of all ranks, one of a layer that of its own.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.

    Returns
    -------
    DampingCurve or list of DampingCurve
        ``dampings``, ``scores`` and ``best``; one for each of ``layers``, where they are given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or all gradients are zero, or all of a layer.

    See Also
    --------
    choose_damping : The best of them.

    Notes
    -----
    With A = mλI + GGᵀ, GGᵀ = Q diag(s) Qᵀ and rᵢ = mλ[A⁻¹]ᵢᵢ = mλ Σₖ Qᵢₖ²/(sₖ + mλ), leaving row i
    out of F = λI + GᵀG/m, with its divisor kept, has

        gᵢᵀF₋ᵢ⁻¹gᵢ = m(1 − rᵢ)/rᵢ,    log det F₋ᵢ = d log λ + Σₖ log(1 + sₖ/(mλ)) + log rᵢ.

    d·m² multiplications for the Gram, one eigenvalue problem of size m, and O(m²) for each λ.

    Where F is block-diagonal a row's blocks are independent, and its score is the sum of theirs. A
    block of B weights costs B·m·min(B, m), an eigenvalue problem of size min(B, m), and
    O(m·min(B, m)) for each λ. Of 512 short blocks or more about 256 are asked, evenly spaced.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> g = np.random.default_rng(0).standard_normal((20, 100))
    >>> curve = mfac.damping_curve(g, dampings=[0.01, 0.1, 1.0, 10.0])
    >>> float(curve.dampings[curve.scores.argmin()])
    1.0
    """
    grid = None if dampings is None else _grid_argument(dampings)

    def curve(blocks: Blocks) -> DampingCurve:
        return _curve_of(blocks, grid)

    curves = _asked(curve, gradients, block_size, layers, reduce, progress)
    return curves[0] if layers is None else curves


@overload
def choose_damping(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: None = None,
    method: Method = "leave-one-out",
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> float: ...
@overload
def choose_damping(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: Layers,
    method: Method = "leave-one-out",
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> NDArray: ...
def choose_damping(
    gradients: AnyGradients,
    *,
    block_size: BlockSize | None = None,
    layers: Layers | None = None,
    method: Method = "leave-one-out",
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> float | NDArray:
    """Return a λ for F = λI + GᵀG/m from the gradients alone.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`InverseFisher` takes.
    block_size : int or sequence of int, optional
        For the diagonal blocks of F of these lengths, see :class:`BlockInverseFisher`: one λ for
        all of them. By default for the whole of F.
    layers : sequence of int or of tuple of int, optional
        Lengths or shapes of layers, in all d weights, for a λ of each; an int ``block_size`` then
        cuts within a layer.
    method : {"leave-one-out", "ledoit-wolf", "oas"}, default "leave-one-out"
        The λ under which the others predict each row best, see :func:`damping_curve`; or that of
        the shrunk covariance (1 − ρ)GᵀG/m + ρμI, μ the mean square of the gradients' entries, which
        is 1 − ρ times F for λ = ρμ/(1 − ρ), with ρ by Ledoit and Wolf (2004) or as the oracle
        approximating shrinkage (Chen et al., 2010), both for rows of mean zero; in blocks by the
        same derivation, with their variances and squared distances summed.
    dampings : sequence of float, optional
        For "leave-one-out", λ to choose from; see :func:`damping_curve`. The result may lie between
        two of them.
    reduce : callable, optional
        For columns that are spread over ranks, see :func:`damping_curve`.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.

    Returns
    -------
    float or numpy.ndarray, shape (layers,)
        λ > 0; one for each of ``layers``, where they are given. Gradients a times as long give a²
        times the λ.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or all gradients are zero, or all of a layer.

    Notes
    -----
    The cost is that of :func:`damping_curve`. For one row λ is ‖g‖²/d. Where all rows are equal
    or collinear, or span fewer than min(m, d) dimensions, the others may predict a row without an
    error: no λ > 0 is the best of "leave-one-out" then, and the smallest one tried is returned.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> g = 0.1 * np.random.default_rng(0).standard_normal((20, 100))
    >>> 0.001 < mfac.choose_damping(g) < 0.02
    True
    >>> mfac.choose_damping(g * np.repeat([1.0, 10.0], 50), layers=[(5, 10), 50]).shape
    (2,)
    """
    if method not in METHODS:
        msg = f"method must be one of {METHODS}, got {method!r}"
        raise ValueError(msg)
    grid = None if dampings is None else _grid_argument(dampings)

    def choose(blocks: Blocks) -> float:
        return damping_of(blocks, method, grid)

    found = _asked(choose, gradients, block_size, layers, reduce, progress)
    return found[0] if layers is None else np.array(found)


def damping_of(
    blocks: Blocks, method: Method = "leave-one-out", grid: NDArray | None = None
) -> float:
    """Choose λ for blocks that share it."""
    if method == "leave-one-out":
        return _curve_of(blocks, grid).best
    (m, d), moments = blocks.shape, blocks.moments()
    mean = mean_square_of(moments[0], m, d)
    share = (_ledoit_wolf if method == "ledoit-wolf" else _oas)(moments, m, d)
    ratio = share / (1.0 - share) if share < 1.0 else LARGEST  # a share of 0 or 1 is no λ
    return float(mean * np.clip(ratio, SMALLEST * blocks.length, LARGEST))


def _least(blocks: Blocks) -> float:
    """Return the least λ to try, in mean squares of the gradients' entries.

    Many rows explain one another in short blocks, whatever λ is, and all blocks together would have
    that of the weakest direction. What is below the standard error of an element of GᵀG/m is noise.
    """
    m = blocks.shape[0]
    least = SMALLEST * blocks.length
    return max(least, m**-0.5) if blocks.count > 1 and blocks.length < m else least


def _curve_of(blocks: Blocks, grid: NDArray | None) -> DampingCurve:
    mean = blocks.mean_square()
    if grid is None:
        first, last = math.log10(_least(blocks)), math.log10(LARGEST)
        grid = mean * np.logspace(first, last, math.ceil((last - first) * PER_DECADE) + 1)
    return DampingCurve(grid, blocks.scores(grid))


def _ledoit_wolf(moments: NDArray, m: int, d: int) -> float:
    """ρ = min(β, δ)/δ: the variance of S = GᵀG/m over its distance from μI."""
    mean, squares = moments[0] / (m * d), moments[1] / m**2  # μ, ‖S‖²
    distance = squares - d * mean**2
    variance = (moments[2] / m - squares) / m
    return float(np.clip(variance / distance, 0.0, 1.0)) if distance > 0.0 else 1.0


def _oas(moments: NDArray, m: int, d: int) -> float:
    """ρ = (‖S‖² + (tr S)²)/((m + 1)(‖S‖² − dμ²)), each square summed over the blocks."""
    mean, squares = moments[0] / (m * d), moments[1] / m**2
    distance = (m + 1.0) * (squares - d * mean**2)
    return float(min((squares + moments[3] / m**2) / distance, 1.0)) if distance > 0.0 else 1.0


def _asked(
    ask: Callable[[Blocks], Answer],
    gradients: AnyGradients,
    block_size: BlockSize | None,
    layers: Layers | None,
    reduce: Reduce | None,
    progress: bool,
) -> list[Answer]:
    """Return the answer of all blocks together, or layer by layer."""
    rows = rows_of(gradients, reduce=reduce, progress=progress)
    d = rows.shape[1]
    if layers is None:
        sizes = None if block_size is None else check.block_sizes(block_size, d)
        return [ask(Blocks(rows, sizes))]
    lengths = [math.prod(shape) for shape in check.layer_shapes(layers, d)]
    answers, stop = [], 0
    for i, inside in enumerate(check.block_sizes_by_layer(block_size, lengths)):
        start, stop = stop, stop + lengths[i]
        try:
            answers.append(ask(Blocks(rows.stretch(start, stop), inside)))
        except ValueError as error:
            msg = f"layers[{i}]: {error}"
            raise ValueError(msg) from None
    return answers


def _grid_argument(dampings: Sequence[float]) -> NDArray:
    check.iterable_argument(dampings, "dampings", "numbers above 0")
    grid = np.sort([check.damping(damping) for damping in dampings])
    if not len(grid):
        msg = "dampings must hold at least one λ, got none"
        raise ValueError(msg)
    return grid
