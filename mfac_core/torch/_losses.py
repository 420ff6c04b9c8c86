"""Losses of a model as functions of its parameters, and whether every pass sees the same ones."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mfac_core._rows.passes import difference
from mfac_core._validate import NonFiniteError
from mfac_core.torch import _batches
from mfac_core.torch._gradients import Loss, bar, common_dtype
from mfac_core.torch._parameters import in_places
from mfac_core.torch._unchanged import unchanged

Values = Mapping[str, Tensor]

MODEL = "model"
"""Name of the attribute that the model is here."""


class Losses(torch.nn.Module):  # type: ignore[misc]
    """The losses of all rows, batch by batch, with other values in the place of parameters.

    Parameters
    ----------
    model : torch.nn.Module
        Comes back as it was from every pass.
    loss_fn : callable
        From model and batch to a scalar or a vector of losses.
    batches : iterable
        The same ones in every pass.
    columns : mapping of str to torch.nn.Parameter
        The parameters that are differentiated by, by name.
    wide : bool
        Whether all that is floating, of the model and of the batches, is taken to float64.
    progress : bool
        Whether passes show a bar.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        columns: Values,
        *,
        wide: bool,
        progress: bool,
    ) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn
        self._batches, self._columns = batches, columns
        self._wide, self._progress = wide, progress
        self._passes = 0
        self._versions = self._counts_of_writes()
        self.recorded = torch.zeros(0, dtype=torch.float64)
        self.slices: list[slice] = []
        self._record()

    def forward(self, batch: Any) -> Tensor:
        """Return the losses of a batch; ``torch.func.functional_call`` puts the values in place."""
        return self.loss_fn(self.model, batch)

    def values(self) -> dict[str, Tensor]:
        """Return the parameters' values as they are now, by name, in the dtype of the passes."""
        return {name: self._cast(p.detach()) for name, p in self._columns.items()}

    def leaves(self) -> dict[str, Tensor]:
        """Return the values as tensors that gradients can be taken by."""
        return {n: v.clone().requires_grad_() for n, v in self.values().items()}

    def rows(self, values: Values, batch: Any) -> Tensor:
        """Return the losses of a batch, one a row, for values of the parameters."""
        losses = torch.func.functional_call(self, self._state(values), (batch,), tie_weights=False)
        if not isinstance(losses, torch.Tensor) or losses.ndim > 1 or losses.is_complex():
            got = tuple(losses.shape) if isinstance(losses, torch.Tensor) else type(losses).__name__
            msg = (
                "loss_fn(model, batch) must return a scalar, a row for the batch, or a "
                f"vector, a row for each of its losses, got {got}"
            )
            raise TypeError(msg)
        return losses.reshape(-1)

    def _state(self, values: Values) -> dict[str, Tensor]:
        """Return what is to stand in every place of the model and of ``loss_fn``."""
        chosen = {f"{MODEL}.{name}": values[name] for name in self._columns}
        others = dict(self.named_parameters()) if self._wide else {}
        others |= dict(self.named_buffers())  # are written to: of their own for each call
        fixed = {n: self._cast(x.detach()).clone() for n, x in others.items() if n not in chosen}
        return in_places(self, fixed | chosen)

    def each(self, start: int = 0) -> Generator[tuple[int, slice, Any]]:
        """Yield batches from one on, with the rows they are; checked for their number.

        Random numbers differ from pass to pass, so that nothing depends on them unnoticed.
        """
        self._passes += 1
        device = next(iter(self._columns.values())).device
        done = -1
        with unchanged(self.model) as restore, sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(self._passes)
            found = bar(self._batches, _batches.number_of(self._batches), self._progress)
            for done, batch in enumerate(found):
                if done >= len(self.slices):
                    break
                if done >= start:
                    batch = _batches.moved(batch, device)
                    batch = _batches.widened(batch) if self._wide else batch
                    yield done, self.slices[done], batch
                    restore()
        if done + 1 != len(self.slices):
            msg = f"batches must be the same in every pass, got {len(self.slices)} and then others"
            raise RuntimeError(msg)

    def check(self, at: slice, losses: Tensor, batch: Any) -> None:
        """Raise where the losses of a batch are not those of the first pass; says why."""
        now, then = _recorded(losses), self.recorded[at]
        if len(now) == len(then) and self._same(now, then):
            return
        was = difference(at, now.numpy(), self.recorded.numpy())
        msg = f"batches must give the same losses in every pass, {was}: {self._why(now, batch)}"
        raise RuntimeError(msg)

    def _same(self, now: Tensor, then: Tensor) -> bool:
        scale = self.recorded.abs().mean()
        return bool(((now - then).abs() <= self.tolerance() * (then.abs() + scale)).all())

    def tolerance(self) -> float:
        """Return the difference that rounding may make, relative: half of the digits."""
        dtype = torch.float64 if self._wide else common_dtype(self._columns.values())
        return float(torch.finfo(dtype).eps ** 0.5)

    def _why(self, now: Tensor, batch: Any) -> str:
        if self._counts_of_writes() != self._versions:
            return "the model has been changed since; make a new ModelGradients of it"
        random = [name or "model" for name, m in self.model.named_modules() if _is_random(m)]
        if random:
            return f"dropout is in training mode in {', '.join(random[:3])}; call model.eval()"
        if batch is None:
            return "the passes in float64 and in the model's own dtype differ"
        with torch.no_grad():
            again = [_recorded(self.rows(self.values(), batch)) for _ in range(2)]
        if len(again[0]) != len(again[1]) or not self._same(*again):
            return "the model or loss_fn is not deterministic; two calls with one batch differ"
        known = (now[:, None] - self.recorded).abs().amin(1)
        if self._same(known, torch.zeros_like(known)):
            return "they come in another order; pass shuffle=False to the DataLoader"
        return "the data differ; use no random augmentation, and no random sampling"

    def _record(self) -> None:
        device = next(iter(self._columns.values())).device
        found: list[Tensor] = []
        start = 0
        with unchanged(self.model) as restore, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            torch.manual_seed(self._passes)
            total = _batches.number_of(self._batches)
            for batch in bar(self._batches, total, self._progress):
                batch = _batches.moved(batch, device)
                batch = _batches.widened(batch) if self._wide else batch
                losses = _recorded(self.rows(self.values(), batch))
                if not bool(torch.isfinite(losses).all()):
                    msg = f"losses must be finite, got NaN or infinity in batch {len(found)}"
                    raise NonFiniteError(msg)
                self.slices.append(slice(start, start + len(losses)))
                start += len(losses)
                found.append(losses)
                restore()
        if not start:
            msg = "batches must hold at least one batch with a loss, got none"
            raise ValueError(msg)
        self.recorded = torch.cat(found)

    def _cast(self, x: Tensor) -> Tensor:
        return x.double() if self._wide and x.is_floating_point() else x

    def _counts_of_writes(self) -> list[int]:
        return [p._version for p in self.model.parameters()]


def _recorded(losses: Tensor) -> Tensor:
    return losses.detach().double().cpu()


def _is_random(module: torch.nn.Module) -> bool:
    rate = module.p if isinstance(module, torch.nn.modules.dropout._DropoutNd) else 0.0
    if isinstance(module, (torch.nn.MultiheadAttention, torch.nn.RNNBase)):
        rate = module.dropout
    return module.training and rate > 0.0


def backward(
    losses: Tensor,
    leaves: Values,
    weights: Tensor,
    *,
    keep: bool = False,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of the weighted losses, None for parameters without one."""
    if not losses.requires_grad:
        msg = "loss_fn must return losses that depend on the chosen parameters"
        raise ValueError(msg)
    return torch.autograd.grad(  # type: ignore[no-any-return]
        losses,
        list(leaves.values()),
        weights,
        retain_graph=keep or create_graph,
        create_graph=create_graph,
        allow_unused=True,
    )
