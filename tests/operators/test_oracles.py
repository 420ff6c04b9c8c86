"""The oracles agree with each other, and the assertions can fail."""

import numpy as np
import pytest
from conftest import relative_error
from hypothesis import given
from problems import problems

import mfac_core as mfac
from mfac_core.testing import (
    DynamicRecursion,
    StaticRecursion,
    assert_operator_close,
    dense_fisher,
    dense_inverse,
    error_bound,
)


@given(problem=problems())
def test_recursions_are_the_dense_inverse(problem):
    g, damping = problem
    x = np.linspace(-1.0, 2.0, g.shape[1])
    dense = dense_inverse(g, damping=damping)
    bound = error_bound(g, damping=damping)
    static = StaticRecursion(g, damping=damping)
    assert relative_error(static.matvec(x), dense @ x) <= bound
    assert relative_error(DynamicRecursion(g, damping=damping).matvec(x), dense @ x) <= bound
    i, j = g.shape[1] // 2, g.shape[1] - 1
    assert abs(static.entry(i, j) - dense[i, j]) <= bound / damping


def test_dense_matrices_are_inverse_to_each_other(rng):
    g = rng.standard_normal((4, 6))
    product = dense_fisher(g, damping=0.1, divisor=9) @ dense_inverse(g, damping=0.1, divisor=9)
    assert np.abs(product - np.eye(6)).max() <= 1e-13


@pytest.mark.parametrize("wrong", ["damping", "row", "divisor"])
def test_a_wrong_operator_is_noticed(rng, wrong):
    g = rng.standard_normal((5, 8))
    dense = dense_inverse(g, damping=0.1)
    operator = {
        "damping": lambda: mfac.InverseFisher(g, damping=0.1001),
        "row": lambda: mfac.InverseFisher(g[:-1], damping=0.1),
        "divisor": lambda: mfac.InverseFisher(g[[0, 1, 2, 3, 4, 4]] * 1.0, damping=0.1),
    }[wrong]()
    with pytest.raises(AssertionError, match="is off by"):
        assert_operator_close(operator, dense, rtol=error_bound(g, damping=0.1))


def test_a_wrong_shape_is_noticed(rng):
    operator = mfac.InverseFisher(rng.standard_normal((5, 8)), damping=0.1)
    with pytest.raises(AssertionError, match="shape is"):
        assert_operator_close(operator, np.eye(7), rtol=1.0)
