"""Pruning step by step, with fresh gradients for each step and training in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, array_namespace, send
from mfac_core._operators.online import BlockFisher
from mfac_core._ops import blocks as ops
from mfac_core._progress import track
from mfac_core._rows.base import Reduce
from mfac_core._rows.protocol import AnyGradients
from mfac_core._rows.storage import rows_of
from mfac_core._typing import AnyArray, ArrayT, BlockSize, Damping, GivenT, Layers, Scope, Update
from mfac_core.pruning._arguments import mask_argument
from mfac_core.pruning._layers import LayerShare
from mfac_core.pruning._prune import PrunedWeights, prune


class _Step(NamedTuple, Generic[ArrayT]):
    step: int
    sparsity: float
    weights: ArrayT
    mask: Any
    loss_increase: float


class GradualStep(_Step[ArrayT]):
    """The state after a step of :func:`gradual`: a tuple of five, with a report beside it.

    Attributes
    ----------
    step : int
        Number of steps done.
    sparsity : float
        Share of the weights that are removed.
    weights : array, shape (d,)
        The new weights, after fine-tuning, zero where removed.
    mask : array of bool, shape (d,)
        True where a weight is kept.
    loss_increase : float
        What the quadratic model predicts for this step, before fine-tuning.
    layers : tuple of LayerShare
        What is left of each layer, as :class:`PrunedWeights` has it.
    damping : float
        λ of this step.
    """

    layers: tuple[LayerShare, ...] = ()
    damping: float = math.nan


def gradual(
    weights: GivenT,
    gradients: Callable[[GivenT, Any], AnyGradients | BlockFisher],
    *,
    sparsity: Sequence[float] | Sequence[Sequence[float]],
    pattern: str | int | AnyArray | None = None,
    mask: AnyArray | None = None,
    layers: Layers | None = None,
    damping: Damping,
    block_size: BlockSize | None = None,
    stages: int = 1,
    update: Update = "joint",
    loss: Callable[[GivenT], float] | None = None,
    finetune: Callable[[GivenT, Any], GivenT] | None = None,
    start: int = 0,
    scope: Scope = "layer",
    floor: float = 0.0,
    reduce: Reduce | None = None,
    progress: bool = False,
) -> Iterator[GradualStep[GivenT]]:
    """Prune step by step, each step by the gradients at the weights that are left.

    Parameters
    ----------
    weights : array, shape (d,)
        Real floating. Not written to.
    gradients : callable
        Called with the current weights and mask before each step; returns the gradients there,
        one per row, of any storage that :func:`prune` takes.
    sparsity : sequence of float
        Share of weights removed after each step, in [0, 1), never falling: such as
        :func:`polynomial_schedule` and :func:`exponential_schedule` return. With ``layers`` each
        may be a sequence of one share for each of them.
    pattern : str, int or array of int, shape (d,), optional
        See :func:`prune`.
    mask : array of bool, shape (d,), optional
        True where a weight is kept so far; what is removed stays so.
    layers : sequence of int or of tuple of int, optional
        See :func:`prune`.
    damping : float or "auto"
        λ > 0; or what :func:`prune` chooses, anew at every step.
    block_size : int or sequence of int, optional
        See :func:`prune`.
    stages : int, default 1
        Number of stages within a step, on the same gradients.
    update : {"joint", "independent"}, default "joint"
        See :func:`prune`.
    loss : callable, optional
        See :func:`prune`.
    finetune : callable, optional
        Called with the weights and mask after each step; returns the trained weights. What it
        does to removed weights is undone.
    start : int, default 0
        Number of steps already done.
    scope : {"layer", "global"}, default "layer"
        See :func:`prune`.
    floor : float, default 0.0
        See :func:`prune`.
    reduce : callable, optional
        See :func:`prune`.
    progress : bool, default False
        Show a bar over the steps, where tqdm is installed.

    Returns
    -------
    iterator of GradualStep
        The state after each step. To go on after an interruption pass its ``weights``, ``mask``
        and ``step`` as ``weights``, ``mask`` and ``start``. They are all there is: what follows
        is then the same to the last bit, if the callables return the same.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or what a callable returns does not fit the weights.

    Notes
    -----
    A step costs what :func:`prune` costs, and the callables. Arrays that were handed out are not
    written to later.

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.pruning import gradual, polynomial_schedule
    >>> rng = np.random.default_rng(0)
    >>> inputs, weights = rng.standard_normal((30, 8)), rng.standard_normal(8)
    >>> def gradients(weights, mask):
    ...     return inputs * np.sin(weights)
    >>> for state in gradual(
    ...     weights, gradients, sparsity=polynomial_schedule(0.75, steps=3), damping=0.1
    ... ):
    ...     print(state.step, state.sparsity)
    1 0.5
    2 0.75
    3 0.75
    """
    check.function_argument(gradients, "gradients", "the weights and their mask")
    if finetune is not None:
        check.function_argument(finetune, "finetune", "the weights and their mask")
    weights = check.array_argument(weights, "weights")
    if weights.ndim != 1:
        msg = f"weights must have shape (d,), got {tuple(weights.shape)}"
        raise ValueError(msg)
    d = int(weights.shape[0])
    shares = _shares_argument(sparsity)
    if check.integer(start, "start", minimum=0) > len(shares):
        msg = f"start must be at most the number of steps {len(shares)}, got {start}"
        raise ValueError(msg)
    home = ops.home(weights)
    boolean = array_namespace(weights).bool
    kept = home.xp.ones(d, dtype=home.xp.bool, device=home.device)
    if mask is not None:
        kept = mask_argument(mask, d, home)

    def steps() -> Iterator[GradualStep[GivenT]]:
        now, left = weights, send(kept, weights, boolean)
        numbers = range(start, len(shares))
        for number in track(numbers, "gradual pruning") if progress else numbers:
            rows = gradients(now, left)
            columns = rows.shape[1] if isinstance(rows, BlockFisher) else rows_of(rows).shape[1]
            if columns != d:
                msg = f"gradients must return rows of {d} columns, one a weight, got {columns}"
                raise ValueError(msg)
            pruned = prune(
                now,
                rows,
                sparsity=shares[number],
                pattern=pattern,
                mask=left,
                layers=layers,
                damping=damping,
                block_size=block_size,
                stages=stages,
                update=update,
                loss=loss,
                scope=scope,
                floor=floor,
                reduce=reduce,
            )
            now, left = pruned.weights, pruned.mask
            if finetune is not None:
                now = _tuned(finetune(now, left), now, left)
            yield _step(number + 1, now, pruned)

    return steps()


def _step(number: int, weights: Array, pruned: PrunedWeights) -> GradualStep:
    sizes, kept = (sum(n) for n in zip(*((s.size, s.kept) for s in pruned.layers), strict=True))
    step = GradualStep(number, 1.0 - kept / sizes, weights, pruned.mask, pruned.loss_increase)
    step.layers, step.damping = pruned.layers, pruned.damping
    return step


def polynomial_schedule(sparsity: float, steps: int, *, initial: float = 0.0) -> list[float]:
    """Return sparsities that rise fast at first and slowly in the end.

    Parameters
    ----------
    sparsity : float
        The last of them, in [0, 1).
    steps : int
        How many.
    initial : float, default 0.0
        The sparsity before the first step.

    Returns
    -------
    list of float
        s_t = s + (s₀ − s)(1 − t/n)³ for t = 1, …, n; the cubic schedule of Zhu and Gupta, "To
        prune, or not to prune" (2017).

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or ``initial`` above ``sparsity``.

    Examples
    --------
    >>> from mfac_core.pruning import polynomial_schedule
    >>> polynomial_schedule(0.8, steps=2)
    [0.7, 0.8]
    """
    first, last, left = _ends(sparsity, steps, initial)
    return _rising([last + (first - last) * share**3 for share in left], last)


def exponential_schedule(sparsity: float, steps: int, *, initial: float = 0.0) -> list[float]:
    """Return sparsities under which each step removes the same share of what is left.

    Parameters
    ----------
    sparsity : float
        The last of them, in [0, 1).
    steps : int
        How many.
    initial : float, default 0.0
        The sparsity before the first step.

    Returns
    -------
    list of float
        s_t = 1 − (1 − s₀)((1 − s)/(1 − s₀))^(t/n) for t = 1, …, n.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or ``initial`` above ``sparsity``.

    Examples
    --------
    >>> from mfac_core.pruning import exponential_schedule
    >>> exponential_schedule(0.75, steps=2)
    [0.5, 0.75]
    """
    first, last, left = _ends(sparsity, steps, initial)
    ratio = (1.0 - last) / (1.0 - first)
    return _rising([1.0 - (1.0 - first) * ratio ** (1.0 - share) for share in left], last)


def _ends(sparsity: float, steps: int, initial: float) -> tuple[float, float, list[float]]:
    """Return the first and the last sparsity, and 1 − t/n for t = 1, …, n."""
    first = check.finite_number(initial, "initial")
    last = check.finite_number(sparsity, "sparsity")
    if not 0.0 <= first <= last < 1.0:
        msg = f"sparsity must be in [0, 1), and initial from 0 to it, got {last} and {first}"
        raise ValueError(msg)
    count = check.integer(steps, "steps", minimum=1)
    return first, last, [1.0 - (step + 1) / count for step in range(count)]


def _rising(shares: list[float], last: float) -> list[float]:
    """Undo the rounding that lets neighbours fall, or the end be another."""
    return [*sorted(min(share, last) for share in shares[:-1]), last]


def _shares_argument(sparsity: Any) -> list[Any]:
    """Return the sparsity after each step, each a number or a list by layer."""
    try:
        shares = np.asarray(list(sparsity), dtype=np.float64)
    except (TypeError, ValueError):
        shares = np.empty(0)
    if shares.ndim not in (1, 2) or not shares.size:
        msg = (
            "sparsity must be a sequence of the sparsity after each step, such as "
            f"polynomial_schedule(0.9, steps=10), got {sparsity!r}"
        )
        raise TypeError(msg)
    if not (np.all((shares >= 0.0) & (shares < 1.0)) and np.all(np.diff(shares, axis=0) >= 0.0)):
        msg = f"sparsity must be in [0, 1) and never fall from step to step, got {sparsity!r}"
        raise ValueError(msg)
    return list(shares.tolist())


def _tuned(tuned: Any, weights: Array, mask: Array) -> Array:
    """Check what fine-tuning returned, and return it with the removed weights zero."""
    name = "the result of finetune"
    tuned = check.vector_argument(tuned, name, int(weights.shape[0]))
    check.beside(tuned, name, weights)
    xp = array_namespace(weights)
    return xp.where(mask, xp.astype(tuned, weights.dtype), xp.zeros_like(weights))
