"""Hostile numbers and arrays: a right answer or a clear error, never a silent wrong one."""

import warnings

import array_api_strict
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import BACKENDS, relative_error
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mfac_core as mfac

# Decimal exponents of the gradients' scale, and of damping: subnormals and overflow included.
EXPONENTS = {
    "float16": st.integers(-8, 4),
    "float32": st.integers(-45, 38),
    "float64": st.integers(-323, 308),
}

QUERIES = {
    "static": lambda g, x, damping: mfac.InverseFisher(g, damping=damping) @ x,
    "blocks": lambda g, x, damping: mfac.BlockInverseFisher(g, damping=damping, block_size=2) @ x,
    "window": lambda g, x, damping: _window(g, damping) @ x,
    "newest": lambda g, x, damping: _newest(g, damping),
    "diagonal": lambda g, x, damping: mfac.InverseFisher(g, damping=damping).diagonal(),
    "quadratic": lambda g, x, damping: mfac.InverseFisher(g, damping=damping).quadratic(x),
    "refined": lambda g, x, damping: mfac.InverseFisher(g, damping=damping).matvec(x, refine=2),
    "forward": lambda g, x, damping: mfac.EmpiricalFisher(g, damping=damping) @ x,
    "column": lambda g, x, damping: mfac.InverseFisher(g, damping=damping).column(0),
    "entries": lambda g, x, damping: _first_column(g, damping),
    "whitened": lambda g, x, damping: _first_column(g, damping, store_whitened=True),
    "submatrix": lambda g, x, damping: _submatrix(g, damping)[:, 0],
}
OF_FIRST_COLUMN = ("column", "entries", "whitened", "submatrix")


def _first_column(g, damping, **options):
    return mfac.InverseFisher(g, damping=damping, **options).entries(range(int(g.shape[1])), 0)


def _submatrix(g, damping):
    return mfac.InverseFisher(g, damping=damping).submatrix(range(int(g.shape[1])))


def _window(g, damping):
    window = mfac.SlidingInverseFisher(int(g.shape[1]), int(g.shape[0]), damping=damping)
    for i in range(int(g.shape[0])):
        window.append(g[i, :])
    return window


def _newest(g, damping):
    window = mfac.SlidingInverseFisher(int(g.shape[1]), int(g.shape[0]), damping=damping)
    for i in range(int(g.shape[0])):
        y = window.append_matvec(g[i, :])
    return y


def _oracle(query, g, x, damping):
    """The same from the dense matrix, in numbers of 1,000 digits."""
    if query == "blocks":
        cuts = [slice(start, start + 2) for start in range(0, g.shape[1], 2)]
        return np.concatenate([_oracle("static", g[:, cut], x[cut], damping) for cut in cuts])
    with mpmath.workdps(1000):
        rows = mpmath.matrix(g.tolist())
        fisher = damping * mpmath.eye(rows.cols) + rows.T * rows / rows.rows
        if query in OF_FIRST_COLUMN:
            x = np.eye(len(x))[0]
        x = mpmath.matrix((g[-1] if query == "newest" else x).tolist())
        if query == "forward":
            y = fisher * x
        elif query == "diagonal":
            inverse = fisher**-1
            y = [inverse[i, i] for i in range(rows.cols)]
        else:
            y = mpmath.lu_solve(fisher, x)
        if query == "quadratic":
            y = [(x.T * y)[0]]
        # Extended precision holds the range of them all.
        return np.array([np.longdouble(mpmath.nstr(number, 20)) for number in y])


@st.composite
def magnitudes(draw):
    """A dtype, and decimal exponents of the gradients and of damping, any or near one another."""
    dtype = draw(st.sampled_from(sorted(EXPONENTS)))
    exponent = draw(EXPONENTS[dtype])
    near = min(max(2 * exponent - 2, -323), 308)
    return dtype, exponent, draw(st.one_of(st.integers(-323, 308), st.just(near)))


@pytest.mark.skipif(
    np.finfo(np.longdouble).maxexp < 16384, reason="the oracle needs extended precision"
)
@pytest.mark.parametrize("library", [np, torch], ids=["numpy", "torch"])
@pytest.mark.parametrize("query", QUERIES)
@settings(max_examples=150)
@example(magnitudes=("float32", 17, 17), shape=(3, 1), seed=0)
@example(magnitudes=("float64", 135, 0), shape=(3, 2), seed=0)
@example(magnitudes=("float16", 0, -16), shape=(6, 5), seed=0)
@example(magnitudes=("float16", 0, -15), shape=(5, 5), seed=6)
@given(
    magnitudes=magnitudes(),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_numbers_of_any_size(query, library, magnitudes, shape, seed):
    """Right digits, or an error or a warning that names the cause, or infinity by right."""
    dtype, exponent, damping_exponent = magnitudes
    rng = np.random.default_rng(seed)
    damping = 10.0**damping_exponent
    limits = np.finfo(dtype)
    with np.errstate(over="ignore", under="ignore"):
        g = np.clip(rng.standard_normal(shape) * 10.0**exponent, limits.min, limits.max)
        g = g.astype(dtype)
    x = rng.standard_normal(shape[1]).astype(dtype)

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            y = np.asarray(QUERIES[query](library.asarray(g), library.asarray(x), damping))
        except ValueError as error:
            if any(words in str(error) for words in ("damping must", "too large", "overflow")):
                return
            raise
    assert y.dtype == dtype or query == "quadratic"
    kinds = [w.category for w in said]
    assert set(kinds) <= {scipy.linalg.LinAlgWarning, RuntimeWarning}
    expected = _oracle(query, g.astype(np.float64), x.astype(np.float64), damping)
    if np.max(np.abs(expected)) > 0.1 * float(np.finfo(y.dtype).max):
        return  # infinite by right, and NumPy says so
    if scipy.linalg.LinAlgWarning not in kinds:
        assert np.isfinite(y).all()
        tiny = float(np.finfo(y.dtype).smallest_normal) * 1e3
        error = np.max(np.abs(y - expected))
        assert error <= 5e-2 * np.max(np.abs(expected)) + tiny


def test_a_window_outlives_the_inference_mode_it_was_filled_in(rng):
    g = torch.from_numpy(rng.standard_normal((12, 9)))
    window = mfac.SlidingInverseFisher(9, 5, damping=0.1)
    with torch.inference_mode():
        for row in g[:4].clone():
            window.append_matvec(row)
        saved = window.state_dict()
    for row in g[4:]:
        y = window.append_matvec(row)
    last = g[-5:].numpy()
    fisher = 0.1 * np.eye(9) + last.T @ last / 5
    assert relative_error(y, np.linalg.solve(fisher, last[-1])) <= 1e-12
    with torch.inference_mode():
        window.load_state_dict(saved)
    window.append(g[4])
    assert relative_error(window.gradients, g[:5].numpy()) == 0.0


PLAIN = np.arange(12, dtype="float64").reshape(3, 4) / 7.0 + np.eye(3, 4)

LAYOUTS = {
    "reversed rows": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "reversed columns": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "every other": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "Fortran": np.asfortranarray,
    "read-only": lambda a: np.frombuffer(a.tobytes()).reshape(a.shape),
    "big-endian": lambda a: a.astype(">f8"),
    "misaligned": lambda a: (
        np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view("f8").reshape(a.shape)
    ),
    "matrix": lambda a: a.view(np.matrix),
    "zero strides": lambda a: np.broadcast_to(a[:1], a.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_memory_layout(layout):
    g = LAYOUTS[layout](PLAIN)
    plain, x = np.array(g, dtype="float64", subok=False), np.ones(4)
    before = plain.copy()
    for make in (_window, lambda g, damping: mfac.InverseFisher(g, damping=damping)):
        rows = np.asarray(g) if layout == "matrix" and make is _window else g
        assert relative_error(make(rows, 0.1) @ x, make(plain, 0.1) @ x) <= 1e-13
    assert np.array_equal(plain, before)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_scalars_and_empty_arrays_are_refused(backend):
    inverse = mfac.InverseFisher(backend.asarray(PLAIN), damping=0.1)
    for bad in (backend.asarray(np.array(1.0)), backend.asarray(np.zeros((0,)))):
        with pytest.raises(ValueError, match="x must have shape"):
            inverse @ bad
    with pytest.raises(ValueError, match=r"shape \(m, d\)"):
        mfac.InverseFisher(backend.asarray(np.array(1.0)), damping=0.1)
    assert inverse.matmat(backend.asarray(np.zeros((4, 0)))).shape == (4, 0)


def test_a_graph_is_neither_needed_nor_grown():
    g = torch.from_numpy(PLAIN).requires_grad_()
    window = mfac.SlidingInverseFisher(4, 3, damping=0.1)
    for row in g:
        assert not window.append_matvec(row * 2.0).requires_grad
    assert not window.gradients.requires_grad
    assert not (window @ g[0].detach()).requires_grad
    assert g.grad is None


def test_arrays_without_values_are_refused():
    with pytest.raises(TypeError, match=r"gradients must be a dense tensor .* on device meta"):
        mfac.InverseFisher(torch.ones((3, 4), device="meta"), damping=0.1)


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda g: g.to(torch.complex64)])
def test_tensors_of_other_kinds_are_refused(make):
    with pytest.raises(TypeError, match="gradients must be"):
        mfac.InverseFisher(make(torch.ones((3, 4))), damping=0.1)


def test_a_window_does_not_take_tracers():
    window = mfac.SlidingInverseFisher(4, 3, damping=0.1)
    with pytest.raises(TypeError, match=r"g must hold values, .* tracer"):
        jax.jit(window.append_matvec)(jnp.ones(4))
    assert len(window) == 0


def test_strict_arrays_of_integers_are_refused():
    with pytest.raises(TypeError, match="gradients must be real floating"):
        mfac.InverseFisher(array_api_strict.ones((3, 4), dtype=array_api_strict.int64), damping=1.0)


def test_huge_m():
    rng = np.random.default_rng(0)
    g = rng.standard_normal((3000, 5))
    dense = np.linalg.inv(0.1 * np.eye(5) + g.T @ g / 3000)
    assert relative_error(mfac.InverseFisher(g, damping=0.1).to_dense(), dense) <= 1e-10
