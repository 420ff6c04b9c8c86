"""The optax transformations against dense inverses, and among optax's own parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import relative_error
from jax.flatten_util import ravel_pytree

from mfac_core.optax import mfac, scale_by_mfac
from mfac_core.testing import dense_inverse, error_bound

WINDOW, DAMPING, RATE = 3, 0.1, 0.05
BLANK = {"w": jnp.zeros((6, 5)), "layer": (jnp.zeros(7), jnp.zeros(()))}


@pytest.fixture
def gradients(rng):
    """Return five gradients of the parameters ``BLANK``."""
    return [
        jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype), BLANK)
        for _ in range(5)
    ]


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def preconditioned(gradients, damping=DAMPING):
    """Return F⁻¹g for each of a sequence of flat gradients, by dense inverses."""
    held = [np.stack(gradients[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(gradients))]
    return [dense_inverse(rows, damping=damping) @ rows[-1] for rows in held]


def run(optimiser, gradients, params=BLANK):
    """Return the updates of each step under jit, from a state donated to the next."""
    update = jax.jit(optimiser.update, donate_argnums=1)
    state = jax.tree.map(jnp.copy, optimiser.init(params))  # nothing may share a buffer
    updates = []
    for g in gradients:
        update_, state = update(g, state, params)
        updates.append(update_)
    return updates, state


def assert_close(updates, expected, bound=1e-4):
    for update, exact in zip(updates, expected, strict=True):
        assert relative_error(flat(update), exact) <= bound


def test_the_update_is_the_dense_inverse_times_the_gradient(gradients):
    updates, _ = run(scale_by_mfac(WINDOW, DAMPING), gradients)
    flats = [flat(g) for g in gradients]
    bound = error_bound(np.float32(flats), damping=DAMPING)
    assert_close(updates, preconditioned(flats), bound)
    assert jax.tree.structure(updates[0]) == jax.tree.structure(BLANK)
    assert bound < 1e-3


def test_without_jit(gradients):
    optimiser = scale_by_mfac(WINDOW, DAMPING)
    state, updates = optimiser.init(BLANK), []
    for g in gradients:
        update, state = optimiser.update(g, state)
        updates.append(update)
    assert_close(updates, preconditioned([flat(g) for g in gradients]))


def test_mixed_dtypes(gradients):
    mixed = [{"a": g["w"].astype(jnp.bfloat16), "b": g["layer"][0]} for g in gradients]
    updates, _ = run(scale_by_mfac(WINDOW, DAMPING), mixed, mixed[0])
    assert updates[-1]["a"].dtype == jnp.bfloat16
    assert updates[-1]["b"].dtype == jnp.float32
    assert_close(updates, preconditioned([flat(g) for g in mixed]), 2.0**-8)


def test_momentum_decay_and_schedule(gradients):
    params = jax.tree.map(lambda x: x + 1.0, BLANK)
    schedule = optax.linear_schedule(RATE, 0.0, 10)
    optimiser = mfac(schedule, WINDOW, DAMPING, momentum=0.9, weight_decay=0.3)
    updates, _ = run(optimiser, gradients, params)
    velocity, expected = 0.0, []
    for i, y in enumerate(preconditioned([flat(g) for g in gradients])):
        velocity = 0.9 * velocity + y
        expected.append(-RATE * (1 - i / 10) * (velocity + 0.3 * flat(params)))
    assert_close(updates, expected)


def test_plain_steps(gradients):
    updates, _ = run(mfac(RATE, WINDOW, DAMPING, None), gradients)
    assert_close(updates, [-RATE * y for y in preconditioned([flat(g) for g in gradients])], 1e-5)


def test_hyperparameters_that_change(gradients):
    dampings = [0.1, 0.1, 0.4, 0.4, 0.4]
    optimiser = optax.inject_hyperparams(mfac)(
        learning_rate=RATE,
        window_size=WINDOW,
        damping=optax.piecewise_constant_schedule(0.1, {2: 4.0}),
        momentum=0.0,
    )
    updates, state = run(optimiser, gradients)
    flats = [flat(g) for g in gradients]
    expected = [-RATE * preconditioned(flats, damping)[i] for i, damping in enumerate(dampings)]
    assert_close(updates, expected)
    state.hyperparams["learning_rate"] = 2 * RATE
    again, _ = jax.jit(optimiser.update)(gradients[4], state, BLANK)
    last = dense_inverse(np.stack([flats[3], flats[4], flats[4]]), damping=0.4) @ flats[4]
    assert_close([again], [-2 * RATE * last])


def test_gradients_accumulated_by_multi_steps(gradients):
    optimiser = optax.MultiSteps(mfac(RATE, WINDOW, DAMPING, None), every_k_schedule=2)
    updates, _ = run(optimiser, gradients[:4])
    means = [(flat(a) + flat(b)) / 2 for a, b in (gradients[:2], gradients[2:4])]
    assert not flat(updates[0]).any()
    assert_close(updates[1::2], [-RATE * y for y in preconditioned(means)])


def test_a_gradient_that_is_not_finite(gradients):
    bad = jax.tree.map(lambda x: x.at[()].set(jnp.nan), gradients[1])
    steps = [gradients[0], bad, gradients[2]]
    expected = preconditioned([flat(gradients[0]), flat(gradients[2])])
    seen, _ = run(scale_by_mfac(WINDOW, DAMPING), steps)
    assert np.isnan(flat(seen[1])).all()
    assert_close(seen[::2], expected)
    skipped, state = run(optax.apply_if_finite(mfac(1.0, WINDOW, DAMPING, None), 5), steps)
    assert not flat(skipped[1]).any()
    assert_close(skipped[::2], [-y for y in expected])
    assert int(state.total_notfinite) == 1


def test_masked_parameters_stay_out_of_the_window(gradients):
    mask = {"w": True, "layer": (False, False)}
    updates, _ = run(optax.masked(scale_by_mfac(WINDOW, DAMPING), mask), gradients)
    expected = preconditioned([flat(g["w"]) for g in gradients])
    assert_close([u["w"] for u in updates], expected)
    np.testing.assert_array_equal(updates[-1]["layer"][0], gradients[-1]["layer"][0])


def test_the_state_survives_as_plain_arrays(gradients):
    optimiser = mfac(RATE, WINDOW, DAMPING, momentum=0.9)
    _, state = run(optimiser, gradients[:4])
    leaves, structure = jax.tree.flatten(state)
    saved = [np.array(leaf) for leaf in leaves]
    restored = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in saved])
    a, _ = jax.jit(optimiser.update)(gradients[4], state, BLANK)
    b, _ = jax.jit(optimiser.update)(gradients[4], restored, BLANK)
    np.testing.assert_array_equal(flat(a), flat(b))


def test_refusals():
    with pytest.raises(ValueError, match="damping must be finite and positive"):
        scale_by_mfac(4, 0.0)
    with pytest.raises(ValueError, match="window_size must be an integer of at least 1"):
        mfac(0.1, 0, 0.1).init(BLANK)
    transformation = scale_by_mfac(4, 0.1)
    state = transformation.init({"a": jnp.ones(3)})
    with pytest.raises(TypeError, match="g must be real floating point, got dtype int32"):
        transformation.update({"a": jnp.ones(3, jnp.int32)}, state)
