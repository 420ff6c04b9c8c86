"""Masks on a model's parameters, by ``torch.nn.utils.prune``.

The parameter ``weight`` becomes ``weight_orig``, the same object, so that an optimiser keeps it,
and ``weight`` the product with the buffer ``weight_mask``, taken anew before every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import prune

from mfac_core.torch._statistics import put_back, saved

READERS = (torch.nn.MultiheadAttention, torch.nn.TransformerEncoderLayer)
"""Modules that read the weights of those in them without calling these."""


class Masked:
    """One parameter, wherever modules hold it.

    Parameters
    ----------
    name : str
        Its name in the model, before there was a mask.
    places : list of (module, str)
        The modules that hold it, and under which name.
    """

    def __init__(self, name: str, places: Sequence[tuple[torch.nn.Module, str]]) -> None:
        self.name, self.places = name, list(places)

    @property
    def parameter(self) -> Tensor:
        """Return the parameter, which holds the weights."""
        module, attribute = self.places[0]
        own = module._parameters
        return own[f"{attribute}_orig"] if f"{attribute}_orig" in own else own[attribute]

    @property
    def kept(self) -> Tensor:
        """Return the mask, bool of the parameter's shape."""
        module, attribute = self.places[0]
        mask = module._buffers.get(f"{attribute}_mask")
        return torch.ones_like(self.parameter, dtype=torch.bool) if mask is None else mask != 0

    @property
    def installed(self) -> bool:
        """Tell whether there is a mask."""
        module, attribute = self.places[0]
        return f"{attribute}_mask" in module._buffers

    def install(self) -> None:
        """Let a mask of ones hold at every place."""
        ones = torch.ones_like(self.parameter)
        for module, attribute in self.places:
            names = list(module._parameters)
            prune.custom_from_mask(module, attribute, ones)
            module._buffers[f"{attribute}_mask"] = ones
            _reorder(module, [f"{n}_orig" if n == attribute else n for n in names])

    def write(self, weights: Tensor, kept: Tensor) -> None:
        """Set the weights, zero where they are not kept, and the mask, in place."""
        with torch.no_grad():
            self._write(weights, kept)

    def _write(self, weights: Tensor, kept: Tensor) -> None:
        parameter = self.parameter
        mask = kept.to(parameter.device).reshape(parameter.shape)
        values = weights.to(parameter).reshape(parameter.shape)
        parameter.copy_(torch.where(mask, values, torch.zeros_like(values)))
        for module, attribute in self.places:
            module._buffers[f"{attribute}_mask"].copy_(mask)
            # Without a graph: the model can be copied and saved before the next forward pass.
            setattr(module, attribute, parameter * module._buffers[f"{attribute}_mask"])

    def remove(self) -> None:
        """Make the mask permanent."""
        for module, attribute in self.places:
            names = list(module._parameters)
            prune.remove(module, attribute)
            _reorder(module, [attribute if n == f"{attribute}_orig" else n for n in names])


def _reorder(module: torch.nn.Module, names: Sequence[str]) -> None:
    """Put a module's parameters in this order.

    ``torch.nn.utils.prune`` puts them last. An optimiser's state, in a checkpoint, goes by their
    order, so that one made before and one made after would not understand each other.
    """
    held = {name: module._parameters[name] for name in names}
    module._parameters.clear()
    module._parameters.update(held)


class Refresh:
    """Before a forward pass, the products with the masks of all that is inside."""

    def __init__(self, places: Sequence[tuple[torch.nn.Module, str]]) -> None:
        self.places = list(places)

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        """Take the products anew."""
        for inner, attribute in self.places:
            own = inner._parameters[f"{attribute}_orig"]
            setattr(inner, attribute, own * inner._buffers[f"{attribute}_mask"])


def masked(model: torch.nn.Module, columns: Mapping[str, Tensor]) -> list[Masked]:
    """Return the parameters with all the places that hold them."""
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {id(p): [] for p in columns.values()}
    for module in model.modules():
        for attribute, p in module._parameters.items():
            if id(p) in places:
                places[id(p)].append((module, attribute))
    return [Masked(name, places[id(p)]) for name, p in columns.items()]


class Masks:
    """The masks of all parameters, which are there together or not at all.

    Parameters
    ----------
    model : torch.nn.Module
        As :func:`bare` returns it.
    columns : mapping
        The parameters by name.
    """

    def __init__(self, model: torch.nn.Module, columns: Mapping[str, Tensor]) -> None:
        self._model = model
        self.parameters = masked(model, columns)
        self._installed = False
        self._readers: list[Any] = []
        self.refuse_others()

    def refuse_others(self) -> None:
        """Refuse parameters that somebody else has put masks on."""
        for each in self.parameters:
            for module, attribute in each.places:
                tensor = attribute.removesuffix("_orig")
                if not self._installed and f"{tensor}_mask" in module._buffers:
                    msg = (
                        f"model must not be pruned by torch.nn.utils.prune already, got a mask of "
                        f"{each.name.removesuffix('_orig')}; make it permanent with "
                        f"torch.nn.utils.prune.remove(module, {tensor!r}), or finalize() the "
                        "Pruner that it is from"
                    )
                    raise ValueError(msg)

    def install(self) -> None:
        """Put masks of ones onto all parameters, once."""
        if self._installed:
            return
        self._installed = True
        for each in self.parameters:
            each.install()
        owned = [place for each in self.parameters for place in each.places]
        for module in self._model.modules():
            inside = {id(m) for m in module.modules() if m is not module}
            places = [place for place in owned if id(place[0]) in inside]
            if places and (module is self._model or isinstance(module, READERS)):
                hook = module.register_forward_pre_hook(Refresh(places), prepend=True)
                self._readers.append(hook)

    def remove(self) -> None:
        """Make the masks permanent."""
        for hook in self._readers:
            hook.remove()
        self._readers = []
        self._installed = False
        for each in self.parameters:
            if each.installed:
                each.remove()

    def removed(self) -> float:
        """Return the share of weights that are removed."""
        size: int = sum(each.parameter.numel() for each in self.parameters)
        return 1.0 - sum(int(each.kept.sum()) for each in self.parameters) / size

    @contextmanager
    def whole_or_not_at_all(self) -> Iterator[None]:
        """Undo all changes to weights, masks and statistics where something fails."""
        weights = [each.parameter.detach().clone() for each in self.parameters]
        kept = [each.kept for each in self.parameters]
        statistics = saved(self._model)
        there = self._installed
        try:
            yield
        except BaseException:
            if not there:
                self.remove()
            for each, w, mask in zip(self.parameters, weights, kept, strict=True):
                if there:
                    each.write(w, mask)
                else:
                    with torch.no_grad():
                        each.parameter.copy_(w)
            put_back(statistics)
            raise


def semi_structured(each: Masked) -> Tensor:
    """Return the weights in PyTorch's 2:4 form, or say why they cannot be."""
    weight = each.parameter.detach() * each.kept
    try:
        return torch.sparse.to_sparse_semi_structured(weight)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        msg = (
            f"{each.name} of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device} cannot "
            f"be converted: {error}; finalize() without semi_structured, or move the model to a "
            "GPU in 16 bits first"
        )
        raise RuntimeError(msg) from error
