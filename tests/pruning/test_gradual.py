"""Pruning step by step, and going on after an interruption."""

import io

import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error
from hypothesis import given
from hypothesis import strategies as st

from mfac_core.pruning import exponential_schedule, gradual, polynomial_schedule, prune

D = 24
INPUTS = np.random.default_rng(0).standard_normal((10, D))


def rows(weights, mask):
    """Gradients that depend on the weights."""
    return INPUTS * np.cos(weights)


def shrunk(weights, mask):
    """Training of a kind, which leaves weights where there should be none."""
    return 0.9 * weights + 0.01


@pytest.fixture
def weights(rng):
    return rng.standard_normal(D)


OPTIONS = {"sparsity": [0.25, 0.5, 0.625, 0.75], "damping": 0.1}


def test_a_step_is_pruning_by_the_gradients_there(weights):
    mask, now = np.ones(D, bool), weights
    for state, sparsity in zip(
        gradual(weights, rows, finetune=shrunk, **OPTIONS), OPTIONS["sparsity"], strict=True
    ):
        pruned = prune(now, rows(now, mask), sparsity=sparsity, mask=mask, damping=0.1, stages=1)
        mask, now = pruned.mask, np.where(pruned.mask, shrunk(pruned.weights, None), 0.0)
        assert (state.mask == mask).all()
        assert (state.weights == now).all()
        assert state.sparsity == sparsity == 1 - mask.mean()
        assert state.loss_increase == pruned.loss_increase
    assert state.step == 4


@pytest.mark.parametrize("stop", [1, 3])
@pytest.mark.parametrize("options", [{}, {"pattern": np.arange(D) // 4}, {"block_size": 8}])
def test_going_on_from_saved_arrays_is_the_same_to_the_last_bit(weights, stop, options):
    options = OPTIONS | options | {"finetune": shrunk, "stages": 2}
    whole = list(gradual(weights, rows, **options))
    file = io.BytesIO()
    for state in gradual(weights, rows, **options):
        if state.step == stop:
            np.savez(file, weights=state.weights, mask=state.mask, step=state.step)
            break
    file.seek(0)
    saved = np.load(file)
    rest = list(
        gradual(saved["weights"], rows, mask=saved["mask"], start=int(saved["step"]), **options)
    )
    assert [state.step for state in rest] == list(range(stop + 1, 5))
    for state, expected in zip(rest, whole[stop:], strict=True):
        assert state.weights.tobytes() == expected.weights.tobytes()
        assert (state.mask == expected.mask).all()
        assert state.loss_increase == expected.loss_increase


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_callables_get_and_return_the_weights_library(backend, weights):
    dtype = backend.dtypes()[-1]

    def like(x, mask):
        assert mask.dtype == backend.xp.bool
        return backend.asarray(rows(numpy64(x), mask), dtype)

    def tune(x, mask):
        return 0.9 * x + 0.01

    given = backend.asarray(weights, dtype)
    states = list(gradual(given, like, finetune=tune, **OPTIONS))
    expected = list(gradual(weights, rows, finetune=shrunk, **OPTIONS))
    assert type(states[0].weights) is type(given)
    assert states[-1].weights.dtype == given.dtype
    for state, same in zip(states, expected, strict=True):
        assert (np.asarray(numpy64(state.mask), bool) == same.mask).all()
        assert relative_error(state.weights, same.weights) <= (1e-9 if dtype == "float64" else 1e-4)


def test_layers_patterns_and_a_loss(weights):
    shares = [[0.25, 0.0], [0.5, 0.25]]
    *_, state = gradual(weights, rows, sparsity=shares, layers=[8, 16], damping=0.1)
    assert state.mask[:8].sum() == 4
    assert state.mask[8:].sum() == 12
    *_, state = gradual(weights, rows, sparsity=[0.25, 0.5], pattern="2:4", damping=0.1)
    assert (state.mask.reshape(-1, 4).sum(axis=1) == 2).all()
    asked = []

    def loss(x):
        asked.append(x)
        return float(np.sum(x * x))

    list(gradual(weights, rows, loss=loss, progress=True, **OPTIONS))
    assert asked


def test_given_arrays_are_not_written_to(weights):
    mask = np.arange(D) > 2
    weights.setflags(write=False)
    mask.setflags(write=False)
    *_, state = gradual(weights, rows, mask=mask, **OPTIONS)
    assert not (state.mask & ~mask).any()


@given(
    ends=st.tuples(st.floats(0.0, 0.999), st.floats(0.0, 0.999)).map(sorted),
    steps=st.integers(1, 30),
)
def test_schedules(ends, steps):
    first, last = ends
    t = np.arange(1, steps + 1) / steps
    polynomial = polynomial_schedule(last, steps, initial=first)
    assert polynomial == pytest.approx(last + (first - last) * (1 - t) ** 3)
    exponential = exponential_schedule(last, steps, initial=first)
    assert 1 - np.array(exponential) == pytest.approx((1 - first) ** (1 - t) * (1 - last) ** t)
    for schedule in (polynomial, exponential):
        assert schedule[-1] == last
        assert all(0 <= share < 1 for share in schedule)
        assert (np.diff(schedule) >= 0).all()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"sparsity": 0.5}, TypeError, r"sparsity must be a sequence .*, got 0.5"),
        ({"sparsity": []}, TypeError, "sparsity must be a sequence"),
        ({"sparsity": [0.5, 1.0]}, ValueError, r"sparsity must be in \[0, 1\) and never fall"),
        ({"sparsity": [0.5, 0.4]}, ValueError, "never fall from step to step"),
        ({"start": 5}, ValueError, "start must be at most the number of steps 4, got 5"),
        ({"start": -1}, ValueError, "start must be an integer of at least 0"),
        ({"mask": np.ones(3, bool)}, ValueError, r"mask must be boolean of shape \(24,\)"),
    ],
)
def test_what_is_refused_at_once(weights, options, error, words):
    with pytest.raises(error, match=words):
        gradual(weights, rows, **(OPTIONS | options))


@pytest.mark.parametrize(
    ("gradients", "finetune", "error", "words"),
    [
        (lambda w, m: INPUTS[:, :-1], None, ValueError, "rows of 24 columns, .* got 23"),
        (lambda w, m: INPUTS[0], None, ValueError, r"gradients must have shape \(m, d\)"),
        (lambda w, m: None, None, TypeError, "gradients must be an array"),
        (rows, lambda w, m: w[:-1], ValueError, r"the result of finetune must have shape \(24,\)"),
        (rows, lambda w, m: None, TypeError, "the result of finetune must be an array"),
        (rows, lambda w, m: w * np.nan, ValueError, "weights must be finite, got 18 NaN"),
    ],
)
def test_what_callables_must_not_return(weights, gradients, finetune, error, words):
    with pytest.raises(error, match=words):
        list(gradual(weights, gradients, finetune=finetune, **OPTIONS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sparsity": 1.0, "steps": 3}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": 0.5, "steps": 3, "initial": 0.6}, "initial from 0 to it, got 0.5 and 0.6"),
        ({"sparsity": 0.5, "steps": 0}, "steps must be an integer of at least 1"),
    ],
)
def test_schedules_that_are_refused(arguments, words):
    for schedule in (polynomial_schedule, exponential_schedule):
        with pytest.raises(ValueError, match=words):
            schedule(**arguments)
