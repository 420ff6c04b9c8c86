"""The block-diagonal inverse against dense inverses of the blocks."""

import numpy as np
import pytest
from conftest import CASES, relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import cuts, dense_blocks, problems

import mfac_core as mfac
from mfac_core.testing import assert_operator_close, error_bound


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(data=st.data())
def test_every_query_is_that_of_the_dense_blocks(backend, dtype, data):
    gradients, damping = data.draw(problems(backend=backend))
    g = backend.asarray(gradients, dtype)
    block_size, lengths = data.draw(cuts(g.shape[1]))
    inverse = mfac.BlockInverseFisher(g, damping=damping, block_size=block_size)
    assert inverse.block_sizes == tuple(lengths)
    dense = dense_blocks(g, lengths, damping)
    assert_operator_close(inverse, dense, rtol=error_bound(g, damping=damping))


@pytest.mark.parametrize("block_size", [500, 600])
def test_one_block_is_the_full_inverse(rng, block_size):
    g = rng.standard_normal((40, 500))
    blocked = mfac.EmpiricalFisher(g, damping=0.01).inverse(block_size=block_size)
    full = mfac.EmpiricalFisher(g, damping=0.01).inverse()
    x = rng.standard_normal(500)
    assert (blocked @ x == full @ x).all()
    assert (blocked.diagonal() == full.diagonal()).all()


@pytest.mark.parametrize("size", [16, 64, 100])
def test_many_blocks_in_float64(rng, size):
    """Blocks shorter and longer than m, more than one batch of them."""
    g = rng.standard_normal((64, 2000))
    lengths = [min(size, 2000 - start) for start in range(0, 2000, size)]
    dense = dense_blocks(g, lengths, 0.01)
    inverse = mfac.BlockInverseFisher(g, damping=0.01, block_size=size)
    x = rng.standard_normal(2000)
    assert relative_error(inverse @ x, dense @ x) <= 1e-9
    assert relative_error(inverse.diagonal(), np.diagonal(dense)) <= 1e-9
    assert relative_error(inverse.power(0.5).power(2) @ x, dense @ x) <= 1e-9


def test_batches_are_bounded(rng, monkeypatch):
    g = rng.standard_normal((20, 300))
    whole = mfac.BlockInverseFisher(g, damping=0.1, block_size=7)
    monkeypatch.setattr("mfac_core._ops.blocks.HOST_BYTES", 8 * 20 * 7 * 3)
    batched = mfac.BlockInverseFisher(g, damping=0.1, block_size=7)
    assert relative_error(batched.diagonal(), whole.diagonal()) <= 1e-14
    assert batched.logdet() == pytest.approx(whole.logdet(), rel=1e-12)


def test_diagonal_where_float32_recursions_return_negative_numbers(rng):
    """B 64, m 512, scale 10, λ 1e-5, float32."""
    g = (10.0 * rng.standard_normal((512, 256))).astype("float32")
    diagonal = mfac.BlockInverseFisher(g, damping=1e-5, block_size=64).diagonal()
    expected = np.diagonal(dense_blocks(g, [64] * 4, 1e-5))
    assert (diagonal > 0).all()
    assert np.abs(diagonal / expected - 1.0).max() <= 1e-4


@pytest.mark.parametrize(
    ("block_size", "error", "words"),
    [
        (0, ValueError, "block_size must be an integer of at least 1, got 0"),
        (-3, ValueError, "block_size must be an integer of at least 1"),
        (2.5, TypeError, "block_size must be an integer"),
        ([2, 3], ValueError, "block_size must sum to the number of parameters 6, got 5"),
        ([7, -1], ValueError, r"block_size\[1\] must be an integer of at least 1"),
        ([3, 3.0], TypeError, r"block_size\[1\] must be an integer"),
        ([], ValueError, "block_size must sum"),
    ],
)
def test_what_is_refused(block_size, error, words):
    with pytest.raises(error, match=words):
        mfac.BlockInverseFisher(np.ones((4, 6)), damping=0.1, block_size=block_size)


@pytest.mark.parametrize("block_size", [2, 6])
def test_a_nan_is_said_with_its_row(block_size):
    g = np.ones((4, 6))
    g[2, 5] = np.nan
    with pytest.raises(ValueError, match="1 of 4 rows, at index 2"):
        mfac.BlockInverseFisher(g, damping=0.1, block_size=block_size)
