"""M-FAC under data parallelism, its window spread over the ranks.

Run ``torchrun --nproc-per-node 2 examples/ranks/torch_zero.py``. Every rank computes gradients of
its own samples, which DistributedDataParallel averages. ZeroRedundancyOptimizer gives each rank
some of the parameters to optimise; ``reduce`` makes one window of theirs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector
from torch_gloo import reduce

from mfac_core.torch import MFAC

OPTIONS = {"lr": 1e-2, "window_size": 8, "momentum": 0.9}


def network() -> torch.nn.Module:
    """Return the same small network on every rank."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1))


def compare() -> None:
    """Take a few steps over ranks and the same on one, and print how far they are apart."""
    rank, size = dist.get_rank(), dist.get_world_size()
    alone, model = network(), DistributedDataParallel(network())
    ordinary = MFAC(alone.parameters(), **OPTIONS)
    spread = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=MFAC, reduce=reduce, **OPTIONS
    )
    for _ in range(20):
        x = torch.randn(8 * size, 20)  # every rank draws everything, to compare
        y = x[:, :1].square()
        mine = slice(rank * 8, (rank + 1) * 8)
        for net, optimizer, samples in ((alone, ordinary, slice(None)), (model, spread, mine)):
            optimizer.zero_grad()
            mse_loss(net(x[samples]), y[samples]).backward()
            optimizer.step()
    expected = parameters_to_vector(alone.parameters())
    difference = parameters_to_vector(model.parameters()) - expected
    error = (torch.linalg.norm(difference) / torch.linalg.norm(expected)).item()
    held = spread.optim.window.num_params
    print(f"rank {rank} of {size}: {held} columns, relative error {error:.1e}", flush=True)


def main() -> None:
    """Compare, between setting the ranks up and leaving them."""
    dist.init_process_group("gloo")
    compare()  # whose models are gone before the group that they communicate by
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
