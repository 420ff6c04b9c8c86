"""The choice of λ against the dense definition, and against scikit-learn's shrinkage."""

import warnings

import numpy as np
import pytest
from conftest import CASES, numpy64
from hypothesis import given
from hypothesis import strategies as st
from problems import Ranks
from sklearn.covariance import ledoit_wolf_shrinkage, oas

import mfac_core as mfac

DECADES = np.logspace(-6, 1, 8)


def dense_score(g, damping):
    """The mean of log det F₋ᵢ + gᵢᵀF₋ᵢ⁻¹gᵢ, one row after the other."""
    m, d = g.shape
    scores = []
    for i in range(m):
        rest = np.delete(g, i, 0)
        fisher = damping * np.eye(d) + rest.T @ rest / m
        scores.append(np.linalg.slogdet(fisher)[1] + g[i] @ np.linalg.solve(fisher, g[i]))
    return np.mean(scores)


def correlated(rng, m=15, d=40, rank=3):
    """Rows of a common subspace and noise."""
    strong = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, d))
    return strong + 0.3 * rng.standard_normal((m, d))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 5), (5, 1)])
def test_the_curve_is_the_dense_one(backend, dtype, shape, rng):
    g = backend.asarray(0.3 * rng.standard_normal(shape), dtype)
    wide = numpy64(g)
    curve = mfac.damping_curve(g, dampings=DECADES)
    expected = [dense_score(wide, damping) for damping in DECADES]
    # The Gram's rounding over λ, in the quadratic form; and the dense oracle's own condition.
    unit = 2.0**-21 if dtype == "float32" else 2.0**-45
    scale = 1.0 + np.sum(wide**2) / DECADES
    assert np.all(np.abs(curve.scores - expected) <= unit * scale * (1.0 + np.abs(expected)))


def test_the_best_is_that_of_a_fine_search(rng):
    g = correlated(rng)
    best = mfac.choose_damping(g)
    around = best * np.logspace(-0.3, 0.3, 601)
    finest = around[np.argmin([dense_score(g, damping) for damping in around])]
    # A parabola over a tenth of a power of ten misses by the third derivative: a fifth of a step.
    assert abs(np.log10(best / finest)) <= 0.01


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10))
def test_scale_order_and_rotation(method, scale, seed):
    rng = np.random.default_rng(seed)
    g = correlated(rng)
    damping = mfac.choose_damping(g, method=method)
    rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    assert mfac.choose_damping(scale * g, method=method) == pytest.approx(
        scale**2 * damping, rel=1e-9
    )
    others = g[rng.permutation(15)], g[:, rng.permutation(40)], g @ rotation
    for other in others:
        assert mfac.choose_damping(other, method=method) == pytest.approx(damping, rel=1e-9)


def test_duplicates_of_every_row_as_the_definition_says(rng):
    """Each row then has its twin among the others, and the least λ predicts it best."""
    g = np.repeat(correlated(rng), 2, axis=0)
    curve = mfac.damping_curve(g, dampings=DECADES)
    expected = [dense_score(g, damping) for damping in DECADES]
    np.testing.assert_allclose(curve.scores, expected, rtol=1e-7)


def test_ledoit_wolf_and_oas_are_scikit_learns(rng):
    for shape in [(30, 8), (10, 50)]:
        g = rng.standard_normal(shape) * np.linspace(0.2, 2.0, shape[1])
        mean = np.mean(g * g)
        for method, share in [
            ("ledoit-wolf", ledoit_wolf_shrinkage(g, assume_centered=True)),
            ("oas", oas(g, assume_centered=True)[1]),
        ]:
            expected = mean * share / (1.0 - share) if share < 1.0 else mean * 100.0
            assert mfac.choose_damping(g, method=method) == pytest.approx(expected, rel=1e-9)


def test_one_row():
    """F₋₁ is λI: d log λ + ‖g‖²/λ is lowest at ‖g‖²/d."""
    g = np.array([[3.0, 4.0, 0.0, 0.0]])
    step = np.log(10.0) / 20.0  # of log λ, in which a parabola misses x + e⁻ˣ by a sixth of h²
    assert mfac.choose_damping(g) == pytest.approx(25.0 / 4.0, rel=step**2 / 5.0)


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
def test_equal_rows_give_a_number_without_a_warning(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damping = mfac.choose_damping(np.ones((4, 9)), method=method)
    assert 0.0 < damping < np.inf


def test_what_it_refuses(rng):
    with pytest.raises(ValueError, match="must not all be zero"):
        mfac.choose_damping(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="method must be one of"):
        mfac.choose_damping(np.ones((3, 4)), method="magic")
    with pytest.raises(ValueError, match="at index 1"):
        mfac.choose_damping(np.array([[1.0, 2.0], [np.nan, 1.0]]))
    with pytest.raises(ValueError, match="at least one"):
        mfac.damping_curve(np.ones((3, 4)), dampings=[])


def test_columns_over_ranks(rng):
    g = correlated(rng)
    ranks = Ranks(2)
    parts = [g[:, :11], g[:, 11:]]
    found = ranks.run(lambda rank: mfac.choose_damping(parts[rank], reduce=ranks.reduce))
    assert found == pytest.approx([mfac.choose_damping(g)] * 2, rel=1e-9)


def test_auto_is_what_choose_damping_says(rng):
    g, x = correlated(rng), rng.standard_normal(40)
    chosen = mfac.choose_damping(g)
    inverse = mfac.InverseFisher(g, damping="auto")
    assert inverse.damping == mfac.EmpiricalFisher(g, damping="auto").damping == chosen
    assert mfac.EmpiricalFisher(g, damping="auto").inverse().damping == chosen
    expected = mfac.ihvp(g, x, damping=chosen)
    np.testing.assert_array_equal(inverse @ x, expected)
    np.testing.assert_array_equal(mfac.ihvp(g, x, damping="auto"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_damping_is_as_if_made_anew(dtype, rng):
    g = correlated(rng).astype(dtype)
    x = rng.standard_normal(40).astype(dtype)
    inverse = mfac.InverseFisher(g, damping=1.0)
    for damping in (1e-7, 10.0, 0.1):  # float32 will not do for the first
        other = inverse.with_damping(damping)
        assert other.damping == damping
        dense = damping * np.eye(40) + g.astype(float).T @ g.astype(float) / len(g)
        bound = 2.0**-14 if dtype == "float32" else 2.0**-52 * np.linalg.cond(dense)
        expected = np.linalg.solve(dense, x.astype(float))
        assert np.linalg.norm(other @ x - expected) <= bound * np.linalg.norm(expected)
    assert inverse.damping == 1.0


def test_another_damping_reads_no_gradients_again(rng):
    class Counted:
        """A file that counts what is read of it."""

        def __init__(self, array):
            self._array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, 0

        def __getitem__(self, key):
            self.reads += 1
            return self._array[key]

    source = Counted(correlated(rng))
    inverse = mfac.InverseFisher(source, damping=1.0)
    reads = source.reads
    for damping in np.logspace(-6, 2, 9):
        inverse.with_damping(damping).logdet()
    assert source.reads == reads
