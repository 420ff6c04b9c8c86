"""Gradients in parts, on several devices, and in files."""

import subprocess
import sys
import textwrap
from itertools import pairwise

import array_api_strict as strict
import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error
from problems import File

import mfac_core as mfac
from mfac_core.testing import assert_operator_close, dense_fisher, dense_inverse, error_bound

CUTS = (0, 13, 14, 60)


@pytest.fixture
def g(rng):
    return rng.standard_normal((8, 60)) / 8


def parts_of(g, backend=BACKENDS[0], dtype="float64"):
    return [backend.asarray(g[:, a:b], dtype) for a, b in pairwise(CUTS)]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.name)
def test_parts_side_by_side(g, backend):
    dtype = backend.dtypes()[-1]
    parts = parts_of(g, backend, dtype)
    g = np.concatenate([numpy64(part) for part in parts], axis=1)
    bound = error_bound(g, damping=0.1, dtype=dtype)
    inverse = mfac.InverseFisher(parts, damping=0.1)
    assert_operator_close(inverse, dense_inverse(g, damping=0.1), rtol=bound)
    fisher = mfac.EmpiricalFisher(parts, damping=0.1)
    assert_operator_close(fisher, dense_fisher(g, damping=0.1), rtol=bound)
    x = [backend.asarray(np.ones(b - a), dtype) for a, b in pairwise(CUTS)]
    for refine in (0, 1):
        pieces = inverse.matvec(x, refine=refine)
        assert [piece.shape for piece in pieces] == [piece.shape for piece in x]
        product = np.concatenate([numpy64(piece) for piece in pieces])
        assert relative_error(product, dense_inverse(g, damping=0.1) @ np.ones(60)) <= bound


@pytest.mark.parametrize("block_size", [5, 20])
def test_blocks_across_parts(g, block_size):
    parts = mfac.BlockInverseFisher(parts_of(g), damping=0.1, block_size=block_size)
    whole = mfac.BlockInverseFisher(g, damping=0.1, block_size=block_size)
    assert relative_error(parts.to_dense(), whole.to_dense()) <= 1e-9


def test_parts_on_two_devices_stay_there(g, rng):
    devices = [strict.Device("device1"), strict.Device("CPU_DEVICE"), strict.Device("device1")]
    parts = [
        strict.asarray(part, device=where) for part, where in zip(parts_of(g), devices, strict=True)
    ]
    inverse = mfac.InverseFisher(parts, damping=0.1)
    x = rng.standard_normal(60)
    dense = dense_inverse(g, damping=0.1)
    y = inverse @ strict.asarray(x, device=devices[0])
    assert y.device == devices[0]
    assert relative_error(y, dense @ x) <= 1e-12
    assert relative_error(inverse.diagonal(), np.diagonal(dense)) <= 1e-12
    pieces = [
        strict.asarray(x[a:b], device=where)
        for (a, b), where in zip(pairwise(CUTS), devices, strict=True)
    ]
    assert [piece.device for piece in inverse @ pieces] == devices


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("width", [7, 1000])
def test_a_file_read_by_slices(g, rng, dtype, width, monkeypatch):
    monkeypatch.setattr("mfac_core._rows.sliced.PART_BYTES", width * 8 * np.dtype(dtype).itemsize)
    file = File(g.astype(dtype))
    exact = g.astype(dtype).astype("float64")
    bound = error_bound(exact, damping=0.1, dtype=dtype)
    inverse = mfac.InverseFisher(file, damping=0.1)
    assert inverse.dtype == dtype
    assert_operator_close(inverse, dense_inverse(exact, damping=0.1), rtol=bound)
    blocks = mfac.BlockInverseFisher(file, damping=0.1, block_size=[8, 52])
    whole = mfac.BlockInverseFisher(exact, damping=0.1, block_size=[8, 52])
    assert relative_error(blocks.to_dense(), whole.to_dense()) <= bound


@pytest.mark.parametrize("chunks", [None, (8, 9), (2, 11)])
def test_one_pass_reads_each_number_once(g, chunks, monkeypatch):
    monkeypatch.setattr("mfac_core._rows.sliced.PART_BYTES", 8 * 8 * 25)
    file = File(g, chunks)
    inverse = mfac.InverseFisher(file, damping=0.1)
    assert (file.read == 1).all()
    inverse @ np.ones(60)
    assert (file.read == 3).all()
    inverse.diagonal()
    assert (file.read == 4).all()


def test_a_file_that_ends_early(g):
    file = File(g)
    file.shape = (8, 70)
    with pytest.raises(ValueError, match=r"gradients\[:, 0:70\] must have shape \(8, 70\).*60"):
        mfac.InverseFisher(file, damping=0.1)


def test_h5py(g, rng, tmp_path):
    import h5py

    with h5py.File(tmp_path / "g.h5", "w") as file:
        data = file.create_dataset("g", data=g, chunks=(4, 16))
        x = rng.standard_normal(60)
        product = mfac.ihvp(data, x, damping=0.1)
    assert relative_error(product, dense_inverse(g, damping=0.1) @ x) <= 1e-12


@pytest.mark.parametrize(
    ("gradients", "error", "words"),
    [
        ([np.ones((3, 4)), np.ones((2, 4))], ValueError, r"gradients\[1\] must have as many rows"),
        ([np.ones((3, 4)), np.ones((3, 4), "f4")], TypeError, r"library and dtype of gradients\[0"),
        ([np.ones((3, 4)), strict.ones((3, 4))], TypeError, "library and dtype of gradients"),
        ([np.ones(4)], ValueError, r"gradients\[0\] must have shape \(m, d\)"),
        ([], TypeError, "gradients must be an array"),
        (File(np.ones((3, 4), int)), TypeError, "dtype float16, float32 or float64, got int64"),
        (File(np.ones(4)), ValueError, r"gradients must have shape \(m, d\)"),
    ],
)
def test_what_is_refused(gradients, error, words):
    with pytest.raises(error, match=words):
        mfac.InverseFisher(gradients, damping=0.1)


def test_a_list_of_pieces_must_fit(g):
    inverse = mfac.InverseFisher(parts_of(g), damping=0.1)
    with pytest.raises(ValueError, match="one array, or one for each of 3 parts"):
        inverse @ [np.ones(60)]
    with pytest.raises(ValueError, match=r"x\[1\] must have shape \(1,\).*got \(2,\)"):
        inverse @ [np.ones(13), np.ones(2), np.ones(46)]


def test_a_nan_in_a_part_is_said_with_its_row(g):
    parts = [part.copy() for part in parts_of(g)]
    parts[2][5, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 8 rows, at index 5"):
        mfac.InverseFisher(parts, damping=0.1)


@pytest.mark.parametrize("make", [lambda g: g, lambda g: parts_of(g), File])
def test_progress_changes_no_result(g, make, capsys):
    inverse = mfac.InverseFisher(make(g), damping=0.1, progress=True)
    assert (
        relative_error(inverse @ np.ones(60), dense_inverse(g, damping=0.1) @ np.ones(60)) < 1e-12
    )
    assert "gradients" in capsys.readouterr().err


MEMMAP = """
g = np.memmap(folder + "/g", np.float32, "w+", shape=(64, 1_000_000))
g[::7, ::1009] = 1.0
g.flush()
"""
ROW_CHUNKS = """
import zarr
g = zarr.create_array(folder + "/g", shape=(48, 1_000_000), chunks=(1, 1_000_000), dtype="f4")
for i in range(48):
    row = np.zeros(1_000_000, np.float32)
    row[i::1009] = 1.0
    g[i] = row
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the memory in use")
@pytest.mark.parametrize(
    "make", [MEMMAP, ROW_CHUNKS], ids=["a memory map of 256 MB", "192 MB, a chunk a gradient"]
)
def test_gradients_are_not_read_into_memory(make, tmp_path):
    """Set-up, product and, where columns lie together, diagonal hold a fraction of them."""
    code = f"""
    import threading, time
    import numpy as np
    import mfac_core as mfac

    def held():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

    folder = {str(tmp_path)!r}
    exec({make!r})
    mfac.ihvp(np.ones((2, 3)), np.ones(3), damping=1.0)
    before, most, done = held(), 0, False

    def watch():
        global most
        while not done:
            most = max(most, held())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    inverse = mfac.InverseFisher(g, damping=1e-2)
    y = inverse @ np.ones(1_000_000, np.float32)
    if isinstance(g, np.ndarray):
        diagonal = inverse.diagonal()
    done = True
    watcher.join()
    print((most - before) // 1024)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) <= 100
