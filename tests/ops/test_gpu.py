"""On a real CUDA device, with ``pytest -m gpu``: kernels against the host executor and NumPy."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import numpy64, relative_error
from cuda_on_cpu import host_array, host_view
from host_machine import DeviceHome, HostMachine

import mfac_core as mfac
from mfac_core._arrays import home_of
from mfac_core._ops import _int8_gram, dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core.testing import assert_operator_close, dense_inverse, error_bound

pytestmark = pytest.mark.gpu

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture
def cupy():
    cupy = pytest.importorskip("cupy", reason="these tests need CuPy")
    assert cupy.cuda.is_available(), "pytest -m gpu needs a CUDA device, and CuPy sees none"
    if os.environ.get("CUPY_TEST_NO_POOL"):
        cupy.cuda.set_allocator(None)
    return cupy


def stored(cupy, rng, shape, dtype):
    from host_machine import NUMPY_DTYPES

    values = rng.standard_normal(shape).astype(NUMPY_DTYPES[dtype])
    return values, cupy.asarray(values)


def test_smoke(cupy, rng):
    """The least that must work: a window in every dtype, on one step more than it holds."""
    for dtype in DTYPES:
        values, g = stored(cupy, rng, (5, 100), dtype)
        window = mfac.SlidingInverseFisher(100, 4, damping=0.1)
        for row in g:
            y = window.append_matvec(row)
        held = values[1:].astype("float64")
        expected = dense_inverse(held, damping=0.1) @ held[-1]
        assert relative_error(y, expected) <= error_bound(values[1:], damping=0.1)


@pytest.mark.parametrize("width", [1, 32, 33, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_on_every_device(cupy, rng, dtype, width):
    """The kernel that asks for more than 48 KiB of shared memory; on each device in turn."""
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(device):
            values, g = stored(cupy, rng, (20, 2 * width), dtype)
        lengths = np.array([width, width])
        inverses, failed = cuda_blocks.inverses(g, lengths, 0.5, 20)
        assert not failed.get().any()
        for number, inverse in enumerate(inverses.get()):
            part = values[:, number * width : (number + 1) * width].astype("float64")
            matrix = 0.5 * np.eye(width) + part.T @ part / 20
            error = np.linalg.norm(inverse - np.linalg.inv(matrix), 2)
            assert error <= 10 * width * np.linalg.cond(matrix) * 2.0**-52 / 0.5


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_rows_that_start_anywhere(cupy, rng, offset):
    storage = rng.standard_normal(3 * 64 + offset).astype("float32")
    g = cupy.asarray(storage)[offset:].reshape(3, 64)
    exact = storage[offset:].reshape(3, 64).astype("float64")
    product = rows.project(g, g[1], float64=True, home=home_of(g))
    assert relative_error(product, exact @ exact[1]) <= 1e-12


def test_another_stream(cupy, rng):
    """Work that another stream still does is waited for by nobody but that stream."""
    values, g = stored(cupy, rng, (8, 50_000), "float32")
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        doubled = g * 2
        product = rows.project(doubled, doubled[3], float64=True, home=home_of(g))
        stream.synchronize()
    exact = 2 * values.astype("float64")
    assert relative_error(product, exact @ exact[3]) <= 1e-12


@pytest.mark.parametrize("d", [1, 1000, 4096, 50_001])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_host_executor(cupy, monkeypatch, rng, dtype, d):
    """Only contraction to fused multiply-add may differ: a rounding a term."""
    g, on_device = stored(cupy, rng, (13, d), dtype)
    x, x_on_device = stored(cupy, rng, d, dtype)
    c = rng.standard_normal(13)
    home = home_of(on_device)
    product = rows.project(on_device, x_on_device, float64=False, home=home)
    combination = rows.combine(
        on_device, cupy.asarray(c), x_on_device, 0.5, dtype=None, float64=True
    )
    monkeypatch.setattr(cuda_machine, "current", HostMachine("fast"))
    expected = rows.project(host_array(g), host_array(x), float64=False, home=DeviceHome())
    expected = host_view(expected)
    terms = abs(g.astype("float64")) @ abs(x.astype("float64"))
    assert (abs(numpy64(product) - expected) <= d * 2.0**-52 * terms).all()
    expected = host_view(
        rows.combine(host_array(g), host_array(c), host_array(x), 0.5, dtype=None, float64=True)
    )
    terms = abs(g.astype("float64").T) @ abs(c) + abs(x.astype("float64"))
    assert (abs(numpy64(combination) - expected) <= 16 * 2.0**-52 * terms).all()


@pytest.mark.parametrize("m", [1, 33, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_elements_are_those_of_the_host_executor(cupy, monkeypatch, rng, dtype, m):
    g, on_device = stored(cupy, rng, (m, 1001), dtype)
    columns, right = rng.integers(0, 1001, 77), rng.standard_normal((m, 77))
    home = home_of(on_device)
    taken = rows.take(on_device, columns, home)
    assert (numpy64(taken) == g[:, columns].astype("float64")).all()
    products = rows.pair_products(on_device, columns, cupy.asarray(right), home)
    of_columns = rows.pair_products(on_device, columns, cupy.asarray(right.T.copy()).T, home)
    assert (of_columns == products).all()
    monkeypatch.setattr(cuda_machine, "current", HostMachine("fast"))
    expected = rows.pair_products(host_array(g), columns, host_array(right), DeviceHome())
    terms = abs(g[:, columns].astype("float64") * right).sum(axis=0)
    assert (abs(numpy64(products) - host_view(expected)) <= m * 2.0**-52 * terms).all()


@pytest.mark.parametrize("m", [1, 33, 1024, 1500])
def test_a_replacement_is_that_of_the_host_executor(cupy, monkeypatch, rng, m):
    g = rng.standard_normal((m, m + 20))
    gram = g @ g.T
    inverse = np.linalg.inv(gram + np.eye(m))
    inverse = (inverse + inverse.T) / 2
    row = gram[m // 2] * 1.0
    row[m // 2] += 3.0
    on_device = [cupy.asarray(x) for x in (inverse, gram, row)]
    failed = dense.replace(*on_device[:2], m // 2, on_device[2], 1.0)
    monkeypatch.setattr(cuda_machine, "current", HostMachine("fast"))
    on_host = [host_array(x.copy()) for x in (inverse, gram, row)]
    dense.replace(*on_host[:2], m // 2, on_host[2], 1.0)
    assert int(failed[0]) == 0
    updated = on_device[0].get()
    assert (updated == updated.T).all()
    expected = host_view(on_host[0])
    assert np.linalg.norm(updated - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("library", ["cupy", "torch", "jax"])
def test_operators_of_every_library_on_the_device(cupy, rng, library, dtype):
    if library == "cupy":
        g = stored(cupy, rng, (20, 3001), dtype)[1]
    elif library == "torch":
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        if not torch.cuda.is_available():
            pytest.skip("this build of PyTorch has no CUDA")
        g = torch.from_numpy(rng.standard_normal((20, 3001))).to("cuda", getattr(torch, dtype))
    else:
        jax = pytest.importorskip("jax", reason="JAX is not installed")
        if dtype == "float64" or jax.default_backend() != "gpu":
            pytest.skip("JAX has no GPU here, or no float64")
        g = jax.numpy.asarray(rng.standard_normal((20, 3001)), dtype=dtype)
    bound = error_bound(g, damping=0.1)
    inverse = mfac.InverseFisher(g, damping=0.1)
    assert_operator_close(inverse, dense_inverse(g, damping=0.1), rtol=bound)
    window = mfac.SlidingInverseFisher(3001, 8, damping=0.1)
    for i in range(20):
        y = window.append_matvec(g[i, :])
    held = numpy64(g[12:, :])
    expected = dense_inverse(held, damping=0.1) @ held[-1]
    assert relative_error(y, expected) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_that_do_not_check_give_the_same(cupy, rng, dtype):
    """Bit for bit; and a gradient that is not finite is refused by the next call."""
    values, g = stored(cupy, rng, (40, 3001), dtype)
    windows = [mfac.SlidingInverseFisher(3001, 8, damping=0.1) for _ in range(2)]
    expected = [windows[0].append_matvec(row) for row in g]
    results = [windows[1].append_matvec(row, check_finite=False) for row in g]
    for y, e in zip(results, expected, strict=True):
        assert (numpy64(y) == numpy64(e)).all()
    bad = values[0].copy()
    bad[77] = np.nan
    y = windows[1].append_matvec(cupy.asarray(bad), check_finite=False)
    assert np.isnan(numpy64(y)).all()
    with pytest.raises(ValueError, match="g must be finite"):
        windows[1].append(g[1])
    assert (numpy64(windows[1].gradients) == values[32:].astype("float64")).all()
    windows[1].append(g[1])
    assert (numpy64(windows[1].gradients)[-1] == values[1].astype("float64")).all()


def test_more_than_two_to_the_31_elements(cupy, rng):
    """A half-precision G of 2³² elements: 8 GiB."""
    m, d = 4, 2**30 + 24
    if cupy.cuda.runtime.memGetInfo()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    g = cupy.zeros((m, d), "float16")
    places = np.array([0, d // 2, d - 1])
    values = rng.standard_normal((m, 3)).astype("float16")
    g[:, places] = cupy.asarray(values)
    x = cupy.zeros(d, "float16")
    x[places] = 1.0
    product = rows.project(g, x, float64=False, home=home_of(g))
    expected = values.astype("float64").sum(axis=1)
    assert abs(product.get() - expected).max() <= 1e-12
    c = rng.standard_normal(m)
    y = rows.combine(g, cupy.asarray(c), None, 1.0, dtype=g.dtype, float64=True)
    assert relative_error(y[places].get(), c @ values.astype("float64")) <= 2.0**-10
    taken = rows.take(g, places, home_of(g))
    assert (taken.get() == values).all()
    products = rows.pair_products(g, places, taken, home_of(g))
    squares = (values.astype("float64") ** 2).sum(axis=0)
    assert relative_error(products.get(), squares) <= 1e-12


def test_exchange_with_more_than_two_to_the_31_elements(cupy, rng):
    """The last row of a half-precision window of 2³² elements is replaced."""
    m, d = 4, 2**30 + 24
    if cupy.cuda.runtime.memGetInfo()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of device memory")
    g, row = cupy.zeros((m, d), "float16"), cupy.zeros(d, "float16")
    places = np.array([0, d // 2, d - 1])
    values = rng.standard_normal((m, 3)).astype("float16")
    g[:, places], row[places] = cupy.asarray(values), cupy.asarray(values[0])
    products, norm2 = rows.exchange(g, m - 1, row, home_of(g))
    values[m - 1] = values[0]
    exact = values.astype("float64")
    assert (g[:, places].get() == values).all()
    assert int(cupy.count_nonzero(g)) == np.count_nonzero(values)
    assert relative_error(products.get(), exact @ exact[0]) <= 1e-12
    assert relative_error(norm2.get(), exact[:1] @ exact[0]) <= 1e-12


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_products_are_those_of_the_host_executor(cupy, monkeypatch, rng, dtype, columns):
    """Rows in slices that do not divide them, and a short last block."""
    m, blocks, width, k, d = 130, 3, 1000, 11, 2900
    indices = np.sort(np.argsort(rng.random((blocks, m, width)))[..., :k], axis=2).astype("int16")
    values, _ = stored(cupy, rng, indices.shape, dtype)
    values[indices + width * np.arange(blocks)[:, None, None] >= d] = 0
    on_device = cupy.asarray(values)
    x = rng.standard_normal((d, columns) if columns > 1 else d)
    c = rng.standard_normal((m, columns) if columns > 1 else m)

    def products(lend, values, home):
        entries = sparse.Entries(lend(indices), values, m, d, width)
        y = sparse.project(entries, lend(x), float64=True, home=home)
        z = sparse.combine(entries, lend(c), lend(x), 0.5, dtype=None, float64=True)
        return y, z

    results = products(cupy.asarray, on_device, home_of(on_device))
    monkeypatch.setattr(cuda_machine, "current", HostMachine("fast"))
    expected = products(host_array, host_array(values), DeviceHome())
    for result, other in zip(results, expected, strict=True):
        assert relative_error(numpy64(result), host_view(other)) <= 1e-12


@pytest.mark.parametrize("columns", [None, 1, 4])
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "float64"])
def test_sums_in_two_float32(cupy, monkeypatch, rng, dtype, columns):
    """As they are on cards with little float64, whatever this one has; and out of their range."""
    monkeypatch.setattr(cuda_machine.Machine, "has_little_float64", lambda self: True)
    for scale in (1.0, 2.0**-40):
        values, _ = stored(cupy, rng, (37, 5000), dtype)
        values[:8] *= scale
        g, values = cupy.asarray(values), values.astype("float64")
        x = values[5] if columns is None else values[:columns].T
        x = cupy.asarray(x.astype("float32"))
        c = rng.standard_normal(37 if columns is None else (37, columns)) * scale
        product = rows.project(g, x, float64=False, home=home_of(g))
        y = rows.combine(g, cupy.asarray(c), None, 1.0, dtype=None, float64=False)
        for result, a, b in ((product, values, numpy64(x)), (y, values.T, c)):
            bound = (a.shape[1] + 8) * 2.0**-45 * (abs(a) @ abs(b))
            assert (abs(numpy64(result) - a @ b) <= bound).all()


@pytest.mark.parametrize("m", [3, 64, 130])
def test_the_gram_by_int8_products(cupy, rng, m):
    g = (rng.standard_normal((m, 3000)) ** 5).astype("float32")
    gram, e = _int8_gram.gram(cupy.asarray(g), home_of(cupy.asarray(g)))
    expected, bound = _int8_gram.gram(g, home_of(g))
    assert (gram.get() == expected).all()
    assert relative_error(e.get(), bound) <= 1e-14


def test_a_step_is_refused_while_a_graph_is_captured(cupy, rng):
    """By name, with the window as it was, and the capture can be ended."""
    values, g = stored(cupy, rng, (5, 100), "float32")
    window = mfac.SlidingInverseFisher(100, 4, damping=0.1)
    for row in g:
        window.append_matvec(row)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
                window.append_matvec(g[0])
        finally:
            stream.end_capture()
    assert (window.gradients.get() == values[1:]).all()
    y = window.append_matvec(g[0])
    held = np.concatenate([values[2:], values[:1]]).astype("float64")
    expected = dense_inverse(held, damping=0.1) @ held[-1]
    assert relative_error(y, expected) <= error_bound(held, damping=0.1)


def test_two_devices(cupy, rng):
    """A window on each of two devices, in turn; the current device stays what it was."""
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    windows, values = [], rng.standard_normal((6, 500)).astype("float32")
    for device in range(2):
        with cupy.cuda.Device(device):
            windows.append((mfac.SlidingInverseFisher(500, 4, damping=0.1), cupy.asarray(values)))
    expected = dense_inverse(values[2:], damping=0.1) @ values[5]
    for i in range(6):
        results = [window.append_matvec(g[i]) for window, g in windows]
    for device, y in enumerate(results):
        assert y.device.id == device
        assert relative_error(y, expected) <= error_bound(values[2:], damping=0.1)
    assert cupy.cuda.runtime.getDevice() == 0


SANITIZED = {
    "memcheck": "products_are or blocks or elements or two_float32",
    "racecheck": "products_are or blocks or two_float32",
    "initcheck": "products_are",
}


@pytest.mark.parametrize("tool", SANITIZED)
def test_under_compute_sanitizer(cupy, tool):
    """With each array an allocation of its own, so that what is read beside it shows."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    this = Path(__file__)
    # Of the dtypes one: what is in brackets is the parameters.
    chosen = f"({SANITIZED[tool]}) and float32 and not float16 or replacement"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(this), "-k", chosen]
    environment = {**os.environ, "CUPY_TEST_NO_POOL": "1"}
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=this.parents[2], env=environment
    )
    assert run.returncode == 0, run.stdout[-3000:]
