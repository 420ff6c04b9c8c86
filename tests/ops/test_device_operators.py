"""Whole operators as on a CUDA device: PyTorch tensors as the carrier, the host as the device.

The m-sized half lives in the tensors' library, as on a device, and every pass goes through the
library's dispatch to the kernels. Oracles are dense float64 inverses.
"""

import numpy as np
import pytest
import scipy.linalg
import torch
from array_api_compat import torch as namespace
from conftest import numpy64, relative_error
from host_machine import tensor, torch_machine

import mfac_core as mfac
from mfac_core._ops import _generic, _sparse_generic, rows
from mfac_core._rows import base, sparse_ring
from mfac_core.testing import (
    assert_operator_close,
    dense_fisher,
    dense_inverse,
    error_bound,
)

DTYPES = ["float32", "float64", "float16", "bfloat16"]


@pytest.fixture
def device(monkeypatch):
    return torch_machine(monkeypatch)


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
    monkeypatch.setattr(base, "TAKE_BYTES", 8 * 6 * 7)
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


@pytest.mark.parametrize("normalization", ["count", "window"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sparse_window(device, monkeypatch, rng, dtype, normalization):
    for name in ("project", "combine"):
        monkeypatch.setattr(_sparse_generic, name, None)
    monkeypatch.setattr(sparse_ring, "LARGEST_BLOCK", 10)
    d, size = 43, 5
    window = mfac.SparseSlidingInverseFisher(
        d,
        size,
        density=0.3,
        damping=0.2,
        normalization=normalization,
        xp=namespace,
        dtype=getattr(torch, dtype),
    )
    total = np.zeros(d)
    for row in rng.standard_normal((12, d)):
        g = tensor(row, dtype)
        y = window.append_matvec(g)
        held = numpy64(window.gradients)
        total += numpy64(g) - held[-1]
        divisor = size if normalization == "window" else len(held)
        dense = dense_inverse(held, damping=0.2, divisor=divisor)
        bound = error_bound(g[None, :], damping=0.2, divisor=divisor)
        assert y.dtype == g.dtype
        assert relative_error(y, dense @ held[-1]) <= bound
    assert relative_error(window.error, total) <= 1e-5
    bound = error_bound(tensor(held, dtype), damping=0.2, divisor=divisor)
    assert_operator_close(window, dense, rtol=bound)
    assert {"sparse_project", "sparse_combine", "dual_update"} <= set(device.launches)


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
