"""The static inverse and the forward operator against dense inverses, on every library."""

import numpy as np
import pytest
import scipy.linalg
from conftest import BACKENDS, CASES, numpy64, relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import problems

import mfac_core as mfac
from mfac_core._ops import rows as ops
from mfac_core.testing import (
    StaticRecursion,
    assert_operator_close,
    dense_fisher,
    dense_inverse,
    error_bound,
)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(data=st.data())
def test_every_query_is_the_dense_inverse(backend, dtype, data):
    gradients, damping = data.draw(problems(backend=backend))
    g = backend.asarray(gradients, dtype)
    bound = error_bound(g, damping=damping)
    inverse = mfac.InverseFisher(g, damping=damping)
    assert_operator_close(inverse, dense_inverse(g, damping=damping), rtol=bound)
    assert bool((numpy64(inverse.diagonal()) > 0).all())


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(data=st.data())
def test_the_forward_operator_is_the_dense_fisher(backend, dtype, data):
    gradients, damping = data.draw(problems(backend=backend))
    g = backend.asarray(gradients, dtype)
    fisher = mfac.EmpiricalFisher(g, damping=damping)
    # Cancellation in Gᵀ(Gx) against λx is all that can lose digits: at most the condition number.
    bound = error_bound(g, damping=damping)
    assert_operator_close(fisher, dense_fisher(g, damping=damping), rtol=bound)
    x = backend.asarray(np.ones(g.shape[1]), dtype)
    assert relative_error(fisher.inverse() @ (fisher @ x), numpy64(x)) <= bound


@given(problem=problems())
def test_it_is_the_papers_recursion(problem):
    gradients, damping = problem
    inverse = mfac.InverseFisher(gradients, damping=damping)
    recursion = StaticRecursion(gradients, damping=damping)
    x = np.linspace(-1.0, 1.0, gradients.shape[1]) + 0.1
    bound = 2 * error_bound(gradients, damping=damping)
    assert relative_error(inverse @ x, recursion.matvec(x)) <= bound
    diagonal = np.array([recursion.entry(i, i) for i in range(gradients.shape[1])])
    assert relative_error(inverse.diagonal(), diagonal) <= bound


@pytest.mark.parametrize("m", [1, 7, 300])
def test_the_duals_factor_holds_the_papers_vectors(rng, m):
    """A = L D Lᵀ with unit L: v_k = (L⁻¹G)_k/λ and q_k = D_kk/λ."""
    g, damping = rng.standard_normal((m, 400)) / 20, 1e-3
    lower = np.linalg.cholesky(m * damping * np.eye(m) + g @ g.T)
    unit = lower / np.diagonal(lower)
    recursion = StaticRecursion(g, damping=damping)
    rtol = error_bound(g, damping=damping)
    assert relative_error(recursion.v, np.linalg.solve(unit, g) / damping) <= rtol
    assert relative_error(recursion.q, np.diagonal(lower) ** 2 / damping) <= rtol


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("shape", [(64, 500), (256, 2000), (300, 100), (5, 10_001)])
def test_benign_gradients(rng, dtype, rtol, shape):
    d = shape[1]
    g = (rng.standard_normal(shape) / np.sqrt(d)).astype(dtype)
    x = rng.standard_normal(d).astype(dtype)
    inverse = mfac.InverseFisher(g, damping=1e-4)
    if d <= 2000:
        dense = dense_inverse(g, damping=1e-4)
        product, diagonal = dense @ x, np.diagonal(dense)
    else:  # the recursion is an oracle without d × d
        recursion = StaticRecursion(g, damping=1e-4)
        product = recursion.matvec(x)
        diagonal = np.array([recursion.entry(i, i) for i in range(d)])
    assert relative_error(inverse @ x, product) <= rtol
    assert relative_error(inverse.diagonal(), diagonal) <= rtol
    assert np.abs(inverse.diagonal() / diagonal - 1.0).max() <= rtol


def test_many_columns_cross_every_block_boundary(rng):
    g = rng.standard_normal((3, 40_001), dtype=np.float32)
    recursion = StaticRecursion(g, damping=0.1)
    x = rng.standard_normal((40_001, 2), dtype=np.float32)
    expected = np.stack([recursion.matvec(column) for column in x.T], axis=1)
    assert relative_error(mfac.InverseFisher(g, damping=0.1) @ x, expected) <= 1e-5


@pytest.mark.parametrize("order", ["C", "F", "strided"])
def test_memory_layout_does_not_matter(rng, order):
    g = rng.standard_normal((12, 90))
    laid_out = {"C": g.copy(), "F": np.asfortranarray(g), "strided": np.repeat(g, 2, 1)[:, ::2]}
    inverse = mfac.InverseFisher(laid_out[order], damping=0.1)
    bound = error_bound(g, damping=0.1)
    assert_operator_close(inverse, dense_inverse(g, damping=0.1), rtol=bound)
    x = rng.standard_normal(180)[::-2]
    assert relative_error(inverse @ x, dense_inverse(g, damping=0.1) @ x) <= bound


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "jax"], ids=lambda b: b.name)
def test_results_are_of_the_promoted_dtype(rng, backend):
    g, x = rng.standard_normal((4, 9)), rng.standard_normal(9)
    narrow, wide = backend.asarray(g, "float32"), backend.asarray(x, "float64")
    y = mfac.ihvp(narrow, wide, damping=0.1)
    assert y.dtype == wide.dtype
    # Products with a float64 vector run in float64: the gradients are those of float32, exactly.
    assert relative_error(y, dense_inverse(narrow, damping=0.1) @ x) <= 1e-6


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_bfloat16_gradients(rng, name):
    backend = next(b for b in BACKENDS if b.name == name)
    g = backend.xp.asarray(backend.asarray(rng.standard_normal((6, 50))), dtype=backend.xp.bfloat16)
    inverse = mfac.InverseFisher(g, damping=0.1)
    bound = error_bound(g, damping=0.1)
    assert_operator_close(inverse, dense_inverse(g, damping=0.1), rtol=bound)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_refinement_reaches_the_row_span_at_tiny_damping(rng, backend, dtype):
    """λ is 1e-7 and x lies in the span, where plain float32 products lose most digits."""
    g = (rng.standard_normal((64, 500)) / np.sqrt(500)).astype("float32")
    x = (g.T @ rng.standard_normal(64)).astype("float32")
    inverse = mfac.InverseFisher(backend.asarray(g, dtype), damping=1e-7)
    expected = dense_inverse(g, damping=1e-7) @ x.astype("float64")
    assert relative_error(inverse.matvec(backend.asarray(x, dtype), refine=2), expected) <= 1e-4
    columns = backend.asarray(np.stack([x, -x], axis=1), dtype)
    expected = np.stack([expected, -expected], axis=1)
    assert relative_error(inverse.matmat(columns, refine=2), expected) <= 1e-4


def test_a_dominant_coordinate_keeps_its_diagonal(rng):
    """F_ii/λ is 1e9: 1 − t cancels unless the Gram is computed in float64."""
    g = rng.standard_normal((3, 6)).astype("float32")
    g[:, 2] *= 1e4
    inverse = mfac.InverseFisher(g, damping=1e-1)
    expected = np.diagonal(dense_inverse(g, damping=1e-1))
    assert np.abs(inverse.diagonal() / expected - 1.0).max() <= 1e-4


def test_damping_far_below_rounding_is_said_and_stays_finite(rng):
    row = rng.standard_normal(30)
    g = np.stack([row, row, 2.0 * row])
    with pytest.warns(scipy.linalg.LinAlgWarning, match="singular in float64.* raise the damping"):
        inverse = mfac.InverseFisher(g, damping=1e-18)
    assert np.isfinite(inverse @ rng.standard_normal(30)).all()
    assert (inverse.diagonal() > 0).all()
    with pytest.warns(scipy.linalg.LinAlgWarning, match="F⁻¹x has few right digits"):
        assert np.isfinite(inverse @ row).all()


def test_few_digits_are_said(rng):
    """x is a held gradient and ‖g‖²/λ beyond 1e14: its part outside the span is rounding."""
    g = rng.standard_normal((3, 30))
    inverse = mfac.InverseFisher(g, damping=1e-13)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="F⁻¹x has few right digits: damping 1e-13"):
        inverse @ g[0]
    g = np.eye(3)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="The diagonal of F⁻¹ has few right"):
        mfac.InverseFisher(g, damping=1e-15).diagonal()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_squares_that_leave_float32(rng, scale):
    """The rows' products under- or overflow float32; float64 holds them."""
    g = (scale * rng.standard_normal((4, 20))).astype("float32")
    damping = 0.1 * scale**2
    x = rng.standard_normal(20)
    expected = dense_inverse(g, damping=damping) @ x
    assert relative_error(mfac.ihvp(g, x, damping=damping), expected) <= 1e-5


def test_products_from_the_left(rng):
    g = rng.standard_normal((4, 9))
    inverse, dense = mfac.InverseFisher(g, damping=0.1), dense_inverse(g, damping=0.1)
    x = rng.standard_normal((3, 9))
    assert relative_error(x @ inverse, x @ dense) <= error_bound(g, damping=0.1)
    assert relative_error(x[0] @ inverse, x[0] @ dense) <= error_bound(g, damping=0.1)


def test_the_gradients_are_held_and_not_copied(rng):
    g = rng.standard_normal((4, 9))
    assert np.shares_memory(mfac.InverseFisher(g, damping=0.1)._rows.array, g)


def test_gradients_that_require_grad_are_detached(rng):
    import torch

    g = torch.from_numpy(rng.standard_normal((4, 9))).requires_grad_()
    y = mfac.InverseFisher(g, damping=0.1) @ torch.ones(9, dtype=torch.float64)
    assert not y.requires_grad
    assert relative_error(y, dense_inverse(g, damping=0.1) @ np.ones(9)) <= 1e-12


@pytest.mark.parametrize(("spread", "wide"), [(1.0, False), (1e-3, True)])
def test_one_gram_where_what_it_takes_can_be_foreseen(rng, spread, wide, monkeypatch):
    m, d = 8, 4096
    gradients = rng.standard_normal((m, d), dtype=np.float32)
    gradients *= np.geomspace(spread, 1.0, m, dtype=np.float32)[:, None]
    whole, grams = ops.gram, []

    def gram(g, *, float64, home):
        grams.append((g.shape[1], float64))
        return whole(g, float64=float64, home=home)

    monkeypatch.setattr(ops, "gram", gram)
    inverse = mfac.InverseFisher(gradients, damping=1e-7)
    assert grams[-1] == (d, wide)
    assert [columns for columns, _ in grams].count(d) == 1
    assert sum(columns for columns, _ in grams) <= d + d / 8
    expected = dense_inverse(gradients, damping=1e-7)
    x = rng.standard_normal(d).astype(np.float32)
    assert relative_error(inverse @ x, expected @ x) <= 1e-5


def test_a_second_gram_only_where_many_products_pay_for_it(rng, monkeypatch):
    """Products in float32 lose too much of x in the span here, the Gram in float32 does not."""
    m, d, damping = 64, 900, 1e-4
    gradients = (rng.standard_normal((m, d)) / d**0.5).astype(np.float32)
    expected = dense_inverse(gradients, damping=damping)
    x = (rng.standard_normal((4, m)) @ gradients).T.astype(np.float32)
    whole, grams = ops.gram, []

    def gram(g, *, float64, home):
        grams.append(float64)
        return whole(g, float64=float64, home=home)

    monkeypatch.setattr(ops, "gram", gram)
    inverse = mfac.InverseFisher(gradients, damping=damping)
    formed = []
    for i in range(4):
        y = inverse @ x[:, i]
        assert y.dtype == np.float32
        assert relative_error(y, expected @ x[:, i]) <= 1e-5
        formed.append(grams.copy())
    assert formed == [[False], [False], [False, True], [False, True]]  # 64 rows pay for two


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
@given(problem=problems())
def test_a_step_for_given_products_with_the_rows(backend, problem):
    gradients, damping = problem
    dtype = backend.dtypes()[-1]
    g = backend.asarray(gradients, dtype)
    inverse, m = mfac.InverseFisher(g, damping=damping), len(gradients)
    e = np.linspace(-1.0, 2.0, m)[:, None] + np.arange(2)
    wide = numpy64(g)
    dual = m * damping * np.eye(m) + wide @ wide.T
    terms = scipy.linalg.solve(dual, e, assume_a="pos")
    step = inverse.solve_rows(backend.asarray(e, dtype))
    assert step.dtype == g.dtype
    # Rounding is relative to the terms of the sum, whose weights are as wrong as the dual is bad.
    scale = np.linalg.norm(wide) * np.linalg.norm(terms) + 1e-300
    bound = error_bound(g, damping=damping) * scale
    assert np.linalg.norm(numpy64(step) - wide.T @ terms) <= bound
    one = inverse.solve_rows(backend.asarray(e[:, 0], dtype))
    assert np.linalg.norm(numpy64(one) - wide.T @ terms[:, 0]) <= bound


def test_a_step_is_refused_by_name():
    inverse = mfac.InverseFisher(np.eye(3, 5), damping=0.1)
    with pytest.raises(ValueError, match=r"e must have shape \(3,\) or \(3, k\), got \(5,\)"):
        inverse.solve_rows(np.ones(5))
