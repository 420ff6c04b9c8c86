"""Saliencies, updates, and the choice of weights in stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, Home, array_namespace, send
from mfac_core._operators.base import SymmetricOperator
from mfac_core._operators.online import BlockFisher
from mfac_core._ops import blocks as ops
from mfac_core._progress import track
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.protocol import AnyGradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import AnyArray, ArrayT, BlockSize, Damping, GivenT, Layers, Scope, Update
from mfac_core._warn import warn
from mfac_core.pruning import _trust
from mfac_core.pruning._arguments import chosen_damping, mask_argument, vector_argument
from mfac_core.pruning._budgets import budgets
from mfac_core.pruning._kept import Mask, Vector
from mfac_core.pruning._layers import Layer, LayerShare, layers_argument
from mfac_core.pruning._model import QuadraticModel
from mfac_core.pruning._patterns import Budget, Pattern, pattern_of, schedule

WORTH_SAYING = 0.25
"""Share of the weights that were to go from which on it is said that groups let none."""


class _Pruned(NamedTuple, Generic[ArrayT]):
    weights: ArrayT
    mask: Any
    loss_increase: float


class PrunedWeights(_Pruned[ArrayT]):
    """What pruning returns: a tuple of three, with a report beside it.

    Attributes
    ----------
    weights : array, shape (d,)
        The new weights, zero where removed; of the given weights' library, dtype and device.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    loss_increase : float
        ½ δᵀFδ of the whole change δ, with a gradient g gᵀδ + ½ δᵀFδ: the rise of the loss that
        the model predicts. With g it may be negative, down to −½ gᵀF⁻¹g where nothing is removed.
        Over ranks that of all.
    layers : tuple of LayerShare
        What is left of each layer, in order; of all weights where no ``layers`` were given.
    damping : float
        λ, as given or chosen.
    """

    layers: tuple[LayerShare, ...] = ()
    damping: float = math.nan


def saliency(
    weights: GivenT, inverse: SymmetricOperator, *, reduce: Reduce | None = None
) -> GivenT:
    """Return wᵢ² / (2 [F⁻¹]ᵢᵢ): the rise of the loss when weight i alone is removed.

    The other weights are taken to move to their best values. This is the saliency of the optimal
    brain surgeon (Hassibi and Stork, 1992), which the M-FAC paper prunes by.

    Parameters
    ----------
    weights : array, shape (d,)
        Of the gradients' library and device.
    inverse : InverseFisher, BlockInverseFisher or SlidingInverseFisher
        The inverse Fisher matrix.
    reduce : callable, optional
        For weights that are spread over ranks, where ``inverse`` was made with it: the saliencies
        of a rank's weights need no other rank, but all of them must be finite.

    Returns
    -------
    array, shape (d,)
        One number for each weight, none negative.

    Raises
    ------
    TypeError, ValueError
        If ``weights`` does not fit the operator.

    Notes
    -----
    For weights that are not at a minimum, where the mean gradient of the loss is g, pass
    ``weights - inverse @ g``: removing weight i alone then raises the lowest value of the model
    gᵀδ + ½ δᵀFδ by this much.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> from mfac_core.pruning import saliency
    >>> inverse = mfac.InverseFisher(np.array([[1.0, 0.0]]), damping=1.0)
    >>> saliency(np.array([1.0, 1.0]), inverse)
    array([1. , 0.5])
    """
    if not isinstance(inverse, SymmetricOperator):
        msg = (
            "inverse must be an operator, such as InverseFisher(gradients, damping=λ), got "
            f"{type(inverse).__name__}"
        )
        raise TypeError(msg)
    w = check.vector_argument(weights, "weights", inverse.shape[0])
    check.beside(w, "weights", inverse._like())
    scores: GivenT = w * w / (2.0 * inverse.diagonal())
    if reduce is not None:
        wrong = not bool(array_namespace(scores).all(array_namespace(scores).isfinite(scores)))
        if float(reduce(np.array([float(wrong)]))[0]):
            msg = "weights must be finite on every rank, and on one or more they are not"
            raise ValueError(msg)
    return scores


def obs_update(
    weights: GivenT,
    gradients: AnyGradients | BlockFisher,
    mask: AnyArray,
    *,
    damping: Damping,
    block_size: BlockSize | None = None,
    gradient: AnyArray | None = None,
    reduce: Reduce | None = None,
) -> GivenT:
    """Remove weights, and change the kept ones to the joint optimum of the quadratic model.

    Parameters
    ----------
    weights : array, shape (d,)
        Real floating, of the gradients' library and device.
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`~mfac_core.InverseFisher` takes; or a
        :class:`~mfac_core.BlockFisher`, the sums of gradients that were not stored.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    damping : float or "auto"
        λ > 0; or that of :func:`~mfac_core.choose_damping` for these gradients and blocks, not of a
        :class:`~mfac_core.BlockFisher`.
    block_size : int or sequence of int, optional
        Use the diagonal blocks of F of these lengths; by default the whole of F.
    gradient : array, shape (d,), optional
        g, the mean gradient of the loss at ``weights``, where they are not at a minimum; for
        rows that are gradients of the loss of one sample each, the mean of the rows.
    reduce : callable, optional
        For weights that are spread over ranks, no block across two of them: sums a float64 NumPy
        array over ranks.

    Returns
    -------
    array, shape (d,)
        w_R + G_Rᵀ A_R⁻¹ G_S w_S at the kept weights R, with A_R = mλI + G_R G_Rᵀ; zero elsewhere.
        With a gradient, F_RR⁻¹g_R less.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form.

    Notes
    -----
    d·m + r·m² + m³/3 multiplications for r kept weights; G is read, and not copied. The paper
    sums the updates of single weights instead, each of which takes the other removed weights to
    be still there.

    The result is the minimum of gᵀδ + ½ δᵀFδ over the changes δ with δ_S = −w_S, where the
    derivative by δ_R is zero: g_R + F_RR δ_R − F_RS w_S = 0. It is also the update without g of
    u = w − F⁻¹g, Newton's step, since gᵀδ + ½ δᵀFδ = ½ (w + δ − u)ᵀF(w + δ − u) − ½ gᵀF⁻¹g.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.pruning import obs_update
    >>> gradients, mask = np.array([[1.0, 1.0]]), np.array([True, False])
    >>> obs_update(np.array([1.0, 1.0]), gradients, mask, damping=1.0)
    array([1.5, 0. ])
    """
    rows = _rows_argument(gradients, block_size, reduce)
    model = _model(rows, weights, gradient, damping, block_size)
    model.restrict(mask_argument(mask, rows.shape[1], model.home))
    new: GivenT = send(model.optimum()[0], weights, weights.dtype)
    return new


def prune(
    weights: GivenT,
    gradients: AnyGradients | BlockFisher,
    *,
    sparsity: float | Sequence[float] | None = None,
    pattern: str | int | AnyArray | None = None,
    mask: AnyArray | None = None,
    layers: Layers | None = None,
    damping: Damping,
    block_size: BlockSize | None = None,
    gradient: AnyArray | None = None,
    stages: int = 16,
    update: Update = "joint",
    loss: Callable[[GivenT], float] | None = None,
    scope: Scope = "layer",
    floor: float = 0.0,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> PrunedWeights[GivenT]:
    """Choose weights to remove, in stages, and update the kept ones.

    Parameters
    ----------
    weights : array, shape (d,)
        Real floating, of the gradients' library and device. Not written to.
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), or sliceable
        One gradient per row, of any storage that :class:`~mfac_core.InverseFisher` takes; or a
        :class:`~mfac_core.BlockFisher`, the sums of gradients that were not stored.
    sparsity : float or sequence of float, optional
        Share of weights removed in the end, in [0, 1): over all weights, or one for each of
        ``layers``. May be left out for an "N:M" pattern, which has its own. Where whole groups
        go, the nearest share that they allow.
    pattern : str, int or array of int, shape (d,), optional
        "N:M" keeps N of every M adjacent weights: along axis 1, the input channels that sparse
        tensor cores read, where ``layers`` has shapes, and what M leaves over there is not
        pruned. An array of labels removes all weights of one
        label together, such as a row or a filter, and never those with a negative label, such as
        biases; an int k is short for labels of k adjacent weights each. Groups go by the least
        joint saliency ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q, divided by their number of weights. By default
        single weights are removed.
    mask : array of bool, shape (d,), optional
        True where a weight is kept so far; what is removed stays so.
    layers : sequence of int or of tuple of int, optional
        Lengths or shapes of the layers, in all d weights. Each then has a budget of its own, or a
        floor, see ``scope``; no group may lie across two. One-dimensional shapes, those of biases
        and norms, are never pruned.
    damping : float or "auto"
        λ > 0; or that of :func:`~mfac_core.choose_damping` for the gradients of the weights that
        are kept so far and for these blocks, not of a :class:`~mfac_core.BlockFisher`.
    block_size : int or sequence of int, optional
        Use the diagonal blocks of F of these lengths; by default the whole of F. On small networks,
        with 20 to 1,500 weights for each row, blocks of about 1,000 were level with it or ahead,
        under a smaller λ. In a transformer's layers, with 6,900, blocks of 32 were far ahead: over
        so many weights the saliency ranks nearly as the magnitude does.
    gradient : array, shape (d,), optional
        g, the mean gradient of the loss at ``weights``, where they are not at a minimum. The
        kept weights then take Newton's step as well, see :func:`obs_update`.
    stages : int, default 16
        Number of stages, by equal ratios of the weights kept; each chooses by the inverse Fisher
        of the weights that are left.
    update : {"joint", "independent"}, default "joint"
        The exact joint update, or the paper's sum of the updates of single weights.
    loss : callable, optional
        From a weight vector to a number. The result is then the best of several candidates under
        it: parts of the joint update, joint updates under larger damping, the independent update
        in one step, and the mask alone, so that it is never worse than any of these.
    scope : {"layer", "global"}, default "layer"
        Whether one ``sparsity`` is that of each of ``layers`` or of all of them together. Without
        ``layers`` there is one.
    floor : float, default 0.0
        Share of each of ``layers`` that is kept at least; one weight is, whatever this says.
    reduce : callable, optional
        For weights that are spread over ranks, no block, group or layer across two of them: sums a
        float64 NumPy array over ranks. Without ``layers``, or with ``scope="global"``, weights
        are ranked over all ranks, and those of equal saliency go together.
    progress : bool, default False
        Show a bar over the stages and the gradients, where tqdm is installed.

    Returns
    -------
    PrunedWeights
        ``weights``, ``mask`` and ``loss_increase``; and ``layers``, what is left of each, and
        ``damping``.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, d not divisible by the pattern, a group across layers,
        or the sparsity below what the mask already has or above what the pattern allows.

    Warns
    -----
    UserWarning
        If groups are so large that nothing is removed, where a quarter or more was to go.
    scipy.linalg.LinAlgWarning
        If λ is so small that float64 has few digits left of the inverse.

    Notes
    -----
    A stage that leaves r weights costs r·m² multiplications for the diagonal, m³/3 for a
    Cholesky factor, up to r·m² for the masked Gram, and a few passes over G. In float64 the Gram
    comes from that of the stage before by taking off what was removed, where this is less: p·m²
    for p weights. A group of k weights costs the lesser of k²·m and m³ more. In blocks of B
    weights a stage reads the gradients once, and costs r·m·min(m, r_b), with r_b what is left of
    a block; where B ≤ m the blocks are kept from stage to stage, up to 256 MB. Beside the
    gradients there are a few vectors of length d, in float64 and on the gradients' device.

    The joint update is always that of the given weights for the mask of the stage: stages differ
    from one shot in the choice of weights alone.

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
    if update not in ("joint", "independent"):
        msg = f"update must be 'joint' or 'independent', got {update!r}"
        raise ValueError(msg)
    if loss is not None:
        check.function_argument(loss, "loss", "the weights")
    if scope not in ("layer", "global"):
        msg = f"scope must be 'layer' or 'global', got {scope!r}"
        raise ValueError(msg)
    stages = check.integer(stages, "stages", minimum=1)
    floor = check.finite_number(floor, "floor")
    if not 0.0 <= floor <= 1.0:
        msg = f"floor must be a share in [0, 1], got {floor!r}"
        raise ValueError(msg)
    rows = _rows_argument(gradients, block_size, reduce, progress=progress)
    d = rows.shape[1]
    if layers is None:
        scope = "layer" if isinstance(sparsity, Sequence) else "global"
    home = ops.home(rows.like)
    kept = _everything(home, d) if mask is None else mask_argument(mask, d, home)
    model = _model(rows, weights, gradient, damping, block_size, None if mask is None else kept)
    named = layers_argument(layers, d)
    shared = rows.reduce if scope == "global" else None
    groups = pattern_of(pattern, named, home, shared)
    given = kept
    groups.restrict(kept)
    goals = budgets(sparsity, named, groups, kept, scope=scope, floor=floor, reduce=shared)
    plan = [(budget, schedule(_now(groups, kept, budget), budget.stay, stages)) for budget in goals]

    model.restrict(kept)
    current = None if update == "joint" else model.alone()
    numbers = range(stages)
    for stage in track(numbers, "pruning") if progress and stages > 1 else numbers:
        saliencies = model.saliencies(groups, current)
        for budget, stays in plan:
            kept = groups.remove(saliencies, kept, budget._replace(stay=stays[stage]))
        del saliencies
        if current is not None:
            current = model.without(current, kept)
        model.restrict(kept)

    def beside(x: Vector) -> Array:
        return send(x, weights, weights.dtype)

    if current is None:
        current, increase = model.optimum()
    elif loss is None:
        increase = model.change(current)
    if loss is not None:
        current = _trust.lowest(model, current, lambda x: loss(beside(x)))
        increase = model.change(current)
    xp = array_namespace(weights)
    pruned = PrunedWeights(beside(current), send(kept, weights, xp.bool), increase)
    pruned.layers, pruned.damping = _shares(named, groups, kept), model.damping
    _warn_of_nothing(plan, given, kept, groups)
    return pruned


def _everything(home: Home, d: int) -> Array:
    return home.xp.ones(d, dtype=home.xp.bool, device=home.device)


def _now(groups: Pattern, kept: Array, budget: Budget) -> int:
    """Return how many of a budget's weights are kept, of all ranks where it is for all."""
    return round(groups.to_go(kept, budget._replace(stay=0)))


def _shares(layers: list[Layer], groups: Pattern, kept: Array) -> tuple[LayerShare, ...]:
    shares = []
    for layer in layers:
        left = groups.count(kept[layer.part])
        shape = (layer.size,) if layer.shape is None else layer.shape
        share = LayerShare(shape, layer.size, left, 1.0 - left / layer.size, groups.dense(layer))
        shares.append(share)
    return tuple(shares)


def _warn_of_nothing(
    plan: list[tuple[Budget, list[int]]], before: Array, after: Array, groups: Pattern
) -> None:
    """Say so where whole groups allow nothing of what was asked for."""
    for budget, _ in plan:
        now = _now(groups, before, budget)
        wanted = now - budget.stay
        much = wanted > WORTH_SAYING * now
        if much and _now(groups, after, budget) == now:
            where = f"{budget.part.start} to {budget.part.stop - 1}"
            warn(
                f"nothing was removed of the weights {where}, where {wanted} were to go: the "
                "nearest that whole groups allow is none; use smaller groups",
                UserWarning,
            )


def _rows_argument(
    gradients: Any, block_size: Any, reduce: Reduce | None, *, progress: bool = False
) -> Rows | BlockFisher:
    """Check gradients, or sums of them."""
    if not isinstance(gradients, BlockFisher):
        return rows_of(gradients, reduce=reduce, progress=progress)
    gradients.asked()
    if block_size is not None:
        sizes = check.block_sizes(block_size, gradients.shape[1])
        if sizes != gradients.block_sizes:
            msg = "block_size must be that of the BlockFisher, or left out"
            raise ValueError(msg)
    if reduce is not gradients.reduce:
        msg = "reduce must be that of the BlockFisher; give it there"
        raise ValueError(msg)
    return gradients


def _model(
    rows: Rows | BlockFisher,
    weights: GivenT,
    gradient: AnyArray | None,
    damping: Damping,
    block_size: BlockSize | None,
    kept: Mask | None = None,
) -> QuadraticModel:
    """Check what a model is made of; λ is chosen by the kept weights, of all of them by default."""
    w = vector_argument(weights, "weights", rows)
    g = None if gradient is None else vector_argument(gradient, "gradient", rows)
    given = check.damping_or_auto(damping)
    sizes = None if block_size is None else check.block_sizes(block_size, rows.shape[1])
    if given is None:
        given = chosen_damping(rows, sizes, kept)
    return QuadraticModel(rows, w, g, given, sizes)
