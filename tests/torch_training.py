"""A network and its training, as the tests of the optimiser share them."""

from __future__ import annotations

import torch
from conftest import numpy64
from torch.nn.functional import cross_entropy


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 5, generator=generator)
        yield x, torch.randint(3, (8,), generator=generator)


def train(model, optimizer, data, scheduler=None):
    for x, y in data:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def vector(model):
    return numpy64(torch.nn.utils.parameters_to_vector(model.parameters()))
