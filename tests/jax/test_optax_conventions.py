"""What optax's own optimisers do, and so what everything that is built on them expects."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_core.optax import mfac
from mfac_core.testing import dense_inverse

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2, jnp.bfloat16)}
MAKES = {
    "plain": lambda: mfac(0.1, 4, 0.1),
    "momentum and decay": lambda: mfac(0.1, 4, 0.1, momentum=0.9, weight_decay=0.01),
    "scale-free": lambda: mfac(0.1, 4),
}


def same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (jnp.shape(x), x.dtype) == (jnp.shape(y), y.dtype)


@pytest.fixture(params=MAKES, name="make")
def make_fixture(request):
    return MAKES[request.param]


def test_parameters_may_be_abstract(make):
    same_types(make().init(jax.eval_shape(lambda: PARAMS)), make().init(PARAMS))
    same_types(jax.eval_shape(make().init, PARAMS), make().init(PARAMS))


def test_the_state_is_mapped_where_it_is_like_the_parameters(make):
    """Momentum is; the window, where it is one array for all, is not, and stays as it is."""
    optimiser = make()
    state = optimiser.init(PARAMS)
    mapped = optax.tree.map_params(optimiser, lambda x: x + 1, state)
    same_types(mapped, state)
    window, expected = mapped[0], state[0]
    if hasattr(window, "inverses"):  # the scale-free form has a window for each parameter
        expected = expected._replace(gradients=jax.tree.map(lambda x: x + 1, expected.gradients))
    jax.tree.map(np.testing.assert_array_equal, window.gradients, expected.gradients)
    for trace in mapped[1:2] if hasattr(state[1], "trace") else ():
        assert all(bool(jnp.all(x == 1)) for x in jax.tree.leaves(trace))


def test_a_label_that_no_parameter_has(make):
    labels = {"w": "sgd", "b": "sgd"}
    optimiser = optax.multi_transform({"mfac": make(), "sgd": optax.sgd(0.1)}, labels)
    state = optimiser.init(PARAMS)
    updates, again = jax.jit(optimiser.update)(PARAMS, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.1 * np.ones((3, 2)), rtol=1e-6)
    same_types(again, state)


def test_no_parameters_at_all(make):
    optimiser = make()
    updates, state = optimiser.update({}, optimiser.init({}), {})
    assert updates == {}
    same_types(state, optimiser.init({}))


def test_types_stay_and_nothing_is_compiled_again(make):
    optimiser, compilations = make(), []

    @jax.jit
    def step(params, state):
        compilations.append(None)
        updates, state = optimiser.update(params, state, params)
        return optax.apply_updates(params, updates), updates, state

    params, state = PARAMS, optimiser.init(PARAMS)
    for _ in range(6):
        params, updates, after = step(params, state)
        same_types(updates, PARAMS)
        same_types(params, PARAMS)
        same_types(after, state)
        state = after
    assert len(compilations) == 1


def test_complex_parameters_are_pairs_of_real_ones(rng):
    z = rng.standard_normal((3, 4, 2)).astype(np.float32)
    real = rng.standard_normal((3, 5)).astype(np.float32)
    optimiser = mfac(1.0, 4, 0.1, None)
    state = optimiser.init({"z": jnp.zeros(4, jnp.complex64), "x": jnp.zeros(5)})
    rows = []
    for pair, x in zip(z, real, strict=True):
        gradient = {"z": jnp.asarray(pair[:, 0] + 1j * pair[:, 1]), "x": jnp.asarray(x)}
        updates, state = jax.jit(optimiser.update)(gradient, state)
        rows.append(np.concatenate([x, pair.ravel()]))
        expected = -dense_inverse(np.stack(rows), damping=0.1) @ rows[-1]
        assert updates["z"].dtype == jnp.complex64
        pairs = np.stack([updates["z"].real, updates["z"].imag], axis=-1)
        found = np.concatenate([updates["x"], pairs.ravel()])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_injected_hyperparameters_without_static_arguments():
    optimiser = optax.inject_hyperparams(mfac)(0.1, 4, 0.1)
    updates, _ = jax.jit(optimiser.update)(PARAMS, optimiser.init(PARAMS), PARAMS)
    expected, _ = mfac(0.1, 4, 0.1).update(PARAMS, mfac(0.1, 4, 0.1).init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5)
    with pytest.raises(TypeError, match=r"window_size must be known.*static_args"):
        jax.jit(optimiser.init)(PARAMS)
    static = optax.inject_hyperparams(mfac, static_args="window_size")(0.1, 4, 0.1)
    same_types(jax.jit(static.init)(PARAMS), static.init(PARAMS))
