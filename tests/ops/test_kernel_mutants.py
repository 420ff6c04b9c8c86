"""Mutations: each barrier deleted and each bound loosened, one at a time, must be noticed.

The exercises here are small, and chosen so that every bound matters: sizes that fill no group, no
tile and no chunk.
"""

import functools
import importlib.resources
import re

import numpy as np
import pytest
from cuda_on_cpu import KernelError, host_array, host_view
from host_machine import DeviceHome, HostMachine

from mfac_core._ops import dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries
from mfac_core._ops.cuda import sparse as cuda_sparse

ORDERS = ("forward", "backward", "random")


def products(machine, rng):
    """Run project in both forms, for rows that fill no group and a second chunk.

    The row exchanged is the first of its group.
    """
    m, d = 11, 2048 + 60
    g, x = rng.standard_normal((m, d)), rng.standard_normal((d, 2))
    y = rows.project(host_array(g), host_array(x), float64=True, home=DeviceHome())
    yield host_view(y), g @ x
    ring = host_array(g)
    y, _ = rows.exchange(ring, 8, host_array(x[:, 0].copy()), DeviceHome())
    g[8] = x[:, 0]
    yield host_view(y), g @ x[:, 0]
    yield host_view(ring), g
    # In two float32; the first group of rows is out of their range and summed once more.
    g, x = g.astype("float32"), x.astype("float32")
    tiny = 2.0**-90
    g[2] *= tiny
    machine.little_float64 = True
    y = rows.project(host_array(g), host_array(x), float64=False, home=DeviceHome())
    machine.little_float64 = False
    expected = g.astype("float64") @ x
    for part, unit in ((2, tiny), ([0, 1, 3], 1.0), (slice(4, None), 1.0)):
        yield host_view(y)[part] / unit, expected[part] / unit


def combinations(machine, rng):
    """Run combine with three tiles of rows, and in slices that do not divide them."""
    g, base = rng.standard_normal((1100, 6)), rng.standard_normal((6, 2))
    c = rng.standard_normal((1100, 2))
    for threads in (1, 1 << 17):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_passes, "COMBINE_THREADS", threads)
            y = rows.combine(
                host_array(g), host_array(c), host_array(base), 0.5, dtype=None, float64=True
            )
        yield host_view(y), 0.5 * base + g.T @ c
        # In two float32; the first columns are out of their range and summed once more.
        narrow = g.astype("float32")
        tiny = 2.0**-90
        narrow[:, 0] *= tiny
        narrow_base = base * (np.arange(6) > 0)[:, None]
        machine.little_float64 = True
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_passes, "COMBINE_THREADS", threads)
            y = rows.combine(
                *map(host_array, (narrow, c, narrow_base)), 0.5, dtype=None, float64=False
            )
        machine.little_float64 = False
        expected = 0.5 * narrow_base + narrow.astype("float64").T @ c
        for part, unit in ((0, tiny), (slice(1, None), 1.0)):
            yield host_view(y)[part] / unit, expected[part] / unit


def sums(machine, rng):
    """Run the second stage: more parts than threads share, and a last group that is not full."""
    partial, base = rng.standard_normal((11, 37)), rng.standard_normal(37)
    y = cuda_passes.sum_parts(
        *map(host_array, (partial, base)), 0.5, (37,), "float64", host_array(base)
    )
    yield host_view(y), 0.5 * base + partial.sum(axis=0)


def replacements(machine, rng):
    """Run the replacement of a row in a matrix larger than a block."""
    m, shift = 261, 1.0
    g = rng.standard_normal((m, 300))
    gram = g @ g.T
    inverse = np.linalg.inv(gram + shift * np.eye(m))
    g[258] = rng.standard_normal(300)
    row = g @ g[258]
    held, held_gram = host_array((inverse + inverse.T) / 2), host_array(gram)
    failed = dense.replace(held, held_gram, 258, host_array(row), shift)
    gram[258, :] = gram[:, 258] = row
    yield host_view(failed), np.zeros(1)
    yield host_view(held_gram), gram
    yield host_view(held), np.linalg.inv(gram + shift * np.eye(m))
    # A Schur complement of exactly half the shift is refused.
    held, held_gram = host_array(np.eye(2)), host_array(np.zeros((2, 2)))
    failed = dense.replace(held, held_gram, 0, host_array(np.array([-0.5, 0.0])), 1.0)
    yield host_view(failed), np.ones(1)


def diagonals(machine, rng):
    """Run the diagonal where it must be held to its range, and where not."""
    columns = rng.standard_normal((11, 37))
    whitened = columns / np.sqrt(0.1 + (columns**2).sum(axis=0))
    whitened *= rng.choice([0.0, 0.5, 1.5], 37)
    diagonal, rest = dense.clamped_diagonal(
        DeviceHome(), host_array(whitened), host_array(columns), 0.1, 11
    )
    taken = (whitened**2).sum(axis=0)
    yield host_view(rest), 1 - taken
    low = 1 / (0.1 + (columns**2).sum(axis=0) / 11)
    yield host_view(diagonal), np.clip((1 - taken) / 0.1, low, 10.0)


def elements(machine, rng):
    """Run both halves of an element: a last group that is not full, rows that fill no group.

    The grid of the first is too low for all rows; what lies behind them and beside the columns is
    not to be read.
    """
    g, right = rng.standard_normal((37, 9)), rng.standard_normal((37, 40))
    columns = rng.integers(0, 9, 40)
    for tallest in (1, 65535):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda_queries, "LARGEST_GRID_Y", tallest)
            yield host_view(rows.take(host_array(g), columns, DeviceHome())), g[:, columns]
    products = rows.pair_products(host_array(g), columns, host_array(right), DeviceHome())
    yield host_view(products), (g[:, columns] * right).sum(axis=0)


def loads_and_stores(machine, rng):
    """Run what the shared header serves."""
    yield from products(machine, rng)
    yield from combinations(machine, rng)


def blocks(machine, rng):
    """Run blocks that fill their width and such that do not, with rows that fill no group."""
    lengths = np.array([32, 5, 31])
    g, x = rng.standard_normal((11, 68)), rng.standard_normal(68)
    inverses, failed = cuda_blocks.inverses(host_array(g), lengths, 0.1, 11)
    y = cuda_blocks.product(inverses, lengths, host_array(x), dtype=np.dtype("float64"))
    yield host_view(failed), np.zeros(3)
    for number, end in enumerate(np.cumsum(lengths)):
        size = lengths[number]
        part = slice(end - size, end)
        expected = np.linalg.inv(0.1 * np.eye(size) + g[:, part].T @ g[:, part] / 11)
        yield host_view(inverses)[number, :size, :size], expected
        yield host_view(y)[part], expected @ x[part]


def sparse_products(machine, rng):
    """Run rows of few and of more entries than a tile holds, whole and in slices.

    The last block is short, and has an entry just past its end.
    """
    for m, width, d, k in ((83, 37, 100, 11), (3, 1100, 2198, 1037)):
        blocks = -(-d // width)
        indices = np.tile(np.arange(width), (blocks, m, 1))
        indices = np.sort(rng.permuted(indices, axis=2)[..., :k], axis=2)
        end = d - (blocks - 1) * width
        indices[-1] = np.arange(end - k + 1, end + 1)
        values = rng.standard_normal(indices.shape)
        values[-1, :, -1] = 0.0
        dense = np.zeros((m, blocks * width))
        for i in range(m):
            dense[i, indices[:, i] + width * np.arange(blocks)[:, None]] = values[:, i]
        dense = dense[:, :d]
        arrays = map(host_array, (indices.astype("int16"), values))
        entries = sparse.Entries(*arrays, m, d, width)
        x, c = rng.standard_normal(d), rng.standard_normal(m)
        for rows_of_slice in (1000, 20):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cuda_sparse, "SLICE_ROWS", rows_of_slice)
                y = sparse.project(entries, host_array(x), float64=True, home=DeviceHome())
                yield host_view(y), dense @ x
                y = sparse.combine(
                    entries, host_array(c), host_array(x), 0.5, dtype=None, float64=True
                )
                yield host_view(y), 0.5 * x + dense.T @ c


EXERCISES = {
    "common.cuh": loads_and_stores,
    "project.cu": products,
    "combine.cu": combinations,
    "sum.cu": sums,
    "dual.cu": replacements,
    "diagonal.cu": diagonals,
    "entries.cu": elements,
    "blocks.cu": blocks,
    "sparse.cu": sparse_products,
}

EQUIVALENT = {
    (
        "blocks.cu",
        "for (int first = 0; first <= m; first += ROWS) {",
    ): "one more group of rows, all past the last and so zero",
    ("common.cuh", "return a <= b ? a : b;"): "of two equal numbers either is the smaller",
    (
        "combine.cu",
        "for (int tile = first; tile <= last; tile += TILE) {",
    ): "one more tile, of no rows",
    (
        "diagonal.cu",
        "diagonal[column] = value <= low ? low : value > high ? high : value;",
    ): "a value at its bound is left or set to it",
    (
        "sparse.cu",
        "for (int group = first; group <= last; group += GROUPS) {",
    ): "one more group of rows, all past the last",
    (
        "sparse.cu",
        "for (int j = threadIdx.x; j <= width; j += THREADS) sums[j] = 0.0;",
    ): "one more sum, that nobody adds to",
    (
        "sparse.cu",
        "for (int tile = first; tile <= last; tile += rows)",
    ): "one more tile, of no rows",
    (
        "sparse.cu",
        "for (int from = 0; from <= k; from += part) {",
    ): "one more part of a row, of no entries",
}
"""Mutants that compute the same, by file and line, and why."""


@functools.cache
def code_of(file):
    """Return a source's text as it stands in what is compiled."""
    kernels = importlib.resources.files("mfac_core._ops") / "kernels"
    return (kernels / file).read_text().split('#include "common.cuh"\n')[-1]


def mutants():
    """Each barrier deleted, of a block or of a warp, and each comparison `<` made `<=`."""
    for file in EXERCISES:
        code = code_of(file)
        for match in re.finditer(r"__sync(?:threads|warp)\(\);| < ", code):
            before = code[: match.start()].rsplit("\n", 1)[-1]
            after = code[match.end() :].split("\n", 1)[0]
            if "//" in before:
                continue
            changed = "" if "sync" in match[0] else " <= "
            line = f"{before.lstrip()}{changed or '[no barrier]'}{after}"
            mutant = code[: match.start()] + changed + code[match.end() :]
            nth = code[: match.start()].count(f"{before}{match[0]}{after}")
            yield pytest.param(
                file, f"{line} #{nth}" if nth else line, mutant, id=f"{file}: {line} {nth}"
            )


def notices(machine, exercise):
    """Whether the exercise fails in any order; also says why."""
    for machine.order in ORDERS:
        machine.seed = 7
        try:
            for result, expected in exercise(machine, np.random.default_rng(5)):
                error = abs(result - expected).max()
                if not error <= 1e-9 * (1 + abs(expected).max()):
                    return f"off by {error:.1e} in {machine.order} order"
        except KernelError as error:
            return str(error)
    return None


@pytest.mark.parametrize("file", EXERCISES)
def test_the_kernels_as_they_are_pass_the_exercises(monkeypatch, file):
    machine = HostMachine("check")
    monkeypatch.setattr(cuda_machine, "current", machine)
    assert notices(machine, EXERCISES[file]) is None
    assert machine.launches


@pytest.mark.parametrize(("file", "line", "mutant"), list(mutants()))
def test_a_mutant_is_noticed(monkeypatch, file, line, mutant):
    machine = HostMachine("check")
    monkeypatch.setattr(cuda_machine, "current", machine)
    original = cuda_machine.source
    monkeypatch.setattr(
        cuda_machine, "source", lambda name: original(name).replace(code_of(file), mutant)
    )
    noticed = notices(machine, EXERCISES[file])
    if (file, line) in EQUIVALENT:
        assert noticed is None, f"{line} is listed as equivalent, but: {noticed}"
    else:
        assert noticed is not None
