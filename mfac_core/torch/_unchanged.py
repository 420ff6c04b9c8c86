"""A model that comes back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged(
    model: torch.nn.Module, *, except_for: Iterable[Tensor] = ()
) -> Iterator[Callable[[], None]]:
    """Undo in the end what running a model changes, but for values of parameters.

    These are the modes of its modules, its buffers and other tensors that modules hold, the
    parameters' ``grad`` and ``requires_grad``, and the state of the random number generators.
    Yields a function that does the same for buffers and held tensors at once: what comes
    next starts from the same state. The buffers ``except_for`` are left as they become.
    """
    left = {id(buffer) for buffer in except_for}
    held = [_Held(module, left) for module in model.modules()]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore() -> None:
        with torch.no_grad():
            for each in held:
                each.restore()

    with torch.random.fork_rng(_cuda_devices(model)):
        try:
            yield restore
        finally:
            restore()
            for each in held:
                each.module.training = each.training
            for p, flag, grad in flags:
                p.requires_grad_(flag)
                p.grad = grad


def _cuda_devices(model: torch.nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


class _Held:
    """What one module holds: tensors that a forward pass may write to or replace."""

    def __init__(self, module: torch.nn.Module, left: set[int]) -> None:
        self.module, self.training = module, module.training
        self._buffers = {
            name: (buffer, buffer.detach().clone())
            for name, buffer in module._buffers.items()
            if buffer is not None and id(buffer) not in left
        }
        self._tensors = self._plain_tensors()
        # Recurrent layers list their weights once more.
        self._lists = [
            (value, list(value))
            for value in vars(module).values()
            if isinstance(value, list) and any(isinstance(x, torch.Tensor) for x in value)
        ]

    def restore(self) -> None:
        buffers = self.module._buffers
        for name, (buffer, value) in self._buffers.items():
            buffers[name] = buffer
            # By value: batch normalisation writes past the tensor's count of versions. Not
            # always: a graph of the caller's may need the buffer as it is.
            if not torch.equal(buffer, value):
                buffer.copy_(value)
        for name in self._plain_tensors().keys() - self._tensors.keys():
            del vars(self.module)[name]
        vars(self.module).update(self._tensors)
        for value, before in self._lists:
            value[:] = before

    def _plain_tensors(self) -> dict[str, Tensor]:
        return {k: x for k, x in vars(self.module).items() if isinstance(x, torch.Tensor)}
