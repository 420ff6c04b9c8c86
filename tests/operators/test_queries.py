"""What ``assert_operator_close`` does not ask: draws, wide queries, stored factors, refusals."""

import numpy as np
import pytest
from conftest import CASES, numpy64, relative_error

import mfac_core as mfac
from mfac_core._operators.digits import SMALLEST_FLOAT32_REST
from mfac_core.testing import dense_fisher, dense_inverse


@pytest.fixture
def g(rng):
    return rng.standard_normal((6, 10))


def operators(g):
    window = mfac.SlidingInverseFisher(10, 6, damping=0.3)
    for row in g:
        window.append(row)
    inverse = dense_inverse(g, damping=0.3)
    fisher = dense_fisher(g, damping=0.3)
    half = np.zeros((10, 10))
    half[:4, :4] = dense_inverse(g[:, :4], damping=0.3)
    half[4:, 4:] = dense_inverse(g[:, 4:], damping=0.3)
    return {
        "fisher": (mfac.EmpiricalFisher(g, damping=0.3), fisher),
        "inverse": (mfac.InverseFisher(g, damping=0.3), inverse),
        "window": (window, inverse),
        "blocks": (mfac.BlockInverseFisher(g, damping=0.3, block_size=[4, 6]), half),
        "power": (mfac.InverseFisher(g, damping=0.3).power(2), inverse @ inverse),
    }


KINDS = ["fisher", "inverse", "window", "blocks", "power"]


@pytest.mark.parametrize("kind", KINDS)
def test_draws_have_the_operator_as_covariance(g, kind):
    operator, dense = operators(g)[kind]
    draws = operator.sample(20_000, 7)
    assert draws.shape == (20_000, 10)
    assert relative_error(draws.T @ draws / len(draws), dense) <= 0.15
    assert np.abs(draws.mean(axis=0)).max() <= 5 * np.sqrt(dense.diagonal().max() / len(draws))
    assert (operator.sample(3, np.random.default_rng(7)) == operator.sample(3, 7)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [-1.5, -1, -0.5, 0, 0.5, 1, 2.25])
def test_any_real_power(g, kind, p):
    operator, dense = operators(g)[kind]
    values, vectors = np.linalg.eigh(dense)
    assert relative_error(operator.power(p).to_dense(), (vectors * values**p) @ vectors.T) <= 1e-8
    assert operator.power(p).logdet() == pytest.approx(p * np.log(values).sum(), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_of_indices(g, kind):
    operator, dense = operators(g)[kind]
    i, j = np.arange(10)[:, None], np.arange(10)
    assert relative_error(operator.entries(i, j), dense) <= 1e-8
    assert relative_error(operator.submatrix(range(10)), dense) <= 1e-8
    assert operator.entries(3, -1) == pytest.approx(dense[3, 9], rel=1e-8)
    assert operator.entries(3, -1).shape == ()
    assert operator.entries([], []).shape == (0,)
    assert operator.submatrix([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda op: op.entries([1.5], [0]), TypeError, "rows must be integers, got dtype float"),
        (lambda op: op.entries([0], [10]), IndexError, "cols 10 is out of range for 10"),
        (lambda op: op.entries([0, 1], [0, 1, 2]), ValueError, "shapes that broadcast"),
        (lambda op: op.column(-11), IndexError, "j -11 is out of range"),
        (lambda op: op.column([1]), ValueError, "j must have 0 dimensions"),
        (lambda op: op.submatrix([[1]]), ValueError, "indices must have 1 dimensions"),
        (lambda op: op.power("a"), TypeError, "p must be a number"),
        (lambda op: op.power(np.inf), ValueError, "p must be finite"),
        (lambda op: op.sample(0), ValueError, "n must be an integer of at least 1"),
        (lambda op: op.quadratic(np.ones(9)), ValueError, "x must have shape"),
    ],
)
def test_what_is_refused(g, ask, error, words):
    with pytest.raises(error, match=words):
        ask(mfac.InverseFisher(g, damping=0.3))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_stored_whitened_gradients_give_the_same_elements(rng, backend, dtype):
    g = backend.asarray(rng.standard_normal((6, 30)) / 5, dtype)
    stored = mfac.InverseFisher(g, damping=0.3, store_whitened=True)
    rows, cols = rng.integers(0, 30, (2, 50))
    expected = dense_inverse(g, damping=0.3)[rows, cols]
    bound = 1e-5 if dtype == "float32" else 1e-12
    assert np.abs(numpy64(stored.entries(rows, cols)) - expected).max() <= bound


@pytest.mark.parametrize("damping", [1e-3, 1e-8, 1e-11])
def test_stored_whitened_gradients_lose_no_digits(rng, damping):
    """Where λ is small, 1 − t is too little for W in float32, and A is solved with instead."""
    g = rng.standard_normal((6, 4)).astype(np.float32)
    stored = mfac.InverseFisher(g, damping=damping, store_whitened=True)
    expected = dense_inverse(g, damping=damping)
    rows, cols = np.indices((4, 4))
    in_float64 = 2.0**-52 * np.linalg.cond(stored.dual)
    bound = 2.0**-24 / SMALLEST_FLOAT32_REST + in_float64
    assert relative_error(stored.entries(rows, cols), expected) <= bound
    assert np.array_equal(stored.entries(range(4), range(4)), stored.diagonal())


def test_stored_whitened_gradients_of_16_bits(rng):
    """W is kept in float32: what is lost is lost in the elements' own rounding."""
    g = (rng.standard_normal((6, 30)) / 5).astype(np.float16)
    stored = mfac.InverseFisher(g, damping=0.3, store_whitened=True)
    rows, cols = np.indices((30, 30))
    expected = dense_inverse(g, damping=0.3)
    error = np.abs(stored.entries(rows, cols) - expected)
    in_float32 = 6 * 2.0**-24 / 0.3  # six terms of at most 1/λ; more than float16's spacing at zero
    assert (error <= 2.0**-11 * np.abs(expected) + in_float32).all()


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_a_power_of_float32_gradients_keeps_its_digits(rng, p):
    """For x in their span λᵖx cancels to (λ/σ²)ᵖ of itself, against the singular values of G."""
    g = rng.standard_normal((8, 60)).astype(np.float32)
    x = (rng.standard_normal(8) @ g).astype(np.float32)
    damping = 1e-10
    _, s, v = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    inside = v @ x.astype(np.float64)
    expected = v.T @ ((damping + s**2 / 8) ** -p * inside)
    expected += damping**-p * (x - v.T @ inside)
    result = mfac.InverseFisher(g, damping=damping).power(p) @ x
    assert relative_error(result, expected) <= 2.0**-24 / SMALLEST_FLOAT32_REST


def test_many_elements_come_in_batches(rng, monkeypatch):
    g = rng.standard_normal((6, 30))
    monkeypatch.setattr("mfac_core._rows.base.TAKE_BYTES", 8 * 6 * 7)
    rows, cols = rng.integers(0, 30, (2, 50))
    entries = mfac.InverseFisher(g, damping=0.3).entries(rows, cols)
    assert np.abs(entries - dense_inverse(g, damping=0.3)[rows, cols]).max() <= 1e-12


def test_the_dual_can_be_read_and_given(rng, g):
    inverse = mfac.InverseFisher(g, damping=0.3)
    assert relative_error(inverse.gram, g @ g.T) <= 1e-14
    assert relative_error(inverse.dual, g @ g.T + 6 * 0.3 * np.eye(6)) <= 1e-14
    inverse.gram[:] = 0.0  # a copy
    again = mfac.InverseFisher.from_gram(g, inverse.gram, damping=0.7)
    x = rng.standard_normal(10)
    assert relative_error(again @ x, dense_inverse(g, damping=0.7) @ x) <= 1e-12
    with pytest.raises(ValueError, match=r"gram must be a finite matrix of shape \(6, 6\)"):
        mfac.InverseFisher.from_gram(g, np.eye(5), damping=0.7)


def test_a_windows_dual_is_in_order_of_age(g):
    window = mfac.SlidingInverseFisher(10, 4, damping=0.3)
    for row in g:
        window.append_matvec(row)
    window.remove(1)
    held = window.gradients
    assert relative_error(window.gram, held @ held.T) <= 1e-14
    assert relative_error(window.dual, held @ held.T + 3 * 0.3 * np.eye(3)) <= 1e-14


def test_a_power_of_a_window_stays_when_the_window_slides(rng, g):
    window = mfac.SlidingInverseFisher(10, 6, damping=0.3)
    for row in g:
        window.append(row)
    root, x = window.power(0.5), rng.standard_normal(10)
    before = root @ x
    window.append(rng.standard_normal(10))
    assert (root @ x == before).all()
