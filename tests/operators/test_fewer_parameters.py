"""More gradients than parameters: F itself, against a dense inverse, for any λ and every query."""

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
