"""The m-sized half by itself."""

import numpy as np
import pytest
from conftest import relative_error

from mfac_core._arrays import Home, home_of
from mfac_core._dual import Dual
from mfac_core._ops import dense


def explicit(dual):
    return np.asarray(dual.gram) + dual.shift * np.eye(len(dual))


@pytest.fixture
def dual(rng):
    g = rng.standard_normal((6, 9))
    return Dual(g @ g.T, 0.1, Home(np, "cpu"))


def test_replacing_updates_the_inverse_and_does_not_factor(rng, monkeypatch):
    g = rng.standard_normal((6, 9))
    dual = Dual(g @ g.T, 0.1, Home(np, "cpu"))
    dual.factor()
    for i in [0, 3, 5, 1, 2]:
        g[i] = rng.standard_normal(9)
        dual.replace(i, g @ g[i])
        monkeypatch.setattr(dense, "cholesky", None)  # from here on the inverse is known
        b = rng.standard_normal((6, 2))
        current = g @ g.T + 0.1 * np.eye(6)
        assert relative_error(dual.solve(b), np.linalg.solve(current, b)) <= 1e-10
        assert relative_error(dual.column(i), np.linalg.inv(current)[:, i]) <= 1e-10


def test_the_inverse_is_computed_afresh_at_least_every_m_replacements(rng, monkeypatch):
    dual = Dual(np.eye(20), 0.1, Home(np, "cpu"))
    dual.factor()
    factored = []
    cholesky = dense.cholesky
    monkeypatch.setattr(
        dense, "cholesky", lambda home, a: factored.append(len(a)) or cholesky(home, a)
    )
    for step in range(100):
        row = np.zeros(20)
        row[step % 20] = 1.0 + rng.random()
        dual.replace(step % 20, row)
        dual.solve(row)
    assert 4 <= len(factored) <= 6


def test_a_damaged_inverse_is_noticed_and_given_up(dual):
    dual.factor()
    dual.replace(2, dual.gram[2] * 1.0)
    dual._inverse *= 1.01
    b = np.arange(6.0)
    assert relative_error(dual.solve(b), np.linalg.solve(explicit(dual), b)) <= 1e-12
    dual.replace(2, dual.gram[2] * 1.0)
    dual._inverse[0, 0] = np.nan
    assert relative_error(dual.column(3), np.linalg.inv(explicit(dual))[:, 3]) <= 1e-12


def test_a_slightly_wrong_inverse_is_refined(dual):
    dual.factor()
    dual.replace(2, dual.gram[2] * 1.0)
    dual._inverse *= 1.0 + 5e-5
    b = np.arange(6.0)
    assert relative_error(dual.solve(b), np.linalg.solve(explicit(dual), b)) <= 1e-12
    assert dual._inverse is not None


def test_growing_keeps_the_inverse(dual, rng):
    dual.factor()
    dual.replace(0, dual.gram[0] * 1.0)
    dual.grow()
    row = 0.01 * rng.standard_normal(7)
    row[6] = 5.0
    dual.replace(6, row)
    assert dual._inverse is not None
    assert relative_error(dual._inverse, np.linalg.inv(explicit(dual))) <= 1e-12


def test_the_norm_of_the_inverse_is_estimated_from_below(dual):
    exact = np.linalg.norm(np.linalg.inv(explicit(dual)), 2)
    assert exact / 3 <= dual.inverse_norm() <= exact * (1 + 1e-12)
    indefinite = Dual(np.diag([1.0, -1.0]), 0.1, Home(np, "cpu"))
    assert indefinite.inverse_norm() == np.inf
    assert indefinite.condition() == np.inf


def test_cancellation_compares_terms_with_their_sum(rng):
    g = rng.standard_normal((3, 9))
    g[1] = g[0]
    dual = Dual(g @ g.T, 0.1, Home(np, "cpu"))
    assert dual.cancellation(np.array([1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert dual.cancellation(np.array([1.0, -1.0, 0.0])) > 1e6


def test_the_norm_of_the_gram_follows_every_change(rng):
    g = rng.standard_normal((4, 9))
    dual = Dual(g @ g.T, 0.1, Home(np, "cpu"))

    def check():
        expected = 0.1 + np.linalg.norm(dual.gram, np.inf)
        assert dual.norm() == pytest.approx(expected, rel=1e-14)

    check()
    dual.factor()
    g[2] *= 10.0
    dual.replace(2, g @ g[2])
    assert dual.gram[2, 2] == pytest.approx(g[2] @ g[2])
    check()
    dual.grow()
    check()
    dual.set_gram(9.0 * g @ g.T)
    check()


def test_homes():
    import array_api_strict
    import jax
    import torch

    for x in (np.ones(2), jax.numpy.ones(2)):
        assert home_of(x).is_numpy
        assert home_of(x).is_host
    home = home_of(torch.ones(2, requires_grad=True))
    assert home.is_host
    assert not home.is_numpy
    received = home.receive(torch.ones(2, requires_grad=True))
    assert received.dtype == torch.float64
    assert not received.requires_grad
    assert not home_of(torch.ones(2, device="meta")).is_host
    device = array_api_strict.Device("device1")
    assert home_of(array_api_strict.ones(2, device=device)).device == device
