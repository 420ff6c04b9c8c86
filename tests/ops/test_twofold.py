"""Sums in two float32, for devices that have little float64: their digits and their range.

The property tests in ``test_kernels.py`` draw them as they draw sums in float64; here is what those
do not reach: many terms, numbers at the ends of float32's range and beyond, and the order of sums.
"""

import numpy as np
import pytest
import torch
from cuda_on_cpu import KernelError, host_array, host_view
from host_machine import DeviceHome, HostMachine

from mfac_core._ops import rows
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes

EPS = 2.0**-45


@pytest.fixture(params=["fast", "check"])
def machine(request, monkeypatch):
    machine = HostMachine(request.param)
    machine.little_float64 = True
    monkeypatch.setattr(cuda_machine, "current", machine)
    return machine


def project(machine, g, x):
    machine.launches.clear()
    y = rows.project(host_array(g), host_array(x), float64=False, home=DeviceHome())
    assert machine.launches["project twofold"] == 1
    return host_view(y)


def combine(machine, g, c):
    machine.launches.clear()
    y = rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=False)
    assert machine.launches["combine twofold"] == 1
    return host_view(y)


def assert_within(result, g, x):
    g, x = g.astype("float64"), x.astype("float64")
    terms = abs(g) @ abs(x)
    assert (abs(result - g @ x) <= (g.shape[1] + 8) * EPS * terms).all()


def test_more_digits_than_float32_has(machine, rng):
    """On 40,000 terms that cancel: float32 would leave none."""
    g = rng.standard_normal((5, 40_000)).astype("float32")
    x = g[0] * np.where(np.arange(40_000) % 2, 1, -1).astype("float32")
    product = project(machine, g, x)
    exact = g.astype("float64") @ x.astype("float64")
    scale = abs(g.astype("float64")) @ abs(x.astype("float64"))
    assert (abs(product - exact) <= 2.0**-44 * scale).all()
    assert abs(g @ x - exact).max() > 2.0**-34 * scale.max()
    tall, c = np.ascontiguousarray(g[:, :1200].T), rng.standard_normal(1200)
    y = combine(machine, tall, c)
    assert (abs(y - tall.T.astype("float64") @ c) <= 2.0**-44 * (abs(tall.T) @ abs(c))).all()


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-19, 1e-12, 1e12, 1e19, 3e37])
def test_out_of_range_is_summed_in_float64(machine, rng, scale, columns):
    """Both of a product at the same end of the range, at opposite ones, and in some rows alone."""
    shape = (300, columns) if columns else 300
    g = rng.uniform(-1, 1, (9, 300))
    g[::2] *= scale
    g = g.astype("float32")
    for other in (scale, 1.0, 1 / scale if scale > 1e-38 else 1e37):
        x = (other * rng.uniform(-1, 1, shape)).astype("float32")
        with np.errstate(over="ignore"):
            assert_within(project(machine, g, x), g, x)
    c = rng.standard_normal((9, columns) if columns else 9)
    for other in (scale, scale**2, scale**-3, 1.0):
        mixed = c.copy()
        mixed[1::3] *= other
        y = combine(machine, g, mixed)
        assert_within(y, np.ascontiguousarray(g.T), mixed)


def test_a_large_and_a_small_product_in_one_sum(machine):
    """What is lost of a tiny weight may be large beside the rest, where its gradient is huge."""
    g = np.array([[1e30, 1.0], [1e-5, 2e-5]], "float32")
    y = combine(machine, g, np.array([1e-42, 1e-9]))
    assert_within(y, np.ascontiguousarray(g.T), np.array([1e-42, 1e-9]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(machine, rng, value):
    g = rng.standard_normal((9, 50)).astype("float32")
    g[3, 7] = value
    product = project(machine, g, np.ones(50, "float32"))
    assert (np.isfinite(product) == (np.arange(9) != 3)).all()
    y = combine(machine, g, np.ones(9))
    assert (np.isfinite(y) == (np.arange(50) != 7)).all()


def test_the_same_bits_in_every_order(machine, rng):
    g = rng.standard_normal((11, 20_000)).astype("float32")
    g[4] *= 1e30
    c = rng.standard_normal(11)
    results = []
    for machine.order in ("forward", "backward", "random"):
        results.append((project(machine, g, g[4]), combine(machine, g, c)))
    for product, y in results[1:]:
        assert (product == results[0][0]).all()
        assert (y == results[0][1]).all()


def test_float64_where_it_is_asked_for_or_held(machine, rng):
    g = rng.standard_normal((3, 40)).astype("float32")
    c = rng.standard_normal(3)

    def names(g, x, float64):
        machine.launches.clear()
        rows.project(host_array(g), host_array(x), float64=float64, home=DeviceHome())
        rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=float64)
        return {name for name in machine.launches if name != "sum_parts"}

    wide = g.astype("float64")
    assert names(g, g[0], False) == {"project twofold", "combine twofold"}
    assert names(g, wide[0], False) == {"project", "combine twofold"}
    assert names(g, g[0], True) == names(wide, wide[0], False) == {"project", "combine"}
    machine.little_float64 = False
    assert names(g, g[0], False) == {"project", "combine"}
    machine.little_float64 = True
    machine.launches.clear()
    rows.exchange(host_array(g), 1, host_array(g[0]), DeviceHome())
    rows.square_norms(torch.from_numpy(g[0]))
    assert set(machine.launches) == {"project", "sum_parts"}


MUTANTS = [
    ("common.cuh", "take(p, __fmaf_rn(a, b, -p));", "take(p, 0.0f);"),
    ("common.cuh", "__fmaf_rn(a, c, __fmaf_rn(a, b, -p))", "__fmaf_rn(a, b, -p)"),
    ("common.cuh", "__fmaf_rn(a, c, __fmaf_rn(a, b, -p))", "a * c"),
    ("common.cuh", "(high - (t - z)) + (p - z)", "p - z"),
    ("common.cuh", "(high - (t - z)) + (p - z)", "high - (t - z)"),
    ("common.cuh", "low + (e + q)", "low + e"),
    ("common.cuh", "low + (e + q)", "e + q"),
    ("common.cuh", "low = rest - (high - t);", "low = rest;"),
    ("common.cuh", "low = rest - (high - t);", "low = 0.0f;"),
    ("common.cuh", "(double)high + (double)low", "(double)high"),
    ("common.cuh", "(double)high + (double)low", "(double)(high + low)"),
    ("common.cuh", "fabs(v) >= (T)0x1p-78", "fabs(v) >= (T)0x1p-126"),
    ("common.cuh", "return fabs(v) >=", "return v == 0 || fabs(v) >="),
    ("common.cuh", "return fabs(v) >=", "return !(v == v) || fabs(v) >="),
    ("common.cuh", "return ::in_range(high);", "return true;"),
    ("project.cu", "in_range = in_range && twofold", "in_range = twofold"),
    ("project.cu", "if (!in_range) {", "if (false) {"),
    ("project.cu", "sums[r][c] = again[r][c].sum;", "sums[r][c] += again[r][c].sum;"),
    ("combine.cu", "in_range(c) ? (float)c : nanf(\"\")", "(float)c"),
    ("combine.cu", "(float)(c - high)", "0.0f"),
    ("combine.cu", "in_range = in_range && parts", "in_range = parts"),
    ("combine.cu", "if (!in_range) {", "if (false) {"),
    ("combine.cu", "sums[j] = 0.0;", ";"),
    ("combine.cu", "(int i = first; i < last; ++i)", "(int i = first; i + 1 < last; ++i)"),
    ("combine.cu", "(int i = first; i < last; ++i)", "(int i = 0; i < m; ++i)"),
    ("combine.cu", "COLUMNS + j % COLUMNS]", "COLUMNS + j / WIDTH]"),
    ("combine.cu", "g[j / COLUMNS] *", "g[j % WIDTH] *"),
]  # fmt: skip


def exercise(machine, rng, file):
    """Ask for digits; then for numbers beyond the range in some rows or weights, and their sums."""
    clean = rng.standard_normal((12, 3000)).astype("float32")
    scaled = clean * np.array([1, 1e-25, 1e25, 1] * 3, "float32")[:, None]
    signs = np.where(np.arange(3000) % 2, 1, -1).astype("float32")
    for g in (clean, scaled):
        if file != "combine.cu":
            x = np.stack([g[0] * signs, g[1], 1e19 * g[4]], axis=1)
            exact = g.astype("float64") @ x.astype("float64")
            terms = abs(g).astype("float64") @ abs(x).astype("float64")
            assert (abs(project(machine, g, x) - exact) <= 2.0**-43 * terms).all()
            spoilt = g.copy()
            spoilt[3, 5] = np.nan
            product = project(machine, spoilt, x)
            assert (np.isnan(product) == (np.arange(12) == 3)[:, None]).all()
        if file != "project.cu":
            tall = np.ascontiguousarray(g[:, :1200].T)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cuda_passes, "COMBINE_THREADS", 64)  # in slices
                for beyond in (1.0, 1e-42, 1e30):
                    c = rng.standard_normal((1200, 3))
                    c[900:, 2] *= beyond
                    terms = abs(tall.T).astype("float64") @ abs(c)
                    error = abs(combine(machine, tall, c) - tall.T.astype("float64") @ c)
                    assert (error <= 2.0**-43 * terms).all()
    for small in (2.0**-55, 2.0**-70) if file != "combine.cu" else ():
        # The errors of products vanish, and the products themselves.
        g = (small * clean).astype("float32")
        exact = g.astype("float64") @ g[:3].T.astype("float64")
        terms = abs(g).astype("float64") @ abs(g[:3].T).astype("float64")
        error = abs(project(machine, g, np.ascontiguousarray(g[:3].T)) - exact)
        assert (error <= 2.0**-43 * terms).all()
    if file != "project.cu":
        huge, c = np.array([[1e30] * 12, [1e-5] * 12], "float32"), np.array([[1e-42], [1e-9]])
        exact = huge.T.astype("float64") @ np.tile(c, 3)
        error = abs(combine(machine, huge, np.tile(c, 3)) - exact)
        assert (error <= 2.0**-43 * exact).all()


@pytest.mark.parametrize(("file", "old", "new"), [("common.cuh", "take", "take"), *MUTANTS])
def test_a_mutant_is_noticed(monkeypatch, rng, file, old, new):
    machine = HostMachine("fast")
    machine.little_float64 = True
    monkeypatch.setattr(cuda_machine, "current", machine)
    original = cuda_machine.source
    for name in ("project.cu", "combine.cu"):
        assert file != name or original(name).count(old) == 1
    monkeypatch.setattr(cuda_machine, "source", lambda name: original(name).replace(old, new))
    if old == new:
        exercise(machine, rng, file)
        return
    with pytest.raises((AssertionError, KernelError)):
        exercise(machine, rng, file)
