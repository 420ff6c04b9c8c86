"""Where the rows of a step of pruning are kept."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

SHARE = 0.5
"""Part of the free memory that rows may take."""

FILE = "mfac_core-rows.npy"


def out_for(storage: Any, shape: tuple[int, int], dtype: Any, device: Any) -> Any:
    """Return what rows of this shape are written to: a tensor, or the path of a file.

    By default the model's device where they take at most half of its free memory, else the
    host's memory where that holds for it, else a file in the folder for temporary ones.
    """
    size = shape[0] * shape[1] * torch.empty(0, dtype=dtype).element_size()
    if storage is None:
        if device.type != "cuda":
            storage = "device" if size <= SHARE * _free_on_host() else "file"
        elif size <= SHARE * torch.cuda.mem_get_info(device)[0]:
            storage = "device"
        else:
            storage = "host" if size <= SHARE * _free_on_host() else "file"
    if storage == "device":
        return torch.empty(shape, dtype=dtype, device=device)
    if storage == "host":
        return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
    folder = Path(tempfile.gettempdir() if storage == "file" else storage)
    return folder / f"{os.getpid()}-{FILE}"


def check_storage(storage: Any) -> None:
    """Refuse what is neither a place nor a folder."""
    if storage is None or storage in ("device", "host", "file"):
        return
    if not isinstance(storage, (str, os.PathLike)) or not Path(storage).is_dir():
        msg = f"storage must be 'device', 'host', 'file' or a folder, got {storage!r}"
        raise ValueError(msg)


def let_go(rows: Any) -> None:
    """Delete the file of rows that are done with."""
    name = getattr(rows, "filename", None)
    if name is not None:
        Path(name).unlink(missing_ok=True)


def _free_on_host() -> float:
    """Return the memory that can be had without swapping, as far as the system tells."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return 1024.0 * int(available.split()[1])
    except (OSError, StopIteration):
        return float("inf")
