"""Passes over gradients in memory, in a wider dtype than theirs, in blocks and threads."""

import numpy as np
import pytest
import torch

from mfac_core._arrays import home_of, to_numpy
from mfac_core._ops import _widened
from mfac_core._ops import rows as ops

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_every_float16_keeps_its_value(wide):
    """Subnormal, negative zero, infinite and NaN ones too; against NumPy's own conversion."""
    narrow = ALL_BITS.view(np.float16)[None, :]
    narrow = narrow[:, ~np.isnan(narrow[0]) | (ALL_BITS & 0x200 != 0)]  # no signalling NaN
    for some in (narrow, narrow[:, np.isfinite(narrow[0])]):
        out = np.empty(some.shape, wide)
        _widened.widen(some, out)
        expected = some.astype(wide)
        np.testing.assert_array_equal(out, expected)
        finite = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(out)[finite], np.signbit(expected)[finite])


@pytest.mark.parametrize("wide", [np.float32, np.float64])
def test_every_bfloat16_keeps_its_value(wide):
    """Against PyTorch's own conversion."""
    narrow = torch.from_numpy(ALL_BITS.view(np.int16)[None, :].copy()).view(torch.bfloat16)
    narrow = narrow[:, (ALL_BITS & 0x40 != 0) | ((ALL_BITS & 0x7F80) != 0x7F80)]
    out = np.empty(tuple(narrow.shape), wide)
    _widened.widen(_widened.bits(narrow), out)
    np.testing.assert_array_equal(out, narrow.float().numpy().astype(wide))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("m", "d"), [(0, 5), (1, 1), (3, 4097), (5, 20_001), (8, 6144)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_products_with_vectors(monkeypatch, library, dtype, m, d, threads):
    """For rows and columns that no stack, block or share divides; against one float64 product."""
    if (library, dtype) == ("numpy", "bfloat16"):
        pytest.skip("NumPy has no bfloat16")
    monkeypatch.setattr(_widened, "THREADED_ELEMENTS", 0)
    monkeypatch.setattr(_widened, "blas_threads", lambda: threads)
    rng = np.random.default_rng(0)
    g = torch.from_numpy(rng.standard_normal((m, 2 * d))).to(getattr(torch, dtype))[:, ::2]
    x, c = rng.standard_normal(d).astype(np.float32), rng.standard_normal(m)
    wide = g.double().numpy()
    if library == "numpy":
        g = g.numpy()
    like = torch.from_numpy if library == "torch" else np.asarray
    home = home_of(g)
    for exact, rounding in ((True, 2.0**-53), (False, 2.0**-24)):
        if not exact and dtype == "float32":
            continue  # nothing to widen
        bound = (d + m) * rounding
        product = to_numpy(ops.project(g, like(x), float64=exact, home=home))
        assert np.all(np.abs(product - wide @ x) <= bound * (np.abs(wide) @ np.abs(x)))
        sums = ops.combine(g, like(c), like(x), 0.5, dtype=like(x).dtype, float64=exact)
        expected = c @ wide + 0.5 * x
        size = np.abs(c) @ np.abs(wide) + np.abs(x)
        assert np.all(np.abs(to_numpy(sums) - expected) <= (bound + 2.0**-24) * size)
        assert type(sums) is type(like(x))


def test_threads_are_those_of_blas():
    """A limit for BLAS holds for these passes."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        assert _widened.blas_threads() == 1
