"""The sliding window against dense inverses of what it should hold."""

import numpy as np
import pytest
from conftest import BACKENDS, CASES, numpy64, relative_error
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

import mfac_core as mfac
from mfac_core.testing import (
    DynamicRecursion,
    assert_operator_close,
    dense_inverse,
    error_bound,
)


def reference(window):
    """The dense inverse of what the window holds, and the bound for it."""
    held = numpy64(window.gradients)
    divisor = window.window_size if window.normalization == "window" else max(len(held), 1)
    bound = error_bound(held, damping=window.damping, dtype="float64", divisor=divisor)
    return dense_inverse(held, damping=window.damping, divisor=divisor), bound


@pytest.mark.parametrize("normalization", ["count", "window"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_a_sliding_window_is_the_static_inverse_of_its_rows(rng, backend, dtype, normalization):
    d, size = 23, 6
    window = mfac.SlidingInverseFisher(d, size, damping=0.1, normalization=normalization)
    rows = rng.standard_normal((15, d))
    for step, row in enumerate(rows):
        g = backend.asarray(row, dtype)
        y = window.append_matvec(g)
        held = rows[max(0, step + 1 - size) : step + 1].astype(dtype).astype("float64")
        assert len(window) == len(held)
        assert (numpy64(window.gradients) == held).all()
        divisor = size if normalization == "window" else len(held)
        dense = dense_inverse(held, damping=0.1, divisor=divisor)
        bound = error_bound(held, damping=0.1, dtype=dtype, divisor=divisor)
        assert y.dtype == g.dtype
        assert relative_error(y, dense @ held[-1]) <= bound
        assert_operator_close(window, dense, rtol=bound)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_replace_remove_clear_and_damping(rng, backend, dtype):
    window = mfac.SlidingInverseFisher(17, 5, damping=0.1)
    rows = [backend.asarray(row, dtype) for row in rng.standard_normal((9, 17))]
    for g in rows[:7]:
        window.append(g)
    window.replace(1, rows[7])
    window.remove(-2)
    window.damping = 0.03
    held = np.stack([numpy64(rows[i]) for i in (2, 7, 4, 6)])
    assert (numpy64(window.gradients) == held).all()
    bound = error_bound(held, damping=0.03, dtype=dtype)
    assert_operator_close(window, dense_inverse(held, damping=0.03), rtol=bound)
    window.append(rows[8])
    held = np.concatenate([held, numpy64(rows[8])[None]])
    assert (numpy64(window.gradients) == held).all()
    assert_operator_close(window, dense_inverse(held, damping=0.03), rtol=bound)
    window.clear()
    assert len(window) == 0
    assert window.gradients.shape == (0, 17)
    assert_operator_close(window, np.eye(17) / 0.03, rtol=1e-6)


def test_an_empty_window_is_the_identity_over_damping():
    window = mfac.SlidingInverseFisher(3, 2, damping=0.5)
    assert window.dtype is None
    assert (window @ np.ones(3, "float32") == 2.0).all()
    assert (window.diagonal() == 2.0).all()
    assert window.to_scipy().shape == (3, 3)


def test_it_is_the_papers_dynamic_algorithm(rng):
    rows = rng.standard_normal((9, 20))
    window = mfac.SlidingInverseFisher(20, 5, damping=0.2)
    for row in rows:
        window.append(row)
    x = rng.standard_normal(20)
    recursion = DynamicRecursion(rows[-5:], damping=0.2)
    bound = error_bound(rows[-5:], damping=0.2)
    assert relative_error(window @ x, recursion.matvec(x)) <= bound


@pytest.mark.parametrize("normalization", ["count", "window"])
@pytest.mark.parametrize("damping", [1e-3, 1e-6])
def test_1500_operations_do_not_drift(rng, damping, normalization):
    d, size = 60, 24
    window = mfac.SlidingInverseFisher(d, size, damping=damping, normalization=normalization)
    mirror = []
    pool = rng.standard_normal((8, d)) / np.sqrt(d)
    for step in range(1500):
        kind = rng.choice(["append", "append", "append", "replace", "remove"])
        fresh = rng.standard_normal(d) / np.sqrt(d)
        g = pool[rng.integers(8)] if rng.random() < 0.2 else fresh  # equal rows are normal life
        if kind == "append" or not mirror:
            window.append(g)
            mirror = [*mirror, g][-size:]
        elif kind == "replace":
            i = int(rng.integers(len(mirror)))
            window.replace(i, g)
            mirror[i] = g
        else:
            i = int(rng.integers(len(mirror)))
            window.remove(i)
            del mirror[i]
        if step % 10 == 0 and mirror:
            divisor = size if normalization == "window" else len(mirror)
            dense = dense_inverse(np.array(mirror), damping=damping, divisor=divisor)
            x = rng.standard_normal(d)
            assert relative_error(window @ x, dense @ x) <= 1e-6
            assert relative_error(window.diagonal(), np.diagonal(dense)) <= 1e-6


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_append_matvec_on_nearly_parallel_gradients(rng, spread):
    """λ is 1e-6 and the rows share a direction: subtracting would lose every digit."""
    d, size = 2000, 256
    common = rng.standard_normal(d)
    rows = (0.1 * (common + spread * rng.standard_normal((size, d)))).astype("float32")
    window = mfac.SlidingInverseFisher(d, size, damping=1e-6)
    for row in rows[:-1]:
        window.append(row)
    expected = dense_inverse(rows, damping=1e-6) @ rows[-1].astype("float64")
    assert relative_error(window.append_matvec(rows[-1]), expected) <= 1e-4


def test_float64_products_end_when_the_gradients_that_asked_for_them_have_left(rng):
    window = mfac.SlidingInverseFisher(50, 8, damping=1e-6)
    row = rng.standard_normal(50).astype("float32")
    x = rng.standard_normal(50).astype("float32")
    for _ in range(9):
        window.append(row)
        window @ x
    assert window._rows.float64
    for _ in range(17):
        window.append(rng.standard_normal(50).astype("float32"))
        window @ x
    assert not window._rows.float64


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_restored_window_continues_bit_for_bit(rng, backend):
    def run(window, rows):
        return [numpy64(window.append_matvec(backend.asarray(row))) for row in rows]

    rows = rng.standard_normal((40, 30))
    window = mfac.SlidingInverseFisher(30, 8, damping=1e-3)
    run(window, rows[:20])
    state = window.state_dict()
    expected = run(window, rows[20:])
    resumed = mfac.SlidingInverseFisher(30, 8, damping=1.0)
    resumed.load_state_dict(state)
    assert resumed.damping == 1e-3
    assert all((a == b).all() for a, b in zip(run(resumed, rows[20:]), expected, strict=True))


@pytest.mark.parametrize("held", [0, 3, 8])
def test_state_survives_a_file(rng, tmp_path, held):
    window = mfac.SlidingInverseFisher(30, 5, damping=1e-3, normalization="window")
    for row in rng.standard_normal((held, 30)):
        window.append_matvec(row)
    np.savez(tmp_path / "window.npz", **window.state_dict())
    resumed = mfac.SlidingInverseFisher(30, 5, damping=1.0)
    with np.load(tmp_path / "window.npz") as state:
        resumed.load_state_dict(state)
    x = rng.standard_normal(30)
    assert (resumed @ x == window @ x).all()
    assert resumed.normalization == "window"
    assert (resumed.append_matvec(x) == window.append_matvec(x)).all()


def test_state_is_a_copy(rng):
    window = mfac.SlidingInverseFisher(10, 3, damping=0.1)
    for row in rng.standard_normal((4, 10)):
        window.append_matvec(row)
    state = window.state_dict()
    before = {key: np.array(value) for key, value in state.items()}
    window.append_matvec(rng.standard_normal(10))
    assert all((before[key] == state[key]).all() for key in state)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_float32_products_that_leave_float32(rng, scale):
    rows = (scale * rng.standard_normal((8, 20))).astype("float32")
    window = mfac.SlidingInverseFisher(20, 4, damping=0.1 * scale**2)
    for row in rows:
        y = window.append_matvec(row.astype("float64"))
    expected = dense_inverse(rows[-4:], damping=window.damping) @ rows[-1].astype("float64")
    assert relative_error(y, expected) <= 1e-5


def test_given_dtype_is_kept(rng):
    window = mfac.SlidingInverseFisher(10, 3, damping=0.1, dtype=np.float32, xp=np)
    y = window.append_matvec(rng.standard_normal(10))
    assert window.dtype == np.float32
    assert y.dtype == np.float64
    import torch

    window = mfac.SlidingInverseFisher(10, 3, damping=0.1, dtype=torch.bfloat16, xp=torch)
    g = torch.from_numpy(rng.standard_normal(10)).float()
    assert window.append_matvec(g).dtype == torch.float32
    assert window.dtype == torch.bfloat16
    assert relative_error(window @ g, reference(window)[0] @ numpy64(g)) <= 1e-5


class Window(RuleBasedStateMachine):
    """Any sequence of operations leaves the inverse of what is held."""

    @initialize(
        d=st.integers(1, 12),
        size=st.integers(1, 7),
        damping=st.sampled_from([1e-6, 1e-3, 1.0]),
        normalization=st.sampled_from(["count", "window"]),
        seed=st.integers(0, 2**32 - 1),
    )
    def start(self, d, size, damping, normalization, seed):
        self.rng = np.random.default_rng(seed)
        self.window = mfac.SlidingInverseFisher(
            d, size, damping=damping, normalization=normalization
        )
        self.mirror = []

    def gradient(self, kind):
        g = self.rng.standard_normal(self.window.num_params)
        if kind == "zero":
            return 0.0 * g
        if kind == "equal" and self.mirror:
            return self.mirror[0].copy()
        if kind == "collinear" and self.mirror:
            return -2.0 * self.mirror[-1]
        return g

    kinds = st.sampled_from(["general", "general", "zero", "equal", "collinear"])

    @rule(kind=kinds)
    def append(self, kind):
        g = self.gradient(kind)
        self.window.append(g)
        self.mirror = [*self.mirror, g][-self.window.window_size :]

    @rule(kind=kinds)
    def append_matvec(self, kind):
        g = self.gradient(kind)
        y = self.window.append_matvec(g)
        self.mirror = [*self.mirror, g][-self.window.window_size :]
        dense, bound = reference(self.window)
        # For a zero gradient, what is left of zeros after refinement, times the other rows.
        rest = 2.0**-52 * bound * np.linalg.norm(self.window.gradients) / self.window.damping
        allowed = bound * np.linalg.norm(dense @ g) + rest
        assert np.linalg.norm(y - dense @ g) <= allowed

    @precondition(lambda self: self.mirror)
    @rule(kind=kinds, where=st.floats(0, 0.999))
    def replace(self, kind, where):
        i = int(where * len(self.mirror))
        self.mirror[i] = self.gradient(kind)
        self.window.replace(i, self.mirror[i])

    @precondition(lambda self: self.mirror)
    @rule(where=st.floats(0, 0.999))
    def remove(self, where):
        i = int(where * len(self.mirror))
        del self.mirror[i]
        self.window.remove(i)

    @rule(damping=st.sampled_from([1e-6, 1e-3, 1.0]))
    def set_damping(self, damping):
        self.window.damping = damping

    @rule()
    def clear(self):
        self.window.clear()
        self.mirror = []

    @rule()
    def save_and_load(self):
        state = self.window.state_dict()
        self.window = mfac.SlidingInverseFisher(
            self.window.num_params, self.window.window_size, damping=1.0
        )
        self.window.load_state_dict(state)

    @rule()
    def refused(self):
        before = self.window.state_dict()
        with pytest.raises(ValueError, match="g must be finite"):
            self.window.append(np.full(self.window.num_params, np.nan))
        after = self.window.state_dict()
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key], after[key]) for key in before)

    @invariant()
    def holds_what_it_should(self):
        assert len(self.window) == len(self.mirror)
        if self.mirror:
            assert (self.window.gradients == np.array(self.mirror)).all()

    @rule()
    def product(self):
        dense, bound = reference(self.window)
        x = self.rng.standard_normal(self.window.num_params)
        assert relative_error(self.window @ x, dense @ x) <= bound
        assert relative_error(self.window.diagonal(), np.diagonal(dense)) <= bound


TestWindow = Window.TestCase
TestWindow.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
