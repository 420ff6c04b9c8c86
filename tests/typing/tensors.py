# pyright: standard
"""The same with PyTorch."""

from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.pruning import prune
from mfac_core.torch import MFAC, ModelGradients, Pruner, gradient_rows, prune_model

G, model = torch.ones(3, 4), torch.nn.Linear(4, 1)


def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


inverse = mfac.InverseFisher(G, damping=1e-3)
assert_type(inverse, mfac.InverseFisher[Tensor])
assert_type(inverse @ G[0], Tensor)
assert_type(mfac.ihvp(G, G[0], damping=1), Tensor)
assert_type(Influence(G, damping=1).scores(G), Tensor)
assert_type(prune(G[0], G, sparsity=0.5, damping=1).weights, Tensor)
assert_type(gradient_rows(model, loss, [G]), Tensor)
assert_type(gradient_rows(model, loss, [G], out="rows.npy"), np.memmap[Any, Any])
assert_type(
    mfac.InverseFisher(ModelGradients(model, loss, [G]), damping=1), mfac.InverseFisher[Tensor]
)
optimizer = MFAC(model.parameters(), 1e-2)
assert_type(optimizer.window, mfac.SlidingInverseFisher[Tensor] | None)
assert_type(optimizer.step(lambda: G[0, 0]), Tensor)
assert_type(Pruner(model, loss, [G], damping="leave-one-out").finalize(), torch.nn.Module)

_ = inverse @ np.ones(4)  # wrong
Pruner(model, loss, [G], update="exakt")  # wrong
prune_model(model, loss, [G], 0.5, layers="local")  # wrong
MFAC(model.parameters(), "fast")  # wrong
