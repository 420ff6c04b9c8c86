"""Inside JAX's transformations, and what JAX would otherwise copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

import mfac_core as mfac
from mfac_core.testing import dense_inverse, error_bound


@pytest.fixture
def problem(rng):
    g = rng.standard_normal((6, 30)).astype("float32")
    x = rng.standard_normal((30, 4)).astype("float32")
    return g, x, error_bound(g, damping=0.1)


def test_jit(problem):
    g, x, bound = problem
    dense = dense_inverse(g, damping=0.1)
    compiled = jax.jit(mfac.ihvp)
    assert relative_error(compiled(g, x[:, 0], damping=0.1), dense @ x[:, 0]) <= bound
    assert relative_error(compiled(g, x, damping=0.1), dense @ x) <= bound
    fixed = jax.jit(lambda x: mfac.ihvp(jnp.asarray(g), x, damping=0.1))
    assert relative_error(fixed(x), dense @ x) <= bound


def test_jit_of_an_operators_product(problem):
    g, x, bound = problem
    inverse = mfac.InverseFisher(jnp.asarray(g), damping=0.1)
    product = jax.jit(inverse.matvec)(x[:, 0])
    assert relative_error(product, dense_inverse(g, damping=0.1) @ x[:, 0]) <= bound


def test_vmap_over_vectors_and_over_gradients(problem, rng):
    g, x, bound = problem
    dense = dense_inverse(g, damping=0.1)
    over_vectors = jax.vmap(lambda v: mfac.ihvp(jnp.asarray(g), v, damping=0.1), in_axes=1)
    assert relative_error(over_vectors(x), (dense @ x).T) <= bound
    many = np.stack([g, 2.0 * g, rng.standard_normal((6, 30)).astype("float32")])
    over_gradients = jax.vmap(lambda h: mfac.ihvp(h, jnp.asarray(x[:, 0]), damping=0.1))
    expected = np.stack([dense_inverse(h, damping=0.1) @ x[:, 0] for h in many])
    assert relative_error(jax.jit(over_gradients)(many), expected) <= 4 * bound


def test_a_large_traced_system_does_not_hang(rng):
    g = (rng.standard_normal((600, 5000)) / 70).astype("float32")
    x = rng.standard_normal(5000).astype("float32")
    expected = mfac.InverseFisher(g, damping=1e-2) @ x
    assert relative_error(jax.jit(mfac.ihvp)(g, x, damping=1e-2), expected) <= 1e-4


def test_with_64_bits(problem):
    g, x, _ = problem
    with jax.enable_x64(True):
        wide = jnp.asarray(g, dtype=jnp.float64)
        y = mfac.ihvp(wide, jnp.asarray(x, dtype=jnp.float64), damping=0.1)
        assert y.dtype == jnp.float64
        assert relative_error(y, dense_inverse(g, damping=0.1) @ x) <= 1e-12


def test_a_traced_argument_of_the_wrong_shape_is_refused(problem):
    g, x, _ = problem
    with pytest.raises(ValueError, match="x must have shape"):
        jax.jit(mfac.ihvp)(g, x[:5, 0], damping=0.1)


def test_the_windows_buffer_is_reused(rng):
    window = mfac.SlidingInverseFisher(1000, 4, damping=0.1)
    window.append(jnp.asarray(rng.standard_normal(1000), dtype=jnp.float32))
    pointer = window._rows.array.unsafe_buffer_pointer()
    window.append(jnp.asarray(rng.standard_normal(1000), dtype=jnp.float32))
    assert window._rows.array.unsafe_buffer_pointer() == pointer
