"""Steps of a full window as on a CUDA device: when the host waits, and what is told how late.

PyTorch's tensors are the carrier and the host is the device, as in ``test_device_operators.py``.
"""

import numpy as np
import pytest
import torch
from conftest import numpy64, relative_error
from host_machine import tensor, torch_machine

import mfac_core as mfac
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core.testing import assert_operator_close, dense_inverse, error_bound


@pytest.fixture
def device(monkeypatch):
    return torch_machine(monkeypatch)


def full_window(rng, d=30, size=8):
    """A window whose next step replaces a row in a known inverse, and the rows it holds."""
    window = mfac.SlidingInverseFisher(d, size, damping=0.1)
    rows = rng.standard_normal((size + 2, d))
    for row in rows:
        window.append_matvec(tensor(row, "float64"))
    return window, list(rows[2:])


VALUE_READS = ("__bool__", "__float__", "__int__", "__index__", "item", "tolist", "cpu")


def watched(device, monkeypatch):
    """A list of what happens from now on: launches, `sent n`, `look n` at it, values read.

    Reading a value of a tensor would wait at once; `look n` waits for what came before `sent n`.
    """
    events, later, launch = [], device.later, cuda_passes.launch

    def recorded_later(x):
        number, look = sum(event.startswith("sent") for event in events), later(x)
        events.append(f"sent {number}")
        return lambda: events.append(f"look {number}") or look()

    for name in VALUE_READS:
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: events.append(name))
    monkeypatch.setattr(device, "later", recorded_later)
    monkeypatch.setattr(
        cuda_passes, "launch", lambda *args: events.append(args[1]) or launch(*args)
    )
    return events


def test_a_step_of_a_full_window_waits_for_the_device_once_behind_its_last_pass(
    device, monkeypatch, rng
):
    window, _ = full_window(rng)
    events = watched(device, monkeypatch)
    window.append_matvec(tensor(rng.standard_normal(30), "float64"))
    assert events.index("dual_update") < events.index("sent 0") < events.index("combine")
    assert events[-1] == "look 0"
    assert sum(event.startswith("look") for event in events) == 1
    assert not set(VALUE_READS) & set(events)


def test_a_step_that_does_not_check_waits_for_nothing_it_has_launched(device, monkeypatch, rng):
    window, _ = full_window(rng)
    events = watched(device, monkeypatch)
    for step in range(4):
        del events[:]
        events += [f"sent {before}" for before in range(step)]  # numbers go on
        window.append_matvec(tensor(rng.standard_normal(30), "float64"), check_finite=False)
        done = events[step:]
        looks = [event for event in done if event.startswith("look")]
        if step == 0:
            assert looks == []
        else:  # at what the step before has sent ahead of its last pass
            assert looks == [done[0]] == [f"look {step - 1}"]
        assert {"project", "dual_update", "combine", f"sent {step}"} <= set(done)
        assert done.index(f"sent {step}") < done.index("combine")
        assert not set(VALUE_READS) & set(done)


def test_steps_that_do_not_check_give_the_same(device, rng):
    """Bit for bit, and without a wait at the end of a step."""
    windows = [mfac.SlidingInverseFisher(23, 5, damping=0.2) for _ in range(2)]
    for step, row in enumerate(rng.standard_normal((30, 23))):
        g = tensor(row, "float32")
        device.waits = 0
        expected = windows[0].append_matvec(g)
        assert device.waits == (step >= 5)
        assert (windows[1].append_matvec(g, check_finite=False) == expected).all()
    states = [window.state_dict() for window in windows]
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def assert_holds(window, held):
    held = np.array(held)
    dense, bound = dense_inverse(held, damping=0.1), error_bound(held, damping=0.1)
    assert_operator_close(window, dense, rtol=bound)


NEXT_CALLS = {
    "append": lambda w: w.append(torch.ones(30, dtype=torch.float64)),
    "append_matvec": lambda w: w.append_matvec(torch.ones(30, dtype=torch.float64)),
    "unchecked": lambda w: w.append_matvec(torch.ones(30).double(), check_finite=False),
    "replace": lambda w: w.replace(0, torch.ones(30, dtype=torch.float64)),
    "remove": lambda w: w.remove(0),
    "damping": lambda w: setattr(w, "damping", 1.0),
    "gradients": lambda w: w.gradients,
    "gram": lambda w: w.gram,
    "dual": lambda w: w.dual,
    "matvec": lambda w: w @ torch.ones(30, dtype=torch.float64),
    "refined": lambda w: w.matvec(torch.ones(30, dtype=torch.float64), refine=1),
    "diagonal": lambda w: w.diagonal(),
    "entries": lambda w: w.entries(1, 2),
    "column": lambda w: w.column(1),
    "submatrix": lambda w: w.submatrix([1, 2]),
    "quadratic": lambda w: w.quadratic(torch.ones(30, dtype=torch.float64)),
    "logdet": lambda w: w.logdet(),
    "power": lambda w: w.power(2),
    "sample": lambda w: w.sample(1, 0),
    "state_dict": lambda w: w.state_dict(),
    "to_dense": lambda w: w.to_dense(),
}


@pytest.mark.parametrize(
    ("call", "value"),
    [*((call, np.nan) for call in NEXT_CALLS), ("append", np.inf), ("append_matvec", 1e200)],
)
def test_a_gradient_nobody_checked_is_refused_by_the_next_call(device, rng, call, value):
    window, held = full_window(rng)
    before = window.state_dict()
    g = tensor(rng.standard_normal(30), "float64")
    g[11] = value
    assert torch.isnan(window.append_matvec(g, check_finite=False)).all()
    with pytest.raises(ValueError, match=r"the append_matvec before.*: g must be finite"):
        NEXT_CALLS[call](window)
    after = window.state_dict()
    for key in ("gradients", "gram", "slots", "damping"):
        assert np.array_equal(np.asarray(before[key]), np.asarray(after[key]))
    assert_holds(window, held)
    NEXT_CALLS[call](window)


def test_a_window_that_is_cleared_forgets_what_nobody_checked(device, rng):
    window, _ = full_window(rng)
    window.append_matvec(torch.full((30,), torch.nan, dtype=torch.float64), check_finite=False)
    window.clear()
    window.append(torch.ones(30, dtype=torch.float64))
    assert (window.gradients == 1.0).all()


def test_while_the_window_fills_a_gradient_is_refused_at_once(device, rng):
    window = mfac.SlidingInverseFisher(4, 3, damping=0.1)
    window.append(torch.ones(4))
    with pytest.raises(ValueError, match=r"^g must be finite"):
        window.append_matvec(torch.full((4,), torch.nan), check_finite=False)
    assert (window.gradients == 1.0).all()


@pytest.mark.parametrize("damage", ["scaled", "nan", "negative"])
def test_an_inverse_found_wrong_after_a_step_that_does_not_check(device, rng, damage):
    """One result may be wrong, and the next call says so; what it does is right."""
    window, held = full_window(rng)
    spoil(window._dual._inverse, damage)
    window.append_matvec(tensor(rng.standard_normal(30), "float64"), check_finite=False)
    held = numpy64(window._rows.held())
    row = rng.standard_normal(30)
    with pytest.warns(RuntimeWarning, match="the append_matvec before.* may be wrong"):
        y = window.append_matvec(tensor(row, "float64"), check_finite=False)
    held = np.array([*held[1:], row])
    bound = error_bound(held, damping=0.1)
    assert relative_error(y, dense_inverse(held, damping=0.1) @ row) <= bound
    assert_holds(window, held)


def spoil(inverse, damage):
    if damage == "scaled":
        inverse *= 1.01
    else:
        inverse += (np.nan if damage == "nan" else -100.0) * torch.eye(8, dtype=torch.float64)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
@pytest.mark.parametrize("step", ["append", "append_matvec", "replace"])
def test_a_gradient_refused_by_the_device_leaves_the_window(device, rng, step, value):
    window, held = full_window(rng)
    before = window.state_dict()
    g = tensor(rng.standard_normal(30), "float64")
    g[11] = value
    with pytest.raises(ValueError, match="g must be finite"):
        window.replace(3, g) if step == "replace" else getattr(window, step)(g)
    after = window.state_dict()
    for key in ("gradients", "gram", "slots"):
        assert np.array_equal(np.asarray(before[key]), np.asarray(after[key]))
    # The row that stayed was exchanged for itself, in the inverse too.
    bound = error_bound(np.array(held), damping=0.1)
    assert relative_error(after["inverse"], before["inverse"]) <= bound
    row = rng.standard_normal(30)
    y = window.append_matvec(tensor(row, "float64"))
    held = np.array([*held[1:], row])
    assert relative_error(y, dense_inverse(held, damping=0.1) @ row) <= bound


@pytest.mark.parametrize("damage", ["scaled", "nan", "negative"])
@pytest.mark.parametrize("what", ["append_matvec", "append, matvec"])
def test_an_inverse_the_device_finds_wrong_is_given_up_in_the_same_step(device, rng, damage, what):
    window, held = full_window(rng)
    spoil(window._dual._inverse, damage)
    row = rng.standard_normal(30)
    held = np.array([*held[1:], row])
    g = tensor(row, "float64")
    if what == "append_matvec":
        y = window.append_matvec(g)
    else:
        window.append(g)
        y = window @ g
    bound = error_bound(held, damping=0.1)
    assert relative_error(y, dense_inverse(held, damping=0.1) @ row) <= bound
    assert window._dual._inverse is None
