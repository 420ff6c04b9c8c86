"""Objects of the public protocol in the place of arrays."""

import copy

import jax
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import BACKENDS, numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Ranks, problems

import mfac_core as mfac
from mfac_core import pruning
from mfac_core.testing import (
    assert_operator_close,
    assert_rows,
    dense_fisher,
    dense_inverse,
    error_bound,
)


class Functions:
    """The protocol with nothing that it does not ask for."""

    def __init__(self, g):
        self._g, self.shape, self.dtype = g, tuple(g.shape), g.dtype
        self.asked = []

    def gram(self):
        self.asked.append("gram")
        return self._g @ self._g.T

    def project(self, x):
        self.asked.append("project")
        assert x.dtype == self.dtype
        return self._g @ x

    def combine(self, c):
        self.asked.append("combine")
        assert c.dtype == self.dtype
        return self._g.T @ c


class OfLibrary(Functions):
    def __init__(self, g):
        super().__init__(g)
        self.device = g.device

    def __array_namespace__(self):
        backends = [b for b in BACKENDS if type(b.asarray(np.zeros(1))) is type(self._g)]
        return backends[0].xp


class Columns(Functions):
    def columns(self, indices):
        return self._g[:, indices]


class Blocks(Functions):
    def blocks(self):
        yield self._g[:, :1]
        yield self._g[:, 1:]


class Widening(Functions):
    def in_float64(self):
        return Functions(self._g.astype(np.float64))


@pytest.fixture
def g(rng):
    return rng.standard_normal((6, 20)) / 3


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_products_in_every_library(g, rng, backend):
    dtype = backend.dtypes()[-1]
    rows = OfLibrary(backend.asarray(g, dtype))
    assert_rows(rows)
    bound = error_bound(g, damping=0.1, dtype=dtype)
    dense, fisher = dense_inverse(g, damping=0.1), dense_fisher(g, damping=0.1)
    x = rng.standard_normal((20, 3))
    inverse = mfac.InverseFisher(rows, damping=0.1)
    for product in (
        inverse @ backend.asarray(x, dtype),
        mfac.ihvp(rows, backend.asarray(x, dtype), damping=0.1),
        mfac.EmpiricalFisher(rows, damping=0.1).inverse() @ backend.asarray(x, dtype),
    ):
        assert type(product) is type(rows._g)
        assert relative_error(product, dense @ x) <= bound
    forward = mfac.EmpiricalFisher(rows, damping=0.1) @ backend.asarray(x, dtype)
    assert relative_error(forward, fisher @ x) <= bound
    assert inverse.logdet() == pytest.approx(-np.linalg.slogdet(fisher)[1], rel=20 * bound)
    quadratic = inverse.quadratic(backend.asarray(x, dtype))
    assert relative_error(quadratic, np.sum(x * (dense @ x), axis=0)) <= bound
    root = scipy.linalg.sqrtm(dense)
    power = inverse.power(0.5) @ backend.asarray(x, dtype)
    assert relative_error(power, root @ x) <= bound
    refined = inverse.matvec(backend.asarray(x[:, 0], dtype), refine=1)
    assert relative_error(refined, dense @ x[:, 0]) <= bound


@settings(max_examples=30)
@given(problem=problems(), kind=st.sampled_from([Columns, Blocks]))
def test_all_queries_where_there_are_columns(problem, kind):
    g, damping = problem
    bound = error_bound(g, damping=damping)
    inverse = mfac.InverseFisher(kind(g), damping=damping)
    assert_operator_close(inverse, dense_inverse(g, damping=damping), rtol=bound)
    fisher = mfac.EmpiricalFisher(kind(g), damping=damping)
    assert_operator_close(fisher, dense_fisher(g, damping=damping), rtol=bound)


def test_a_draw_has_the_covariance(g):
    draws = mfac.InverseFisher(Functions(g), damping=0.5).sample(20_000, 0)
    assert relative_error(np.cov(draws.T), dense_inverse(g, damping=0.5)) <= 0.1


@pytest.mark.parametrize("kind", [Columns, Blocks])
def test_blocks_and_pruning_where_there_are_columns(g, rng, kind):
    x, mask = rng.standard_normal(20), np.arange(20) % 3 > 0
    blocks = mfac.BlockInverseFisher(kind(g), damping=0.1, block_size=7)
    dense = [dense_inverse(g[:, i : i + 7], damping=0.1) for i in (0, 7, 14)]
    assert relative_error(blocks @ x, scipy.linalg.block_diag(*dense) @ x) <= 1e-12
    pruned = pruning.obs_update(x, kind(g), mask, damping=0.1)
    expected = pruning.obs_update(x, g, mask, damping=0.1)
    assert relative_error(pruned, expected) <= 1e-12


def test_one_gram_and_two_products(g, rng):
    rows = Functions(g)
    inverse = mfac.InverseFisher(rows, damping=0.1)
    assert rows.asked == ["gram"]
    inverse @ rng.standard_normal(20)
    assert rows.asked == ["gram", "project", "combine"]


def test_what_needs_columns_is_refused_by_name(g):
    rows = Functions(g[:, :4])  # fewer parameters than gradients: still by the dual
    inverse = mfac.InverseFisher(rows, damping=0.1)
    queries = {
        "diagonal": inverse.diagonal,
        "entries": lambda: inverse.entries(0, 1),
        "column": lambda: inverse.column(0),
        "submatrix": lambda: inverse.submatrix([0, 1]),
    }
    for name, query in queries.items():
        with pytest.raises(TypeError, match=rf"^{name} needs columns.*type Functions give none"):
            query()
    with pytest.raises(TypeError, match="needs columns of the gradients"):
        mfac.BlockInverseFisher(rows, damping=0.1, block_size=2)
    with pytest.raises(TypeError, match="diagonal needs columns"):
        mfac.EmpiricalFisher(rows, damping=0.1).diagonal()
    assert relative_error(inverse @ np.ones(4), dense_inverse(g[:, :4], damping=0.1).sum(1)) < 1e-12


def test_columns_over_ranks(g, rng):
    x, ranks = rng.standard_normal(20), Ranks(2)

    def body(rank):
        mine = slice(0, 13) if rank == 0 else slice(13, 20)
        inverse = mfac.InverseFisher(Functions(g[:, mine]), damping=0.1, reduce=ranks.reduce)
        return inverse @ x[mine]

    product = np.concatenate(ranks.run(body))
    assert relative_error(product, dense_inverse(g, damping=0.1) @ x) <= 1e-12


def test_float64_rows_are_asked_for_where_the_damping_is_small(rng):
    g = (rng.standard_normal(500) + 0.01 * rng.standard_normal((30, 500))).astype(np.float32)
    x = rng.standard_normal(500).astype(np.float32)
    rows = Widening(g)
    y = mfac.InverseFisher(rows, damping=1e-7) @ x
    assert y.dtype == np.float32
    assert relative_error(y, dense_inverse(g, damping=1e-7) @ numpy64(x)) <= 1e-5
    with pytest.warns(scipy.linalg.LinAlgWarning, match=r"too small.*in_float64\(\)"):
        mfac.InverseFisher(Functions(g), damping=1e-7)


def test_large_and_small_numbers_keep_to_the_range_of_float32(g):
    rows = Functions(g.astype(np.float32))
    inverse = mfac.InverseFisher(rows, damping=0.1)
    for scale in (1e30, 1e-30):
        x = np.full(20, scale, np.float32)
        expected = dense_inverse(rows._g, damping=0.1) @ numpy64(x)
        assert relative_error(inverse @ x, expected) <= 1e-5


def test_torch_differentiates_products_in_x(g):
    inverse = mfac.InverseFisher(Functions(torch.from_numpy(g)), damping=0.1)
    x = torch.ones(20, dtype=torch.float64, requires_grad=True)
    (inverse @ x).sum().backward()
    assert relative_error(x.grad, dense_inverse(g, damping=0.1).sum(axis=0)) <= 1e-12


def test_no_product_inside_of_jit(g):
    rows = OfLibrary(jax.numpy.asarray(g.astype(np.float32)))
    inverse = mfac.InverseFisher(rows, damping=0.1)
    with pytest.raises(TypeError, match=r"x must have values.*OfLibrary.*jax\.jit"):
        jax.jit(inverse.matvec)(jax.numpy.ones(20))


def changed(rows, **members):
    rows = copy.copy(rows)
    vars(rows).update(members)
    return rows


def test_wrong_rows_are_refused_by_name(g):
    good = Functions(g)
    wrong = {
        r"gradients\.gram\(\) must be symmetric": changed(good, gram=lambda: np.triu(g @ g.T)),
        r"gradients\.gram\(\) must return shape \(6, 6\)": changed(good, gram=lambda: g),
        r"gradients must have shape \(m, d\)": changed(good, shape=(6,)),
        r"floating dtype": changed(good, dtype=np.int64),
        r"gradients must be finite.*index 0": Functions(np.where(np.arange(6)[:, None], g, np.nan)),
    }
    for message, rows in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message):
            mfac.InverseFisher(rows, damping=0.1)
    for name, part in (("project", g[:2] @ np.ones(20)), ("combine", np.ones(3))):
        rows = changed(good, **{name: lambda _, part=part: part})
        with pytest.raises(ValueError, match=rf"gradients\.{name}\(.\) must return shape"):
            mfac.InverseFisher(rows, damping=0.1) @ np.ones(20)
    other = changed(good, project=lambda x: torch.from_numpy(g @ x))
    with pytest.raises(TypeError, match=r"gradients\.project\(x\) must be an array of"):
        mfac.InverseFisher(other, damping=0.1) @ np.ones(20)


@pytest.mark.parametrize(
    ("name", "act", "message"),
    [
        ("project", lambda g, x: 1.1 * (g @ x), "beside"),
        ("project", lambda g, x: g @ x + 1.0, "of columns|project"),
        ("combine", lambda g, c: abs(g.T @ c), "combine"),
        ("combine", lambda g, c: g.T @ c * np.random.default_rng().random(), "a second time"),
        ("gram", lambda g: 2.0 * g @ g.T, r"gram\(\) @ c"),
    ],
)
def test_the_check_of_rows_finds(g, name, act, message):
    assert_rows(Functions(g))
    rows = changed(Functions(g), **{name: lambda *x: act(g, *x)})
    with pytest.raises(AssertionError, match=message):
        assert_rows(rows)


def test_the_check_of_rows_looks_at_columns(g):
    assert_rows(Columns(g))
    assert_rows(Blocks(g))
    assert_rows(Widening(g.astype(np.float32)))
    rows = changed(Columns(g), columns=lambda indices: g[:, indices[::-1]])
    with pytest.raises(AssertionError, match="columns by index"):
        assert_rows(rows)
