"""Which parameters of a model are meant, by name, pattern, predicate or as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mfac_core import _validate as check

Choice: TypeAlias = "str | Tensor | Iterable[str | Tensor] | Callable[[str, Tensor], bool]"
"""Names, patterns or parameters, one or many, or a predicate on (name, parameter)."""

COMPILED = "_orig_mod"
"""Where ``torch.compile`` keeps the module that it wraps."""


def bare(model: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside ``torch.compile`` and ``DistributedDataParallel``."""
    if not isinstance(model, torch.nn.Module):
        msg = f"model must be a torch.nn.Module, got {type(model).__name__}"
        raise TypeError(msg)
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif COMPILED in getattr(model, "_modules", {}):
            model = model._modules[COMPILED]
        else:
            return model


def with_gradient(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require a gradient, each once, by name."""
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not chosen:
        msg = (
            "model must have a parameter that requires a gradient, got none; set requires_grad, "
            "or name the parameters with parameters="
        )
        raise ValueError(msg)
    return chosen


def chosen(model: torch.nn.Module, parameters: Choice, argument: str) -> dict[str, Tensor]:
    """Return the parameters that are meant, each once, by name, in the model's order.

    A pattern, with the wildcards of :mod:`fnmatch`, is held against a parameter's name and those
    of the modules that it is in; every one must fit something.
    """
    names = dict(model.named_parameters(remove_duplicate=False))
    if callable(parameters) and not isinstance(parameters, torch.Tensor):
        wanted = {id(p) for name, p in names.items() if parameters(name, p)}
    else:
        single = isinstance(parameters, (str, torch.Tensor))
        if not single:
            check.iterable_argument(parameters, argument, "parameters, names or patterns")
        wanted = set()
        for choice in [parameters] if single else parameters:
            wanted |= _meant(choice, names, argument)
    found = {name: p for name, p in model.named_parameters() if id(p) in wanted}
    if not found:
        msg = f"{argument} must choose at least one parameter of the model, and chose none"
        raise ValueError(msg)
    for name, p in found.items():
        if not p.is_floating_point():
            msg = f"{argument} must choose real floating parameters, got {name!r} of {p.dtype}"
            raise TypeError(msg)
    return found


def fits(name: str, pattern: str) -> bool:
    """Tell whether a pattern fits a parameter's name or that of a module that it is in."""
    pattern = pattern.replace(f"{COMPILED}.", "")
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(len(parts), 0, -1))


def _meant(choice: Any, names: Mapping[str, Tensor], argument: str) -> set[int]:
    if isinstance(choice, torch.Tensor):
        if not any(choice is p for p in names.values()):
            shape = tuple(choice.shape)
            msg = f"{argument} must hold parameters of the model, got a tensor of shape {shape}"
            raise ValueError(msg)
        return {id(choice)}
    if not isinstance(choice, str):
        msg = (
            f"{argument} must be parameters, names, patterns such as 'layer1.*', or a function "
            f"of (name, parameter), got {type(choice).__name__}"
        )
        raise TypeError(msg)
    found = {id(p) for name, p in names.items() if fits(name, choice)}
    if not found:
        some = ", ".join(list(names)[:4])
        msg = f"{argument} {choice!r} fits no parameter of the model, which has {some}, ..."
        raise ValueError(msg)
    return found


PRUNABLE = (
    torch.nn.Linear,
    torch.nn.Bilinear,
    torch.nn.modules.conv._ConvNd,
    torch.nn.Embedding,
    torch.nn.EmbeddingBag,
    torch.nn.RNNBase,
    torch.nn.modules.rnn.RNNCellBase,
    torch.nn.MultiheadAttention,
)
"""Layers whose weights are pruned unless somebody says which."""


def prunable(model: torch.nn.Module, *, embeddings: bool = True) -> dict[str, Tensor]:
    """Return the weights, and no biases, of the usual layers that are not frozen, by name."""
    tables = () if embeddings else (torch.nn.Embedding, torch.nn.EmbeddingBag)
    wanted = {
        id(p)
        for module in model.modules()
        if isinstance(module, PRUNABLE) and not isinstance(module, tables)
        for attribute, p in module._parameters.items()
        if p is not None and "weight" in attribute and p.ndim > 1 and p.requires_grad
    }
    return {name: p for name, p in model.named_parameters() if id(p) in wanted}


def in_places(model: torch.nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what is to stand in every place of parameters and buffers, for values by name.

    Each module once: where ``functional_call`` ties weights itself, it leaves its own values behind
    in a module that has two names.
    """
    named = (*model.named_parameters(), *model.named_buffers())
    known = {id(x): values[name] for name, x in named if name in values}
    places = {}
    for prefix, module in model.named_modules():
        for local, x in (*module._parameters.items(), *module._buffers.items()):
            if x is not None and id(x) in known:
                places[f"{prefix}.{local}" if prefix else local] = known[id(x)]
    return places
