"""The recipes show what their page says they show, and their mathematics is right."""

import jax
import numpy as np
import pytest
import scipy.linalg
from scipy.stats import multivariate_normal
from scripts import load

from mfac_core.testing import dense_fisher


@pytest.fixture
def run(capsys):
    """Run a recipe in its short form and return what it prints."""

    def run(name):
        load(f"recipes/{name}.py").main(["--quick"])
        return capsys.readouterr().out

    return run


def numbers(text, label):
    """The numbers behind a label, on the line that it begins."""
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith(label))
    return [float(word) for word in line.removeprefix(label).split()]


def test_influence(run):
    text = run("influence")
    assert numbers(text, "correlation of predicted and actual change")[0] >= 0.9
    by_influence = numbers(text, "influence, most harmful first")[0]
    assert by_influence >= 0.8
    assert by_influence >= numbers(text, "the same with I in place of F")[0] + 0.2


def test_an_influence_is_a_newton_step(rng):
    """On a few pixels: the prediction is gᵀ F⁻¹ gᵢ/m with a dense F."""
    influence, softmax = load("recipes/influence.py"), load("recipes/softmax.py")
    train, test = ((rng.standard_normal((n, 3)), rng.integers(0, 10, n)) for n in (8, 5))
    weights = rng.standard_normal(30)
    g = softmax.gradients(weights, *train)
    fisher = dense_fisher(g, damping=influence.PENALTY)
    expected = g @ scipy.linalg.solve(fisher, softmax.gradients(weights, *test).mean(axis=0)) / 8
    assert np.allclose(influence.influences(weights, train, test), expected, rtol=1e-9)


def test_the_gradients_are_those_of_the_loss(rng):
    softmax = load("recipes/softmax.py")
    x, y, weights = rng.standard_normal((4, 3)), rng.integers(0, 10, 4), rng.standard_normal(30)
    step = 1e-5 * rng.standard_normal(30)
    change = softmax.losses(weights + step, x, y) - softmax.losses(weights - step, x, y)
    assert np.allclose(softmax.gradients(weights, x, y) @ (2 * step), change, rtol=1e-6)


def test_laplace(run):
    lines = [line.split() for line in run("laplace").splitlines()[2:]]
    evidence = {line[0]: float(line[1]) for line in lines}
    assert max(evidence, key=evidence.get) == "0.1000"


def test_the_evidence_is_that_of_the_linear_model(rng):
    """For outputs linear in the weights, log N(y; 0, σ²I + JJᵀ/(mλ)) at the best weights."""
    laplace = load("recipes/laplace.py")
    m, d, damping = 5, 7, 0.3
    j, y = rng.standard_normal((m, d)), rng.standard_normal(m)
    laplace.jacobian = lambda weights, x: x
    laplace.outputs = lambda weights, x: (x @ weights, None)
    precision = j.T @ j / laplace.NOISE**2 + m * damping * np.eye(d)
    best = scipy.linalg.solve(precision, j.T @ y / laplace.NOISE**2)
    evidence, variance = laplace.laplace(best, j, y, j[:2], damping)
    covariance = laplace.NOISE**2 * np.eye(m) + j @ j.T / (m * damping)
    exact = multivariate_normal.logpdf(y, np.zeros(m), covariance)
    assert evidence == pytest.approx(exact, rel=1e-9)
    expected = np.diagonal(j[:2] @ scipy.linalg.solve(precision, j[:2].T))
    assert np.allclose(variance, expected, rtol=1e-9)


def test_the_networks_derivatives(rng):
    laplace = load("recipes/laplace.py")
    x, weights = rng.standard_normal((4, 3)), rng.standard_normal(4 * laplace.HIDDEN)
    step = 1e-5 * rng.standard_normal(len(weights))
    change = laplace.outputs(weights + step, x)[0] - laplace.outputs(weights - step, x)[0]
    assert np.allclose(laplace.jacobian(weights, x) @ (2 * step), change, rtol=1e-6)


def test_ewc(run):
    text = run("ewc")
    none, diagonal, full = (
        numbers(text, name)[-1]
        for name in ("no penalty", "diagonal F, strength 1", "full F, strength 1")
    )
    assert full > diagonal > none + 0.2


def test_preconditioner(run):
    before = jax.config.jax_enable_x64
    try:
        text = run("preconditioner")
    finally:
        jax.config.update("jax_enable_x64", before)
    for solver in ("1  ", "the last by lineax"):
        plain, ours = (numbers(text, solver)[i] for i in (-3, -1))
        assert ours <= 0.7 * plain


def test_ground_state(run):
    text = run("ground_state")
    assert abs(numbers(text, "minSR, float32")[-1]) <= 1e-5
    assert abs(numbers(text, "SPRING, float64")[-1]) <= 1e-8


def test_a_step_to_the_ground_state_is_the_natural_gradient(rng):
    """On four spins: Σ p J ε by the dense metric, and the derivatives by differences."""
    recipe = load("recipes/ground_state.py")
    states, h = recipe.chain(4)
    weights = rng.standard_normal(3 * 5)
    p, local, j = recipe.energies(weights, states, h)
    moved = 1e-5 * rng.standard_normal(15)
    ahead, behind = (recipe.log_amplitudes(weights + x, states)[0] for x in (moved, -moved))
    assert np.allclose(j @ (2 * moved), ahead - behind, rtol=1e-5, atol=1e-10)
    psi = np.sqrt(p)
    assert p @ local == pytest.approx(psi @ h @ psi, rel=1e-12)
    centred = j - p @ j
    metric = centred.T @ (p[:, None] * centred) + recipe.DAMPING * np.eye(15)
    expected = scipy.linalg.solve(metric, -centred.T @ (p * local))
    step = recipe.step(p, local, j, np.zeros(15), 0.0)
    assert np.allclose(step, expected, rtol=1e-8)
