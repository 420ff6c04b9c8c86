"""Weights that are removed together, by label, against dense constrained optima."""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import BACKENDS, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import File, blocks_of, constrained_optimum, cuts, increase, problems

from mfac_core._arrays import Home
from mfac_core._rows.storage import rows_of
from mfac_core.pruning import prune
from mfac_core.pruning._groups import add_rises, form, half
from mfac_core.pruning._kept import KeptFisher
from mfac_core.testing import dense_fisher, error_bound


def rises(fisher, w, labels):
    """½ δᵀFδ of removing each label's weights, at the best of the others."""
    masks = [labels != label for label in range(labels.max() + 1)]
    return np.array([increase(fisher, w, constrained_optimum(fisher, w, mask)) for mask in masks])


@pytest.fixture
def problem(rng):
    return rng.standard_normal(24), rng.standard_normal((10, 24))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@settings(max_examples=25)
@given(problem=problems(max_params=24), data=st.data())
def test_group_saliencies_are_those_of_the_dense_inverse(backend, problem, data):
    """Also where groups are larger than the rows are many, and lie across blocks."""
    gradients, damping = problem
    g = backend.asarray(gradients, backend.dtypes()[-1])
    d = g.shape[1]
    block_size, lengths = data.draw(st.one_of(st.just((None, [d])), cuts(d)))
    count = data.draw(st.integers(1, 4))
    labels = np.array(data.draw(st.lists(st.integers(-1, count - 1), min_size=d, max_size=d)))
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
    w = np.where(kept, np.linspace(-1.0, 2.0, d), 0.0)
    fisher = KeptFisher(rows_of(g), damping, None if block_size is None else lengths)
    fisher.restrict(fisher.home.xp.asarray(kept, device=fisher.home.device))
    actual = fisher.home.zeros(count)
    there = fisher.home.receive(w)
    parts = fisher.visit(lambda part, at: part.rises(there[at], np.where(kept, labels, -1)[at]))
    for some in parts:
        for addend in some:
            add_rises(fisher.home, actual, addend)
    dense = blocks_of(dense_fisher(g, damping=damping), lengths)
    for label in range(count):
        own = np.flatnonzero(kept & (labels == label))
        inverse = np.linalg.inv(dense[np.ix_(kept, kept)])
        at = np.searchsorted(np.flatnonzero(kept), own)
        expected = 0.5 * w[own] @ np.linalg.solve(inverse[np.ix_(at, at)], w[own])
        # In float64, whatever the gradients: the inverse is inverted once more.
        condition = error_bound(g, damping=damping, dtype=np.float64)
        assert float(actual[label]) == pytest.approx(expected, rel=min(condition, 1.0), abs=1e-300)


LABELS = np.array([0, 1, 2, 3] * 3 + [4] * 8 + [-1] * 4)


@pytest.mark.parametrize("block_size", [None, 9])
def test_the_group_of_the_least_rise_a_weight_goes_first(problem, block_size):
    w, g = problem
    lengths = [24] if block_size is None else [9, 9, 6]
    fisher = blocks_of(dense_fisher(g, damping=0.1), lengths)
    expected = rises(fisher, w, LABELS)
    sizes = np.bincount(LABELS[LABELS >= 0])
    first = int(np.argmin(expected / sizes))
    pruned = prune(
        w,
        g,
        sparsity=sizes[first] / 24,
        pattern=LABELS,
        damping=0.1,
        stages=1,
        block_size=block_size,
    )
    assert (pruned.mask == (first != LABELS)).all()
    assert pruned.loss_increase == pytest.approx(expected[first], rel=1e-6)


@pytest.mark.parametrize("stages", [1, 4])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_whole_groups_go_and_negative_labels_stay(problem, stages, sparsity):
    w, g = problem
    pruned = prune(w, g, sparsity=sparsity, pattern=LABELS, damping=0.1, stages=stages)
    assert pruned.mask[LABELS < 0].all()
    for label in range(5):
        assert len(set(pruned.mask[label == LABELS])) == 1
    assert abs((~pruned.mask).sum() - 24 * sparsity) <= 8 / 2
    expected = constrained_optimum(dense_fisher(g, damping=0.1), w, pruned.mask)
    assert relative_error(pruned.weights, expected) <= 1e-9


def test_the_sparsity_is_the_nearest_that_groups_allow():
    """Groups apart from each other, of rising saliency a weight, though not in all."""
    labels = np.repeat(np.arange(5), [8, 4, 6, 2, 4])
    w, g = 1.0 + labels, np.zeros((1, 24))
    cases = [(4, 0), (5, 8), (10, 8), (11, 12), (15, 12), (16, 18), (19, 18), (20, 20), (23, 24)]
    for removed, expected in cases:
        pruned = prune(w, g, sparsity=removed / 24, pattern=labels, damping=1.0, stages=1)
        assert (~pruned.mask).sum() == expected


def test_a_mask_of_whole_groups_may_be_ahead_by_a_part_of_one(problem):
    w, g = problem
    mask = prune(w, g, sparsity=0.3, pattern=8, damping=0.1).mask
    assert (~mask).sum() == 8
    assert (prune(w, g, sparsity=0.3, pattern=8, mask=mask, damping=0.1).mask == mask).all()
    with pytest.raises(ValueError, match="below what mask already has"):
        prune(w, g, sparsity=0.0, pattern=8, mask=mask, damping=0.1)


def test_labels_are_any_integers_of_any_library(problem):
    w, g = problem
    expected = prune(w, g, sparsity=0.5, pattern=4, damping=0.1)
    labels = 1000 - 7 * (np.arange(24) // 4)
    apart = labels * 10**15
    for pattern in (labels, apart, labels.tolist(), labels.astype(np.int16), torch.asarray(labels)):
        pruned = prune(w, g, sparsity=0.5, pattern=pattern, damping=0.1)
        assert (pruned.mask == expected.mask).all()


@pytest.mark.parametrize("m", [5, 40])
@pytest.mark.parametrize("size", [10, 64])
def test_groups_of_whole_blocks_and_pieces_of_them(rng, m, size):
    """Of groups longer than the rows are many, by either form; a few blocks have several pieces."""
    w, g = rng.standard_normal(640), rng.standard_normal((m, 640))
    labels = np.arange(640) // (3 * size + 5)
    labels[-7:] = -1
    fisher = blocks_of(dense_fisher(g, damping=0.1), [size] * (640 // size))
    expected = np.zeros(labels.max() + 1)
    inverse = np.linalg.inv(fisher)
    for label in range(len(expected)):
        at = np.flatnonzero(labels == label)
        expected[label] = 0.5 * w[at] @ np.linalg.solve(inverse[np.ix_(at, at)], w[at])
    model = KeptFisher(rows_of(g), 0.1, [size] * (640 // size))
    model.restrict(np.ones(640, dtype=bool))
    actual = np.zeros(len(expected))
    for some in model.visit(lambda part, here: part.rises(w[here], labels[here])):
        for addend in some:
            add_rises(model.home, actual, addend)
    assert actual == pytest.approx(expected, rel=1e-11)
    pruned = prune(w, g, sparsity=0.5, pattern=labels, damping=0.1, block_size=size, stages=2)
    assert 0 < pruned.mask.sum() < 640
    best = constrained_optimum(fisher, w, pruned.mask)
    assert relative_error(pruned.weights, best) <= 1e-11


def test_single_weights_with_some_that_stay(problem):
    w, g = problem
    labels = np.where(np.arange(24) % 4 == 3, -1, np.arange(24))
    pruned = prune(w, g, sparsity=0.7, pattern=labels, damping=0.1)
    assert pruned.mask[labels < 0].all()
    assert (~pruned.mask).sum() == round(0.7 * 24)


def test_groups_of_a_file(problem):
    w, g = problem
    expected = prune(w, g, sparsity=0.5, pattern=LABELS, damping=0.1)
    for gradients in (File(g), [g[:, :7], g[:, 7:]]):
        pruned = prune(w, gradients, sparsity=0.5, pattern=LABELS, damping=0.1)
        assert (pruned.mask == expected.mask).all()
        assert relative_error(pruned.weights, expected.weights) <= 1e-10


def test_groups_by_layer(problem):
    w, g = problem
    labels = np.arange(24) // 3
    pruned = prune(
        w, g, sparsity=[0.5, 1 / 3], layers=[6, 18], pattern=labels, damping=0.1, stages=3
    )
    assert pruned.mask[:6].sum() == 3
    assert pruned.mask[6:].sum() == 12


def test_groups_whose_inverse_is_singular_to_rounding(rng):
    g, w = np.repeat(1e8 * rng.standard_normal((6, 8)), 2, axis=1), np.ones(16)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="raise"):
        pruned = prune(w, g, sparsity=0.5, pattern=2, damping=1e-8, stages=2)
    assert np.isfinite(pruned.weights).all()
    assert pruned.mask.sum() == 8
    singular = np.array([[[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 4.0]]])
    x = np.ones((2, 2))
    home = Home(np, "cpu")
    forms = form(home, singular, x)
    assert forms == pytest.approx([1.0, 0.75])
    forms = np.array([np.nan, 0.05, 30.0])
    held = half(home, forms, np.full(3, 0.1), np.full(3, 9.0))
    assert held == pytest.approx([4.5, 0.05, 4.5])


def test_n_of_m_is_exact_beside_a_mask_of_another_form(problem):
    w, g = problem
    mask = np.arange(24) >= 12
    pruned = prune(w, g, pattern="2:4", mask=mask, damping=0.1)
    assert list(pruned.mask.reshape(6, 4).sum(axis=1)) == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": np.zeros(23, int)}, r"labels of shape \(24,\), got dtype int64 and shape"),
        ({"pattern": np.zeros(24)}, r"integer labels of shape \(24,\), got dtype float64"),
        ({"pattern": np.zeros((24, 1), int)}, r"got dtype int64 and shape \(24, 1\)"),
        ({"pattern": LABELS, "sparsity": 0.9}, r"0.9 cannot be reached.* at most 0.8333 of the 24"),
        ({"pattern": "2:4", "sparsity": 0.6}, "0.6 cannot be reached.* at most 0.5000"),
        (
            {"pattern": LABELS, "layers": [10, 14], "sparsity": [0.5, 0.5]},
            r"across layers, and weight 10 is of a group that begins in layers\[0\]",
        ),
        (
            {"pattern": "2:4", "layers": [10, 14], "sparsity": [0.5, 0.5]},
            r"across layers, and weight 10 is of a group that begins in layers\[0\]",
        ),
    ],
)
def test_what_is_refused(problem, options, words):
    w, g = problem
    with pytest.raises(ValueError, match=words):
        prune(w, g, **({"sparsity": 0.5, "damping": 0.1} | options))
