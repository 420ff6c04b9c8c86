"""Gradients in chunks and in shards, of rows and of columns: what is read, and that it is right."""

import h5py
import numpy as np
import pytest
import torch
from conftest import relative_error
from problems import File

import mfac_core as mfac
from mfac_core.testing import dense_fisher, dense_inverse, error_bound

SMALL = 8 * 6 * 20  # bytes that are read at a time, here

CHUNKS = [(1, 47), (2, 47), (3, 30), (13, 47), (5, 21)]


@pytest.fixture
def g(rng):
    return rng.standard_normal((13, 47)) / 7


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("mfac_core._rows.sliced.PART_BYTES", SMALL)
    monkeypatch.setattr("mfac_core._rows.sliced.LONG_BYTES", SMALL)
    monkeypatch.setattr("mfac_core._rows.sliced.HELD_BYTES", 2 * SMALL)
    monkeypatch.setattr("mfac_core._rows.sliced.COMBINED_COLUMNS", 9)
    monkeypatch.setattr("mfac_core._rows.sliced.STRETCH_COLUMNS", 4)


class Bounded(File):
    """Refuses to be read in larger pieces than a chunk, or what is read at a time."""

    def __getitem__(self, key):
        part = super().__getitem__(key)
        chunk = self.chunks[0] * self.chunks[1] * self.dtype.itemsize
        assert part.nbytes <= max(2 * SMALL, chunk)
        return part


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_long_chunks(g, rng, chunks, dtype):
    """Every query, in bounded pieces; against the dense inverse."""
    g = g.astype(dtype)
    file, bound = Bounded(g, chunks), error_bound(g, damping=0.1, dtype=dtype)
    inverse, dense = mfac.InverseFisher(file, damping=0.1), dense_inverse(g, damping=0.1)
    x = rng.standard_normal((47, 3)).astype(dtype)
    assert relative_error(inverse @ x[:, 0], dense @ x[:, 0]) <= bound
    assert relative_error(inverse @ x, dense @ x) <= bound
    assert relative_error(inverse.matvec(x[:, 0], refine=1), dense @ x[:, 0]) <= bound
    assert relative_error(inverse.diagonal(), np.diagonal(dense)) <= bound
    i, j = rng.permutation(47)[:9], rng.permutation(47)[:9]
    assert relative_error(inverse.entries(i, j), dense[i, j]) <= bound
    fisher = mfac.EmpiricalFisher(file, damping=0.1)
    assert relative_error(fisher @ x, dense_fisher(g, damping=0.1) @ x) <= bound
    blocks = mfac.BlockInverseFisher(file, damping=0.1, block_size=10)
    whole = mfac.BlockInverseFisher(g, damping=0.1, block_size=10)
    assert relative_error(blocks.to_dense(), whole.to_dense()) <= bound


def test_products_read_a_chunk_of_rows_once(g):
    file = File(g, (2, 47))
    inverse = mfac.InverseFisher(file, damping=0.1)
    before = file.read.copy()
    inverse @ np.ones(47)
    np.testing.assert_array_equal(file.read - before, 2)


def test_a_long_row_with_a_nan_is_named(g):
    g[11, 40] = np.nan
    with pytest.raises(ValueError, match=r"1 of 13 rows, at index 11"):
        mfac.InverseFisher(File(g, (1, 47)), damping=0.1)


@pytest.mark.parametrize("chunks", [(13, 5), (1, 47)])
def test_scattered_columns_read_a_chunk_once(g, rng, chunks):
    file = File(g, chunks)
    inverse = mfac.InverseFisher(file, damping=0.1)
    file.read[:] = 0
    inverse.submatrix(rng.permutation(47))
    assert file.read.max() <= 1


def test_neighbours_asked_for_one_by_one_are_read_together(g):
    file = File(g, (13, 5))
    inverse = mfac.InverseFisher(file, damping=0.1)
    file.read[:] = 0
    expected = dense_inverse(g, damping=0.1)
    for j in range(5):
        assert inverse.submatrix([j])[0, 0] == pytest.approx(expected[j, j], rel=1e-9)
    assert file.read.max() == 1


def test_row_shards(g, rng, tmp_path):
    """An array, a memory map, a dataset in chunks and a path, one below the other."""
    np.save(tmp_path / "shard.npy", g[9:])
    mapped = np.memmap(tmp_path / "map", g.dtype, "w+", shape=(3, 47))
    mapped[:] = g[2:5]
    with h5py.File(tmp_path / "file.h5", "w") as file:
        data = file.create_dataset("g", data=g[5:9], chunks=(1, 47))
        shards = mfac.RowShards([g[:2], mapped, data, tmp_path / "shard.npy"])
        assert (shards.shape, shards.dtype, shards.chunks) == ((13, 47), g.dtype, (1, 47))
        np.testing.assert_array_equal(shards[:, 3:9], g[:, 3:9])
        np.testing.assert_array_equal(shards[4:11, 3:9], g[4:11, 3:9])
        inverse, x = mfac.InverseFisher(shards, damping=0.1), rng.standard_normal(47)
        bound = error_bound(g, damping=0.1, dtype="float64")
        assert relative_error(inverse @ x, dense_inverse(g, damping=0.1) @ x) <= bound


def test_npy_files_by_their_paths(g, rng, tmp_path):
    """One of all, some side by side, and nothing else by a path."""
    x, expected = rng.standard_normal(47), dense_inverse(g, damping=0.1)
    for name, part in {"whole": g, "left": g[:, :9], "right": g[:, 9:]}.items():
        np.save(tmp_path / f"{name}.npy", part)
    for given in (tmp_path / "whole.npy", str(tmp_path / "whole.npy")):
        assert relative_error(mfac.ihvp(given, x, damping=0.1), expected @ x) <= 1e-12
    parts = [tmp_path / "left.npy", tmp_path / "right.npy"]
    assert relative_error(mfac.InverseFisher(parts, damping=0.1) @ x, expected @ x) <= 1e-12
    for given in (tmp_path / "g.h5", [tmp_path / "g.h5"]):
        with pytest.raises(TypeError, match=r"gradients.* path of a \.npy file, got .*g\.h5"):
            mfac.InverseFisher(given, damping=0.1)
    with pytest.raises(FileNotFoundError):
        mfac.InverseFisher(tmp_path / "none.npy", damping=0.1)


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_safetensors(g, rng, tmp_path, framework):
    """A tensor of a file, and tensors of two one below the other."""
    safetensors = pytest.importorskip("safetensors", reason="safetensors is optional")
    from safetensors.numpy import save_file

    save_file({"all": g, "some": g[:4], "whole numbers": g.astype(int)}, tmp_path / "a")
    save_file({"more": g[4:]}, tmp_path / "b")
    x, expected = rng.standard_normal(47), dense_inverse(g, damping=0.1)
    with (
        safetensors.safe_open(tmp_path / "a", framework) as a,
        safetensors.safe_open(tmp_path / "b", framework) as b,
    ):
        shards = mfac.RowShards([a.get_slice("some"), b.get_slice("more")])
        for given in (a.get_slice("all"), shards):
            inverse = mfac.InverseFisher(given, damping=0.1)
            assert relative_error(inverse @ x, expected @ x) <= 1e-12
            assert relative_error(inverse.diagonal(), np.diagonal(expected)) <= 1e-12
        with pytest.raises(TypeError, match="float16, float32 or float64, got I64"):
            mfac.InverseFisher(a.get_slice("whole numbers"), damping=0.1)


@pytest.mark.parametrize(
    ("shards", "error", "message"),
    [
        ([], ValueError, "at least one"),
        (
            [np.zeros((2, 3)), np.zeros((2, 4))],
            ValueError,
            r"shards\[1\] must have shape \(rows, 3",
        ),
        ([np.zeros((2, 3)), np.zeros((2, 3), "f4")], TypeError, r"shards\[1\] must be of dtype"),
        ([torch.zeros(2, 3)], TypeError, r"shards\[0\] must be a NumPy array.*concatenate"),
        ([3], TypeError, r"shards\[0\] must have shape, dtype and slicing"),
    ],
)
def test_shards_that_do_not_fit(shards, error, message):
    with pytest.raises(error, match=message):
        mfac.RowShards(shards)


@pytest.mark.parametrize("chunks", [(13, 10), (4, 47), (5, 9)])
def test_dask_gradients_are_read_by_slices(g, rng, chunks):
    da = pytest.importorskip("dask.array", reason="Dask is optional")
    lazy, x = da.from_array(g, chunks=chunks), rng.standard_normal(47)
    inverse = mfac.InverseFisher(lazy, damping=0.1)
    bound = error_bound(g, damping=0.1, dtype="float64")
    assert relative_error(inverse @ x, dense_inverse(g, damping=0.1) @ x) <= bound
    with pytest.raises(TypeError, match=r"x must hold its values in memory, got dask.*compute"):
        inverse @ da.from_array(x)
    with pytest.raises(TypeError, match="in memory"):
        mfac.SlidingInverseFisher(47, 2, damping=0.1).append(da.from_array(x))
    with pytest.raises(TypeError, match="in memory"):
        mfac.InverseFisher([lazy, lazy], damping=0.1)


def test_a_gram_that_is_no_gram(g):
    """A triangle, as BLAS's syrk returns it, and a matrix that is not symmetric."""
    gram = g @ g.T
    for wrong in (np.triu(gram), np.tril(gram), gram + np.triu(np.full((13, 13), 1e-3), 1)):
        with pytest.raises(ValueError, match=r"symmetric.*T \+ T\.T"):
            mfac.InverseFisher.from_gram(g, wrong, damping=0.1)
    for dtype in ("float16", "float32", "float64"):
        mfac.InverseFisher.from_gram(g, gram.astype(dtype), damping=0.1)
