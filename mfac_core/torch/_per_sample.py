"""Gradients of single samples of a PyTorch model, as the rows of G."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfac_core import _validate as check

Tensor = Any


def per_sample_gradients(
    model: torch.nn.Module,
    loss_fn: Callable[[Any, Tensor], Tensor],
    inputs: Tensor | tuple[Tensor, ...],
    targets: Tensor,
    chunk_size: int | None = None,
    *,
    samples_per_row: int = 1,
) -> Tensor:
    """Return the gradient of each sample's loss by the model's parameters, one a row.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that require a gradient are the columns, in the order of
        ``model.parameters()``, each flattened as ``torch.nn.utils.parameters_to_vector`` does.
        Parameters, gradients and buffers stay as they are.
    loss_fn : callable
        From the model's output for a batch and its targets to the batch's loss, a scalar: what
        you train with, as a rule ``torch.nn.functional.cross_entropy``.
    inputs : torch.Tensor of shape (n, ...), or tuple of them
        The samples; a tuple is given to the model as several arguments.
    targets : torch.Tensor, shape (n, ...)
        Their targets.
    chunk_size : int, optional
        Rows computed together, which is what their activations cost in memory; all by default.
    samples_per_row : int, default 1
        k: a row is then the gradient of the loss of k samples that follow one another, of their
        mean for a loss that averages. Fewer rows stand for as many samples.

    Returns
    -------
    torch.Tensor, shape (n / samples_per_row, d)
        In the parameters' dtype, on the model's device.

    Raises
    ------
    ValueError
        If the model normalises over the batch (BatchNorm in training mode): a sample then has no
        gradient of its own. If nothing requires a gradient, the lengths of ``inputs`` and
        ``targets`` differ, or ``samples_per_row`` does not divide them.

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
    _refuse_batch_statistics(model)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        msg = "model must have a parameter that requires a gradient, got none"
        raise ValueError(msg)
    per_row = check.integer(samples_per_row, "samples_per_row", minimum=1)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    lengths = {len(x) for x in (*arguments, targets)}
    if len(lengths) > 1 or len(targets) == 0 or len(targets) % per_row:
        msg = (
            "inputs and targets must hold the same number of samples, a multiple of "
            f"samples_per_row {per_row}, got {[len(x) for x in arguments]} and {len(targets)}"
        )
        raise ValueError(msg)
    m = len(targets) // per_row
    chunk = m if chunk_size is None else check.integer(chunk_size, "chunk_size", minimum=1)

    def loss(parameters: dict[str, Tensor], arguments: tuple[Tensor, ...], target: Tensor) -> Any:
        return loss_fn(torch.func.functional_call(model, parameters, arguments), target)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), randomness="different")
    flat = [p.reshape(-1) for p in parameters.values()]
    # Each chunk goes to its rows: joined at the end, they would need the memory of G twice.
    rows = torch.cat([p[:0] for p in flat]).new_empty((m, sum(len(p) for p in flat)))
    batches = [x.reshape(m, per_row, *x.shape[1:]) for x in (*arguments, targets)]
    for start in range(0, m, chunk):
        *xs, y = (batch[start : start + chunk] for batch in batches)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no vectorised form
            parts = gradients(parameters, tuple(xs), y)
        torch.cat([g.flatten(1) for g in parts.values()], 1, out=rows[start : start + chunk])
    return rows


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
