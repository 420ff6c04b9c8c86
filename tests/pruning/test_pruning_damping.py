"""Pruning with a damping that the gradients choose."""

import numpy as np
import pytest
from conftest import BACKENDS, numpy64
from problems import Ranks

import mfac_core as mfac
from mfac_core.pruning import gradual, obs_update, prune

SIZES = [5, 9, 6, 4]


@pytest.fixture
def problem(rng):
    g = rng.standard_normal((15, 3)) @ rng.standard_normal((3, 24))
    return rng.standard_normal(24), g + 0.3 * rng.standard_normal((15, 24))


@pytest.mark.parametrize("sizes", [None, 6, SIZES])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_auto_is_the_damping_chosen_by_hand(problem, backend, sizes):
    dtype = backend.dtypes()[-1]
    w, g = (backend.asarray(array, dtype) for array in problem)
    damping = mfac.choose_damping(g, block_size=sizes)
    pruned = prune(w, g, sparsity=0.5, damping="auto", block_size=sizes, stages=2)
    expected = prune(w, g, sparsity=0.5, damping=damping, block_size=sizes, stages=2)
    assert pruned.damping == expected.damping == damping
    np.testing.assert_array_equal(numpy64(pruned.weights), numpy64(expected.weights))
    np.testing.assert_array_equal(
        numpy64(obs_update(w, g, pruned.mask, damping="auto", block_size=sizes)),
        numpy64(obs_update(w, g, pruned.mask, damping=damping, block_size=sizes)),
    )


@pytest.mark.parametrize("sizes", [None, SIZES])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_only_what_is_kept_has_a_say(problem, backend, sizes):
    """Gradients of weights that are gone are as good as not there; whole blocks may be gone."""
    dtype = backend.dtypes()[-1]
    w, g = problem
    kept = np.arange(24) % 3 > 0
    kept[5:14] = False
    left = None if sizes is None else [3, 4, 3]
    damping = mfac.choose_damping(backend.asarray(g[:, kept], dtype), block_size=left)
    options = {} if backend.device is None else {"device": backend.device}
    pruned = prune(
        backend.asarray(w, dtype),
        backend.asarray(np.where(kept, g, 100.0), dtype),
        sparsity=0.75,
        mask=backend.xp.asarray(kept, **options),
        damping="auto",
        block_size=sizes,
    )
    assert pruned.damping == pytest.approx(damping, rel=1e-6 if dtype == "float32" else 1e-12)


def test_each_step_chooses_its_own(problem):
    w, g = problem
    scales = iter((1.0, 10.0))
    steps = list(gradual(w, lambda w, mask: g * next(scales), sparsity=[0.25, 0.5], damping="auto"))
    assert steps[0].damping == mfac.choose_damping(g)
    mask = steps[0].mask
    assert steps[1].damping == pytest.approx(mfac.choose_damping(10.0 * g[:, mask]), rel=1e-9)


@pytest.mark.parametrize("sizes", [None, [[5, 9], [6, 4]]])
def test_over_ranks(problem, sizes):
    w, g = problem
    ranks = Ranks(2)
    parts = [slice(0, 14), slice(14, 24)]

    def pruned(rank, mask):
        here = parts[rank]
        return prune(
            w[here], g[:, here], sparsity=0.6, damping="auto", reduce=ranks.reduce,
            mask=mask[here], block_size=None if sizes is None else sizes[rank],
        ).damping  # fmt: skip

    whole = None if sizes is None else sizes[0] + sizes[1]
    masks = [np.arange(24) % 4 > 0]
    if sizes is not None:
        masks.append(np.arange(24) < 14)  # all that one rank has is gone
    for mask in masks:
        expected = prune(w, g, sparsity=0.6, damping="auto", mask=mask, block_size=whole).damping
        found = ranks.run(lambda rank, mask=mask: pruned(rank, mask))
        assert found == pytest.approx([expected] * 2, rel=1e-9)


def test_what_has_no_rows_has_no_choice(problem):
    w, g = problem
    fisher = mfac.BlockFisher(block_size=6)
    fisher.add(g)
    with pytest.raises(ValueError, match="must be a number for a BlockFisher"):
        prune(w, fisher, sparsity=0.5, damping="auto")
    with pytest.raises(ValueError, match="must not all be zero"):
        prune(w, 0.0 * g, sparsity=0.5, damping="auto")
    with pytest.raises(TypeError, match="damping must be a positive number"):
        prune(w, g, sparsity=0.5, damping="best")
