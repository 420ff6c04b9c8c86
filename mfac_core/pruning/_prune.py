"""Saliencies, updates, and the choice of weights in stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, send
from mfac_core._operators.base import SymmetricOperator
from mfac_core._progress import track
from mfac_core._rows.base import Rows
from mfac_core._rows.storage import rows_of
from mfac_core.pruning import _trust
from mfac_core.pruning._arguments import mask_argument, vector_argument
from mfac_core.pruning._budgets import weights_to_stay
from mfac_core.pruning._kept import Vector
from mfac_core.pruning._model import QuadraticModel
from mfac_core.pruning._patterns import groups_of, schedule


class PrunedWeights(NamedTuple):
    """What pruning returns.

    Attributes
    ----------
    weights : array, shape (d,)
        The new weights, zero where removed; of the given weights' library, dtype and device.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    loss_increase : float
        ½ δᵀFδ of the whole change δ, with a gradient g gᵀδ + ½ δᵀFδ: the rise of the loss that
        the model predicts. With g it may be negative, down to −½ gᵀF⁻¹g where nothing is removed.
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
    gradient: Array | None = None,
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
    gradient : array, shape (d,), optional
        g, the mean gradient of the loss at ``weights``, where they are not at a minimum; for
        rows that are gradients of the loss of one sample each, the mean of the rows.

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
    rows = rows_of(gradients)
    model = _model(rows, weights, gradient, damping, block_size)
    model.restrict(mask_argument(mask, rows.shape[1]))
    return send(model.optimum(), rows.like, weights.dtype)


def prune(
    weights: Array,
    gradients: Any,
    *,
    sparsity: float | Sequence[float] | None = None,
    pattern: str | int | Array | None = None,
    mask: Array | None = None,
    layers: Sequence[int] | None = None,
    damping: float,
    block_size: int | Sequence[int] | None = None,
    gradient: Array | None = None,
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
        ``layers``. May be left out for an "N:M" pattern, which has its own. Where whole groups
        go, the nearest share that they allow.
    pattern : str, int or array of int, shape (d,), optional
        "N:M" keeps N of every M adjacent weights. An array of labels removes all weights of one
        label together, such as a row or a filter, and never those with a negative label, such as
        biases; an int k is short for labels of k adjacent weights each. Groups go by the least
        joint saliency ½ w_Qᵀ([F⁻¹]_QQ)⁻¹w_Q, divided by their number of weights. By default
        single weights are removed.
    mask : array of bool, shape (d,), optional
        True where a weight is kept so far; what is removed stays so.
    layers : sequence of int, optional
        Lengths that sum to d, for sparsities by layer.
    damping : float
        λ > 0.
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
        what the mask already has or above what the pattern allows.

    Notes
    -----
    A stage that leaves r weights costs r·m² multiplications for the diagonal, m³/3 for a
    Cholesky factor, up to r·m² for the masked Gram, and a few passes over G. In float64 the Gram
    comes from that of the stage before by taking off what was removed, where this is less: p·m²
    for p weights. A group of k weights costs the lesser of k²·m and m³ more. In blocks of B
    weights a stage costs r·B², and the blocks d·B·m once.

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
    stages = check.integer(stages, "stages", minimum=1)
    rows = rows_of(gradients)
    d = rows.shape[1]
    groups = groups_of(pattern, d)
    kept = np.ones(d, dtype=np.bool_) if mask is None else mask_argument(mask, d)
    plan = [
        (layer, schedule(int(kept[layer].sum()), stay, stages))
        for layer, stay in weights_to_stay(sparsity, layers, groups, kept)
    ]
    model = _model(rows, weights, gradient, damping, block_size)

    model.restrict(kept)
    current = model.optimum() if update == "joint" else model.newton(model.alone())
    for stage in track(range(stages), "pruning") if progress else range(stages):
        saliencies = groups.saliencies(current, kept, model.fisher)
        for layer, stays in plan:
            kept = groups.remove(saliencies, kept, layer, stays[stage])
        if update == "independent":
            current = model.without(current, kept)
        model.restrict(kept)
        if update == "joint":
            current = model.optimum()

    def beside(x: Vector) -> Array:
        return send(x, rows.like, weights.dtype)

    if loss is not None:
        current = _trust.lowest(model, current, lambda x: loss(beside(x)))
    xp = array_namespace(weights)
    return PrunedWeights(beside(current), send(kept, rows.like, xp.bool), model.change(current))


def _model(
    rows: Rows,
    weights: Array,
    gradient: Array | None,
    damping: float,
    block_size: int | Sequence[int] | None,
) -> QuadraticModel:
    w = vector_argument(weights, "weights", rows)
    g = None if gradient is None else vector_argument(gradient, "gradient", rows)
    damping = check.damping(damping)
    sizes = None if block_size is None else check.block_sizes(block_size, len(w))
    return QuadraticModel(rows, w, g, damping, sizes)
