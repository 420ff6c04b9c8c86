"""Sizes one past what a group, a chunk or a block of threads holds, and mutants of the launches.

Each exercise runs the library's own launches at the sizes where a grid computed from one less, or
a load wider than its array allows, goes wrong. Then the code that computes those is changed, one
place at a time, and some exercise must notice.
"""

import inspect

import numpy as np
import pytest
from cuda_on_cpu import BuildError, KernelError, host_array, host_view
from host_machine import DeviceHome, HostMachine

from mfac_core._ops import dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries
from mfac_core._ops.cuda import sparse as cuda_sparse


def shifted(x):
    """An array whose data starts one element past a multiple of 16 bytes."""
    storage = np.concatenate([np.zeros(1, x.dtype), x.ravel()])
    return host_array(storage)[1:].reshape(x.shape)


def passes(rng):
    """One column, one row and one slice past a full block of threads."""
    for m, d in ((9, 2049), (8, 2048), (5, 129), (1, 513), (17, 4097)):
        g = rng.standard_normal((m, d)).astype("float32")
        for columns in (1, 3):
            x = rng.standard_normal((d, columns) if columns > 1 else d)
            product = rows.project(host_array(g), host_array(x), float64=True, home=DeviceHome())
            yield product, g @ x
            c = rng.standard_normal((m, columns) if columns > 1 else m)
            y = rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=True)
            yield y, g.T.astype("float64") @ c
    g = rng.standard_normal((200, 33))  # in slices, that are summed by groups of 32
    c = rng.standard_normal(200)
    y = rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=True)
    yield y, g.T @ c
    y = rows.combine(host_array(g), host_array(c), host_array(g[0]), 3.0, dtype=None, float64=True)
    yield y, g.T @ c + 3.0 * g[0]


def in_two_float32(rng):
    """Where float64 is scarce and neither asked for nor held; one column past a chunk."""
    machine = cuda_machine.current
    try:
        for machine.little_float64, dtype, other, float64, expected in (
            (False, "float32", "float32", False, [0, 0]),
            (True, "float32", "float32", False, [1, 1]),
            (True, "float32", "float32", True, [0, 0]),
            (True, "float32", "float64", False, [0, 1]),
            (True, "float64", "float64", False, [0, 0]),
        ):
            machine.launches.clear()
            g = rng.standard_normal((9, 8193)).astype(dtype)
            x, c = rng.standard_normal(8193).astype(other), rng.standard_normal(9)
            product = rows.project(host_array(g), host_array(x), float64=float64, home=DeviceHome())
            yield product, g.astype("float64") @ x
            y = rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=float64)
            yield y, g.T.astype("float64") @ c
            rows.exchange(host_array(g), 3, host_array(g[0]), DeviceHome())  # always float64
            names = ("project twofold", "combine twofold")
            yield np.array([machine.launches[name] for name in names]), np.array(expected)
    finally:
        machine.little_float64 = False


def addresses(rng):
    """G at a multiple of 16 bytes, what it is multiplied by or added to not; and the reverse."""
    g = rng.standard_normal((3, 64)).astype("float32")
    x = rng.standard_normal(64).astype("float32")
    c = rng.standard_normal(3)
    for lay_g, lay_x in ((host_array, shifted), (shifted, host_array), (shifted, shifted)):
        product = rows.project(lay_g(g), lay_x(x), float64=True, home=DeviceHome())
        yield product, g.astype("float64") @ x
        y = rows.combine(
            lay_g(g), host_array(c), lay_x(x), 2.0, dtype=np.dtype("float64"), float64=True
        )
        yield y, g.T.astype("float64") @ c + 2.0 * x
        ring = lay_g(g.copy())
        product, _ = rows.exchange(ring, 1, lay_x(x), DeviceHome())
        exchanged = g.copy()
        exchanged[1] = x
        yield ring, exchanged
        yield product, exchanged.astype("float64") @ x


def exchanges(rng):
    """A row refused in a window of several groups of rows; rows at either end of a group."""
    g = rng.standard_normal((300, 2049))
    for i in (0, 7, 8, 255, 256, 299):
        ring, row = host_array(g.copy()), rng.standard_normal(2049)
        product, norm2 = rows.exchange(ring, i, host_array(row), DeviceHome())
        exchanged = g.copy()
        exchanged[i] = row
        yield ring, exchanged
        yield product, exchanged @ row
        yield norm2, np.array([row @ row])
    row[2048] = np.inf
    ring = host_array(g.copy())
    product, _ = rows.exchange(ring, 257, host_array(row), DeviceHome())
    yield ring, g
    yield product, g @ g[257]


def duals(rng):
    """A replacement refused at m = 300, and at one past a group of rows."""
    for m, i in ((300, 257), (300, 299), (257, 256), (9, 8)):
        g = rng.standard_normal((m, m + 5))
        gram = g @ g.T
        inverse = np.linalg.inv(gram + np.eye(m))
        inverse = (inverse + inverse.T) / 2
        g[i] = rng.standard_normal(m + 5)
        row = g @ g[i]
        for damage in (None, "pivot", "schur", "pivot with a good Schur complement"):
            held, held_gram, fresh = inverse.copy(), gram.copy(), row.copy()
            if damage == "schur":
                fresh[i] = -5.0 * m
            elif damage is not None:
                held[i, i] = -1.0 if damage == "pivot" else 0.0
            if damage == "pivot with a good Schur complement":
                held[i, i], fresh[i] = -1e6, 1e6
            device = [host_array(x) for x in (held.copy(), held_gram, fresh)]
            failed = dense.replace(*device[:2], i, device[2], 1.0)
            yield failed, np.array([damage is not None])
            expected_gram = gram.copy()
            expected_gram[i, :] = expected_gram[:, i] = fresh
            yield device[1], expected_gram
            if damage is None:
                held = np.linalg.inv(expected_gram + np.eye(m))
            yield device[0], held


def small_blocks(rng):
    """A pivot that is not positive in the middle of a block, where its neighbours are sound."""
    lengths = np.array([32, 33, 1, 64])
    g = rng.standard_normal((9, 130))
    x = rng.standard_normal(130)
    inverses, failed = cuda_blocks.inverses(host_array(g), lengths, 0.1, 7.0)
    y = cuda_blocks.product(inverses, lengths, host_array(x), dtype=np.dtype("float64"))
    yield failed, np.zeros(4)
    end = np.cumsum(lengths)
    for number, size in enumerate(lengths):
        part = slice(end[number] - size, end[number])
        expected = np.linalg.inv(0.1 * np.eye(size) + g[:, part].T @ g[:, part] / 7.0)
        yield host_view(inverses)[number, :size, :size], expected
        yield host_view(y)[part], expected @ x[part]
    for damping in (-0.5, -3.0):
        # Orthogonal columns: each is a pivot by itself, and one in the middle is too short.
        g = np.zeros((64, 64))
        np.fill_diagonal(g, 8.0 * 2.0)
        g[20, 20] = 8.0 * 0.1
        _, failed = cuda_blocks.inverses(host_array(g), np.array([31, 33]), damping, 64.0)
        yield failed, np.array([1, 0])


def elements(rng):
    """One pair, one column and one row past a group."""
    for m, count in ((17, 33), (16, 32), (1, 65), (33, 1)):
        g = rng.standard_normal((m, 50)).astype("float32")
        columns, right = rng.integers(0, 50, count), rng.standard_normal((m, count))
        yield rows.take(host_array(g), columns, DeviceHome()), g[:, columns]
        for lent in (host_array(right), host_array(right.T).T):
            products = rows.pair_products(host_array(g), columns, lent, DeviceHome())
            yield products, (g[:, columns] * right).sum(axis=0)
        for lent in (host_array(right / m), host_array(right.T / m).T):
            diagonal, rest = dense.clamped_diagonal(DeviceHome(), lent, host_array(right), 0.5, 3.0)
            taken = ((right / m) ** 2).sum(axis=0)
            yield rest, 1 - taken
            low = 1 / (0.5 + (right**2).sum(axis=0) / 3.0)
            yield diagonal, np.clip((1 - taken) / 0.5, low, 2.0)


def sparse_passes(rng):
    """Rows in slices that do not divide them, several columns, a short last block."""
    for m, columns in ((129, 1), (130, 2), (3, 1)):
        blocks, width, k, d = 3, 8, 3, 21
        indices = np.sort(np.argsort(rng.random((blocks, m + 2, width)))[..., :k], axis=2)
        values = rng.standard_normal(indices.shape)
        place = indices + width * np.arange(blocks)[:, None, None]
        values[place >= d] = 0.0
        whole = np.zeros((m, blocks * width))
        for i in range(m):
            whole[i, place[:, i]] = values[:, i]
        values[:, m:] = np.nan
        entries = sparse.Entries(
            host_array(indices.astype("int16")), host_array(values), m, d, width
        )
        whole = whole[:, :d]
        x = rng.standard_normal((d, columns) if columns > 1 else d)
        c = rng.standard_normal((m, columns) if columns > 1 else m)
        yield sparse.project(entries, host_array(x), float64=True, home=DeviceHome()), whole @ x
        y = sparse.combine(entries, host_array(c), host_array(x), 0.5, dtype=None, float64=True)
        yield y, 0.5 * x + whole.T @ c


EXERCISES = {
    function.__name__: function
    for function in (
        passes,
        in_two_float32,
        addresses,
        exchanges,
        duals,
        small_blocks,
        elements,
        sparse_passes,
    )
}


def notices(exercise):
    try:
        for result, expected in exercise(np.random.default_rng(11)):
            error = abs(host_view(result).astype("float64") - expected).max()
            if not error <= 1e-8 * (1 + abs(expected).max()):
                return f"off by {error:.1e}"
    except (BuildError, KernelError, TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.fixture
def machine(monkeypatch):
    machine = HostMachine("fast")
    monkeypatch.setattr(cuda_machine, "current", machine)
    return machine


@pytest.mark.parametrize("exercise", EXERCISES)
def test_one_past_every_size(machine, exercise):
    assert notices(EXERCISES[exercise]) is None
    assert machine.launches


HOST_MUTANTS = [
    (cuda_passes, "(-(-m // (8 if columns == 1 else 4)), parts),", "(m // 8 + 1, parts),"),
    (cuda_passes, "(-(-m // (8 if columns == 1 else 4))", "(-(-(m - 1) // 8)"),
    (cuda_passes, "parts = -(-d // chunk)", "parts = -(-(d - 1) // chunk)"),
    (cuda_passes, "(-(-d // (128 * width)), slices),", "(-(-(d - 1) // (128 * width)), slices),"),
    (cuda_passes, "(-(-n // 32),),", "(-(-(n - 1) // 32),),"),
    (cuda_passes, "(-(-n // 32),),", "(n // 32,),"),
    (cuda_passes, "groups = (-(-m // 8),)", "groups = (-(-(m - 1) // 8),)"),
    (cuda_passes, "slices = -(-m // rows)", "slices = m // rows"),
    (cuda_passes, "any(array.data.ptr % LOAD_BYTES for array, _ in operands)", "held_only"),
    (cuda_passes, "any(array.data.ptr % LOAD_BYTES for array, _ in operands)", "False"),
    (cuda_passes, "(factor, x.dtype)),", "),"),
    (cuda_passes, "(added, added_dtype))", ")"),
    (cuda_passes, "    while d % width:\n        width //= 2\n", ""),
    (cuda_passes, "alpha if whole else 0.0", "alpha"),
    (cuda_passes, "partial if norm2 is None else norm2", "partial"),
    (cuda_passes, "twofold = itemsize(x.dtype) <= 4 and _twofold", "twofold = _twofold"),
    (cuda_passes, "return not float64 and itemsize(g", "return itemsize(g"),
    (cuda_passes, "return not float64 and itemsize(g.dtype) <= 4 and", "return not float64 and"),
    (cuda_passes, " and cuda_machine.current.has_little_float64()", ""),
    (cuda_passes, "        if _twofold(g, float64):\n", "        if False:\n"),
    (cuda_passes, "_project(g, row, i, norm2)", "_project(g, row, i, norm2, twofold=True)"),
    (
        cuda_passes,
        "_project(row[None, :], row, None, None)",
        "_project(row[None, :], row, None, None, twofold=True)",
    ),
    (cuda_queries, "(-(-len(columns) // 32),", "(-(-(len(columns) - 1) // 32),"),
    (cuda_queries, "(-(-count // 32),),", "(-(-(count - 1) // 32),),"),
    (cuda_queries, "(-(-width // 32),),", "(-(-(width - 1) // 32),),"),
    (cuda_queries, "np.int64(1), np.int64(m)", "np.int64(width), np.int64(1)"),
    (cuda_queries, "np.int64(width), np.int64(1)", "np.int64(1), np.int64(m)"),
    (cuda_blocks, "(count,),\n            (16, 16),", "(count - 1,),\n            (16, 16),"),
    (cuda_blocks, "(count,),\n            (256,),", "(count - 1,),\n            (256,),"),
    (cuda_blocks, "width >= widest", "width > widest - 2"),
    (cuda_blocks, "len(lengths) + 1, np.int64", "len(lengths) + 1, np.int32"),
    (cuda_blocks, "np.float64(divisor)", "np.float64(m)"),
    (cuda_sparse, "(blocks, *grid),", "(blocks - 1, *grid),"),
    (cuda_sparse, "return -(-entries.m // rows), rows", "return entries.m // rows, rows"),
    (cuda_sparse, "np.int32(capacity)", "np.int32(entries.m)"),
    (
        cuda_sparse,
        "(slices, columns),\n            rows,\n            weights",
        "(slices, 1),\n            rows,\n            weights",
    ),
    (cuda_sparse, "alpha if whole else 0.0", "alpha"),
]


@pytest.mark.parametrize(
    ("module", "old", "new"), HOST_MUTANTS, ids=lambda x: getattr(x, "__name__", x)
)
def test_a_mutant_of_the_launches_is_noticed(machine, monkeypatch, module, old, new):
    source = inspect.getsource(module)
    assert old in source
    if new == "held_only":
        new = "operands[0][0].data.ptr % LOAD_BYTES"
    names = dict(vars(module))
    exec(compile(source.replace(old, new), module.__file__, "exec"), names)
    for name, value in names.items():
        if inspect.isfunction(value) and value.__code__.co_filename == module.__file__:
            monkeypatch.setattr(module, name, value)
    assert any(notices(exercise) is not None for exercise in EXERCISES.values())
