"""Parameters of which each rank has a part: DTensors, and the flat ones of FSDP's first version.

Elements that several ranks have are counted by one of them, so that sums over ranks are those of
one process.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mfac_core._rows.base import Reduce


def is_dtensor(x: Any) -> bool:
    """Whether x is a DTensor; importing their module would take most of a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP's first version has made p a flat part of parameters, or a view of one."""
    return bool(getattr(p, "_fsdp_flattened", False))


def local(x: Tensor) -> Tensor:
    """Return what this rank has of x."""
    return x.to_local() if is_dtensor(x) else x


def as_pairs(x: Tensor) -> Tensor:
    """Return x, complex numbers as pairs of real ones: a view with a last dimension of 2."""
    return torch.view_as_real(x) if x.is_complex() else x


def local_gradient(p: Tensor) -> Tensor:
    """Return what this rank has of p's gradient, spread as p is."""
    g = p.grad
    if is_dtensor(g):
        if g.placements != p.placements:
            g = g.redistribute(placements=p.placements)
        return g.to_local()
    return g


def whole(part: Tensor, p: Tensor) -> Tensor:
    """Return all of what this rank has a part of, as it does of p."""
    return vector_like(part, p).full_tensor() if is_dtensor(p) else part


def rows_like(rows: Tensor, p: Tensor) -> Tensor:
    """Return rows of this rank's elements, (m, ...), as rows of p: a DTensor where p is one."""
    if not is_dtensor(p):
        return rows
    return _global(rows, p, (rows.shape[0], *p.shape), [_behind(x) for x in p.placements])


def vector_like(part: Tensor, p: Tensor) -> Tensor:
    """Return this rank's elements as those of p: a DTensor where p is one."""
    return _global(part, p, tuple(p.shape), p.placements) if is_dtensor(p) else part


def units_like(inverse: Tensor, p: Tensor) -> Tensor:
    """Return this rank's units' inverses, (u, k, k), as those of p: a DTensor where p is one."""
    if not is_dtensor(p):
        return inverse
    shape = (p.shape[0] if p.ndim > 1 else 1, *inverse.shape[1:])
    return _global(inverse, p, shape, _of_units(p))


def local_units(inverse: Tensor, p: Tensor) -> Tensor:
    """Return this rank's units of the inverses of p, however these are spread."""
    return _local_of(inverse, p, _of_units(p) if is_dtensor(p) else [])


def length_of_units(p: Tensor) -> tuple[int | None, Tensor | None]:
    """Return the length of p's units on all ranks, if it is known, and which elements are here."""
    if is_flattened(p):
        return None, None
    shape = as_pairs(p).shape if p.is_complex() else p.shape
    rest = shape[1:] if len(shape) > 1 else shape
    if not is_dtensor(p) or not _groups(p, None, of_units=True):
        return rest.numel(), None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    here, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    slices = [slice(a, a + n) for a, n in zip(offset, here, strict=True)][-len(rest) :]
    numbers = torch.arange(rest.numel(), device=local(p).device).view(rest)
    return rest.numel(), numbers[tuple(slices)].flatten()


def _of_units(p: Tensor) -> list[Any]:
    """Return the placements of what p has one of for each unit."""
    from torch.distributed.tensor import Replicate

    whole = [x.is_replicate() or x.dim != 0 or p.ndim < 2 for x in p.placements]
    return [Replicate() if w else x for w, x in zip(whole, p.placements, strict=True)]


def local_rows(rows: Tensor, p: Tensor) -> Tensor:
    """Return this rank's elements of rows of p, however these are spread."""
    return _local_of(rows, p, [_behind(x) for x in p.placements] if is_dtensor(p) else [])


def local_vector(x: Tensor, p: Tensor) -> Tensor:
    """Return this rank's elements of a vector like p, however it is spread."""
    return _local_of(x, p, list(p.placements) if is_dtensor(p) else [])


def _local_of(x: Tensor, p: Tensor, placements: list[Any]) -> Tensor:
    if not is_dtensor(p):
        return x.full_tensor() if is_dtensor(x) else x
    if is_dtensor(x):
        if x.device_mesh != p.device_mesh or list(x.placements) != placements:
            x = x.redistribute(p.device_mesh, placements)
        return x.to_local()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(x.shape, p.device_mesh, placements)
    return x[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]


def _behind(placement: Any) -> Any:
    """Return the placement of what has the rows' dimension in front."""
    if placement.is_replicate():
        return placement
    more = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + 1, **more)


def _global(x: Tensor, p: Tensor, shape: tuple[int, ...], placements: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        x, p.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


class Sharding:
    """How parameters are spread over ranks, and sums over these.

    Parameters
    ----------
    params : sequence of torch.Tensor
        The parameters, in the same order on all ranks of a mesh.
    reduce : callable, optional
        A sum over ranks besides those that the parameters know of.

    Raises
    ------
    NotImplementedError
        If meshes overlap other than as dimensions of one mesh.
    """

    def __init__(self, params: Sequence[Tensor], reduce: Reduce | None) -> None:
        self._reduce = reduce
        owned = [_groups(p, reduce) for p in params]
        self._groups = {ranks: group for groups in owned for ranks, group in groups.items()}
        _check_orthogonal(list(self._groups))
        first = {ranks: dist.get_rank(group) == 0 for ranks, group in self._groups.items()}
        self.counted = [
            all(first[ranks] for ranks in self._groups if ranks not in groups) for groups in owned
        ]
        """Whether this rank counts a parameter's elements."""
        self._device = next(
            (local(p).device for p, groups in zip(params, owned, strict=True) if groups), None
        )
        self._flattened = [reduce is not None and is_flattened(p) for p in params]
        self.cuts = self._find_cuts(params)
        """Numbers of the parameters whose units are cut over the same ranks, and the sum there."""

    @property
    def alone(self) -> bool:
        """Whether nothing is summed."""
        return not self._groups and self._reduce is None

    @property
    def replicates(self) -> bool:
        """Whether other ranks count some of this one's elements."""
        return not all(self.counted)

    @property
    def reduce(self) -> Reduce | None:
        """Sum of an array over all ranks that have columns of the window."""
        return None if self.alone else self._sum_array

    def _find_cuts(self, params: Sequence[Tensor]) -> list[tuple[list[int], Any]]:
        numbers: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, p in enumerate(params):
            ranks = tuple(_groups(p, self._reduce, of_units=True))
            if ranks or self._flattened[i]:
                numbers.setdefault(ranks, []).append(i)
        return [(cut, self._sum_over(ranks)) for ranks, cut in numbers.items()]

    def _sum_over(self, ranks: tuple[tuple[int, ...], ...]) -> Any:
        def by_reduce(x: Tensor) -> Tensor:
            assert self._reduce is not None
            found = self._reduce(np.array(x.double().cpu().numpy()))
            return torch.from_numpy(np.asarray(found)).to(x)

        return functools.partial(self._sum, over=ranks) if ranks else by_reduce

    def _sum_array(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if self._groups:
            x = self._sum(torch.from_numpy(x)).numpy()
        return x if self._reduce is None else np.asarray(self._reduce(x))

    def _sum(self, x: Tensor, over: Sequence[tuple[int, ...]] | None = None) -> Tensor:
        """Sum over the dimensions of the meshes, or some of them, one after the other."""
        there = x.to(self._device)
        for ranks in self._groups if over is None else over:
            dist.all_reduce(there, group=self._groups[ranks])
        return there.to(x.device)

    def sums(self, x: Tensor) -> Tensor:
        """Sum numbers for each parameter, (k, P), over the ranks that have parts of it."""
        if self._groups:
            return self._sum(x * x.new_tensor(self.counted))
        return self.totals(x)[0] if any(self._flattened) else x

    def totals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`sums`, and those of all parameters of all ranks, (k,)."""
        if self._groups:
            x = self._sum(x * x.new_tensor(self.counted))
        if self._reduce is None:
            return x, x.sum(dim=1)
        cut = torch.tensor(self._flattened, dtype=torch.bool, device=x.device)
        mine = torch.cat([x[:, ~cut].sum(dim=1, keepdim=True), x[:, cut]], dim=1)
        found = torch.from_numpy(np.asarray(self._reduce(np.array(mine.cpu().numpy()))))
        found = found.to(x.device)
        x = x.clone()
        x[:, cut] = found[:, 1:]
        return x, found.sum(dim=1)


def _groups(
    p: Tensor, reduce: Reduce | None, *, of_units: bool = False
) -> dict[tuple[int, ...], Any]:
    """Return the process groups over which p is cut, or its units are, by their ranks."""
    groups: list[Any] = []
    if is_dtensor(p):
        if any(x.is_partial() for x in p.placements):
            msg = f"MFAC needs parameters that are sharded or replicated, got {p.placements}"
            raise NotImplementedError(msg)
        mesh = p.device_mesh
        cut = [i for i, x in enumerate(p.placements) if not x.is_replicate() and mesh.size(i) > 1]
        if of_units and p.ndim > 1:
            cut = [i for i in cut if p.placements[i].dim != 0]
        groups = [mesh.get_group(i) for i in cut]
    elif is_flattened(p) and reduce is None and dist.get_world_size() > 1:
        groups = [dist.group.WORLD]
    return {tuple(dist.get_process_group_ranks(group)): group for group in groups}


def _check_orthogonal(groups: list[tuple[int, ...]]) -> None:
    for i, ranks in enumerate(groups):
        for others in groups[:i]:
            if len(set(ranks) & set(others)) > 1:
                msg = (
                    "MFAC needs parameters that are sharded along dimensions of one mesh, got "
                    f"some over ranks {list(others)} and some over ranks {list(ranks)}; give "
                    "each kind an optimizer of its own"
                )
                raise NotImplementedError(msg)
