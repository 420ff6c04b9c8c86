"""Derivatives of products: against those of a dense solve, by the library's own autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import mfac_core as mfac

LAMBDA = 0.1


@pytest.fixture
def g():
    return torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[(), (3,)], ids=["vector", "matrix"])
def x(request):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(11, *request.param, dtype=torch.float64, generator=generator)


def dense_solve(g, x):
    return torch.linalg.solve(LAMBDA * torch.eye(11, dtype=g.dtype) + g.T @ g / len(g), x)


def products(g):
    window = mfac.SlidingInverseFisher(11, 6, damping=LAMBDA)
    for row in g:
        window.append(row)
    static = mfac.InverseFisher(g, damping=LAMBDA)
    return {
        "ihvp": lambda x: mfac.ihvp(g, x, damping=LAMBDA),
        "static @": static.__matmul__,
        "refined": lambda x: (static.matvec if x.ndim == 1 else static.matmat)(x, refine=1),
        "@ static": lambda x: x @ static if x.ndim == 1 else (x.T @ static).T,
        "window": window.__matmul__,
        "blocks": mfac.BlockInverseFisher(g, damping=LAMBDA, block_size=11).__matmul__,
    }


# PyTorch's forward mode is written with what PyTorch now deprecates.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", list(products(torch.eye(6, 11, dtype=torch.float64))))
def test_in_x(g, x, name):
    product = products(g)[name]
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ((product(ours) ** 3).sum() + (ours**2).sum()).backward()
    ((dense_solve(g, theirs) ** 3).sum() + (theirs**2).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    torch.autograd.gradcheck(product, x.clone().requires_grad_(), check_forward_ad=True)
    if x.ndim == 1:
        torch.autograd.gradgradcheck(lambda x: product(x) ** 2, x.clone().requires_grad_())


def test_the_forward_matrix_and_powers(g, x):
    for operator in (
        mfac.EmpiricalFisher(g, damping=LAMBDA),
        mfac.InverseFisher(g, damping=LAMBDA).power(0.5),
    ):
        torch.autograd.gradcheck(operator.__matmul__, x.clone().requires_grad_())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_in_the_gradients(g, x):
    def ours(g, x):
        return mfac.ihvp(g, x, damping=LAMBDA)

    both = g.clone().requires_grad_(), x.clone().requires_grad_()
    torch.autograd.gradcheck(ours, both, check_forward_ad=True)
    torch.autograd.gradcheck(ours, (both[0], x))
    torch.autograd.gradgradcheck(ours, both)


def test_single_precision_stays_single(g, x):
    inverse = mfac.InverseFisher(g, damping=LAMBDA)
    narrow = x.float().requires_grad_()
    (inverse @ narrow).sum().backward()
    assert narrow.grad.dtype == torch.float32


def test_nothing_is_recorded_where_nothing_is_asked(g, x):
    inverse = mfac.InverseFisher(g.clone().requires_grad_(), damping=LAMBDA)
    assert not (inverse @ x).requires_grad
    with torch.no_grad():
        assert not (inverse @ x.clone().requires_grad_()).requires_grad


def test_a_window_that_changed_meanwhile(g, x):
    window = mfac.SlidingInverseFisher(11, 6, damping=LAMBDA)
    for change in (
        lambda: window.append(g[1]),
        lambda: window.replace(0, g[2]),
        lambda: setattr(window, "damping", 0.2),
        window.clear,
    ):
        window.append(g[0])
        y = window @ x.clone().requires_grad_()
        change()
        with pytest.raises(RuntimeError, match=r"changed since.*backward before"):
            y.sum().backward()


def test_parts_are_refused(g):
    parts = [g[:, :5], g[:, 5:]]
    inverse = mfac.InverseFisher(parts, damping=LAMBDA)
    pieces = [torch.ones(5, dtype=g.dtype).requires_grad_(), torch.ones(6, dtype=g.dtype)]
    with pytest.raises(TypeError, match="x in several parts cannot be differentiated"):
        inverse @ pieces
    with pytest.raises(TypeError, match="gradients in several parts"):
        mfac.ihvp([g[:, :5].clone().requires_grad_(), g[:, 5:]], g[0], damping=LAMBDA)


def test_jax(g, x):
    """Reverse, forward, and of second order; in x, in the gradients and in the damping."""
    g, x = (jnp.asarray(a.float().numpy()) for a in (g, x))

    def dense(g, x, damping):
        return jnp.linalg.solve(damping * jnp.eye(11) + g.T @ g / len(g), x)

    def ours(g, x, damping):
        return mfac.ihvp(g, x, damping=damping)

    def loss(solve):
        return lambda *arguments: (solve(*arguments) ** 2).sum()

    arguments = (g, x, jnp.float32(LAMBDA))
    close = dict(rtol=2e-4, atol=2e-4)
    for k in range(3):
        for derive in (jax.grad, lambda f, k: jax.jit(jax.grad(f, k))):
            ours_k = derive(loss(ours), k)(*arguments)
            np.testing.assert_allclose(ours_k, jax.grad(loss(dense), k)(*arguments), **close)
    along = tuple(jnp.ones_like(a) for a in arguments)
    for one, other in zip(
        jax.jvp(ours, arguments, along), jax.jvp(dense, arguments, along), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-3)
    inverse = mfac.InverseFisher(g, damping=LAMBDA)
    of_operator = jax.grad(lambda x: ((inverse @ x) ** 2).sum())(x)
    np.testing.assert_allclose(of_operator, jax.grad(loss(dense), 1)(*arguments), **close)

    def twice(f):
        return jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum())(x)

    np.testing.assert_allclose(
        twice(lambda x: loss(ours)(g, x, LAMBDA)),
        twice(lambda x: loss(dense)(g, x, LAMBDA)),
        rtol=1e-3,
        atol=1e-2,
    )
