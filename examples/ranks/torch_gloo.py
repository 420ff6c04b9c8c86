"""Gradients spread over torch.distributed ranks: each holds some columns.

Run ``torchrun --nproc-per-node 2 examples/ranks/torch_gloo.py``. With NCCL only ``reduce``
changes: it moves the small array to the rank's GPU and back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import mfac_core as mfac

M, D = 64, 30_000


def reduce(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Sum a small array over ranks; with NCCL: ``torch.from_numpy(x).cuda()``, and ``.cpu()``."""
    total = torch.from_numpy(x)
    dist.all_reduce(total)
    return total.numpy()


def main() -> None:
    """Compare a product over ranks with the same on one."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)  # every rank draws everything, to compare
    gradients = torch.randn(M, D, generator=generator)
    x = torch.randn(D, generator=generator)
    mine = slice(rank * D // size, (rank + 1) * D // size)

    inverse = mfac.InverseFisher(gradients[:, mine], damping=1e-3, reduce=reduce)
    expected = (mfac.InverseFisher(gradients, damping=1e-3) @ x)[mine]
    error = float(torch.linalg.norm(inverse @ x[mine] - expected) / torch.linalg.norm(expected))
    print(f"rank {rank} of {size}: relative error {error:.1e}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
