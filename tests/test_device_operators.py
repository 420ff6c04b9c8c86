"""Whole operators as on a CUDA device: PyTorch tensors as the carrier, the host as the device.

The m-sized half lives in the tensors' library, as on a device, and every pass goes through the
library's dispatch to the kernels. Oracles are dense float64 inverses.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import numpy64, relative_error
from host_machine import HostMachine

import mfac_core as mfac
from mfac_core import _primal, _rows
from mfac_core._arrays import Home
from mfac_core._ops import _cupy, _generic, cuda, rows
from mfac_core.testing import (
    assert_operator_close,
    dense_fisher,
    dense_inverse,
    error_bound,
)

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture
def device(monkeypatch):
    """A machine that holds PyTorch's tensors, with a home of PyTorch's."""
    machine = HostMachine("check")
    monkeypatch.setattr(_cupy, "machine", machine)
    namespace = _namespace()
    for module in (_primal, _rows, rows):
        monkeypatch.setattr(module, "home_of", lambda x: Home(namespace, torch.device("cpu")))
    return machine


def _namespace():
    from array_api_compat import torch as namespace

    return namespace


def tensor(x, dtype):
    return torch.from_numpy(np.array(x, dtype="float64")).to(getattr(torch, dtype))


def only_kernels(monkeypatch, *names):
    """Let passes over the gradients that a kernel should take fail on the generic path."""
    for name in names:
        monkeypatch.setattr(_generic, name, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_static_inverse(device, monkeypatch, rng, dtype):
    g = tensor(rng.standard_normal((7, 45)), dtype)
    inverse = mfac.InverseFisher(g, damping=0.3)
    only_kernels(monkeypatch, "project", "combine")
    dense = dense_inverse(g, damping=0.3)
    bound = error_bound(g, damping=0.3)
    x = tensor(rng.standard_normal((45, 3)), dtype)
    for y, expected in [
        (inverse @ x[:, 0].contiguous(), dense @ numpy64(x[:, 0])),
        (inverse @ x, dense @ numpy64(x)),
        (inverse.diagonal(), np.diagonal(dense)),
        (inverse.matvec(x[:, 0].contiguous(), refine=1), dense @ numpy64(x[:, 0])),
    ]:
        assert y.dtype == g.dtype
        assert relative_error(y, expected) <= bound
    assert set(device.launches) == {"project", "sum_parts", "combine", "clamped_diagonal"}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["inverse", "stored", "window", "fisher", "power"])
def test_elements(device, monkeypatch, rng, dtype, kind):
    """Of columns that no pass over the gradients reads; equal indices and repeated ones."""
    g = tensor(rng.standard_normal((7, 45)), dtype)
    dense, bound = dense_inverse(g, damping=0.3), error_bound(g, damping=0.3)
    if kind == "window":
        operator = mfac.SlidingInverseFisher(45, 9, damping=0.3)  # not full
        for row in g:
            operator.append(row)
    elif kind in ("inverse", "stored"):
        operator = mfac.InverseFisher(g, damping=0.3, store_whitened=kind == "stored")
    else:
        operator, dense = mfac.EmpiricalFisher(g, damping=0.3), dense_fisher(g, damping=0.3)
    if kind == "power":
        operator, dense = operator.power(2), dense @ dense
    monkeypatch.setattr(rows, "gathered", None)
    i, j = rng.integers(-45, 45, (2, 6)), rng.integers(-45, 45, 6)
    i[0] = j
    device.launches.clear()
    entries = operator.entries(i, j)
    assert entries.dtype == g.dtype
    assert set(device.launches) == {"take_columns", "pair_products"}
    assert abs(numpy64(entries) - dense[i, j]).max() <= bound * abs(dense).max()
    assert operator.entries([], []).shape == (0,)
    submatrix = numpy64(operator.submatrix(j))
    assert abs(submatrix - dense[np.ix_(j, j)]).max() <= bound * abs(dense).max()
    assert relative_error(operator.column(-3), dense[:, -3]) <= bound
    assert device.launches["take_columns"] == 3


def test_elements_in_batches(device, monkeypatch, rng):
    g = rng.standard_normal((6, 30))
    monkeypatch.setattr(_rows, "TAKE_BYTES", 8 * 6 * 7)
    i, j = rng.integers(0, 30, (2, 50))
    entries = mfac.InverseFisher(tensor(g, "float64"), damping=0.3).entries(i, j)
    assert device.launches["pair_products"] == 8
    bound = error_bound(g, damping=0.3)
    assert abs(numpy64(entries) - dense_inverse(g, damping=0.3)[i, j]).max() <= bound / 0.3


@pytest.mark.parametrize("normalization", ["count", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sliding_window(device, monkeypatch, rng, dtype, normalization):
    only_kernels(monkeypatch, "project", "combine", "write")
    d, size = 23, 5
    window = mfac.SlidingInverseFisher(d, size, damping=0.2, normalization=normalization)
    rows = rng.standard_normal((14, d))
    for step, row in enumerate(rows):
        g = tensor(row, dtype)
        y = window.append_matvec(g)
        held = numpy64(tensor(rows[max(0, step + 1 - size) : step + 1], dtype))
        assert (numpy64(window.gradients) == held).all()
        divisor = size if normalization == "window" else len(held)
        dense = dense_inverse(held, damping=0.2, divisor=divisor)
        bound = error_bound(g[None, :], damping=0.2, divisor=divisor)
        assert y.dtype == g.dtype
        assert relative_error(y, dense @ held[-1]) <= bound
    # Under "count" the shift moves with each gradient until the window is full.
    assert device.launches["dual_update"] >= (9 if normalization == "count" else 12)
    # The square norm and the exchange; the norm once before where a row is added.
    assert device.launches["project"] == 2 * len(rows) + size


def test_other_operations_of_a_window(device, rng):
    window = mfac.SlidingInverseFisher(17, 5, damping=0.1)
    rows = [tensor(row, "float32") for row in rng.standard_normal((9, 17))]
    for g in rows[:7]:
        window.append(g)
    window.replace(1, rows[7])
    window.remove(-2)
    window.damping = 0.03
    held = np.stack([numpy64(rows[i]) for i in (2, 7, 4, 6)])
    assert (numpy64(window.gradients) == held).all()
    bound = error_bound(held, damping=0.03, dtype="float32")
    assert_operator_close(window, dense_inverse(held, damping=0.03), rtol=bound)
    before = window.state_dict()
    with pytest.raises(ValueError, match="g must be finite"):
        window.append(torch.full((17,), torch.nan))
    after = window.state_dict()
    assert all(np.array_equal(np.asarray(before[k]), np.asarray(after[k])) for k in before)
    restored = mfac.SlidingInverseFisher(17, 5, damping=1.0)
    restored.load_state_dict(after)
    assert (restored.append_matvec(rows[8]) == window.append_matvec(rows[8])).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 9])
def test_small_blocks(device, rng, dtype, size):
    g = tensor(rng.standard_normal((12, 45)), dtype)
    inverse = mfac.BlockInverseFisher(g, damping=0.3, block_size=size)
    blocks = [dense_inverse(g[:, a : a + size], damping=0.3) for a in range(0, 45, size)]
    bound = error_bound(g, damping=0.3)
    assert_operator_close(inverse, scipy.linalg.block_diag(*blocks), rtol=bound)
    assert device.launches["block_inverses"] == 1
    assert device.launches["block_product"] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_in_small_blocks_is_said_with_its_row(device, rng, value):
    g = tensor(rng.standard_normal((12, 45)), "float32")
    g[7, 40] = value
    with pytest.raises(ValueError, match="1 of 12 rows, at index 7"):
        mfac.BlockInverseFisher(g, damping=0.3, block_size=9)


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
    events, later, launch = [], device.later, cuda.launch

    def recorded_later(x):
        number, look = sum(event.startswith("sent") for event in events), later(x)
        events.append(f"sent {number}")
        return lambda: events.append(f"look {number}") or look()

    for name in VALUE_READS:
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name: events.append(name))
    monkeypatch.setattr(device, "later", recorded_later)
    monkeypatch.setattr(cuda, "launch", lambda *args: events.append(args[1]) or launch(*args))
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


def test_a_strided_gradient(device, rng):
    """A column of a matrix, into a window that fills and into one that is full."""
    columns = tensor(rng.standard_normal((30, 12)), "bfloat16")
    window = mfac.SlidingInverseFisher(30, 8, damping=0.1)
    for i in range(12):
        y = window.append_matvec(columns[:, i])
    held = numpy64(columns[:, 4:]).T
    assert (numpy64(window.gradients) == held).all()
    expected = dense_inverse(held, damping=0.1) @ held[-1]
    assert relative_error(y, expected) <= error_bound(columns.T, damping=0.1)
    y = window @ columns[:, ::3]
    expected = dense_inverse(held, damping=0.1) @ numpy64(columns[:, ::3])
    assert relative_error(y, expected) <= error_bound(columns.T, damping=0.1)


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


@pytest.mark.parametrize("normalization", ["count", "window"])
def test_a_long_run_does_not_drift(device, rng, normalization):
    d, size = 40, 12
    window = mfac.SlidingInverseFisher(d, size, damping=1e-4, normalization=normalization)
    pool = rng.standard_normal((4, d)) / np.sqrt(d)
    held = []
    for step in range(120):
        # Equal rows are normal life.
        row = pool[step % 4] if rng.random() < 0.3 else rng.standard_normal(d) / np.sqrt(d)
        held = [*held, row][-size:]
        y = window.append_matvec(tensor(row, "float64"))
        divisor = size if normalization == "window" else len(held)
        dense = dense_inverse(np.array(held), damping=1e-4, divisor=divisor)
        bound = error_bound(np.array(held), damping=1e-4, divisor=divisor)
        assert relative_error(y, dense @ row) <= bound
    assert device.launches["dual_update"] > 60
