"""More gradients than parameters: F itself, against a dense inverse, for any λ and every query."""

import tracemalloc

import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error
from problems import File

import mfac_core as mfac
from mfac_core.testing import assert_operator_close, dense_fisher, dense_inverse


@pytest.fixture
def g(rng):
    return rng.standard_normal((40, 7))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("damping", [1e-1, 1e-8, 1e-16])
def test_every_query_at_any_damping(g, backend, damping):
    """The error does not depend on λ: F's condition is that of GᵀG."""
    dtype = backend.dtypes()[-1]
    given = backend.asarray(g, dtype)
    g = numpy64(given)
    dense = dense_inverse(g, damping=damping)
    rounding = np.finfo("float32" if "32" in str(given.dtype) else "float64").eps
    bound = 10 * rounding * np.linalg.cond(dense_fisher(g, damping=damping))
    assert_operator_close(mfac.InverseFisher(given, damping=damping), dense, rtol=bound)
    x = backend.asarray(g[0], dtype)
    assert relative_error(mfac.ihvp(given, x, damping=damping), dense @ g[0]) <= bound


def test_the_dual_is_still_there(g):
    inverse = mfac.InverseFisher(g, damping=0.1)
    assert relative_error(inverse.gram, g @ g.T) <= 1e-14
    assert relative_error(inverse.dual, g @ g.T + 4.0 * np.eye(40)) <= 1e-14
    other = inverse.with_damping(0.2)
    assert relative_error(other.to_dense(), dense_inverse(g, damping=0.2)) <= 1e-12


def test_from_a_file(g):
    inverse = mfac.InverseFisher(File(g, (1, 7)), damping=0.1)
    assert relative_error(inverse.to_dense(), dense_inverse(g, damping=0.1)) <= 1e-12


def test_a_nan_is_named(g):
    g[31, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 40 rows, at index 31"):
        mfac.InverseFisher(g, damping=0.1)


def test_rows_that_do_not_span(g):
    """Where F is singular but for λ, the dual knows what a product has lost."""
    g[:, 3] = g[:, 2]
    inverse, x = mfac.InverseFisher(g, damping=1e-13), np.eye(7)[3] - np.eye(7)[2]
    assert relative_error(inverse @ x, x / 1e-13) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@pytest.mark.parametrize("normalization", ["count", "window"])
def test_a_window(rng, backend, normalization):
    """Filling and full, with rows replaced and removed, another damping, and a state taken up."""
    dtype, d, m = backend.dtypes()[-1], 4, 16
    window = mfac.SlidingInverseFisher(d, m, damping=0.3, normalization=normalization)
    held = []

    def expected():
        n = m if normalization == "window" else len(held)
        fisher = window.damping * np.eye(d) + np.stack(held).T @ np.stack(held) / n
        return np.linalg.inv(fisher), 20 * np.finfo(dtype).eps * np.linalg.cond(fisher)

    def right(window):
        dense, bound = expected()
        assert_operator_close(window, dense, rtol=bound)
        gram = np.stack(held) @ np.stack(held).T
        assert relative_error(window.gram, gram) <= 20 * np.finfo(dtype).eps

    def row():
        return rng.standard_normal(d).astype(dtype).astype(float)

    for _ in range(m + 5):
        held = [*held, row()][-m:]
        product = window.append_matvec(backend.asarray(held[-1], dtype))
        dense, bound = expected()
        assert relative_error(product, dense @ held[-1]) <= bound
    right(window)
    held[2] = row()
    window.replace(2, backend.asarray(held[2], dtype))
    del held[0]
    window.remove(0)
    right(window)
    window.damping = 1e-6
    right(window)
    other = mfac.SlidingInverseFisher(d, m, damping=1.0)
    other.append(backend.asarray(row(), dtype))
    other.load_state_dict(window.state_dict())
    held = [*held, row()]
    for each in (window, other):
        each.append(backend.asarray(held[-1], dtype))
        right(each)
    x = backend.asarray(row(), dtype)
    np.testing.assert_array_equal(numpy64(window @ x), numpy64(other @ x))


def test_a_window_that_does_not_span(rng):
    """Where F is singular but for λ the dual answers, and a state says the same bit for bit."""
    window = mfac.SlidingInverseFisher(4, 16, damping=1e-13)
    for row in rng.standard_normal((20, 4)) * [1.0, 1.0, 1.0, 0.0]:
        window.append(row)
    x = np.eye(4)[3]
    assert relative_error(window @ x, x / 1e-13) <= 1e-6
    other = mfac.SlidingInverseFisher(4, 16, damping=1.0)
    other.load_state_dict(window.state_dict())
    y = rng.standard_normal(4)
    np.testing.assert_array_equal(window @ y, other @ y)


def test_a_window_that_refuses_stays_as_it_was(rng):
    window = mfac.SlidingInverseFisher(4, 16, damping=0.1)
    for row in rng.standard_normal((16, 4)):
        window.append(row)
    before = window.to_dense()
    for act in (window.append, window.append_matvec, lambda g: window.replace(3, g)):
        with pytest.raises(ValueError, match="finite"):
            act(np.array([1.0, np.nan, 0.0, 0.0]))
    np.testing.assert_array_equal(window.to_dense(), before)


def test_a_window_holds_no_dual(rng):
    """Neither m² numbers nor d² times m: 4,096 rows of 4 parameters."""
    tracemalloc.start()
    window = mfac.SlidingInverseFisher(4, 4096, damping=0.1, dtype="float64", xp=np)
    for row in rng.standard_normal((64, 4)):
        window.append_matvec(row)
    window.diagonal()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * 4096 * 4 * 10
