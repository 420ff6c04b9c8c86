"""What goes into the layers of a model and comes back to them: the factors of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from mfac_core.torch._factors import Factor, Full, Lookup, is_smaller_outer, outer

Found: TypeAlias = dict[str, Callable[[], Factor]]
"""Gradients by parameter, each to be computed if it is wanted."""


@dataclass
class Call:
    """One use of a module in a forward pass."""

    module: nn.Module
    input: Tensor
    back: Tensor = field(default=None)
    """What comes back to its output."""


class Recorder:
    """Records the calls of the modules that hold some parameters.

    Parameters
    ----------
    model : torch.nn.Module
        The model.
    columns : mapping of str to torch.nn.Parameter
        The parameters that matter, by name.
    """

    def __init__(self, model: nn.Module, columns: Mapping[str, Tensor]) -> None:
        names = {id(p): name for name, p in columns.items()}
        self.owned = {
            module: owned
            for module in model.modules()
            if (
                owned := {
                    local: names[id(p)]
                    for local, p in module._parameters.items()
                    if p is not None and id(p) in names
                }
            )
        }
        """The modules that hold them, with their names there and in all."""

        self.stops_gradients = any(
            getattr(module, "padding_idx", None) is not None for module in self.owned
        )
        """Whether what goes backward is less than the derivative: that of padding is left out."""

    @contextmanager
    def recording(self) -> Iterator[tuple[list[Call], set[str]]]:
        """Yield the list of calls of a forward pass, and the names that calls do not explain.

        What comes back to them is there after the backward pass.
        """
        calls: list[Call] = []
        lost: set[str] = set()

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            known = len(arguments) == 1 and isinstance(arguments[0], torch.Tensor)
            if not known or not isinstance(output, torch.Tensor):
                lost.update(self.owned[module].values())
                return
            call = Call(module, arguments[0].detach())
            calls.append(call)
            if output.requires_grad:
                # Of the output as it is now: what follows may write to it.
                output.register_hook(lambda back: setattr(call, "back", back.detach()))

        handles = [module.register_forward_hook(hook) for module in self.owned]
        try:
            yield calls, lost
        finally:
            for handle in handles:
                handle.remove()

    def factors(
        self, call: Call, rows: int, values: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Factor]]:
        """Yield the gradients of a call by its module's parameters, with their names."""
        module, x, back = call.module, call.input, call.back
        owned = self.owned[module]
        if len(x) % rows or len(back) % rows:
            raise NotByRowsError
        found: Found
        if type(module).forward is nn.Linear.forward:
            a, b = x.reshape(rows, -1, x.shape[-1]), back.reshape(rows, -1, back.shape[-1])
            found = {"weight": partial(outer, a, b), "bias": lambda: Full(b.sum(1))}
        elif _is_plain_table(module):
            b = back.reshape(rows, -1, back.shape[-1])
            index = x.reshape(rows, -1)
            if module.padding_idx is not None:
                b = b * (index != module.padding_idx)[..., None]
            found = {"weight": partial(Lookup, index, b, module.num_embeddings)}
        elif _is_plain_convolution(module) and _is_by_places(module, back, rows):
            found = _of_places(module, x, back, rows)
        else:
            found = _of_module(module, owned, values, x, back, rows)
        for local, name in owned.items():
            yield name, found[local]()


class NotByRowsError(ValueError):
    """What a module is given is not one part for each row."""


def _is_plain_table(module: Any) -> bool:
    return (
        type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )


def _is_plain_convolution(module: Any) -> bool:
    return (
        type(module).forward is nn.Conv2d.forward
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_by_places(module: Any, back: Tensor, rows: int) -> bool:
    """Whether inputs at every place are smaller than the kernel's gradients."""
    places = len(back) // rows * back.shape[2] * back.shape[3]
    inputs = module.in_channels * module.kernel_size[0] * module.kernel_size[1]
    return is_smaller_outer(places, inputs, module.out_channels)


def _of_places(module: Any, x: Tensor, back: Tensor, rows: int) -> Found:
    """Return a convolution's gradients as those of a linear layer at each of its places."""
    options = module.kernel_size, module.dilation, module.padding, module.stride
    a = functional.unfold(x, *options).mT.reshape(rows, -1, module.weight[0].numel())
    b = back.flatten(2).mT.reshape(rows, -1, back.shape[1])
    return {"weight": partial(outer, a, b), "bias": lambda: Full(b.sum(1))}


def _of_module(
    module: nn.Module,
    owned: Mapping[str, str],
    values: Mapping[str, Tensor],
    x: Tensor,
    back: Tensor,
    rows: int,
) -> Found:
    """Return any module's gradients, by running it backward once more, on each row by itself."""
    mine = {local: values[name].detach() for local, name in owned.items()}
    wide = next(iter(mine.values())).dtype
    rest = {
        name: t.detach().to(wide) if t.is_floating_point() else t
        for name, t in (*module.named_parameters(), *module.named_buffers())
        if name not in mine
    }

    def of_row(x: Tensor, back: Tensor) -> dict[str, Tensor]:
        def run(values: dict[str, Tensor]) -> Tensor:
            state = {**rest, **values}
            return torch.func.functional_call(module, state, (x,), tie_weights=False)

        _, pull = torch.func.vjp(run, mine)
        return pull(back)[0]  # type: ignore[no-any-return]

    xs, backs = (t.reshape(rows, len(t) // rows, *t.shape[1:]) for t in (x, back))
    found = torch.func.vmap(of_row)(xs, backs)
    return {local: partial(Full, g.flatten(1)) for local, g in found.items()}
