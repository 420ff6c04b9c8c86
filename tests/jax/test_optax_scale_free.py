"""The scale-free step of optax against that of PyTorch, and against dense inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mfac_core.optax import mfac, scale_by_mfac
from mfac_core.torch import MFAC

WINDOW = 4
SHAPES = {"a": (5, 3), "k": (3, 2, 4), "b": (7,), "c": (), "z": (3, 2)}  # units of 3, 8, 7, 1, 4
EVENED = ("a", "k", "z")


def blank(k):
    return np.ones(SHAPES[k], np.complex64 if k == "z" else np.float32)


def gradients(rng, steps=9):
    """Return gradients that have something in common, of lengths from 1e-30 to 1e30.

    Some elements of "k" are always zero, all of its first unit at first.
    """
    common = {k: rng.standard_normal((*shape, 2)) for k, shape in SHAPES.items()}
    for i in range(steps):
        scale = 10.0 ** rng.integers(-30, 31) if i % 2 else 1.0
        pairs = {
            k: np.float32(scale * (x + rng.standard_normal(x.shape))) for k, x in common.items()
        }
        g = {k: x[..., 0] for k, x in pairs.items()} | {"z": pairs["z"] @ np.complex64([1, 1j])}
        g["k"][1, 0] = 0.0
        g["k"][0] *= i > 2
        yield g


def real(x):
    x = np.asarray(x)
    return np.float64(np.stack([x.real, x.imag], axis=-1) if np.iscomplexobj(x) else x)


def whole(g):
    """Return a gradient at length 1, complex parameters as pairs."""
    g = {k: real(x) for k, x in g.items()}
    length = np.linalg.norm(np.concatenate([x.ravel() for x in g.values()]))
    return {k: x / length for k, x in g.items()}


def dense_direction(rows):
    """Return C⁻¹û, with C as a matrix, for each unit; rows are one parameter's, the newest last."""
    shape = rows[-1].shape
    units = np.stack(rows).reshape(len(rows), shape[0] if len(shape) > 1 else 1, -1)
    y = np.zeros(units.shape[1:])
    for i, block in enumerate(np.moveaxis(units, 1, 0)):
        lengths = np.linalg.norm(block, axis=1, keepdims=True)
        unit = np.divide(block, lengths, where=lengths > 0.0, out=np.zeros_like(block))
        c = 0.6 * np.eye(block.shape[1]) + unit.T @ unit
        y[i] = np.linalg.solve(c, unit[-1]) * lengths[-1]
    y = y.reshape(shape)
    return y * np.sqrt(np.count_nonzero(rows[-1]) / np.sum(y**2))


def newton_schulz(x):
    y = x.reshape(len(x), -1) / np.linalg.norm(x)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    y = y.reshape(x.shape) * (x != 0.0)
    return y * np.linalg.norm(x) / np.linalg.norm(y)


def directions(given, stored=lambda x: x):
    """Return the direction of each step, by parameter."""
    rows, result = [], []
    for g in given:
        rows.append({k: stored(x) for k, x in whole(g).items()})
        held = rows[-WINDOW:]
        result.append({k: dense_direction([row[k] for row in held]) for k in g})
    return result


def run(optimiser, given):
    """Return the updates of each step under jit, from a state donated to the next."""
    params = {k: jnp.asarray(blank(k)) for k in SHAPES}
    update = jax.jit(optimiser.update, donate_argnums=1)
    state, updates = jax.tree.map(jnp.copy, optimiser.init(params)), []
    for g in given:
        one, state = update(jax.tree.map(jnp.asarray, g), state, params)
        updates.append({k: real(x) for k, x in one.items()})
    return updates, state


def assert_close(found, expected, atol=1e-5):
    for one, exact in zip(found, expected, strict=True):
        for k in exact:
            np.testing.assert_allclose(one[k], exact[k], rtol=0, atol=atol, err_msg=k)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.8, "nesterov": False, "weight_decay": 0.1}],
    ids=str,
)
def test_steps_are_those_of_torch(rng, options):
    optimiser = mfac(1.0, WINDOW, **options)
    params = {k: jnp.asarray(blank(k)) for k in SHAPES}
    theirs = {k: torch.nn.Parameter(torch.tensor(blank(k))) for k in SHAPES}
    reference = MFAC(theirs.values(), lr=1.0, window_size=WINDOW, **options)
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    for g in gradients(rng):
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        before = {k: p.detach().clone() for k, p in theirs.items()}
        for k, p in theirs.items():
            p.grad = torch.tensor(g[k])
        reference.step()
        steps = {k: (p.detach() - before[k]).numpy() for k, p in theirs.items()}
        for k, step in steps.items():
            np.testing.assert_allclose(updates[k], step, rtol=0, atol=1e-5, err_msg=k)
        # From the same weights, so that the decay of both is of the same.
        params = {k: jnp.asarray(p.detach().numpy()) for k, p in theirs.items()}


def test_directions_are_those_of_dense_inverses(rng):
    given = list(gradients(rng))
    updates, state = run(scale_by_mfac(WINDOW), given)
    assert_close(updates, directions(given))
    assert state.inverses["a"].shape == (5, 3, 3)
    assert state.inverses["k"].shape == (3, WINDOW, WINDOW)
    assert not updates[-1]["k"][1, 0].any()


def test_steps_are_even(rng):
    given = list(gradients(rng))
    velocity, expected = dict.fromkeys(SHAPES, 0.0), []
    for y in directions(given):
        velocity = {k: 0.9 * v + 0.1 * y[k] for k, v in velocity.items()}
        ahead = {k: 0.9 * v + 0.1 * y[k] for k, v in velocity.items()}
        expected.append({k: -newton_schulz(x) if k in EVENED else -x for k, x in ahead.items()})
    updates, _ = run(mfac(1.0, WINDOW), given)
    assert_close(updates, expected)
    for k in ("a", "z"):
        values = np.linalg.svd(updates[-1][k].reshape(len(updates[-1][k]), -1), compute_uv=False)
        assert values.max() < 2.0 * values.min()


def test_a_window_of_16_bits(rng):
    given = list(gradients(rng))
    updates, state = run(scale_by_mfac(WINDOW, dtype="bfloat16"), given)
    assert state.gradients["k"].dtype == jnp.bfloat16
    stored = directions(given, lambda x: real(jnp.asarray(x, jnp.bfloat16)))
    # A row's element that rounds the other way moves its direction by a part of 2⁻⁸.
    assert_close(updates, stored, atol=2.0**-8)


def test_scan_and_vmap(rng):
    transformation = scale_by_mfac(2)
    g = jnp.asarray(np.float32(rng.standard_normal((2, 5, 3, 2))))  # two of five steps
    init = transformation.init(g[0, 0])

    def steps(g):
        def step(state, g):
            update, state = transformation.update(g, state)
            return state, update

        return jax.lax.scan(step, init, g)[1]

    together = jax.jit(jax.vmap(steps))(g)
    for updates, given in zip(together, g, strict=True):
        state = init
        for update, one in zip(updates, given, strict=True):
            expected, state = transformation.update(one, state)
            np.testing.assert_allclose(update, expected, rtol=0, atol=1e-5)


def test_noise_is_not_amplified(rng):
    transformation = scale_by_mfac(4)
    state = transformation.init({"loud": jnp.zeros(50), "faint": jnp.zeros(50)})
    for _ in range(6):
        loud, faint = np.float32(rng.standard_normal((2, 50)))
        updates, state = transformation.update(
            {"loud": jnp.asarray(loud), "faint": jnp.asarray(1e-9 * faint)}, state
        )
        assert float(jnp.sqrt(jnp.mean(updates["loud"] ** 2))) == pytest.approx(1.0, rel=1e-5)
        rms = float(jnp.sqrt(jnp.mean(updates["faint"] ** 2)))
        expected = 1e-9 * np.linalg.norm(faint) / np.linalg.norm(loud) * 2**0.5 * 2**12
        assert rms == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shape", [(6,), (3, 2)], ids=str)
def test_zeros_and_what_is_not_finite(rng, shape):
    transformation = scale_by_mfac(4)
    update = jax.jit(transformation.update)
    g = jnp.asarray(np.float32(rng.standard_normal(shape)))
    _, state = update(g[::-1], transformation.init(jnp.zeros(shape)))
    expected, after = update(g, state)
    one_infinity = g.at[(1,) * len(shape)].set(jnp.inf)
    for bad, result in ((0.0 * g, 0.0), (g * jnp.nan, np.nan), (one_infinity, np.nan)):
        direction, same = update(bad, state)
        np.testing.assert_array_equal(direction, np.full(shape, result, np.float32))
        jax.tree.map(np.testing.assert_array_equal, same, state)
        again, _ = update(g, same)
        np.testing.assert_array_equal(again, expected)
    assert int(after.count) == 2
    first = (0,) * len(shape)
    direction, _ = update(g.at[first].set(0.0), transformation.init(g))
    assert float(direction[first]) == 0.0
    assert float(jnp.sum(direction**2)) == pytest.approx(5.0, rel=1e-5)


def test_arrays_of_nothing_and_refusals():
    optimiser = mfac(0.1, 4)
    params = {"a": jnp.zeros((0, 3)), "b": jnp.zeros((3, 0)), "c": jnp.ones((2, 2))}
    updates, _ = optimiser.update(params, optimiser.init(params))
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert np.isfinite(updates["c"]).all()
    with pytest.raises(ValueError, match="window_size must be an integer of at least 1"):
        mfac(0.1, 0).init(params)
    with pytest.raises(TypeError, match="dtype must be real floating point"):
        scale_by_mfac(4, dtype="int32").init(params)
    whole_numbers = jax.tree.map(lambda x: x.astype(jnp.int32), params)
    with pytest.raises(TypeError, match="gradients must be floating point, got dtype int32"):
        optimiser.update(whole_numbers, optimiser.init(params))


def test_a_nested_optimiser_of_optax(rng):
    """Hyperparameters that are injected, and a mask."""
    g = {k: jnp.asarray(np.float32(rng.standard_normal((2, 3)))) for k in "ab"}
    optimiser = optax.masked(optax.inject_hyperparams(mfac)(0.1, 4), {"a": True, "b": False})
    updates, _ = jax.jit(optimiser.update)(g, optimiser.init(g), g)
    alone = mfac(0.1, 4)
    expected, _ = alone.update(g["a"], alone.init(g["a"]))
    np.testing.assert_allclose(updates["a"], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(updates["b"], g["b"])
