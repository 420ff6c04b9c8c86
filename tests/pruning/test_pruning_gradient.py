"""Pruning weights that are not at a minimum, against dense systems with multipliers."""

import numpy as np
import pytest
from conftest import CASES, numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import blocks_of, cuts, problems

import mfac_core as mfac
from mfac_core.pruning import obs_update, prune, saliency
from mfac_core.testing import dense_fisher, error_bound


def optimum(fisher, w, g, mask):
    """Minimise gᵀδ + ½ δᵀFδ under δ_S = −w_S, by the system with Lagrange multipliers."""
    removed = np.flatnonzero(~mask)
    select = np.eye(len(w))[removed]
    zero = np.zeros((len(removed), len(removed)))
    system = np.block([[fisher, select.T], [select, zero]])
    return w + np.linalg.solve(system, np.concatenate([-g, -w[removed]]))[: len(w)]


def model(fisher, w, g, new):
    delta = np.asarray(new) - w
    return g @ delta + 0.5 * delta @ fisher @ delta


@pytest.fixture
def problem(rng):
    return rng.standard_normal(24), rng.standard_normal((10, 24)), rng.standard_normal(24) / 5


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@settings(max_examples=25)
@given(problem=problems(max_params=20), data=st.data())
def test_the_update_is_the_constrained_optimum(backend, dtype, problem, data):
    gradients, damping = problem
    rows = backend.asarray(gradients, dtype)
    d = rows.shape[1]
    w = np.linspace(-1.0, 2.0, d).astype(dtype)
    fisher = dense_fisher(rows, damping=damping)
    g = (fisher @ np.cos(np.arange(d))).astype(dtype)  # so that Newton's step is of length √d
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    block_size, lengths = data.draw(st.one_of(st.just((None, [d])), cuts(d)))
    kept = backend.xp.asarray(mask, **({"device": backend.device} if backend.device else {}))
    best = obs_update(
        backend.asarray(w, dtype),
        rows,
        kept,
        damping=damping,
        block_size=block_size,
        gradient=backend.asarray(g, dtype),
    )
    assert best.dtype == rows.dtype
    wide, expected = w.astype(float), blocks_of(fisher, lengths)
    step = np.zeros(d)
    step[mask] = np.linalg.solve(expected[np.ix_(mask, mask)], g[mask].astype(float))
    expected = optimum(expected, wide, g.astype(float), mask)
    bound = error_bound(rows, damping=damping) * (np.linalg.norm(w) + np.linalg.norm(step))
    assert np.linalg.norm(numpy64(best) - expected) <= bound
    assert (numpy64(best)[~mask] == 0).all()


def test_a_larger_problem_in_float64(rng):
    rows, w = rng.standard_normal((60, 400)) / 20, rng.standard_normal(400)
    g = rows.mean(axis=0)
    mask = rng.random(400) < 0.3
    best = obs_update(w, rows, mask, damping=1e-3, gradient=g)
    expected = optimum(dense_fisher(rows, damping=1e-3), w, g, mask)
    assert relative_error(best, expected) <= 1e-9


@pytest.mark.parametrize("block_size", [None, 6])
@pytest.mark.parametrize("update", ["joint", "independent"])
def test_the_increase_is_that_of_the_whole_model(problem, block_size, update):
    w, rows, g = problem
    lengths = [24] if block_size is None else [6] * 4
    fisher = blocks_of(dense_fisher(rows, damping=0.1), lengths)
    options = {"damping": 0.1, "block_size": block_size, "stages": 3, "gradient": g}
    pruned = prune(w, rows, sparsity=0.5, update=update, **options)
    assert pruned.loss_increase == pytest.approx(model(fisher, w, g, pruned.weights), rel=1e-6)
    if update == "joint":
        assert relative_error(pruned.weights, optimum(fisher, w, g, pruned.mask)) <= 1e-9
    newton = prune(w, rows, sparsity=0.0, update=update, **options)
    assert relative_error(newton.weights, w - np.linalg.solve(fisher, g)) <= 1e-9
    assert newton.loss_increase == pytest.approx(-0.5 * g @ np.linalg.solve(fisher, g), rel=1e-6)


@pytest.mark.parametrize("pattern", [None, 4])
def test_what_raises_the_model_least_goes_first(problem, pattern):
    w, rows, g = problem
    fisher = dense_fisher(rows, damping=0.1)
    k = pattern or 1
    rises = []
    for first in range(0, 24, k):
        mask = (np.arange(24) < first) | (np.arange(24) >= first + k)
        rises.append(model(fisher, w, g, optimum(fisher, w, g, mask)))
    pruned = prune(w, rows, sparsity=k / 24, pattern=pattern, damping=0.1, stages=1, gradient=g)
    gone = np.flatnonzero(~pruned.mask.reshape(-1, k).any(axis=1))
    assert list(gone) == [int(np.argmin(rises))]
    if pattern is None:
        inverse = mfac.InverseFisher(rows, damping=0.1)
        lowest = -0.5 * g @ np.linalg.solve(fisher, g)
        assert saliency(w - inverse @ g, inverse) == pytest.approx(np.array(rises) - lowest)


def test_it_is_pruning_after_newtons_step(problem):
    w, rows, g = problem
    newton = w - np.linalg.solve(dense_fisher(rows, damping=0.1), g)
    options = {"sparsity": 0.6, "damping": 0.1, "stages": 4}
    for update in ("joint", "independent"):
        pruned = prune(w, rows, gradient=g, update=update, **options)
        same = prune(newton, rows, update=update, **options)
        assert (pruned.mask == same.mask).all()
        assert relative_error(pruned.weights, same.weights) <= 1e-9


def test_with_a_mask_and_a_loss(problem):
    w, rows, g = problem
    mask = np.arange(24) % 3 > 0
    fisher = dense_fisher(rows, damping=0.1)
    pruned = prune(
        w,
        rows,
        sparsity=0.5,
        mask=mask,
        damping=0.1,
        gradient=g,
        loss=lambda x: model(fisher, w, g, x),
    )
    assert not (pruned.mask & ~mask).any()
    assert relative_error(pruned.weights, optimum(fisher, w, g, pruned.mask)) <= 1e-9


def test_a_zero_gradient_changes_nothing(problem):
    w, rows, g = problem
    options = {"sparsity": 0.5, "damping": 0.1, "stages": 2}
    pruned, same = prune(w, rows, **options), prune(w, rows, gradient=0 * g, **options)
    assert (pruned.weights == same.weights).all()
    assert pruned.loss_increase == same.loss_increase


def test_what_is_refused(problem):
    w, rows, g = problem
    with pytest.raises(ValueError, match=r"gradient must have shape \(24,\), got \(23,\)"):
        obs_update(w, rows, np.ones(24, bool), damping=0.1, gradient=g[:-1])
    with pytest.raises(ValueError, match="gradient must be finite, got 24 NaN or infinities"):
        prune(w, rows, sparsity=0.5, damping=0.1, gradient=g * np.nan)
