"""Vectors and masks, checked; where they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, Home, array_namespace, is_array_api_obj, to_numpy
from mfac_core._operators.damping import damping_of
from mfac_core._operators.online import BlockFisher
from mfac_core._operators.spectra import Blocks
from mfac_core._rows.base import Rows
from mfac_core._rows.selected import SelectedRows
from mfac_core.pruning._kept import Mask


def vector_argument(x: Array, name: str, rows: Rows | BlockFisher) -> Array:
    """Check a finite vector beside the gradients."""
    x = check.vector_argument(x, name, rows.shape[1])
    check.beside(x, name, rows.like)
    xp = array_namespace(x)
    finite = xp.isfinite(x)
    if not bool(xp.all(finite)):
        wrong = int(xp.sum(xp.astype(~finite, xp.int32)))
        msg = f"{name} must be finite, got {wrong} NaN or infinities"
        raise ValueError(msg)
    return x


def mask_argument(mask: Any, d: int, home: Home) -> Mask:
    """Check a mask of any library, and return a copy in the home of blocks."""
    kept = mask if is_array_api_obj(mask) else np.asarray(mask)
    boolean = str(kept.dtype).rsplit(".", 1)[-1] == "bool"
    if not boolean or tuple(kept.shape) != (d,):
        msg = (
            f"mask must be boolean of shape ({d},), True where a weight is kept, "
            f"got dtype {kept.dtype} and shape {tuple(kept.shape)}"
        )
        raise ValueError(msg)
    if array_namespace(kept) is home.xp:
        return home.xp.asarray(kept, copy=True, device=home.device)
    return home.xp.asarray(np.array(to_numpy(kept)), device=home.device)


def chosen_damping(
    rows: Rows | BlockFisher, sizes: Sequence[int] | None, kept: Mask | None
) -> float:
    """Choose λ by the gradients of the kept weights; of all of them where None is given."""
    if isinstance(rows, BlockFisher):
        msg = (
            "damping must be a number for a BlockFisher, which no longer knows the rows one by "
            'one, got "auto"; take choose_damping(rows, block_size=...) of some of the rows'
        )
        raise ValueError(msg)
    if kept is None:
        return damping_of(Blocks(rows, sizes))
    mask = to_numpy(kept)
    inside = None
    if sizes is not None:
        starts = np.cumsum([0, *sizes[:-1]])
        inside = [int(n) for n in np.add.reduceat(mask, starts, dtype=np.int64) if n]
    return damping_of(Blocks(SelectedRows(rows, np.flatnonzero(mask)), inside))
