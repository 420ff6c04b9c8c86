"""Blocks from gradients that are seen once, against dense inverses."""

import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error
from problems import dense_blocks

import mfac_core as mfac
from mfac_core.pruning import gradual, obs_update, prune
from mfac_core.testing import assert_operator_close, error_bound


@pytest.mark.parametrize("block_size", [5, 7, [3, 14, 3]])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_inverse_of_all_rows(rng, backend, block_size):
    rows = rng.standard_normal((23, 20))
    lengths = block_size if isinstance(block_size, list) else [5] * 4
    lengths = [7, 7, 6] if block_size == 7 else lengths
    fisher = mfac.BlockFisher(block_size=block_size)
    for some in np.array_split(rows, 4):
        fisher.add(backend.asarray(some, backend.dtypes()[-1]))
    assert fisher.shape == (23, 20)
    seen = numpy64(backend.asarray(rows, backend.dtypes()[-1]))
    dense = dense_blocks(seen, lengths, 0.1)
    bound = error_bound(backend.asarray(rows, backend.dtypes()[-1]), damping=0.1)
    assert_operator_close(fisher.inverse(damping=0.1), dense, rtol=bound)


def test_accumulate_takes_any_iterable(rng):
    rows = rng.standard_normal((9, 12))
    inverse = mfac.BlockInverseFisher.accumulate(
        (row[None, :] for row in rows), damping=0.1, block_size=4
    )
    dense = dense_blocks(rows, [4] * 3, 0.1)
    assert relative_error(inverse.to_dense(), dense) <= 1e-12


@pytest.mark.parametrize("update", ["joint", "independent"])
@pytest.mark.parametrize("pattern", [None, "2:4", 3])
def test_pruning_from_sums_is_pruning_from_rows(rng, update, pattern):
    w, g = rng.standard_normal(24), rng.standard_normal((30, 24))
    fisher = mfac.BlockFisher(block_size=6)
    for some in np.array_split(g, 7):
        fisher.add(some)
    options = {"sparsity": 0.5, "damping": 0.1, "stages": 3, "update": update, "pattern": pattern}
    expected = prune(w, g, block_size=6, **options)
    pruned = prune(w, fisher, **options)
    assert (pruned.mask == expected.mask).all()
    assert relative_error(pruned.weights, expected.weights) <= 1e-10
    assert pruned.loss_increase == pytest.approx(expected.loss_increase, rel=1e-9)
    assert (
        relative_error(
            obs_update(w, fisher, expected.mask, damping=0.1),
            obs_update(w, g, expected.mask, damping=0.1, block_size=6),
        )
        <= 1e-10
    )
    steps = gradual(w, lambda w, m: fisher, sparsity=[0.25, 0.5], pattern=pattern, damping=0.1)
    assert len(list(steps)) == 2


def test_what_is_refused_adds_nothing(rng):
    fisher = mfac.BlockFisher(block_size=4)
    with pytest.raises(ValueError, match="must be given gradients by add"):
        fisher.inverse(damping=0.1)
    with pytest.raises(ValueError, match="must be given gradients by add"):
        prune(np.ones(8), fisher, sparsity=0.5, damping=0.1)
    g = rng.standard_normal((6, 8))
    fisher.add(g)
    before = fisher.inverse(damping=0.1).to_dense()
    wrong = g.copy()
    wrong[2, 5] = np.nan
    with pytest.raises(ValueError, match="1 of 6 rows, at index 2"):
        fisher.add(wrong)
    with pytest.raises(ValueError, match="must have 8 columns as before, got 7"):
        fisher.add(g[:, :7])
    with pytest.raises(ValueError, match="block_size must be that of the BlockFisher"):
        prune(np.ones(8), fisher, sparsity=0.5, damping=0.1, block_size=2)
    assert fisher.count == 6
    assert (fisher.inverse(damping=0.1).to_dense() == before).all()
