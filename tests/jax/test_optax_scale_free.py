"""The scale-free step of optax against that of PyTorch, gradient by gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from mfac_core.optax import mfac, scale_by_mfac
from mfac_core.torch import MFAC

SHAPES = {"a": (5, 3), "b": (7,), "c": ()}


def gradients(rng, steps=9):
    """Return gradients that have something in common, of lengths from 1e-30 to 1e30."""
    common = {k: rng.standard_normal(shape) for k, shape in SHAPES.items()}
    for i in range(steps):
        scale = 10.0 ** rng.integers(-30, 31) if i % 2 else 1.0
        yield {
            k: np.float32(scale * (common[k] + rng.standard_normal(shape)))
            for k, shape in SHAPES.items()
        }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    ],
    ids=str,
)
def test_steps_are_those_of_torch(rng, options):
    optimiser = mfac(0.1, 4, **options)
    params = {k: jnp.ones(shape) for k, shape in SHAPES.items()}
    theirs = {k: torch.nn.Parameter(torch.ones(shape)) for k, shape in SHAPES.items()}
    reference = MFAC(theirs.values(), lr=0.1, window_size=4, **options)
    state, update = optimiser.init(params), jax.jit(optimiser.update)
    for g in gradients(rng):
        updates, state = update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, updates)
        for k, p in theirs.items():
            p.grad = torch.tensor(g[k])
        reference.step()
        for k, p in theirs.items():
            np.testing.assert_allclose(params[k], p.detach().numpy(), rtol=0, atol=1e-5)


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


def test_zeros_and_what_is_not_finite(rng):
    transformation = scale_by_mfac(4)
    state = transformation.init(jnp.zeros(6))
    g = jnp.asarray(np.float32(rng.standard_normal(6)))
    expected, after = jax.jit(transformation.update)(g, state)
    for bad, result in ((jnp.zeros(6), 0.0), (g * jnp.nan, np.nan), (g / 0.0, np.nan)):
        update, same = jax.jit(transformation.update)(bad, state)
        np.testing.assert_array_equal(update, np.full(6, result, np.float32))
        again, _ = jax.jit(transformation.update)(g, same)
        np.testing.assert_array_equal(again, expected)
    assert int(after.count) == 1
    masked = g.at[2].set(0.0)
    update, _ = transformation.update(masked, state)
    assert float(update[2]) == 0.0
    assert float(jnp.sum(update**2)) == pytest.approx(5.0, rel=1e-5)
