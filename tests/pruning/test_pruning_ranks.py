"""Pruning over ranks: the same masks, to the bit, on one rank, two and three."""

import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_error

sys.path.insert(0, str(Path(__file__).parents[1] / "rows"))
from problems import Ranks

import mfac_core as mfac
from mfac_core.pruning import gradual, obs_update, prune, saliency

SIZE, D = 6, 72


def pieces(size):
    """Whole blocks for each rank, unevenly."""
    blocks = D // SIZE
    stops = [0, *(round(blocks * (i + 1) ** 1.5 / size**1.5) * SIZE for i in range(size))]
    return [slice(a, b) for a, b in pairwise(stops)]


def on_ranks(size, body, parts=None):
    ranks = Ranks(size)
    parts = parts or pieces(size)
    return ranks.run(lambda rank: body(parts[rank], ranks.reduce))


@pytest.fixture
def problem(rng):
    return rng.standard_normal(D), rng.standard_normal((4, D))


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("m", [4, 20])
def test_masks_in_blocks_are_the_same_to_the_bit(rng, update, m):
    w, g = rng.standard_normal(D), rng.standard_normal((m, D))
    options = {"sparsity": 0.6, "damping": 0.1, "block_size": SIZE, "stages": 3, "update": update}
    expected = prune(w, g, **options)
    for size in (1, 2, 3):
        results = on_ranks(
            size, lambda here, reduce: prune(w[here], g[:, here], reduce=reduce, **options)
        )
        assert (np.concatenate([r.mask for r in results]) == expected.mask).all()
        assert (np.concatenate([r.weights for r in results]) == expected.weights).all()
        for r in results:
            assert r.loss_increase == pytest.approx(expected.loss_increase, rel=1e-12)


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("loss", [None, lambda weights: 0.0])
def test_a_rank_that_keeps_nothing(problem, update, loss):
    w, g = problem
    w[D // 2 :] *= 1e-6
    options = {"sparsity": 0.6, "damping": 0.1, "stages": 3, "update": update, "loss": loss}
    expected = prune(w, g, **options)
    parts = [slice(0, D // 2), slice(D // 2, D)]
    first, last = on_ranks(
        2, lambda here, reduce: prune(w[here], g[:, here], reduce=reduce, **options), parts
    )
    assert not last.mask.any()
    assert not last.weights.any()
    assert (first.mask == expected.mask[: D // 2]).all()
    assert relative_error(first.weights, expected.weights[: D // 2]) <= 1e-9


@pytest.mark.parametrize("pattern", [None, "2:4", 3])
def test_the_whole_matrix(problem, pattern):
    w, g = problem
    options = {"sparsity": 0.5, "damping": 0.1, "stages": 4, "pattern": pattern}
    expected = prune(w, g, **options)
    for size in (1, 2, 3):
        parts = [
            slice(i * D // size // 12 * 12, (i + 1) * D // size // 12 * 12) for i in range(size)
        ]
        results = on_ranks(
            size,
            lambda here, reduce: prune(w[here], g[:, here], reduce=reduce, **options),
            parts,
        )
        assert (np.concatenate([r.mask for r in results]) == expected.mask).all()
        assert (
            relative_error(np.concatenate([r.weights for r in results]), expected.weights) <= 1e-9
        )
        for r in results:
            assert r.loss_increase == pytest.approx(expected.loss_increase, rel=1e-9)


def test_equal_saliencies_go_together(rng):
    """On ranks there is no first of equal ones; the nearest number goes."""
    w, g = np.repeat([1.0, 2.0, 3.0], [24, 24, 24]), np.zeros((2, D))
    options = {"damping": 1.0, "block_size": SIZE, "stages": 1}
    for sparsity, removed in ((0.3, 24), (0.16, 0), (0.51, 48)):
        for size in (1, 2, 3):
            results = on_ranks(
                size,
                lambda here, reduce, s=sparsity: prune(
                    w[here], g[:, here], sparsity=s, reduce=reduce, **options
                ),
            )
            assert sum(int((~r.mask).sum()) for r in results) == removed


@pytest.mark.parametrize("block_size", [None, SIZE])
def test_update_saliency_and_steps(problem, block_size):
    w, g = problem
    mask = np.arange(D) % 3 > 0
    options = {"damping": 0.1, "block_size": block_size}
    best = obs_update(w, g, mask, **options)
    steps = list(gradual(w, lambda w, m: g, sparsity=[0.3, 0.6], **options))
    scores = saliency(w, mfac.InverseFisher(g, damping=0.1))

    def body(here, reduce):
        mine = {"reduce": reduce, **options}
        inverse = mfac.InverseFisher(g[:, here], damping=0.1, reduce=reduce)
        return (
            obs_update(w[here], g[:, here], mask[here], **mine),
            list(gradual(w[here], lambda w, m: g[:, here], sparsity=[0.3, 0.6], **mine))[-1].mask,
            saliency(w[here], inverse, reduce=reduce),
        )

    for size in (2, 3):
        results = list(zip(*on_ranks(size, body), strict=True))
        assert relative_error(np.concatenate(results[0]), best) <= 1e-9
        assert (np.concatenate(results[1]) == steps[-1].mask).all()
        assert relative_error(np.concatenate(results[2]), scores) <= 1e-9
