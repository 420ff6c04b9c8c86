"""Gradients of single samples of a PyTorch model, as the rows of G."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfac_core import _validate as check
from mfac_core._typing import Sliceable
from mfac_core._warn import warn
from mfac_core.torch._gradients import (
    columns_of,
    common_dtype,
    refuse_sharded,
    requiring_gradient,
    scalar,
)
from mfac_core.torch._parameters import Choice, bare, in_places
from mfac_core.torch._store import store_for, width
from mfac_core.torch._unchanged import unchanged

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]

CHUNK_BYTES = 1 << 28
"""What the rows of a chunk and their activations may take, as far as can be told beforehand."""

ACTIVATIONS = 64
"""How many times the size of its input the activations of a sample are taken to be."""


OutT = TypeVar("OutT", bound=Sliceable)


@overload
def per_sample_gradients(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Inputs,
    targets: Tensor,
    chunk_size: int | None = None,
    *,
    samples_per_row: int = 1,
    parameters: Choice | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def per_sample_gradients(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Inputs,
    targets: Tensor,
    chunk_size: int | None = None,
    *,
    samples_per_row: int = 1,
    parameters: Choice | None = None,
    out: OutT,
) -> OutT: ...
@overload
def per_sample_gradients(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Inputs,
    targets: Tensor,
    chunk_size: int | None = None,
    *,
    samples_per_row: int = 1,
    parameters: Choice | None = None,
    out: str | Path,
) -> np.memmap[Any, Any]: ...
def per_sample_gradients(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Inputs,
    targets: Tensor,
    chunk_size: int | None = None,
    *,
    samples_per_row: int = 1,
    parameters: Choice | None = None,
    out: Any = None,
) -> Any:
    """Return the gradient of each sample's loss by the model's parameters, one a row.

    Parameters
    ----------
    model : torch.nn.Module
        It comes back as it was: parameters, gradients, ``requires_grad`` and buffers. Every row
        starts from the same buffers.
    loss_fn : callable
        From the model's output for a batch and its targets to the batch's loss, a scalar: what
        you train with, as a rule ``torch.nn.functional.cross_entropy``.
    inputs : torch.Tensor of shape (n, ...), or tuple or mapping of them
        The samples; a tuple is given to the model as several arguments, a mapping as keyword
        arguments.
    targets : torch.Tensor, shape (n, ...)
        Their targets.
    chunk_size : int, optional
        Rows computed together, which is what their activations cost in memory; by default as
        many as take about 256 MiB, with activations of 64 times the size of the inputs.
    samples_per_row : int, default 1
        k: a row is then the gradient of the loss of k samples that follow one another, of their
        mean for a loss that averages. Fewer rows stand for as many samples.
    parameters : optional
        The columns, see :func:`gradient_rows`; by default all parameters that require a gradient,
        in the order of ``model.parameters()``, each flattened as
        ``torch.nn.utils.parameters_to_vector`` does.
    out : tensor, array or path, optional
        Where to write, chunk by chunk, see :func:`gradient_rows`.

    Returns
    -------
    torch.Tensor of shape (n / samples_per_row, d), or ``out``
        In the parameters' dtype, on the model's device.

    Raises
    ------
    ValueError
        If the model normalises over the batch (BatchNorm in training mode): a sample then has no
        gradient of its own. If nothing requires a gradient, the lengths of ``inputs`` and
        ``targets`` differ, or ``samples_per_row`` does not divide them.

    Warns
    -----
    UserWarning
        If the model cannot be vectorised, such as a recurrent one. The rows are then computed
        one after the other, which takes longer.

    Notes
    -----
    By ``torch.func``: one forward and backward pass of the model for each sample, vectorised.
    The model is called on batches of ``samples_per_row``. Dropout, in training mode, draws anew
    for every row.

    Examples
    --------
    >>> import torch
    >>> from mfac_core.torch import per_sample_gradients
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> torch.nn.init.ones_(model.weight)
    Parameter containing:
    tensor([[1., 1.]], requires_grad=True)
    >>> per_sample_gradients(model, torch.nn.functional.mse_loss, x, y)
    tensor([[2., 0.],
            [0., 8.]])
    """
    model = bare(model)
    _refuse_batch_statistics(model)
    columns = columns_of(model, parameters)
    refuse_sharded(columns)
    per_row = check.integer(samples_per_row, "samples_per_row", minimum=1)
    check.function_argument(loss_fn, "loss_fn", "(output, targets)")
    positional, named = _arguments(inputs)
    for name, x in (("inputs", positional), ("inputs", named.values()), ("targets", [targets])):
        for one in x:
            if not isinstance(one, Tensor):
                msg = f"{name} must be of torch.Tensor, got {type(one).__name__}; convert it first"
                raise TypeError(msg)
    lengths = [len(x) for x in (*positional, *named.values())]
    if {*lengths, len(targets)} != {len(targets)} or len(targets) % per_row or not len(targets):
        msg = (
            "inputs and targets must hold the same number of samples, a multiple of "
            f"samples_per_row {per_row}, got {lengths} and {len(targets)}"
        )
        raise ValueError(msg)
    m = len(targets) // per_row
    parts = [x.reshape(m, per_row, *x.shape[1:]) for x in (*positional, *named.values(), targets)]
    chunk = _chunk(chunk_size, parts, columns)
    store, _, dtype = store_for(out, m, width(columns), columns, common_dtype(columns.values()))

    def loss(values: Mapping[str, Tensor], buffers: Mapping[str, Tensor], *batch: Tensor) -> Any:
        *arguments, target = batch
        keywords = dict(zip(named, arguments[len(positional) :], strict=True))
        state = in_places(model, {**values, **buffers})
        inside = tuple(arguments[: len(positional)])
        result = torch.func.functional_call(model, state, inside, keywords, tie_weights=False)
        return loss_fn(result, target)

    vectorised = True
    with unchanged(model) as restore:
        for start in range(store.start, m, chunk):
            batch = [part[start : start + chunk] for part in parts]
            reason = None
            if vectorised:
                try:
                    rows = _vectorised(loss, model, columns, batch)
                except Exception as error:  # no rule for an operation, a branch on values, ...
                    vectorised, reason = False, f"{type(error).__name__}: {error}"
                    restore()
            if not vectorised:
                rows = _one_by_one(loss, columns, batch, restore)
            if reason is not None:  # and the plain loop can
                msg = f"model is run on one row at a time, since it cannot be vectorised: {reason}"
                warn(msg, UserWarning)
            store.write(start, rows.to(dtype))
            restore()
    return store.finish()


def _vectorised(
    loss: Callable[..., Tensor], model: torch.nn.Module, columns: Mapping[str, Tensor], batch: Any
) -> Tensor:
    """Return rows (k, d) for k rows of samples, by ``torch.func``."""
    # Of their own for each chunk: a model may write to its buffers, or put others in their place.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    values = {name: p.detach() for name, p in columns.items()}
    rest = (None, None, *[0] * len(batch))
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=rest, randomness="different")
    # The fused kernels of attention have no vectorised form; where other operations have none,
    # PyTorch warns, and goes through a loop of its own for each of them.
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False):
        warnings.filterwarnings("error", message="There is a performance drop")
        parts = gradients(values, buffers, *batch)
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


def _one_by_one(
    loss: Callable[..., Tensor],
    columns: Mapping[str, Tensor],
    batch: list[Tensor],
    restore: Callable[[], None],
) -> Tensor:
    """Return rows (k, d) for k rows of samples, by a loop of plain autograd."""
    parameters = list(columns.values())
    rows: list[Tensor] = []
    for row in zip(*batch, strict=True):
        with requiring_gradient(parameters):
            value = scalar(loss(columns, {}, *row), len(rows))
            parts = torch.autograd.grad(value, parameters, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
        restore()
    return torch.stack(rows)


def _arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the positional and the keyword arguments of the model."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return inputs if isinstance(inputs, tuple) else (inputs,), {}


def _chunk(size: int | None, parts: list[Tensor], columns: Mapping[str, Tensor]) -> int:
    """Return how many rows to compute together."""
    if size is not None:
        return check.integer(size, "chunk_size", minimum=1)
    gradient: int = sum(p.numel() * p.element_size() for p in columns.values())
    activations: int = ACTIVATIONS * sum(part[0].numel() * part.element_size() for part in parts)
    return max(CHUNK_BYTES // (2 * gradient + activations), 1)


def _refuse_batch_statistics(model: torch.nn.Module) -> None:
    """Refuse modules that mix the samples of a batch, or record what they see of them."""
    for name, module in model.named_modules():
        recorded = getattr(module, "track_running_stats", None)
        mixes = isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not recorded
        if mixes or (recorded and module.training):
            kind = type(module).__name__
            msg = (
                f"model must not normalise over the batch, got {kind} {name!r} with batch "
                "statistics: a sample then has no gradient of its own; call model.eval() to use "
                "its running statistics, or use GroupNorm or LayerNorm"
            )
            raise ValueError(msg)
