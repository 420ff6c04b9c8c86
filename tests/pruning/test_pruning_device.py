"""Pruning as on a CUDA device: what is d-sized stays there, and kernels are launched."""

import sys

import numpy as np
import pytest
import torch
from conftest import numpy64, relative_error
from host_machine import tensor, torch_machine

from mfac_core import _arrays
from mfac_core._ops import blocks
from mfac_core.pruning import obs_update, prune

D = 96


@pytest.fixture
def device(monkeypatch):
    return torch_machine(monkeypatch)


@pytest.fixture
def copied(monkeypatch):
    """Sizes of what was brought to the host."""
    sizes = []
    real = _arrays.to_numpy

    def to_numpy(x):
        if isinstance(x, torch.Tensor):
            sizes.append(x.numel())
        return real(x)

    for name, module in list(sys.modules.items()):
        if name.startswith("mfac_core") and getattr(module, "to_numpy", None) is real:
            monkeypatch.setattr(module, "to_numpy", to_numpy)
    return sizes


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 0.6},
        {"sparsity": 0.6, "update": "independent"},
        {"pattern": "2:4", "layers": [(4, 8, 2), (8, 4)]},
        {"sparsity": 0.6, "layers": [(8, 8), (8, 4)], "scope": "global", "floor": 0.3},
    ],
)
@pytest.mark.parametrize(("m", "block_size"), [(5, 12), (16, 12), (4, None), (5, [7, 41, 48])])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_of_the_weights_size_comes_to_the_host(
    device, copied, monkeypatch, rng, dtype, m, block_size, options
):
    monkeypatch.setattr(blocks, "DEVICE_BYTES", 8 * m * 30)  # several batches
    g, w = tensor(rng.standard_normal((m, D)), dtype), tensor(rng.standard_normal(D), dtype)
    options = {"damping": 0.5, "stages": 2, "block_size": block_size} | options
    pruned = prune(w, g, **options)
    assert isinstance(pruned.weights, torch.Tensor)
    assert pruned.weights.dtype == w.dtype
    assert pruned.mask.dtype == torch.bool
    assert max(copied, default=0) <= m * m
    if block_size == 12:
        assert device.launches["block_inverses"] > 0
    if block_size is None:
        assert device.launches["project"] > 0
    expected = prune(numpy64(w), numpy64(g), **options)
    assert (pruned.mask.numpy() == expected.mask).all()
    bound = 1e-5 if dtype == "float32" else 2.0**-7
    assert relative_error(pruned.weights, expected.weights) <= bound
    assert pruned.loss_increase == pytest.approx(expected.loss_increase, rel=1e-3)


@pytest.mark.parametrize("pattern", [4, "labels"])
@pytest.mark.parametrize(("m", "block_size"), [(5, 12), (16, 12), (4, None)])
def test_groups_bring_a_number_each(device, rng, m, block_size, pattern):
    g, w = tensor(rng.standard_normal((m, D)), "float32"), tensor(rng.standard_normal(D), "float32")
    labels = np.arange(D) % 16 - 1 if pattern == "labels" else pattern
    options = {"sparsity": 0.5, "damping": 0.5, "block_size": block_size, "stages": 3}
    pruned = prune(w, g, pattern=labels, **options)
    expected = prune(numpy64(w), numpy64(g), pattern=labels, **options)
    assert (pruned.mask.numpy() == expected.mask).all()
    assert relative_error(pruned.weights, expected.weights) <= 1e-5


@pytest.mark.parametrize("block_size", [12, None])
def test_an_update_for_a_mask_on_the_device(device, copied, rng, block_size):
    g, w = tensor(rng.standard_normal((5, D)), "float32"), tensor(rng.standard_normal(D), "float32")
    mask = torch.from_numpy(rng.random(D) < 0.4)
    best = obs_update(w, g, mask, damping=0.5, block_size=block_size)
    assert max(copied, default=0) <= 25
    expected = obs_update(numpy64(w), numpy64(g), mask.numpy(), damping=0.5, block_size=block_size)
    assert relative_error(best, expected) <= 1e-5
