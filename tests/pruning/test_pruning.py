"""Pruning against dense constrained optima."""

from itertools import combinations

import numpy as np
import pytest
from conftest import BACKENDS, CASES, numpy64, relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import blocks_of, constrained_optimum, cuts, increase, problems

import mfac_core as mfac
from mfac_core.pruning import obs_update, prune, saliency
from mfac_core.testing import dense_fisher, dense_inverse, error_bound


@pytest.fixture
def problem(rng):
    return rng.standard_normal(24), rng.standard_normal((10, 24))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@given(problem=problems(max_params=20), data=st.data())
def test_the_joint_update_is_the_constrained_optimum(backend, dtype, problem, data):
    gradients, damping = problem
    g = backend.asarray(gradients, dtype)
    d = g.shape[1]
    w = np.linspace(-1.0, 2.0, d).astype(dtype)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    block_size, lengths = data.draw(st.one_of(st.just((None, [d])), cuts(d)))
    fisher = blocks_of(dense_fisher(g, damping=damping), lengths)
    kept = backend.xp.asarray(mask, **({"device": backend.device} if backend.device else {}))
    best = obs_update(backend.asarray(w, dtype), g, kept, damping=damping, block_size=block_size)
    assert best.dtype == g.dtype
    expected = constrained_optimum(fisher, w.astype(float), mask)
    bound = error_bound(g, damping=damping) * np.linalg.norm(w)
    assert np.linalg.norm(numpy64(best) - expected) <= bound
    assert (numpy64(best)[~mask] == 0).all()


def test_a_larger_problem_in_float64(rng):
    g, w = rng.standard_normal((60, 400)) / 20, rng.standard_normal(400)
    mask = rng.random(400) < 0.3
    best = obs_update(w, g, mask, damping=1e-3)
    expected = constrained_optimum(dense_fisher(g, damping=1e-3), w, mask)
    assert relative_error(best, expected) <= 1e-9


@pytest.mark.parametrize("lengths", [[12, 12], [8, 16], [2, 8, 3, 11], [24]])
@pytest.mark.parametrize("backend", BACKENDS[:2], ids=lambda b: b.name)
def test_blocks_too_long_for_batches(backend, lengths, problem, monkeypatch):
    """Those of 8 and more go one by one, beside batches of shorter ones."""
    monkeypatch.setattr("mfac_core.pruning._kept.WIDE_BYTES", 8 * 7 * 10)
    w, g = problem
    fisher = blocks_of(dense_fisher(g, damping=0.1), lengths)
    pruned = prune(
        *(backend.asarray(some, "float64") for some in (w, g)),
        sparsity=0.5, damping=0.1, block_size=lengths, stages=1,
    )  # fmt: skip
    mask = numpy64(pruned.mask).astype(bool)
    saliencies = w**2 / np.linalg.inv(fisher).diagonal()
    assert (np.flatnonzero(~mask) == np.sort(np.argsort(saliencies)[:12])).all()
    assert relative_error(pruned.weights, constrained_optimum(fisher, w, mask)) <= 1e-10


def test_saliency_is_the_increase_of_removing_one(problem):
    w, g = problem
    fisher = dense_fisher(g, damping=0.1)
    scores = saliency(w, mfac.InverseFisher(g, damping=0.1))
    for i in (0, 7, 23):
        mask = np.arange(24) != i
        best = constrained_optimum(fisher, w, mask)
        assert scores[i] == pytest.approx(increase(fisher, w, best), rel=1e-9)


@pytest.mark.parametrize("block_size", [None, 6, [4, 20]])
@pytest.mark.parametrize("update", ["joint", "independent"])
def test_the_predicted_increase_is_that_of_the_whole_change(problem, block_size, update):
    w, g = problem
    lengths = {None: [24], 6: [6] * 4}.get(block_size if not isinstance(block_size, list) else 0)
    fisher = blocks_of(dense_fisher(g, damping=0.1), lengths or block_size)
    options = {"sparsity": 0.5, "damping": 0.1, "block_size": block_size, "stages": 4}
    pruned = prune(w, g, update=update, **options)
    assert pruned.loss_increase == pytest.approx(increase(fisher, w, pruned.weights), rel=1e-6)
    assert pruned.mask.sum() == 12
    assert (pruned.weights[~pruned.mask] == 0).all()


@given(problem=problems(max_params=20), sparsity=st.floats(0.0, 0.95))
def test_the_joint_update_is_never_above_the_independent(problem, sparsity):
    g, damping = problem
    w = np.linspace(-1.0, 2.0, g.shape[1])
    independent = prune(w, g, sparsity=sparsity, damping=damping, stages=1, update="independent")
    fisher = dense_fisher(g, damping=damping)
    joint = increase(fisher, w, obs_update(w, g, independent.mask, damping=damping))
    assert joint <= increase(fisher, w, independent.weights) * (1 + 1e-9) + 1e-300


def test_the_independent_update_is_the_papers_sum(problem):
    w, g = problem
    inverse = dense_inverse(g, damping=0.1)
    scores = w**2 / (2 * np.diagonal(inverse))
    mask = scores > np.sort(scores)[11]
    expected = w - sum(w[s] / inverse[s, s] * inverse[:, s] for s in np.flatnonzero(~mask))
    pruned = prune(w, g, sparsity=0.5, damping=0.1, stages=1, update="independent")
    assert (pruned.mask == mask).all()
    assert relative_error(pruned.weights, np.where(mask, expected, 0.0)) <= 1e-9


def test_one_weight_a_stage_is_the_greedy_brain_surgeon(problem):
    w, g = problem
    fisher = dense_fisher(g, damping=0.1)
    mask, current = np.ones(24, bool), w
    for _ in range(6):
        rises = [
            increase(fisher, w, constrained_optimum(fisher, w, mask & (np.arange(24) != i)))
            if mask[i]
            else np.inf
            for i in range(24)
        ]
        mask = mask & (np.arange(24) != int(np.argmin(rises)))
        current = constrained_optimum(fisher, w, mask)
    kept = np.ones(24, bool)
    for stop in range(1, 7):
        pruned = prune(w, g, sparsity=stop / 24, mask=kept, damping=0.1, stages=1)
        kept = pruned.mask
    assert (pruned.mask == mask).all()
    assert relative_error(pruned.weights, current) <= 1e-9


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:3", 1, 3), ("4:8", 4, 8)])
@pytest.mark.parametrize("stages", [1, 5])
@pytest.mark.parametrize("block_size", [None, 8])
def test_n_of_m_is_exact(problem, pattern, n, m, stages, block_size):
    w, g = problem
    pruned = prune(w, g, pattern=pattern, damping=0.1, stages=stages, block_size=block_size)
    assert (pruned.mask.reshape(-1, m).sum(axis=1) == n).all()


@pytest.mark.parametrize("block_size", [None, 8, [5, 19]])
def test_groups_go_together_by_their_joint_saliency(problem, block_size):
    w, g = problem
    lengths = {8: [8] * 3}.get(block_size, [24]) if not isinstance(block_size, list) else block_size
    fisher = blocks_of(dense_fisher(g, damping=0.1), lengths)
    rises = []
    for first in range(0, 24, 4):
        mask = (np.arange(24) < first) | (np.arange(24) >= first + 4)
        rises.append(increase(fisher, w, constrained_optimum(fisher, w, mask)))
    pruned = prune(w, g, sparsity=1 / 6, pattern=4, damping=0.1, stages=1, block_size=block_size)
    gone = np.flatnonzero(~pruned.mask.reshape(6, 4).any(axis=1))
    assert list(gone) == [int(np.argmin(rises))]
    assert pruned.loss_increase == pytest.approx(min(rises), rel=1e-6)
    staged = prune(w, g, sparsity=0.5, pattern=4, damping=0.1, stages=3, block_size=block_size)
    assert set(staged.mask.reshape(6, 4).sum(axis=1)) == {0, 4}


def test_the_best_pair_is_found_by_group_saliency_but_not_by_single(rng):
    """Two equal columns: each alone is free to remove, both together are not."""
    g = rng.standard_normal((40, 4))
    g[:, 1] = g[:, 0]
    g[:, 2:] *= 0.3
    w = np.ones(4)
    fisher = dense_fisher(g, damping=1e-6)
    singles = saliency(w, mfac.InverseFisher(g, damping=1e-6))
    assert singles[0] < singles[2]
    pruned = prune(w, g, sparsity=0.5, pattern=2, damping=1e-6, stages=1)
    assert list(pruned.mask) == [True, True, False, False]
    rises = {
        pair: increase(fisher, w, constrained_optimum(fisher, w, ~np.isin(range(4), pair)))
        for pair in combinations(range(4), 2)
    }
    assert rises[2, 3] < rises[0, 1]


def test_a_mask_only_grows(problem):
    w, g = problem
    mask = np.arange(24) % 3 > 0
    pruned = prune(w, g, sparsity=0.6, mask=mask, damping=0.1, stages=3)
    assert not (pruned.mask & ~mask).any()
    assert (~pruned.mask).sum() == round(0.6 * 24)
    expected = constrained_optimum(dense_fisher(g, damping=0.1), w, pruned.mask)
    assert relative_error(pruned.weights, expected) <= 1e-9


def test_sparsity_by_layer(problem):
    w, g = problem
    pruned = prune(w, g, sparsity=[0.5, 0.25], layers=[8, 16], damping=0.1, stages=4)
    assert pruned.mask[:8].sum() == 4
    assert pruned.mask[8:].sum() == 12


def test_with_a_loss_the_result_is_never_worse_than_simpler_ones(rng):
    w, g = rng.standard_normal(24), rng.standard_normal((10, 24))
    curvature = rng.standard_normal((24, 24))

    def loss(x):
        return float(np.sum(np.tanh(curvature @ (x - w)) ** 2))

    for sparsity in (0.3, 0.7, 0.9):
        options = {"sparsity": sparsity, "damping": 0.01, "stages": 1}
        pruned = prune(w, g, loss=loss, **options)
        independent = prune(w, g, update="independent", **options)
        assert (pruned.mask == independent.mask).all()
        alone = np.where(pruned.mask, w, 0.0)
        joint = prune(w, g, **options).weights
        others = [loss(alone), loss(independent.weights), loss(joint)]
        assert loss(pruned.weights) <= min(others) * (1 + 1e-12)


def test_with_a_loss_a_part_of_the_joint_update_may_win(problem):
    w, g = problem
    options = {"sparsity": 0.5, "damping": 0.1, "stages": 1}
    joint = prune(w, g, **options)
    alone = np.where(joint.mask, w, 0.0)
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        best = alone + part * (joint.weights - alone)
        pruned = prune(w, g, loss=lambda x, best=best: np.sum((x - best) ** 2), **options)
        assert pruned.weights == pytest.approx(best, rel=1e-12, abs=1e-12)
        fisher = dense_fisher(g, damping=0.1)
        assert pruned.loss_increase == pytest.approx(increase(fisher, w, best), rel=1e-6)


@pytest.mark.parametrize("block_size", [None, 10])
def test_gradients_from_parts_and_files(problem, block_size):
    from problems import File

    w, g = problem
    options = {"sparsity": 0.5, "damping": 0.1, "block_size": block_size, "stages": 3}
    expected = prune(w, g, **options)
    for gradients in ([g[:, :7], g[:, 7:]], File(g)):
        pruned = prune(w, gradients, **options)
        assert (pruned.mask == expected.mask).all()
        assert relative_error(pruned.weights, expected.weights) <= 1e-10


def test_inputs_are_not_written_to(problem):
    w, g = problem
    mask = np.ones(24, bool)
    for array in (w, g, mask):
        array.setflags(write=False)
    prune(w, g, sparsity=0.5, mask=mask, damping=0.1)
    assert mask.all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": "a"}, TypeError, "sparsity must be a number"),
        ({}, ValueError, "sparsity must be given"),
        (
            {"sparsity": 0.5, "mask": np.ones(5, bool)},
            ValueError,
            r"mask must be boolean .*\(24,\)",
        ),
        ({"sparsity": 0.5, "mask": np.ones(24)}, ValueError, "mask must be boolean"),
        ({"sparsity": 0.1, "mask": np.arange(24) > 11}, ValueError, "below what mask already has"),
        ({"pattern": "2:5"}, ValueError, "pattern must divide the number of weights 24"),
        ({"pattern": "4:2"}, ValueError, "pattern must be 'N:M'"),
        ({"pattern": 7, "sparsity": 0.5}, ValueError, "pattern must divide"),
        ({"sparsity": 0.5, "update": "magnitude"}, ValueError, "update must be 'joint' or"),
        ({"sparsity": 0.5, "stages": 0}, ValueError, "stages must be an integer of at least 1"),
        ({"sparsity": [0.5, 0.5]}, ValueError, "one for each of 1 layers"),
        ({"sparsity": 0.5, "layers": [4, 4]}, ValueError, "layers must sum to the number"),
        ({"sparsity": 0.5, "damping": 0.0}, ValueError, "damping must be finite and positive"),
    ],
)
def test_what_is_refused(problem, options, error, words):
    w, g = problem
    with pytest.raises(error, match=words):
        prune(w, g, **({"damping": 0.1} | options))


def test_weights_must_fit(problem):
    w, g = problem
    with pytest.raises(ValueError, match=r"weights must have shape \(24,\), got \(23,\)"):
        prune(w[:-1], g, sparsity=0.5, damping=0.1)
    with pytest.raises(ValueError, match="weights must be finite, got 1 NaN"):
        prune(np.where(np.arange(24) == 3, np.nan, w), g, sparsity=0.5, damping=0.1)
