"""Influence by the dual, against dense inverses that are formed anew for each group."""

import numpy as np
import pytest
import scipy.linalg
from conftest import BACKENDS, numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import File, Ranks, problems

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.testing import dense_fisher, dense_inverse, error_bound


def dense_scores(g, queries, damping):
    return queries @ dense_inverse(g, damping=damping) @ g.T / len(g)


def steps_without(g, group, damping):
    """What each of a group adds to the step below, in columns: a new matrix, solved."""
    stays = np.ones(len(g), bool)
    stays[group] = False
    fisher = damping * np.eye(g.shape[1]) + g[stays].T @ g[stays] / len(g)
    return scipy.linalg.solve(fisher, g[~stays].T / len(g), assume_a="pos")


def solution_without(g, group, damping):
    """The step to the minimum of the quadratic model without a group."""
    return steps_without(g, group, damping).sum(axis=1)


def dense_increase(g, step, damping):
    return 0.5 * step @ dense_fisher(g, damping=damping) @ step


@pytest.fixture
def g(rng):
    return rng.standard_normal((12, 30)) / 4


@pytest.fixture
def queries(rng):
    return rng.standard_normal((5, 30))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_scores_in_every_library(g, queries, backend):
    dtype = backend.dtypes()[-1]
    influence = Influence(backend.asarray(g, dtype), damping=0.1)
    scores = influence.scores(backend.asarray(queries, dtype))
    assert type(scores) is type(backend.asarray(g, dtype))
    assert scores.shape == (5, 12)
    bound = error_bound(g, damping=0.1, dtype=dtype)
    assert relative_error(scores, dense_scores(g, queries, 0.1)) <= bound
    one = influence.scores(backend.asarray(queries[2], dtype))
    assert relative_error(one, dense_scores(g, queries[2:3], 0.1)) <= bound


@settings(max_examples=40)
@given(problem=problems(), data=st.data())
def test_groups_against_dense_inverses_made_anew(problem, data):
    g, damping = problem
    m, d = g.shape
    influence = Influence(g, damping=damping)
    queries = np.random.default_rng(m + d).standard_normal((3, d))
    groups = data.draw(st.lists(st.sets(st.integers(0, m - 1)), min_size=1, max_size=4))
    groups = [sorted(group) for group in [*groups, range(m)]]
    increases, changes = influence.leave_out(groups), influence.leave_out(groups, queries)
    bound = error_bound(g, damping=damping)
    for group, increase, change in zip(groups, increases, changes, strict=True):
        step = solution_without(g, group, damping)
        # Rounding is relative to the terms of the sum over a group, which may cancel.
        terms = steps_without(g, group, damping)
        lengths = np.linalg.norm(terms, axis=0).sum()
        error = np.linalg.norm(change - queries @ step)
        assert error <= 4 * bound * np.linalg.norm(queries) * lengths
        energies = np.sum(terms * (dense_fisher(g, damping=damping) @ terms), axis=0)
        error = abs(increase - dense_increase(g, step, damping))
        assert error <= 4 * bound * np.sum(np.sqrt(energies)) ** 2


def test_groups_to_the_eighth_digit(rng):
    """Correlated rows of very different norms, and dampings on both sides of their eigenvalues."""
    m, d = 80, 300
    g = rng.standard_normal((m, 6)) @ rng.standard_normal((6, d)) + rng.standard_normal((m, d)) / 4
    g *= np.logspace(-1.5, 0.5, m)[:, None]
    queries = rng.standard_normal((4, d))
    groups = [[3], [79], range(10), range(40, 80), [5, 1, 5, -1], range(80), np.arange(80) % 2 == 0]
    for damping in (1e-3, 1e-1, 1e3, 1e7):
        influence = Influence(g, damping=damping)
        increases, changes = influence.leave_out(groups), influence.leave_out(groups, queries)
        for group, increase, change in zip(groups, increases, changes, strict=True):
            step = solution_without(g, np.asarray(group), damping)
            expected = dense_increase(g, step, damping)
            assert abs(increase - expected) <= 1e-8 * expected
            assert relative_error(change, queries @ step) <= 1e-8


def test_one_sample_and_its_leverage(g, queries):
    influence = Influence(g, damping=0.1)
    leverage = influence.self_influence()
    assert relative_error(leverage, np.diagonal(dense_scores(g, g, 0.1))) <= 1e-12
    each = influence.leave_out(range(12), queries)
    expected = influence.scores(queries).T / (1 - leverage)[:, None]
    assert relative_error(each, expected) <= 1e-12
    assert influence.leave_out([[]]).tolist() == [0.0]
    assert influence.leave_out([], queries).shape == (0, 5)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_groups_in_every_form(g, queries, backend):
    """The same samples, as whatever says which they are; all but one; twice over; none."""
    influence = Influence(g, damping=0.1)
    expected = queries @ solution_without(g, [1, 3], 0.1)
    mask = np.isin(np.arange(12), [1, 3])
    arrays = [backend.asarray(x, x.dtype.name) for x in (np.array([1, 3], np.int32), mask)]
    forms = [[1, 3], (3, 1), {1, 3}, range(1, 5, 2), (i for i in (1, 3)), {1: "a", 3: "b"}.keys()]
    forms += [[3, 1, 3, -9, 1], [np.int64(1), 3], mask.tolist(), mask, *arrays]
    for change in influence.leave_out(forms, queries):
        assert relative_error(change, expected) <= 1e-12
    rest = influence.leave_out([range(1, 12), range(12)], queries)
    for change, group in zip(rest, (range(1, 12), range(12)), strict=True):
        assert relative_error(change, queries @ solution_without(g, group, 0.1)) <= 1e-12
    nothing = [[], set(), range(0), np.zeros(0), np.zeros(12, bool), arrays[0][:0]]
    assert not influence.leave_out(nothing, queries).any()
    assert not influence.leave_out(nothing).any()


def test_selections(g, queries):
    influence = Influence(g, damping=0.1)
    scores = influence.scores(queries)
    order = np.argsort(scores, axis=1)
    best, worst = influence.most_helpful(queries, 4), influence.most_harmful(queries, 12)
    assert np.array_equal(best.indices, order[:, :-5:-1])
    assert np.array_equal(worst.indices, order)
    assert np.allclose(worst.scores, np.sort(scores, axis=1), rtol=1e-12, atol=0)
    ties = Influence(np.zeros((5, 2)), damping=1.0).most_helpful(np.ones((1, 2)), 5)
    assert ties.indices.tolist() == [[0, 1, 2, 3, 4]]


def test_queries_in_chunks_and_in_any_storage(g, queries, tmp_path, monkeypatch):
    expected = dense_scores(g, queries, 0.1)
    influence = Influence(g, damping=0.1)
    monkeypatch.setattr("mfac_core.influence._queries.QUERY_BYTES", 2 * 8 * 30)
    np.save(tmp_path / "queries.npy", queries)
    file = File(queries)
    forms = [
        queries,
        file,
        np.load(tmp_path / "queries.npy", mmap_mode="r"),
        mfac.RowShards([queries[:2], queries[2:]]),
        (queries[i : i + 2] for i in (0, 2, 4)),
        Functions(queries),
    ]
    for form in forms:
        assert relative_error(influence.scores(form), expected) <= 1e-12
    assert (file.read == 1).all()
    assert influence.most_helpful(queries, 1).indices.shape == (5, 1)
    parts = Influence([g[:, :11], g[:, 11:]], damping=0.1)
    pieces = [queries[:, :11], queries[:, 11:]]
    assert relative_error(parts.scores(pieces), expected) <= 1e-12
    assert relative_error(parts.scores(queries), expected) <= 1e-12


class Functions:
    """The protocol with nothing that it does not ask for."""

    def __init__(self, g):
        self._g, self.shape, self.dtype = g, g.shape, g.dtype

    def gram(self):
        return self._g @ self._g.T

    def project(self, x):
        return self._g @ x

    def combine(self, c):
        return self._g.T @ c


@pytest.mark.parametrize("storage", [File, Functions, lambda g: mfac.RowShards([g[:5], g[5:]])])
def test_gradients_in_any_storage(g, queries, storage):
    influence = Influence(storage(g), damping=0.1)
    assert relative_error(influence.scores(queries), dense_scores(g, queries, 0.1)) <= 1e-12
    step = solution_without(g, [1, 2], 0.1)
    assert influence.leave_out([[1, 2]])[0] == pytest.approx(dense_increase(g, step, 0.1), rel=1e-9)


def test_more_gradients_than_parameters(rng):
    g, queries = rng.standard_normal((40, 6)), rng.standard_normal((3, 6))
    influence = Influence(g, damping=0.01)
    assert relative_error(influence.scores(queries), dense_scores(g, queries, 0.01)) <= 1e-9
    step = solution_without(g, range(35), 0.01)
    assert influence.leave_out([range(35)], queries)[0] == pytest.approx(queries @ step, rel=1e-8)


def test_columns_over_ranks(g, queries, monkeypatch):
    monkeypatch.setattr("mfac_core.influence._queries.QUERY_BYTES", 2 * 8 * 30)
    ranks = Ranks(3)

    def body(rank):
        mine = slice((0, 7, 8)[rank], (7, 8, 30)[rank])
        influence = Influence(g[:, mine], damping=0.1, reduce=ranks.reduce)
        return (
            influence.scores(queries[:, mine]),
            influence.leave_out([[0, 4]], queries[:, mine]),
            influence.self_influence(),
        )

    results = ranks.run(body)
    step = solution_without(g, [0, 4], 0.1)
    for scores, changes, leverage in results:
        assert relative_error(scores, dense_scores(g, queries, 0.1)) <= 1e-12
        assert relative_error(changes[0], queries @ step) <= 1e-12
        assert relative_error(leverage, np.diagonal(dense_scores(g, g, 0.1))) <= 1e-12


def test_damping_chosen_from_the_gradients(g, queries):
    influence = Influence(g, damping="auto")
    assert influence.damping == mfac.choose_damping(g)
    expected = dense_scores(g, queries, influence.damping)
    assert relative_error(influence.scores(queries), expected) <= 1e-9


@pytest.mark.parametrize("damping", [1e-3, 1e-7])
def test_float32_gradients_under_a_small_damping(rng, damping):
    """Nearly parallel rows: a Gram of float32 products would not do."""
    g = (rng.standard_normal(500) + 0.01 * rng.standard_normal((30, 500))).astype(np.float32)
    queries = rng.standard_normal((4, 500)).astype(np.float32)
    scores = Influence(g, damping=damping).scores(queries)
    assert scores.dtype == np.float32
    expected = dense_scores(numpy64(g), numpy64(queries), damping)
    assert relative_error(scores, expected) <= 1e-5


def test_refusals_by_name(g, queries):
    influence = Influence(g, damping=0.1)
    for wrong in (queries[:, :7], queries[None], 3, "queries"):
        with pytest.raises((TypeError, ValueError), match="queries"):
            influence.scores(wrong)
    with pytest.raises(TypeError, match="queries"):
        influence.scores(BACKENDS[1].asarray(queries, "float64"))
    with pytest.raises(ValueError, match="queries must be finite"):
        influence.scores(np.where(np.arange(30) == 3, np.nan, queries))
    with pytest.raises(IndexError, match=r"groups\[1\] holds 12.*12 training samples"):
        influence.leave_out([[0], [12]])
    with pytest.raises(TypeError, match=r"groups\[0\].*float64"):
        influence.leave_out([[0.5]])
    with pytest.raises(ValueError, match=r"groups\[0\] must be a mask of shape \(12,\)"):
        influence.leave_out([[True, False]])
    with pytest.raises(TypeError, match=r"groups must be an iterable.*got 3"):
        influence.leave_out(3)
    with pytest.raises(ValueError, match=r"groups\[0\] must be a mask .*one mask m is one group"):
        influence.leave_out(np.ones(12, bool))
    with pytest.raises(TypeError, match=r"groups\[0\].*indices"):
        influence.leave_out("all")
    with pytest.raises(ValueError, match="k must be at most"):
        influence.most_helpful(queries, 13)
    with pytest.raises(ValueError, match="gradients must be finite"):
        Influence(np.full((2, 3), np.nan), damping=0.1)


def test_another_damping_takes_no_pass(g, queries):
    file = File(g)
    influence = Influence(file, damping=0.1)
    read = file.read.copy()
    for damping in (1e-3, 10.0):
        other = influence.with_damping(damping)
        assert (file.read == read).all()
        expected = dense_scores(g, queries, damping)
        assert relative_error(other.scores(queries), expected) <= 1e-10
        assert relative_error(other.self_influence(), np.diagonal(dense_scores(g, g, damping))) <= (
            1e-10
        )
        read = file.read.copy()
    assert influence.damping == 0.1
