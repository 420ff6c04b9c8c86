"""Pruning by the inverse Fisher matrix: what to remove, and how to change what is kept.

To second order, changing the weights by δ raises the loss by ½ δᵀFδ. Removing the weights S sets
δ_S = −w_S; the best change of the kept weights R is then δ_R = F_RR⁻¹ F_RS w_S, the *joint* update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, send, to_numpy
from mfac_core._kept import KeptFisher, Mask, Vector
from mfac_core._operator import SymmetricOperator
from mfac_core._patterns import AdjacentUnits, remove_lowest, schedule, units_of
from mfac_core._progress import track
from mfac_core._rows import Rows
from mfac_core._storage import rows_of

__all__ = ["PrunedWeights", "obs_update", "prune", "saliency"]

STEPS = (0.25, 0.5, 0.75, 1.0)
"""Parts of a joint update that are tried on the real loss."""

RIDGES = (10.0, 100.0)
"""Multiples of the damping under which the joint update is tried on the real loss as well."""


class PrunedWeights(NamedTuple):
    """What pruning returns.

    Attributes
    ----------
    weights : array, shape (d,)
        The new weights, zero where removed; of the given weights' library, dtype and device.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    loss_increase : float
        ½ δᵀFδ of the whole change δ: the rise of the loss that the Fisher matrix predicts.
    """

    weights: Array
    mask: Array
    loss_increase: float


def saliency(weights: Array, inverse: SymmetricOperator) -> Array:
    """Return wᵢ² / (2 [F⁻¹]ᵢᵢ): the rise of the loss when weight i alone is removed.

    The other weights are taken to move to their best values. This is the saliency of the optimal
    brain surgeon (Hassibi and Stork, 1992), which the M-FAC paper prunes by.

    Parameters
    ----------
    weights : array, shape (d,)
        Of the gradients' library and device.
    inverse : InverseFisher, BlockInverseFisher or SlidingInverseFisher
        The inverse Fisher matrix.

    Returns
    -------
    array, shape (d,)
        One number for each weight, none negative.

    Raises
    ------
    TypeError, ValueError
        If ``weights`` does not fit the operator.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> from mfac_core.pruning import saliency
    >>> inverse = mfac.InverseFisher(np.array([[1.0, 0.0]]), damping=1.0)
    >>> saliency(np.array([1.0, 1.0]), inverse)
    array([1. , 0.5])
    """
    weights = check.vector_argument(weights, "weights", inverse.shape[0])
    check.beside(weights, "weights", inverse._like())
    return weights * weights / (2.0 * inverse.diagonal())


def obs_update(
    weights: Array,
    gradients: Any,
    mask: Array,
    *,
    damping: float,
    block_size: int | Sequence[int] | None = None,
) -> Array:
    """Remove weights, and change the kept ones to the joint optimum of the quadratic model.

    Parameters
    ----------
    weights : array, shape (d,)
        Real floating, of the gradients' library and device.
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`~mfac_core.InverseFisher` takes.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    damping : float
        λ > 0.
    block_size : int or sequence of int, optional
        Use the diagonal blocks of F of these lengths; by default the whole of F.

    Returns
    -------
    array, shape (d,)
        w_R + G_Rᵀ A_R⁻¹ G_S w_S at the kept weights R, with A_R = mλI + G_R G_Rᵀ; zero elsewhere.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form.

    Notes
    -----
    d·m + r·m² + m³/3 multiplications for r kept weights; G is read, and not copied. The paper
    sums the updates of single weights instead, each of which takes the other removed weights to
    be still there.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.pruning import obs_update
    >>> gradients, mask = np.array([[1.0, 1.0]]), np.array([True, False])
    >>> obs_update(np.array([1.0, 1.0]), gradients, mask, damping=1.0)
    array([1.5, 0. ])
    """
    rows, w = _arguments(weights, gradients)
    kept = _mask_argument(mask, len(w))
    fisher = _fisher(rows, damping, block_size)
    fisher.restrict(kept)
    return send(fisher.joint(w), rows.like, weights.dtype)


def prune(
    weights: Array,
    gradients: Any,
    *,
    sparsity: float | Sequence[float] | None = None,
    pattern: str | int | None = None,
    mask: Array | None = None,
    layers: Sequence[int] | None = None,
    damping: float,
    block_size: int | Sequence[int] | None = None,
    stages: int = 16,
    update: str = "joint",
    loss: Callable[[Array], float] | None = None,
    progress: bool = False,
) -> PrunedWeights:
    """Choose weights to remove, in stages, and update the kept ones.

    Parameters
    ----------
    weights : array, shape (d,)
        Real floating, of the gradients' library and device. Not written to.
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`~mfac_core.InverseFisher` takes.
    sparsity : float or sequence of float, optional
        Share of weights removed in the end, in [0, 1): over all weights, or one for each of
        ``layers``. May be left out for an "N:M" pattern, which has its own.
    pattern : str or int, optional
        "N:M" keeps N of every M adjacent weights; an int k removes k adjacent weights together,
        by their joint saliency ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q. By default single weights are removed.
    mask : array of bool, shape (d,), optional
        True where a weight is kept so far; what is removed stays so.
    layers : sequence of int, optional
        Lengths that sum to d, for sparsities by layer.
    damping : float
        λ > 0.
    block_size : int or sequence of int, optional
        Use the diagonal blocks of F of these lengths; by default the whole of F. With far fewer
        rows than d the blocks, say of 64 to 128 weights, are usually the better model.
    stages : int, default 16
        Number of stages, by equal ratios of the weights kept; each chooses by the inverse Fisher
        of the weights that are left.
    update : {"joint", "independent"}, default "joint"
        The exact joint update, or the paper's sum of the updates of single weights.
    loss : callable, optional
        From a weight vector to a number. The result is then the best of several candidates under
        it: parts of the joint update, joint updates under larger damping, the independent update
        in one step, and the mask alone, so that it is never worse than any of these.
    progress : bool, default False
        Show a bar over the stages, where tqdm is installed.

    Returns
    -------
    PrunedWeights
        ``weights``, ``mask`` and ``loss_increase``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, d not divisible by the pattern, or the sparsity below
        what the mask already has.

    Notes
    -----
    A stage that starts from r kept weights costs about 2·r·m² multiplications, for the masked
    Gram and the diagonal, and a few passes over G. The joint update is always that of the given
    weights for the mask of the stage: stages differ from one shot in the choice of weights alone.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.pruning import prune
    >>> rng = np.random.default_rng(0)
    >>> gradients, weights = rng.standard_normal((20, 8)), rng.standard_normal(8)
    >>> pruned = prune(weights, gradients, pattern="2:4", damping=0.1)
    >>> pruned.mask.reshape(2, 4).sum(axis=1)
    array([2, 2])
    """
    rows, w = _arguments(weights, gradients)
    if update not in ("joint", "independent"):
        msg = f"update must be 'joint' or 'independent', got {update!r}"
        raise ValueError(msg)
    stages = check.integer(stages, "stages", minimum=1)
    units = units_of(pattern, len(w))
    kept = np.ones(len(w), dtype=np.bool_) if mask is None else _mask_argument(mask, len(w))
    if sparsity is None and isinstance(units, AdjacentUnits):
        sparsity = 1.0 - units.n / units.m
    bounds, budgets = _budgets(sparsity, layers, len(w))
    owner = np.searchsorted(bounds, units.members[:, 0], side="right") - 1
    stays = []
    for layer, budget in enumerate(budgets):
        size = int((owner == layer).sum())
        now = int(units.kept(kept)[owner == layer].sum())
        stay = size - round(budget * size)
        if stay > now:
            msg = (
                f"sparsity {budget} must not be below what mask already has, "
                f"{1 - now / size:.4f}; raise it or leave the mask out"
            )
            raise ValueError(msg)
        stays.append(schedule(now, stay, stages))
    fisher = _fisher(rows, damping, block_size)

    current = np.where(kept, w, 0.0)
    fisher.restrict(kept)
    if not kept.all() and update == "joint":
        current = fisher.joint(w)
    for stage in track(range(stages), "pruning") if progress else range(stages):
        smaller, saliencies = kept, units.saliencies(current, fisher)
        for layer, counts in enumerate(stays):
            smaller = remove_lowest(units, saliencies, smaller, owner == layer, counts[stage])
        if update == "joint":
            fisher.restrict(smaller)
            current = fisher.joint(w)
        else:
            current = _independent(current, kept, smaller, fisher)
            fisher.restrict(smaller)
        kept = smaller

    if loss is not None:
        current = _best(w, current, kept, rows, fisher, damping, block_size, loss, weights)
    increase = 0.5 * fisher.quadratic(current - w)
    xp = array_namespace(weights)
    return PrunedWeights(
        send(current, rows.like, weights.dtype), send(kept, rows.like, xp.bool), increase
    )


def _independent(weights: Vector, kept: Mask, smaller: Mask, fisher: KeptFisher) -> Vector:
    """Return w − Σ_s (w_s/[F⁻¹]_ss) F⁻¹e_s, with the removed weights set to zero."""
    diagonal = np.where(kept, fisher.diagonal(), 1.0)
    removed = kept & ~smaller
    update = fisher.apply(np.where(removed, weights / diagonal, 0.0))
    return np.where(smaller, weights - update, 0.0)


def _best(
    w: Vector,
    current: Vector,
    kept: Mask,
    rows: Rows,
    fisher: KeptFisher,
    damping: float,
    block_size: int | Sequence[int] | None,
    loss: Callable[[Array], float],
    weights: Array,
) -> Vector:
    """Return the candidate of lowest loss."""
    alone = np.where(kept, w, 0.0)
    candidates = [alone]
    for ridge in (1.0, *RIDGES):
        target = current
        if ridge != 1.0:
            stronger = _fisher(rows, ridge * damping, block_size)
            stronger.restrict(kept)
            target = stronger.joint(w)
        candidates += [alone + step * (target - alone) for step in STEPS]
    everything = np.ones_like(kept)
    fisher.restrict(everything)
    candidates.append(_independent(w, everything, kept, fisher))
    fisher.restrict(kept)
    losses = [float(loss(send(candidate, rows.like, weights.dtype))) for candidate in candidates]
    finite = [value if np.isfinite(value) else np.inf for value in losses]
    return candidates[int(np.argmin(finite))]


def _fisher(rows: Rows, damping: float, block_size: int | Sequence[int] | None) -> KeptFisher:
    damping = check.damping(damping)
    sizes = None if block_size is None else check.block_sizes(block_size, rows.shape[1])
    return KeptFisher(rows, damping, sizes)


def _arguments(weights: Array, gradients: Any) -> tuple[Rows, Vector]:
    rows = rows_of(gradients)
    weights = check.vector_argument(weights, "weights", rows.shape[1])
    check.beside(weights, "weights", rows.like)
    w = to_numpy(weights).astype(np.float64)
    if not np.isfinite(w).all():
        msg = f"weights must be finite, got {int((~np.isfinite(w)).sum())} NaN or infinities"
        raise ValueError(msg)
    return rows, w


def _mask_argument(mask: Any, d: int) -> Mask:
    kept = np.asarray(mask) if isinstance(mask, (list, tuple)) else to_numpy(mask)
    if kept.dtype != np.bool_ or kept.shape != (d,):
        msg = (
            f"mask must be boolean of shape ({d},), True where a weight is kept, "
            f"got dtype {kept.dtype} and shape {kept.shape}"
        )
        raise ValueError(msg)
    return np.array(kept)


def _budgets(
    sparsity: Any, layers: Sequence[int] | None, d: int
) -> tuple[np.ndarray[Any, Any], list[float]]:
    """Return where layers start, and the sparsity of each."""
    if sparsity is None:
        msg = "sparsity must be given, unless pattern is 'N:M'"
        raise ValueError(msg)
    single = not isinstance(sparsity, Sequence) and getattr(sparsity, "ndim", 0) == 0
    values = [sparsity] if single else list(sparsity)
    for value in values:
        if not 0.0 <= check.finite_number(value, "sparsity") < 1.0:
            msg = f"sparsity must be in [0, 1), got {value!r}"
            raise ValueError(msg)
    lengths = [d] if layers is None else [check.integer(n, "layers", minimum=1) for n in layers]
    if sum(lengths) != d:
        msg = f"layers must sum to the number of weights {d}, got {sum(lengths)}"
        raise ValueError(msg)
    if single:
        return np.array([0]), [float(values[0])]
    if len(values) != len(lengths):
        msg = f"sparsity must be one number or one for each of {len(lengths)} layers"
        raise ValueError(msg)
    return np.cumsum([0, *lengths[:-1]]), [float(value) for value in values]
