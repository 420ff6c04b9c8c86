"""The Gram with a certificate: against correctly rounded sums, and its products against int64.

A product of two float32 numbers is exact in float64, and ``math.fsum`` adds without error.
"""

import ctypes
import inspect
import math
import types

import ml_dtypes
import numpy as np
import pytest
from cuda_on_cpu import host_array, host_view
from host_machine import HostMachine
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core._arrays import home_of
from mfac_core._ops import _int8_gram, rows
from mfac_core._ops.cuda import machine as cuda_machine


def oracle(g):
    """GGᵀ, correctly rounded."""
    wide = g.astype("float64")
    return np.array([[math.fsum(a * b) for b in wide] for a in wide])


def within(g, gram, e):
    """Whether a Gram is as near as its certificate says, whose own sum is rounded too."""
    exact = oracle(g)
    return (abs(gram - exact) <= np.outer(e, e) + 2.0**-53 * abs(exact)).all()


def adversarial(rng, m, d):
    """One peak a block, and beside it numbers whose lower slices are large and of one sign."""
    digits = rng.integers(60, 64, (m, 4))
    digits[:, 3] = 56  # as far as float32 goes
    g = np.repeat(digits @ 2.0 ** -np.array([12.0, 19.0, 26.0, 33.0])[:, None], d, axis=1)
    g[:, ::512] = 1.0
    return g


KINDS = {
    "gaussian": lambda rng, m, d: rng.standard_normal((m, d)),
    "heavy tails": lambda rng, m, d: rng.standard_normal((m, d)) ** 9,
    "spikes": lambda rng, m, d: np.where(rng.random((m, d)) < 2 / d, 1e6, rng.random((m, d))),
    "adversarial": adversarial,
    "denormal": lambda rng, m, d: 1e-42 * rng.standard_normal((m, d)),
    "near overflow": lambda rng, m, d: 3e38 * rng.uniform(-1, 1, (m, d)),
    "every scale": lambda rng, m, d: (
        rng.uniform(-1, 1, (m, d)) * 2.0 ** rng.integers(-149, 127, (m, d))
    ),
    "powers of two": lambda rng, m, d: (
        rng.choice([-1.0, 1.0], (m, d)) * 2.0 ** rng.integers(-9, 1, (m, d))
    ),
    "zeros": lambda rng, m, d: rng.standard_normal((m, d)) * (rng.random((m, 1)) < 0.5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_certificate_holds(kind):
    @settings(max_examples=12)
    @given(
        m=st.integers(1, 6),
        d=st.sampled_from([1, 3, 511, 512, 513, 1025, 1700]),
        dtype=st.sampled_from(["float32", "float32", "float16", "bfloat16"]),
        seed=st.integers(0, 2**31),
    )
    def check(m, d, dtype, seed):
        rng = np.random.default_rng(seed)
        narrow = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        with np.errstate(over="ignore"):
            g = KINDS[kind](rng, m, d).astype(narrow)
        g[~np.isfinite(g)] = 1.0
        gram, e = _int8_gram.gram(g, home_of(g))
        assert gram.dtype == e.dtype == np.float64
        assert (gram == gram.T).all()
        assert within(g, gram, e)

    check()


def test_it_has_the_digits_that_it_claims(rng):
    """Far more than float32 products on any rows, and a certificate that says as much."""
    for kind, error, claim in (("gaussian", 1e-10, 1e-8), ("heavy tails", 1e-8, 1e-6)):
        g = KINDS[kind](rng, 8, 5000).astype("float32")
        gram, e = _int8_gram.gram(g, home_of(g))
        norms = np.linalg.norm(g.astype("float64"), axis=1)
        assert (abs(gram - oracle(g)) <= error * np.outer(norms, norms)).all()
        assert (e <= claim**0.5 * norms).all()


def test_the_certificate_is_not_generous(rng):
    """Some rows come near it: it could not be a third of what it is."""
    g = adversarial(rng, 6, 512).astype("float32")
    gram, e = _int8_gram.gram(g, home_of(g))
    assert (abs(gram - oracle(g)) / np.outer(e, e)).max() > 0.3


def test_the_certificate_is_the_one_that_is_proved(rng):
    """Its last digits, too, in which the sum's rounding shows: √(Σ nσ² (7·2⁻³⁵ + b·2⁻⁵²))."""
    g = rng.standard_normal((4, 1100)).astype("float32")
    g[0, :512] = 0.0
    _, e = _int8_gram.gram(g, home_of(g))
    squares = np.zeros(4)
    for block in (g[:, :512], g[:, 512:1024], g[:, 1024:]):
        peak = abs(block).max(axis=1).astype("float64")
        nonzero = peak > 0
        sigma = 2.0 ** (np.floor(np.log2(peak[nonzero])) + 1)
        squares[nonzero] += block.shape[1] * sigma**2
    np.testing.assert_allclose(e**2, squares * (7 * 2.0**-35 + 3 * 2.0**-52), rtol=1e-14)


def test_a_row_of_zeros_is_exact_and_one_that_is_not_finite_spoils_itself_alone(rng):
    g = rng.standard_normal((7, 1100)).astype("float32")
    g[2] = 0.0
    g[4, 600], g[5, 3] = np.nan, -np.inf
    gram, e = _int8_gram.gram(g, home_of(g))
    spoilt = np.isin(np.arange(7), [4, 5])
    assert (np.isnan(gram) == (spoilt[:, None] | spoilt)).all()
    assert (np.isnan(e) == spoilt).all()
    assert (gram[2, ~spoilt] == 0.0).all()
    assert e[2] == 0.0
    slices, scale = _int8_gram.cut(g[:, :512].astype("float64"), np, "int8")
    assert not slices[:, 5].any()  # what is not finite is no integer, either
    assert (np.isnan(scale) == (np.arange(7) == 5)).all()
    assert within(g[~spoilt], gram[~spoilt][:, ~spoilt], e[~spoilt])


@pytest.mark.parametrize("kind", KINDS)
def test_slices_are_small_and_leave_little(rng, kind):
    block = KINDS[kind](rng, 5, 300).astype("float32").astype("float64")
    slices, scale = _int8_gram.cut(block, np, "int8")
    assert slices.shape == (5, 8, 512)
    assert not slices[:, 5:].any()
    assert not slices[:, :, 300:].any()
    assert abs(slices.astype(int)).max() <= 64
    weights = 2.0 ** (1 - 7 * np.arange(1, 6))
    kept = np.tensordot(weights, slices[:, :5, :300].astype("float64"), 1) * scale[:, None]
    assert (abs(block - kept) <= 2.0**-35 * scale[:, None]).all()
    peak = abs(block).max(axis=1)
    assert ((peak < scale) & (scale <= 2 * peak) | (peak == 0) & (scale == 0)).all()


def test_products_are_exact_and_nine(rng):
    """Where every number is as large as a slice holds, in float32 as in int32."""
    slices = rng.choice([-64, 64], (5, 8, 512)).astype("float32")
    slices[:, :2] = 64.0
    calls = []

    def counted(a, b):
        calls.append(1)
        return _int8_gram.exact_float32(a, b)

    expected = sum(
        (slices[s].astype(int) @ slices[t].astype(int).T) << 7 * (4 - s - t)
        for s in range(5)
        for t in range(5 - s)
    )
    assert (_int8_gram.whole(slices, counted) == expected).all()
    assert len(calls) == 9


class Cublas:
    """cuBLAS's product of int8 over host memory, as its manual describes it."""

    CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_COMPUTE_32I, CUBLAS_GEMM_DEFAULT = 0, 1, 72, -1

    def __init__(self):
        self.arrays = {}

    def lend(self, x):
        """Return a CuPy array over a copy, which products may then read or write."""
        lent = host_array(x.copy())
        self.arrays[lent.data.ptr] = lent
        return lent

    def matrix(self, pointer, dtype, rows, columns, leading):
        """View what a pointer and a leading dimension mean, column by column."""
        flat = host_view(self.arrays[pointer]).reshape(-1)
        assert flat.dtype == dtype
        assert rows <= leading
        assert leading * columns <= flat.size
        return flat[: leading * columns].reshape(columns, leading)[:, :rows].T

    def gemmEx(
        self, handle, op_a, op_b, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type,
        ldc, compute, algorithm,
    ):  # fmt: skip
        assert (handle, a_type, b_type, c_type, compute, algorithm) == (7, 3, 3, 10, 72, -1)
        assert (op_a, op_b) == (self.CUBLAS_OP_T, self.CUBLAS_OP_N)
        assert m % 4 == k % 4 == lda % 4 == ldb % 4 == 0
        factor, keep = (ctypes.c_int32.from_address(p).value for p in (alpha, beta))
        first = self.matrix(a, "int8", k, m, lda).astype("int32")
        second = self.matrix(b, "int8", k, n, ldb).astype("int32")
        target = self.matrix(c, "int32", m, n, ldc)
        target[...] = factor * (first.T @ second) + keep * target


def on_host(monkeypatch, module=_int8_gram):
    """Return a product by ``int8_product`` over host memory."""
    import cupy

    cublas = Cublas()
    monkeypatch.setattr(cupy.cuda.device, "get_cublas_handle", lambda: 7)
    modules = {"cupy": cupy, "cupy_backends.cuda.libs.cublas": cublas}
    fake = types.SimpleNamespace(import_module=modules.__getitem__)
    monkeypatch.setattr(module, "importlib", fake)

    def multiply(a, b):
        out = cublas.lend(np.full((len(a), len(b)), -1, "int32"))
        return host_view(module.int8_product(cublas.lend(a), cublas.lend(b), out))

    return multiply


def test_the_cards_products_are_those_of_int64(monkeypatch, rng):
    multiply = on_host(monkeypatch)
    a, b = (rng.integers(-64, 65, (m, 512)).astype("int8") for m in (12, 8))
    assert (multiply(a, b) == a.astype(int) @ b.astype(int).T).all()


@pytest.mark.parametrize("m", [1, 5, 8])
def test_the_cards_gram_is_the_references_bit_for_bit(monkeypatch, rng, m):
    g = KINDS["heavy tails"](rng, m, 700).astype("float32")
    gram, e = _int8_gram.summed(g, np, on_host(monkeypatch), "int8")
    expected, bound = _int8_gram.gram(g, home_of(g))
    assert (gram == expected).all()
    assert (e == bound).all()


def on_a_card(monkeypatch, module, g):
    """Return what the branch for CuPy gives, with NumPy in its place."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "is_cupy_array", lambda x: True)
        patch.setattr(module, "importlib", types.SimpleNamespace(import_module=lambda name: np))
        patch.setattr(cuda_machine, "current", HostMachine("fast"))

        def int8_product(a, b, out):
            assert a.dtype == b.dtype == np.int8
            assert out.dtype == np.int32
            np.matmul(a.astype("int32"), b.T.astype("int32"), out=out)
            return out

        patch.setattr(module, "int8_product", int8_product)
        return module.gram(g, home_of(g))


def test_the_branch_for_cupy_gives_the_same(monkeypatch, rng):
    g = KINDS["heavy tails"](rng, 5, 700).astype("float32")
    gram, e = on_a_card(monkeypatch, _int8_gram, g)
    expected, bound = _int8_gram.gram(g, home_of(g))
    assert (gram == expected).all()
    assert (e == bound).all()


def test_it_is_off_and_takes_what_it_serves_where_it_is_on(monkeypatch, rng):
    g = rng.standard_normal((3, 20)).astype("float32")
    arrays = {"narrow": host_array(g), "wide": host_array(g.astype("float64")), "host": g}
    assert not any(map(_int8_gram.serves, arrays.values()))
    monkeypatch.setattr(_int8_gram, "ON_CARDS", True)
    assert [name for name, x in arrays.items() if _int8_gram.serves(x)] == ["narrow"]
    monkeypatch.setattr(_int8_gram, "gram", lambda x, home: ("certified", None))
    monkeypatch.setattr(rows._generic, "gram", lambda x, **given: "generic")
    assert rows.gram(arrays["narrow"], float64=False, home=None) == "certified"
    assert rows.gram(arrays["narrow"], float64=True, home=None) == "generic"
    assert rows.gram(arrays["wide"], float64=False, home=None) == "generic"


MUTANTS = [
    ("SLICES = 5", "SLICES = 4"),
    ("(SLICES + 2)", "0.1"),
    ("ROWS = 4", "ROWS = 1"),
    ("abs(block).max", "block.max"),
    ("xp.rint(rest)", "xp.floor(rest)"),
    ("xp.rint(rest)", "xp.trunc(rest)"),
    ("BITS - 1 - exponent", "BITS - exponent"),
    ("slices[s, :m, :n]", "slices[s, :m, -n:]"),
    ("(rest - nearest)", "(rest + nearest)"),
    ("xp.where(peak == 0.0, 0.0, xp.ldexp(one, exponent))", "xp.ldexp(one, exponent)"),
    ("return slices, xp.where(finite, scale, xp.nan)", "return slices, scale"),
    ("xp.where(finite[:, None], block, 0.0) *", "block *"),
    ("range((order + 1) // 2)", "range(order // 2)"),
    ("range((order + 1) // 2)", "range(order + 1)"),
    (" if order % 2 == 0 else []", ""),
    ("slices[order - s]", "slices[SLICES - 1 - s]"),
    ("*(pair.T for pair in pairs), ", "*pairs, "),
    ("total * 2.0**BITS +", "total * 2.0 ** (BITS - 1) +"),
    ("* scale[:, None] * scale\n", "* scale[:, None] * scale[:, None]\n"),
    ("(columns.stop - columns.start) * scale**2", "scale**2"),
    ("squares += ", "squares = "),
    ("(SLICES + 1))  #", "SLICES)  #"),
    ("CUBLAS_OP_T, cublas.CUBLAS_OP_N", "CUBLAS_OP_N, cublas.CUBLAS_OP_T"),
    ("b.data.ptr, CUDA_R_8I, b.shape[1],", "a.data.ptr, CUDA_R_8I, b.shape[1],"),
    ("len(b), len(a), a.shape[1],", "len(a), len(b), a.shape[1],"),
    ("out.data.ptr, CUDA_R_32I, len(b)", "out.data.ptr, CUDA_R_32I, len(a)"),
    ("zero.ctypes.data, out", "one.ctypes.data, out"),
    ("CUDA_R_8I, CUDA_R_32I = 3, 10", "CUDA_R_8I, CUDA_R_32I = 8, 10"),
    ("(SLICES + 2)", "(SLICES + 1)"),
    ("blocks += 1", "blocks = 1"),
    ("blocks * 2.0**-52", "2.0**-52"),
    ("int8_product(a, b, xp.", "int8_product(a, a, xp."),
    ('xp.empty((len(a), len(b)), "int32")', "xp.empty((len(a), len(b)))"),
]


def claims(monkeypatch, module):
    """Ask of a mutated module what the tests above ask of the real one, on one case each."""
    rng = np.random.default_rng(3)
    multiply = on_host(monkeypatch, module)
    g = KINDS["heavy tails"](rng, 5, 700).astype("float32")
    gram, e = on_a_card(monkeypatch, module, g)
    assert within(g, gram, e)
    assert (gram == gram.T).all()
    for name in ("gram", "summed", "cut", "whole", "int8_product", "exact_float32"):
        monkeypatch.setattr(_int8_gram, name, getattr(module, name))
    test_a_row_of_zeros_is_exact_and_one_that_is_not_finite_spoils_itself_alone(rng)
    test_the_certificate_is_the_one_that_is_proved(rng)
    test_it_has_the_digits_that_it_claims(rng)
    for kind in ("adversarial", "spikes", "every scale"):
        g = KINDS[kind](rng, 6, 512).astype("float32")
        gram, e = module.gram(g, home_of(g))
        assert (gram == gram.T).all()
        assert within(g, gram, e)
        test_slices_are_small_and_leave_little(rng, kind)
    test_products_are_exact_and_nine(rng)
    a, b = (rng.integers(-64, 65, (m, 512)).astype("int8") for m in (12, 8))
    assert (multiply(a, b) == a.astype(int) @ b.astype(int).T).all()


@pytest.mark.parametrize(("old", "new"), [("SLICES = 5", "SLICES = 5"), *MUTANTS])
def test_a_mutant_is_noticed(monkeypatch, old, new):
    code = inspect.getsource(_int8_gram)
    assert code.count(old) == 1
    module = types.ModuleType("mutant")
    exec(compile(code.replace(old, new), "mutant", "exec"), module.__dict__)
    if old == new:
        claims(monkeypatch, module)
        return
    with pytest.raises((AssertionError, ValueError, RuntimeWarning)):
        claims(monkeypatch, module)
