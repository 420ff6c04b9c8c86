"""The compressed window against plain top-k with error feedback and dense inverses."""

import math
import tracemalloc

import jax
import numpy as np
import pytest
import torch
from conftest import BACKENDS, CASES, numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Ranks

import mfac_core as mfac
from mfac_core._ops import _entries
from mfac_core._rows import sparse_ring as _sparse_ring
from mfac_core.testing import assert_operator_close, dense_inverse, error_bound


class ErrorFeedback:
    """Block-wise top-k with error feedback, one block and one gradient at a time."""

    def __init__(self, d, density, dtype, largest_block=4096):
        blocks = math.ceil(d / largest_block)
        self.size = math.ceil(d / blocks)
        self.k = math.ceil(density * self.size)
        self.dtype = dtype
        self.error = np.zeros(d, "float64" if dtype == "float64" else "float32")

    def row(self, g):
        """The row stored for g, and what is left out by then."""
        total = g.astype(self.error.dtype) + self.error
        row = np.zeros_like(total)
        for start in range(0, len(total), self.size):
            block = total[start : start + self.size]
            chosen = np.argsort(-abs(block), kind="stable")[: self.k]
            stored = torch.from_numpy(block[chosen]).to(getattr(torch, self.dtype))
            row[start + chosen] = stored.to(torch.float64).numpy()
        self.error = total - row
        return row.astype("float64")


@pytest.fixture
def short_blocks(monkeypatch):
    """Several blocks of a few columns, and passes of a few blocks."""
    monkeypatch.setattr(_sparse_ring, "LARGEST_BLOCK", 7)
    monkeypatch.setattr(_entries, "PASS_ENTRIES", 60)


def examples(backend):
    """JAX compiles for each shape."""
    return 2 if backend.name == "jax" else 12


def check_against_dense(window, held, dtype, x):
    divisor = window.window_size if window.normalization == "window" else max(len(held), 1)
    dense = dense_inverse(held, damping=window.damping, divisor=divisor)
    bound = error_bound(held, damping=window.damping, dtype=dtype, divisor=divisor)
    assert relative_error(window @ x, dense @ numpy64(x)) <= bound
    return dense, bound


@pytest.mark.parametrize("normalization", ["count", "window"])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_it_is_the_inverse_of_the_compressed_rows(rng, short_blocks, backend, dtype, normalization):
    d, size, density = 45, 6, 0.3
    window = mfac.SparseSlidingInverseFisher(
        d, size, density=density, damping=0.1, normalization=normalization
    )
    reference = ErrorFeedback(d, density, dtype, 7)
    rows = []
    for row in rng.standard_normal((14, d)):
        g = backend.asarray(row, dtype)
        y = window.append_matvec(g)
        rows = [*rows, reference.row(numpy64(g))][-size:]
        held = np.stack(rows)
        assert len(window) == len(held)
        assert (numpy64(window.gradients) == held).all()
        assert (numpy64(window.error) == reference.error).all()
        assert (np.count_nonzero(held, axis=1) <= 7 * math.ceil(density * 7)).all()
        dense, bound = check_against_dense(window, held, dtype, g)
        assert y.dtype == g.dtype
        assert relative_error(y, dense @ held[-1]) <= bound
    assert_operator_close(window, dense, rtol=bound)
    assert relative_error(window.matvec(g, refine=1), dense @ numpy64(g)) <= bound


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_any_sizes(backend, dtype):
    @settings(max_examples=examples(backend))
    @given(
        d=st.integers(1, 40),
        block=st.integers(1, 40),
        size=st.integers(1, 5),
        density=st.one_of(st.floats(0.01, 1.0), st.just(1.0)),
        entries=st.sampled_from([1, 40, 1 << 19]),
        damping=st.sampled_from([1e-3, 1.0]),
        seed=st.integers(0, 2**31),
    )
    def check(d, block, size, density, entries, damping, seed):
        rng = np.random.default_rng(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_sparse_ring, "LARGEST_BLOCK", block)
            patch.setattr(_entries, "PASS_ENTRIES", entries)
            window = mfac.SparseSlidingInverseFisher(d, size, density=density, damping=damping)
            reference = ErrorFeedback(d, density, dtype, block)
            held = []
            for _ in range(size + 2):
                g = backend.asarray(rng.standard_normal(d), dtype)
                window.append(g)
                held = [*held, reference.row(numpy64(g))][-size:]
            assert (numpy64(window.gradients) == np.stack(held)).all()
            dense, bound = check_against_dense(window, np.stack(held), dtype, g)
            x = backend.asarray(rng.standard_normal((d, 2)), dtype)
            assert relative_error(window @ x, dense @ numpy64(x)) <= bound
            assert relative_error(window.diagonal(), np.diagonal(dense)) <= bound

    check()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_replace_remove_clear_and_damping(rng, short_blocks, backend, dtype):
    window = mfac.SparseSlidingInverseFisher(17, 5, density=0.4, damping=0.1)
    reference = ErrorFeedback(17, 0.4, dtype, 7)
    gradients = [backend.asarray(row, dtype) for row in rng.standard_normal((9, 17))]
    rows = [reference.row(numpy64(g)) for g in gradients]
    for g in gradients[:7]:
        window.append(g)
    window.replace(1, gradients[7])
    window.remove(-2)
    window.damping = 0.03
    held = np.stack([rows[i] for i in (2, 7, 4, 6)])
    assert (numpy64(window.gradients) == held).all()
    bound = error_bound(held, damping=0.03, dtype=dtype)
    assert_operator_close(window, dense_inverse(held, damping=0.03), rtol=bound)
    window.append(gradients[8])
    held = np.concatenate([held, rows[8][None]])
    assert (numpy64(window.gradients) == held).all()
    assert (numpy64(window.error) == reference.error).all()
    assert_operator_close(window, dense_inverse(held, damping=0.03), rtol=bound)
    window.clear()
    assert len(window) == 0
    assert window.gradients.shape == (0, 17)
    assert (numpy64(window.error) == 0.0).all()
    assert_operator_close(window, np.eye(17) / 0.03, rtol=1e-6)


@pytest.mark.parametrize(
    ("xp", "dtype"), [(torch, "bfloat16"), (torch, "float16"), (jax.numpy, "bfloat16")]
)
def test_sixteen_bits_leave_their_rounding_to_the_error(rng, short_blocks, xp, dtype):
    window = mfac.SparseSlidingInverseFisher(
        40, 4, density=0.3, damping=0.1, xp=xp, dtype=getattr(xp, dtype)
    )
    reference = ErrorFeedback(40, 0.3, dtype, 7)
    rows = []
    for row in rng.standard_normal((9, 40)).astype("float32"):
        g = xp.asarray(row)
        y = window.append_matvec(g)
        rows = [*rows, reference.row(row)][-4:]
        held = np.stack(rows)
        assert (numpy64(window.gradients) == held).all()
        assert (numpy64(window.error) == reference.error).all()
        dense, bound = check_against_dense(window, held, "float32", g)
        assert y.dtype == g.dtype
        assert relative_error(y, dense @ held[-1]) <= bound
    assert window.dtype == getattr(xp, dtype)
    assert window.error.dtype == xp.float32


def test_numpys_float16(rng):
    window = mfac.SparseSlidingInverseFisher(
        500, 4, density=0.1, damping=0.1, xp=np, dtype=np.float16
    )
    for row in rng.standard_normal((6, 500)).astype("float32"):
        window.append(row)
    held = numpy64(window.gradients)
    assert window.gradients.dtype == np.float16
    check_against_dense(window, held, "float32", row)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_what_is_left_out_is_put_off(backend, dtype):
    """The rows ever stored and the error add up to the gradients: a rounding a step and entry."""

    @settings(max_examples=examples(backend))
    @given(
        d=st.integers(1, 60),
        block=st.integers(1, 30),
        density=st.floats(0.01, 1.0),
        steps=st.integers(1, 12),
        kind=st.sampled_from(["general", "equal", "zero", "signs"]),
        seed=st.integers(0, 2**31),
    )
    def check(d, block, density, steps, kind, seed):
        rng = np.random.default_rng(seed)
        g = rng.standard_normal((steps, d))
        if kind == "equal":
            g[:] = g[0]
        elif kind == "zero":
            g[::2] = 0.0
        elif kind == "signs":  # entries of equal magnitude are chosen among in any way
            g = np.sign(g)
        g = g.astype(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_sparse_ring, "LARGEST_BLOCK", block)
            window = mfac.SparseSlidingInverseFisher(d, 3, density=density, damping=0.1)
        stored = np.zeros(d)
        for row in g:
            window.append(backend.asarray(row, dtype))
            stored += numpy64(window.gradients)[-1]
        total = numpy64(g).sum(axis=0)
        rounding = steps * np.finfo(dtype).eps * abs(numpy64(g)).sum(axis=0)
        assert (abs(stored + numpy64(window.error) - total) <= rounding).all()

    check()


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_full_density_is_the_dense_window(rng, short_blocks, backend, dtype):
    sparse = mfac.SparseSlidingInverseFisher(40, 5, density=1.0, damping=0.1)
    dense = mfac.SlidingInverseFisher(40, 5, damping=0.1)
    for row in rng.standard_normal((8, 40)):
        g = backend.asarray(row, dtype)
        y, expected = sparse.append_matvec(g), numpy64(dense.append_matvec(g))
        held = numpy64(dense.gradients)
        assert (numpy64(sparse.gradients) == held).all()
        assert (numpy64(sparse.error) == 0.0).all()
        assert relative_error(y, expected) <= 2 * error_bound(held, damping=0.1, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_restored_window_continues_bit_for_bit(rng, short_blocks, backend):
    def run(window, rows):
        return [numpy64(window.append_matvec(backend.asarray(row))) for row in rows]

    rows = rng.standard_normal((30, 30))
    window = mfac.SparseSlidingInverseFisher(30, 6, density=0.2, damping=1e-3)
    run(window, rows[:15])
    window.remove(2)
    state = window.state_dict()
    expected = run(window, rows[15:])
    resumed = mfac.SparseSlidingInverseFisher(30, 6, density=0.2, damping=1.0)
    resumed.load_state_dict(state)
    assert all((a == b).all() for a, b in zip(run(resumed, rows[15:]), expected, strict=True))


@pytest.mark.parametrize("held", [0, 3, 8])
def test_state_survives_a_file(rng, tmp_path, held):
    window = mfac.SparseSlidingInverseFisher(30, 5, density=0.2, damping=1e-3)
    for row in rng.standard_normal((held, 30)):
        window.append_matvec(row)
    np.savez(tmp_path / "window.npz", **window.state_dict())
    resumed = mfac.SparseSlidingInverseFisher(30, 5, density=0.2, damping=1.0)
    with np.load(tmp_path / "window.npz") as state:
        resumed.load_state_dict(state)
    x = rng.standard_normal(30)
    assert (resumed @ x == window @ x).all()
    assert (resumed.append_matvec(x) == window.append_matvec(x)).all()


def state_of(rng, density=0.2, d=30):
    window = mfac.SparseSlidingInverseFisher(d, 5, density=density, damping=0.1)
    for row in rng.standard_normal((7, d)):
        window.append(row)
    return window.state_dict()


def test_states_that_do_not_fit(rng):
    window = mfac.SparseSlidingInverseFisher(30, 5, density=0.2, damping=0.1)
    with pytest.raises(ValueError, match=r"density\) \(1, 30, 5, 0.2\), got \(1, 30, 5, 0.4\)"):
        window.load_state_dict(state_of(rng, density=0.4))
    for key in ("values", "error", "indices"):
        state = state_of(rng)
        with pytest.raises(ValueError, match=f"no entry '{key}'"):
            window.load_state_dict({k: v for k, v in state.items() if k != key})
        state[key] = state[key][:-1] if key == "error" else state[key][..., :-1]
        with pytest.raises(ValueError, match="it is damaged"):
            window.load_state_dict(state)
    assert len(window) == 0


def test_state_is_a_copy(rng):
    window = mfac.SparseSlidingInverseFisher(30, 3, density=0.2, damping=0.1)
    for row in rng.standard_normal((4, 30)):
        window.append_matvec(row)
    state = window.state_dict()
    before = {key: np.array(value) for key, value in state.items()}
    root = window.power(0.5)
    y = root @ row
    window.append_matvec(rng.standard_normal(30))
    assert all((before[key] == state[key]).all() for key in before)
    assert (root @ row == y).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("step", ["append", "append_matvec", "replace"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_a_refused_gradient_changes_nothing(rng, short_blocks, backend, step, value):
    window = mfac.SparseSlidingInverseFisher(30, 4, density=0.2, damping=0.1)
    g = backend.asarray(np.full(30, value))
    with pytest.raises(ValueError, match="g must be finite"):
        window.append(g)
    assert window.dtype is None
    rows = [backend.asarray(row) for row in rng.standard_normal((7, 30))]
    for row in rows[:6]:
        window.append_matvec(row)
    before = window.state_dict()
    bad = rng.standard_normal(30)
    bad[11] = value
    g = backend.asarray(bad)
    with pytest.raises(ValueError, match="g must be finite"):
        window.replace(3, g) if step == "replace" else getattr(window, step)(g)
    after = window.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(numpy64(before[k]), numpy64(after[k])) for k in before if k in ARRAYS)
    assert all(before[k] == after[k] for k in before if k not in ARRAYS)
    assert (numpy64(before["error"]) != 0.0).any()


ARRAYS = {"slots", "indices", "values", "error", "gram", "inverse", "probe"}


def test_entries_that_overflow_only_when_rounded_are_refused():
    window = mfac.SparseSlidingInverseFisher(
        4, 2, density=0.5, damping=0.1, xp=torch, dtype=torch.float16
    )
    window.append(torch.ones(4))
    before = window.error
    with pytest.raises(ValueError, match=r"finite in the window's dtype torch\.float16"):
        window.append(torch.tensor([1.0, 1e6, 0.0, 0.0]))
    assert (window.error == before).all()


def test_gradients_are_not_written_to(rng):
    g = rng.standard_normal(20)
    before = g.copy()
    window = mfac.SparseSlidingInverseFisher(20, 3, density=1.0, damping=0.1)
    for _ in range(3):
        window.append(g)
    window.error[:] = np.nan
    window.gradients[:] = np.nan
    assert (g == before).all()
    assert np.isfinite(window @ g).all()


@pytest.mark.parametrize(
    ("density", "error", "words"),
    [
        (0.0, ValueError, "density must be finite and positive"),
        (1.1, ValueError, "density must be at most 1, .* got 1.1"),
        (np.nan, ValueError, "density must be finite"),
        ("a", TypeError, "density must be a positive number"),
    ],
)
def test_density(density, error, words):
    with pytest.raises(error, match=words):
        mfac.SparseSlidingInverseFisher(10, 3, density=density, damping=0.1)


def test_a_traced_vector_is_refused():
    window = mfac.SparseSlidingInverseFisher(4, 2, density=0.5, damping=0.1)
    window.append(jax.numpy.ones(4))
    with pytest.raises(TypeError, match="traced by JAX"):
        jax.jit(lambda x: window @ x)(jax.numpy.ones(4))


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1 / 50), ("float16", 1 / 66)])
def test_memory(rng, dtype, share):
    """Bytes really held at density 1 %, against m·d·4; the dual comes on top in both windows."""
    d, m = 1_000_000, 256
    rows = rng.standard_normal((3, d), dtype=np.float32)
    tracemalloc.start()
    window = mfac.SparseSlidingInverseFisher(
        d, m, density=0.01, damping=0.1, xp=np, dtype=np.dtype(dtype)
    )
    for row in rows:
        window.append_matvec(row)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= share * (4 * m * d)
    assert peak - held <= 32 * d  # a few vectors while a gradient is compressed


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_the_rows_by_columns(rng, short_blocks, backend):
    """Whatever way columns are asked for, they are those of the window's rows."""
    window = mfac.SparseSlidingInverseFisher(45, 4, density=0.4, damping=0.1)
    for row in rng.standard_normal((3, 45)):
        window.append(backend.asarray(row))
    held, rows = numpy64(window.gradients), window._rows
    assert (numpy64(rows.read(slice(5, 24))) == held[:, 5:24]).all()
    assert (numpy64(rows.read(slice(40, 45))) == held[:, 40:]).all()
    assert (numpy64(rows.take(np.array([44, 0, 13, 13]))) == held[:, [44, 0, 13, 13]]).all()
    stretch = rows.stretch(6, 30)
    assert (numpy64(stretch.array) == held[:, 6:30]).all()
    assert stretch.dtype == rows.dtype
    assert relative_error(rows.gram(float64=True), held @ held.T) <= 1e-14


def test_columns_spread_over_ranks(rng):
    """Each rank compresses its own; the dual is that of all."""
    g = rng.standard_normal((7, 30))
    ranks = Ranks(2)

    def body(rank):
        mine = g[:, :12] if rank == 0 else g[:, 12:]
        window = mfac.SparseSlidingInverseFisher(
            mine.shape[1], 4, density=0.3, damping=0.1, reduce=ranks.reduce
        )
        y = [window.append_matvec(row) for row in mine][-1]
        bad = np.full(mine.shape[1], np.nan if rank else 1.0)
        before = window.error
        with pytest.raises(ValueError, match="g must be finite"):
            window.append(bad)
        assert (window.error == before).all()
        return window.gradients, y

    (left, y_left), (right, y_right) = ranks.run(body)
    held = np.concatenate([left, right], axis=1)
    expected = dense_inverse(held, damping=0.1) @ held[-1]
    bound = error_bound(held, damping=0.1)
    assert relative_error(np.concatenate([y_left, y_right]), expected) <= bound
