"""The choice of λ from the gradients themselves: one eigenvalue problem of size m for every λ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import to_numpy
from mfac_core._operators.digits import finite_gram
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.storage import rows_of

METHODS = ("leave-one-out", "ledoit-wolf", "oas")

DECADES = (-10.0, 2.0)
"""Where λ is looked for: powers of ten of the mean square of the gradients' entries."""

PER_DECADE = 20
"""Dampings tried in each power of ten."""

NDArray = np.ndarray[Any, Any]


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


def damping_curve(
    gradients: Any,
    *,
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> DampingCurve:
    """Return how well each λ predicts every gradient from the others.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`InverseFisher` takes.
    dampings : sequence of float, optional
        λ > 0 to try. By default twenty in every power of ten from 1e-10 to 100 times the mean
        square of the gradients' entries.
    reduce : callable, optional
        For columns that are spread over ranks, see :class:`InverseFisher`.
    progress : bool, default False
        Show a bar during the pass over the gradients, where tqdm is installed.

    Returns
    -------
    DampingCurve
        ``dampings``, ``scores`` and ``best``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or all gradients are zero.

    See Also
    --------
    choose_damping : The best of them.

    Notes
    -----
    With A = mλI + GGᵀ, GGᵀ = Q diag(s) Qᵀ and rᵢ = mλ[A⁻¹]ᵢᵢ = mλ Σₖ Qᵢₖ²/(sₖ + mλ), leaving row i
    out of F = λI + GᵀG/m, with its divisor kept, has

        gᵢᵀF₋ᵢ⁻¹gᵢ = m(1 − rᵢ)/rᵢ,    log det F₋ᵢ = d log λ + Σₖ log(1 + sₖ/(mλ)) + log rᵢ.

    d·m² multiplications for the Gram, one eigenvalue problem of size m, and O(m²) for each λ.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> g = np.random.default_rng(0).standard_normal((20, 100))
    >>> curve = mfac.damping_curve(g, dampings=[0.01, 0.1, 1.0, 10.0])
    >>> float(curve.dampings[curve.scores.argmin()])
    1.0
    """
    rows = rows_of(gradients, reduce=reduce, progress=progress)
    grid = None if dampings is None else _grid_argument(dampings)
    return curve_of(to_numpy(finite_gram(rows)), rows.total_columns, grid)


def choose_damping(
    gradients: Any,
    *,
    method: str = "leave-one-out",
    dampings: Sequence[float] | None = None,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> float:
    """Return a λ for F = λI + GᵀG/m from the gradients alone.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`InverseFisher` takes.
    method : {"leave-one-out", "ledoit-wolf", "oas"}, default "leave-one-out"
        The λ under which the others predict each row best, see :func:`damping_curve`; or that of
        the shrunk covariance (1 − ρ)GᵀG/m + ρμI, μ the mean square of the gradients' entries, which
        is 1 − ρ times F for λ = ρμ/(1 − ρ), with ρ by Ledoit and Wolf (2004) or as the oracle
        approximating shrinkage (Chen et al., 2010), both for rows of mean zero.
    dampings : sequence of float, optional
        For "leave-one-out", λ to choose from; see :func:`damping_curve`. The result may lie between
        two of them.
    reduce : callable, optional
        For columns that are spread over ranks, see :class:`InverseFisher`.
    progress : bool, default False
        Show a bar during the pass over the gradients, where tqdm is installed.

    Returns
    -------
    float
        λ > 0. Gradients a times as long give a² times the λ.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or all gradients are zero.

    Notes
    -----
    d·m² multiplications for the Gram, and O(m³). For one row λ is ‖g‖²/d. Where all rows are equal
    or collinear, no λ > 0 is the best of "leave-one-out", and the smallest one tried is returned.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> g = 0.1 * np.random.default_rng(0).standard_normal((20, 100))
    >>> 0.001 < mfac.choose_damping(g) < 0.02
    True
    """
    if method not in METHODS:
        msg = f"method must be one of {METHODS}, got {method!r}"
        raise ValueError(msg)
    rows = rows_of(gradients, reduce=reduce, progress=progress)
    grid = None if dampings is None else _grid_argument(dampings)
    return damping_of(rows, to_numpy(finite_gram(rows)), method, grid)


def damping_of_rows(rows: Rows) -> float:
    """Choose λ, for whoever does not need the Gram."""
    return damping_of(rows, to_numpy(finite_gram(rows)))


def damping_of(
    rows: Rows, gram: NDArray, method: str = "leave-one-out", grid: NDArray | None = None
) -> float:
    """Choose λ from a known Gram."""
    d = rows.total_columns
    if method == "leave-one-out":
        return curve_of(gram, d, grid).best
    mean = _mean_square(gram, d)
    share = _ledoit_wolf(gram, d) if method == "ledoit-wolf" else _oas(gram, d)
    smallest, largest = (10.0**decade for decade in DECADES)  # shares of 0 and of 1 are no λ
    ratio = share / (1.0 - share) if share < 1.0 else largest
    return float(mean * np.clip(ratio, smallest, largest))


def curve_of(gram: NDArray, d: int, grid: NDArray | None = None) -> DampingCurve:
    """Return the leave-one-out curve of rows of length d with this Gram."""
    m = len(gram)
    mean = _mean_square(gram, d)
    if grid is None:
        first, last = DECADES
        grid = mean * 10.0 ** np.linspace(first, last, round((last - first) * PER_DECADE) + 1)
    s, q = np.linalg.eigh(gram)
    # Eigenvalues that rounding alone has made are no evidence of a direction.
    s = np.where(s > m * 2.0**-52 * s[-1], s, 0.0)
    shifts = m * grid
    r = (q * q) @ (shifts / (s[:, None] + shifts))  # mλ[A⁻¹]ᵢᵢ, (m, k)
    # 1 − rᵢ by itself: for large λ nothing is left of it otherwise.
    rest = (q * q) @ (s[:, None] / (s[:, None] + shifts))
    logdet = d * np.log(grid) + np.log1p(s[:, None] / shifts).sum(axis=0)
    scores = logdet + np.mean(np.log(r) + m * rest / r, axis=0)
    return DampingCurve(grid, scores)


def _mean_square(gram: NDArray, d: int) -> float:
    mean = float(np.trace(gram)) / (len(gram) * d)
    if not mean > 0.0:
        msg = "gradients must not all be zero for a damping to be chosen by them; give damping"
        raise ValueError(msg)
    return mean


def _ledoit_wolf(gram: NDArray, d: int) -> float:
    """ρ = min(β, δ)/δ: the variance of S = GᵀG/m over its distance from μI, from GGᵀ alone."""
    m, mean = len(gram), _mean_square(gram, d)
    squares = np.sum(gram * gram) / m**2  # ‖S‖²
    distance = squares - d * mean**2
    variance = (np.sum(np.diagonal(gram) ** 2) / m - squares) / m
    return float(np.clip(variance / distance, 0.0, 1.0)) if distance > 0.0 else 1.0


def _oas(gram: NDArray, d: int) -> float:
    m, mean = len(gram), _mean_square(gram, d)
    alpha = np.sum(gram * gram) / (m * d) ** 2
    distance = (m + 1.0) * (alpha - mean**2 / d)
    return float(min((alpha + mean**2) / distance, 1.0)) if distance > 0.0 else 1.0


def _grid_argument(dampings: Sequence[float]) -> NDArray:
    grid = np.sort([check.damping(damping) for damping in dampings])
    if not len(grid):
        msg = "dampings must hold at least one λ, got none"
        raise ValueError(msg)
    return grid
