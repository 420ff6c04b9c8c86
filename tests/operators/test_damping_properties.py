"""What holds for the choice of λ whatever the gradients, in blocks and layers as well."""

import numpy as np
import pytest
import scipy.linalg
from conftest import relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import blocks_of, cuts, problems
from sklearn.covariance import ledoit_wolf_shrinkage, oas

import mfac_core as mfac
from mfac_core.testing import dense_fisher

METHODS = ("leave-one-out", "ledoit-wolf", "oas")


def correlated(rng, m=15, d=40, rank=3):
    """Rows of a common subspace and noise."""
    strong = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, d))
    return strong + 0.3 * rng.standard_normal((m, d))


@given(data=st.data(), method=st.sampled_from(METHODS))
def test_a_number_for_any_gradients_and_any_cut(data, method):
    """Zero, equal and collinear rows, one row, dead blocks: no warning, which would be an error."""
    g, _ = data.draw(problems(max_rows=7, max_params=15))
    block_size, lengths = data.draw(cuts(g.shape[1]))
    layered = data.draw(st.booleans())
    options = {"layers": list(lengths)} if layered else {"block_size": block_size}
    if not all(part.any() for part in np.split(g, np.cumsum(lengths)[:-1] if layered else [], 1)):
        with pytest.raises(ValueError, match="must not all be zero"):
            mfac.choose_damping(g, method=method, **options)
        return
    chosen = np.asarray(mfac.choose_damping(g, method=method, **options))
    assert chosen.shape == ((len(lengths),) if layered else ())
    assert np.all(np.isfinite(chosen))
    parts = np.split(g, np.cumsum(lengths)[:-1], 1) if layered else [g]
    means = np.array([np.mean(part**2) for part in parts]).reshape(chosen.shape)
    # What is tried ends at 1e-10 mean square norms of a row's part, and at 100 mean squares.
    assert np.all(0.99e-10 * means <= chosen)
    assert np.all(chosen <= 101.0 * means)


@pytest.mark.parametrize("method", METHODS)
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10))
def test_scale_order_and_rotation_within_layers(method, scale, seed):
    rng = np.random.default_rng(seed)
    g = correlated(rng, d=40) * np.repeat([1.0, 10.0, 0.1], [10, 24, 6])
    layers = [10, (4, 6), 6]
    rotation = scipy.linalg.block_diag(
        *(np.linalg.qr(rng.standard_normal((n, n)))[0] for n in (10, 24, 6))
    )
    dampings = mfac.choose_damping(g, layers=layers, method=method)
    for other, factor in [
        (scale * g, scale**2),
        (g[rng.permutation(15)], 1.0),
        (g @ rotation, 1.0),
        (g * np.repeat([1.0, scale, 1.0], [10, 24, 6]), [1.0, scale**2, 1.0]),
    ]:
        found = mfac.choose_damping(other, layers=layers, method=method)
        np.testing.assert_allclose(found, factor * dampings, rtol=1e-9)


def test_duplicates_of_every_row_as_the_shrinkage_is_defined(rng):
    g = np.repeat(correlated(rng, m=8, d=12), 2, axis=0)
    shares = {
        "ledoit-wolf": ledoit_wolf_shrinkage(g, assume_centered=True),
        "oas": oas(g, assume_centered=True)[1],
    }
    for method, share in shares.items():
        expected = np.mean(g * g) * share / (1.0 - share)
        assert mfac.choose_damping(g, method=method) == pytest.approx(expected, rel=1e-9)
        layers = mfac.choose_damping(np.hstack([g, 3.0 * g]), layers=[12, 12], method=method)
        np.testing.assert_allclose(layers, [expected, 9.0 * expected], rtol=1e-9)


def test_one_row_in_blocks_and_layers():
    """F₋₁ is λI, whatever the blocks: d log λ + ‖g‖²/λ is lowest at ‖g‖²/d."""
    g = np.array([[3.0, 4.0, 0.0, 0.0, 1.0, 2.0]])
    error = (np.log(10.0) / 10.0) ** 2 / 5.0  # of a parabola in log λ, see test_one_row
    for sizes in (2, [4, 2], [1, 5]):
        assert mfac.choose_damping(g, block_size=sizes) == pytest.approx(30.0 / 6.0, rel=error)
    layers = mfac.choose_damping(g, layers=[4, (1, 2)])
    np.testing.assert_allclose(layers, [25.0 / 4.0, 5.0 / 2.0], rtol=error)


@pytest.mark.parametrize("m", [1, 5, 40])
def test_equal_rows_leave_the_digits_that_products_in_blocks_need(m, rng):
    """They predict one another without an error, so that the least λ tried is chosen."""
    g = np.ones((m, 1)) * rng.standard_normal((1, 30))
    x = rng.standard_normal(30)
    inverse = mfac.BlockInverseFisher(g, block_size=[12, 18], damping="auto")
    fisher = blocks_of(dense_fisher(g, damping=inverse.damping), [12, 18])
    bound = 2.0**-50 * np.linalg.cond(fisher)
    assert relative_error(inverse @ x, np.linalg.solve(fisher, x)) <= bound
    assert np.all(mfac.choose_damping(g, layers=[12, 18]) > 0.0)
