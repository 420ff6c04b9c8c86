"""Layers by length and by shape: budgets, floors, reports, and N:M as hardware reads it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.pruning import gradual, prune

SIZES = [600, 300, 40]


@pytest.fixture
def uneven(rng):
    """A large first layer of large weights, and a small last one of small weights."""
    scale = np.repeat([1.0, 0.3, 0.05], SIZES)
    return scale * rng.standard_normal(940), rng.standard_normal((16, 940))


def shares(mask, sizes):
    return [1 - part.mean() for part in np.split(mask, np.cumsum(sizes)[:-1])]


@pytest.mark.parametrize("layers", [SIZES, [(60, 10), (30, 10), (8, 5)]])
@pytest.mark.parametrize("block_size", [None, 20])
def test_one_sparsity_is_that_of_each_layer(uneven, layers, block_size):
    w, g = uneven
    pruned = prune(w, g, sparsity=0.9, layers=layers, damping=1e-3, stages=2, block_size=block_size)
    assert shares(pruned.mask, SIZES) == pytest.approx([0.9] * 3)
    assert [share.kept for share in pruned.layers] == [60, 30, 4]
    assert [share.sparsity for share in pruned.layers] == pytest.approx([0.9] * 3)
    assert [share.dense for share in pruned.layers] == [0, 0, 0]
    assert pruned.layers[0].shape == (layers[0] if isinstance(layers[0], tuple) else (600,))


def test_of_all_layers_together_none_vanishes(uneven):
    w, g = uneven
    options = {"sparsity": 0.9, "damping": 1e-3, "stages": 2, "block_size": 20}
    free = prune(w, g, **options)
    assert shares(free.mask, SIZES)[2] == 1.0
    assert [share.size for share in free.layers] == [940]
    held = prune(w, g, layers=SIZES, scope="global", **options)
    assert held.mask.sum() == free.mask.sum()
    assert [share.kept for share in held.layers][2] == 1
    floored = prune(w, g, layers=SIZES, scope="global", floor=0.05, **options)
    assert floored.mask.sum() == free.mask.sum()
    assert [share.kept for share in floored.layers][1:] == [15, 2]


def test_a_layer_keeps_one_weight_where_rounding_would_leave_none(uneven):
    w, g = uneven
    pruned = prune(w, g, sparsity=[0.9, 0.9, 0.99], layers=SIZES, damping=1e-3, stages=1)
    assert [share.kept for share in pruned.layers] == [60, 30, 1]
    pruned = prune(w, g, sparsity=0.9, layers=SIZES, floor=0.25, damping=1e-3, stages=1)
    assert [share.kept for share in pruned.layers] == [150, 75, 10]


def test_vectors_are_never_removed(rng):
    w, g = rng.standard_normal(30), rng.standard_normal((6, 30))
    layers = [(6, 4), (6,)]
    for options in ({"sparsity": 0.5}, {"sparsity": [0.5, 0.0]}, {"pattern": "2:4"}):
        pruned = prune(w, g, layers=layers, damping=0.1, **options)
        assert [share.kept for share in pruned.layers] == [12, 6]
        assert [share.dense for share in pruned.layers] == [0, 6]
    with pytest.raises(ValueError, match=r"0\.5 of layers\[1\] cannot be reached.* at most 0.0000"):
        prune(w, g, layers=layers, damping=0.1, sparsity=[0.5, 0.5])
    pruned = prune(w, g, layers=layers, damping=0.1, sparsity=0.5, scope="global")
    assert [share.kept for share in pruned.layers] == [9, 6]


@given(st.integers(1, 3), st.integers(1, 10), st.integers(1, 3), st.sampled_from([(2, 4), (1, 3)]))
def test_n_of_m_is_along_axis_one(filters, channels, kernel, ratio):
    """A layer of a convolution before one of vectors: N of M input channels, remainders dense."""
    n, m = ratio
    shape = (filters, channels, kernel, 2)
    d = int(np.prod(shape))
    rng = np.random.default_rng(0)
    w, g = rng.standard_normal(d + 3), rng.standard_normal((5, d + 3))
    pruned = prune(w, g, pattern=f"{n}:{m}", layers=[shape, (3,)], damping=0.1, stages=2)
    mask = pruned.mask[:d].reshape(shape)
    whole = channels // m * m
    units = mask[:, :whole].reshape(filters, whole // m, m, kernel, 2)
    assert (units.sum(axis=2) == n).all()
    assert mask[:, whole:].all()
    assert pruned.mask[d:].all()
    assert pruned.layers[0].dense == d - filters * whole * kernel * 2
    assert pruned.layers[1].dense == 3


def test_n_of_m_removes_the_least_salient_of_each_unit(rng):
    """Weights apart from each other: saliencies are λw²/2."""
    shape = (2, 8, 3)
    w = rng.permutation(np.arange(1.0, 49.0))
    pruned = prune(w, np.zeros((1, 48)), pattern="2:4", layers=[shape], damping=1.0, stages=1)
    units, kept = (x.reshape(2, 2, 4, 3) for x in (w, pruned.mask))
    threshold = np.sort(units, axis=2)[:, :, 2:3]
    assert (kept == (units >= threshold)).all()


def test_lengths_that_units_would_straddle_are_refused_by_name(rng):
    w, g = rng.standard_normal(852), rng.standard_normal((4, 852))
    with pytest.raises(ValueError, match=r"across layers, and weight 270 .* begins in layers\[0\]"):
        prune(w, g, pattern="2:4", layers=[270, 540, 42], damping=1e-4)
    with pytest.raises(ValueError, match=r"weight 270 .* begins in layers\[0\]"):
        prune(w, g, pattern=np.arange(852) // 4, layers=[270, 540, 42], sparsity=0.5, damping=1e-4)
    shapes = [(10, 3, 9), (6, 10, 9), (7, 6)]
    pruned = prune(w, g, pattern="2:4", layers=shapes, damping=1e-4, stages=1)
    assert [share.dense for share in pruned.layers] == [270, 6 * 2 * 9, 7 * 2]


def test_groups_that_allow_nothing_say_so(rng):
    w, g = rng.standard_normal(40), rng.standard_normal((4, 40))
    with pytest.warns(UserWarning, match="nothing was removed of the weights 0 to 39, where 18"):
        pruned = prune(w, g, sparsity=0.45, pattern=np.zeros(40, int), damping=1e-3)
    assert pruned.mask.all()


def test_groups_of_all_layers_together_leave_each_its_floor(rng):
    w = np.repeat([3.0, 2.0, 1.0], [16, 16, 8])
    options = {"pattern": 4, "damping": 1.0, "stages": 1, "sparsity": 0.4, "scope": "global"}
    pruned = prune(w, np.zeros((1, 40)), layers=[16, 16, 8], **options)
    assert [share.kept for share in pruned.layers] == [16, 4, 4]
    with pytest.raises(ValueError, match=r"0\.4 cannot be reached"):
        prune(w, np.zeros((1, 40)), layers=[16, 16, 8], floor=0.75, **options)


def test_steps_report_their_layers(rng):
    w, g = rng.standard_normal(30), rng.standard_normal((6, 30))
    steps = list(
        gradual(w, lambda w, m: g, sparsity=[0.25, 0.5], layers=[(6, 4), (6,)], damping=0.1)
    )
    assert [[share.kept for share in step.layers] for step in steps] == [[18, 6], [12, 6]]
    number, sparsity, _, mask, _ = steps[-1]
    assert (number, sparsity) == (2, pytest.approx(0.4))
    assert sparsity == pytest.approx(1 - mask.mean())


def test_a_pruned_result_unpacks_to_three(rng):
    w, g = rng.standard_normal(8), rng.standard_normal((3, 8))
    weights, mask, increase = prune(w, g, sparsity=0.5, damping=0.1)
    assert mask.sum() == 4
    assert (weights[~mask] == 0).all()
    assert increase > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scope": "all"}, "scope must be 'layer' or 'global', got 'all'"),
        ({"floor": 1.5}, r"floor must be a share in \[0, 1\], got 1.5"),
        ({"layers": [(2, 0), 8]}, r"layers\[0\] must be an integer of at least 1, got 0"),
        ({"layers": [(2, 3), 1]}, "layers must sum to the number of weights 8, got 7"),
        ({"layers": [4, 4], "sparsity": [0.5]}, "one for each of 2 layers"),
        ({"layers": [4, 4], "sparsity": [0.5, 0.5], "scope": "global"}, "sparsity must be one"),
    ],
)
def test_what_is_refused(rng, options, words):
    w, g = rng.standard_normal(8), rng.standard_normal((3, 8))
    with pytest.raises(ValueError, match=words):
        prune(w, g, **({"sparsity": 0.5, "damping": 0.1} | options))
