"""Indices beyond 2³¹ and 2³²: chosen blocks of a grid over memory hardly touched.

Each kernel runs where its indices are largest. Then, one at a time, each 64-bit number inside a
kernel is made one of 32 bits, and each product of sizes is narrowed: that must be noticed.
"""

import functools
import importlib.resources
import re

import numpy as np
import pytest
from cuda_on_cpu import KernelError, Module, untouched

from mfac_core._ops.cuda import machine as cuda_machine

FAR = 2**32 + 2056
"""A length past what 32 bits count, with a sign or without; a multiple of eight."""


def launch(source, file, name, macros, grid, block, blocks, *arguments, shared_mem=0):
    # What overflows wraps round, and is not optimised as if it could not.
    module = Module(source(file), (*cuda_machine.options(macros), "-fwrapv"), "fast")
    kernel = module.get_function(name)
    kernel.blocks = blocks
    kernel.seconds = (
        1.0  # A few thousandths will do, but where a loop starts 2³² columns too early.
    )
    kernel.max_dynamic_shared_size_bytes = shared_mem
    kernel(grid, block, arguments, shared_mem=shared_mem)


def project(source):
    """The last chunk of the last row; with a row exchanged there; and many rows and chunks."""
    m, d, chunk = 2, FAR, 2**21
    parts = -(-d // chunk)
    # Sums in two float32, and such that leave their range: they are summed once more.
    for macros, storage, unit in (
        ({"G_T": "__half"}, "float16", 1.0),
        ({"G_T": "__half", "EXCHANGE": 1}, "float16", 1.0),
        ({"G_T": "float", "TWOFOLD": 1}, "float32", 1.0),
        ({"G_T": "float", "TWOFOLD": 1}, "float32", 2.0**70),
    ):
        exchanged = "EXCHANGE" in macros
        g, x = untouched((m, d), storage), untouched(d, storage)
        x[-4:] = unit * np.array([1, 2, 3, 4])
        g[1, -4:] = unit * np.array([5, 6, 7, 8])
        g[0, -1] = unit * 2
        partial = np.zeros((parts, m))
        sizes = (np.int32(m), np.int64(d), np.int64(chunk), np.int32(1 if exchanged else -1))
        macros = {"X_T": macros["G_T"], "COLUMNS": 1, "WIDTH": 4, **macros}
        launch(
            source, "project.cu", "project", macros, (1, parts), (256,), [(0, parts - 1, 0)], g, x,
            partial, *sizes, np.ones(1),
        )  # fmt: skip
        yield partial[-1] / unit**2, [8, 30 if exchanged else 70]
        yield g[1, -4:] / unit, [1, 2, 3, 4] if exchanged else [5, 6, 7, 8]
        if exchanged:  # A row refused: it is the old one of the slot that is multiplied.
            x[-4:] = 9
            launch(
                source, "project.cu", "project", macros, (1, parts), (256,), [(0, parts - 1, 0)], g,
                x, partial, *sizes, np.full(1, np.nan),
            )  # fmt: skip
            yield partial[-1], [8, 30]
    m, d = 2**21 + 9, 1026
    g, x, partial = untouched((m, d), "float16"), np.ones((d, 2)), untouched((d, m, 2), "float64")
    g[-1, -1], x[-1, 1] = 3, 7
    launch(
        source, "project.cu", "project",
        {"G_T": "__half", "X_T": "double", "COLUMNS": 2, "WIDTH": 1}, (-(-m // 4), d), (256,),
        [(-(-m // 4) - 1, d - 1, 0)], g, x, partial, np.int32(m), np.int64(d), np.int64(1),
        np.int32(-1), partial.ravel()[:1],
    )  # fmt: skip
    yield partial[-1, -1], [3, 21]


def combine(source):
    """The last columns, of the last rows; and of the last slice of rows."""
    m, d = 3, FAR
    g, base, out = (untouched((m, d), "float16"), untouched(d, "float16"), untouched(d, "float16"))
    g[:, -4:] = [[1, 2, 3, 4], [0, 1, 0, 1], [2, 2, 2, 2]]
    base[-4:] = 5
    last = (-(-d // 512) - 1, 0, 0)
    macros = {"G_T": "__half", "X_T": "__half", "OUT_T": "__half", "COLUMNS": 1, "WIDTH": 4}
    launch(
        source, "combine.cu", "combine", macros, (last[0] + 1, 1), (128,), [last], g,
        np.array([1.0, 10.0, 100.0]), base, np.float64(2.0), out, np.int32(m), np.int64(d),
        np.int32(3),
    )  # fmt: skip
    yield out[-4:], [211, 222, 213, 224]
    c = np.array([[1.0, 2], [3, 4], [5, 6]])
    last = (-(-d // 128) - 1, 2, 0)
    # Sums in two float32, and weights out of their range: they are summed once more.
    for twofold, unit in (({}, 1.0), ({"TWOFOLD": 1}, 1.0), ({"TWOFOLD": 1}, 2.0**200)):
        macros = {"G_T": "__half", "OUT_T": "double", "COLUMNS": 2, "WIDTH": 1, "X_T": "double"}
        parts = untouched((3, d, 2), "float64")
        launch(
            source, "combine.cu", "combine", macros | twofold, (last[0] + 1, 3), (128,), [last], g,
            unit * c, parts[0], np.float64(0.0), parts, np.int32(m), np.int64(d), np.int32(1),
        )  # fmt: skip
        yield parts[2, -1] / unit, [10, 12]
        whole, base = untouched((d, 2), "float64"), untouched((d, 2), "float64")
        base[-1] = [4 * unit, 5 * unit]
        launch(
            source, "combine.cu", "combine", macros | twofold, (last[0] + 1, 1), (128,),
            [(last[0], 0, 0)], g, unit * c, base, np.float64(1.0), whole, np.int32(m), np.int64(d),
            np.int32(3),
        )  # fmt: skip
        yield whole[-1] / unit, [4 + 4 + 3 + 10, 5 + 8 + 4 + 12]


def sums(source):
    n, parts = FAR, 9
    partial, base, out = (untouched(s, "float64") for s in ((parts, n), n, n))
    partial[:, -1], base[-1] = np.arange(parts), 10
    last = (-(-n // 32) - 1, 0, 0)
    macros = {"X_T": "double", "OUT_T": "double"}
    launch(
        source, "sum.cu", "sum_parts", macros, (last[0] + 1,), (32, 8), [last], partial, base,
        np.float64(0.5), out, np.int32(parts), np.int64(n),
    )  # fmt: skip
    yield out[-1], 41


def dual(source):
    """A matrix of more than 2³¹ elements, the identity where it is looked at."""
    m, i = 46_400, 46_396
    inverse, gram = untouched((m, m), "float64"), untouched((m, m), "float64")
    inverse[-8:, -8:] = np.eye(8)
    row, w, k = np.zeros(m), np.zeros(m), np.zeros(m)
    row[i], row[i + 1] = 3, 0.5
    last = (-(-m // 8) - 1, 0, 0)
    failed = np.full(1, -1, "int32")
    launch(
        source, "dual.cu", "dual_products", {}, (last[0] + 1,), (256,), [last], inverse, row, w, k,
        np.int32(m), np.int32(i),
    )  # fmt: skip
    yield w[-8:], [0, 0, 0, 0, 0, 0.5, 0, 0]
    yield k[-8:], [0, 0, 0, 0, 1, 0, 0, 0]
    launch(
        source, "dual.cu", "dual_update", {}, (last[0] + 1,), (256,), [last], inverse, gram, row, w,
        k, failed, np.float64(1.0), np.int32(m), np.int32(i),
    )  # fmt: skip
    matrix = np.eye(8)
    matrix[4, 4], matrix[4, 5], matrix[5, 4] = 4, 0.5, 0.5
    yield inverse[-8:, -8:], np.linalg.inv(matrix)
    yield gram[i, i - 4 :], row[i - 4 :]


def diagonal(source):
    m, width = 33, 2**26
    columns = untouched((m, width), "float64")
    columns[:, -1] = 2
    last = (-(-width // 32) - 1, 0, 0)
    for steps, w in (((width, 1), 0.1), ((1, m), 0.1), ((1, m), 0.03**0.5)):
        whitened = untouched(m * width, "float64")
        whitened[np.arange(m) * steps[0] + (width - 1) * steps[1]] = w
        result, rest = untouched(width, "float64"), untouched(width, "float64")
        launch(
            source, "diagonal.cu", "clamped_diagonal", {}, (last[0] + 1,), (32, 8), [last],
            whitened, columns, result, rest, np.int32(m), np.int32(width), np.int64(steps[0]),
            np.int64(steps[1]), np.float64(1.0), np.float64(m),
        )  # fmt: skip
        yield rest[-1], 1 - m * w**2
        yield result[-1], max(1 - m * w**2, 0.2)


def entries(source):
    """The last columns of the last rows; and pairs whose number passes 2³¹."""
    m, d, count = 3, FAR, FAR
    g, columns = untouched((m, d), "float16"), untouched(count, "int64")
    g[:, -1], columns[-1] = [1, 2, 3], d - 1
    taken, last = untouched((m, count), "float64"), (-(-count // 32) - 1, 0, 0)
    launch(
        source, "entries.cu", "take_columns", {"G_T": "__half"}, (last[0] + 1, 1), (32, 16), [last],
        g, columns, taken, np.int32(m), np.int64(d), np.int64(count),
    )  # fmt: skip
    yield taken[:, -1], [1, 2, 3]
    for steps in ((count, 1), (1, m)):
        right, products = untouched(m * count, "float64"), untouched(count, "float64")
        right[np.arange(m) * steps[0] + (count - 1) * steps[1]] = [1, 10, 100]
        launch(
            source, "entries.cu", "pair_products", {"G_T": "__half"}, (last[0] + 1,), (32, 16),
            [last], g, columns, right, products, np.int32(m), np.int64(d), np.int64(count),
            np.int64(steps[0]), np.int64(steps[1]),
        )  # fmt: skip
        yield products[-1], 321


def blocks(source):
    m, d, width, far = 3, FAR, 32, 2**21 + 3
    g, x, out = (untouched(s, "float16") for s in ((m, d), d, d))
    g[:, -2:] = [[1, 0], [1, 1], [0, 2]]
    x[-2:] = [3, 4]
    starts, inverses = np.zeros(far + 1, "int64"), untouched((far, width, width), "float64")
    starts[-2:] = [d - 2, d]
    failed = np.zeros(far, "int32")
    macros = {"BLOCK": 32, "G_T": "__half", "X_T": "__half", "OUT_T": "__half"}
    shared = 8 * (width * (width + 1) // 2 + width + 8 * width)
    launch(
        source, "blocks.cu", "block_inverses", macros, (far,), (16, 16), [(far - 1, 0, 0)], g,
        starts, inverses, failed, np.int32(m), np.int64(d), np.int32(width), np.float64(1.0),
        np.float64(1.0), shared_mem=shared,
    )  # fmt: skip
    expected = np.linalg.inv(np.array([[3.0, 1], [1, 6]]))
    yield inverses[-1, :2, :2], expected
    launch(
        source, "blocks.cu", "block_product", macros, (far,), (256,), [(far - 1, 0, 0)], inverses,
        starts, x, out, np.int32(width),
    )  # fmt: skip
    yield out[-2:], (expected @ [3, 4]).astype("float16")


def sparse_rows(source):
    """The last row of the last block, of several columns; the last slice of rows."""
    width, k, m, step = 8, 4, 2**16, 5
    count = 2**13 + 1
    d = count * width
    indices = untouched((count, m, k), "int16")
    values = untouched((count, m, k), "float16")
    indices[-1, -1], values[-1, -1] = [0, 2, 5, 7], [1, 2, 3, 4]
    x, partial = untouched((d, step), "float64"), untouched((count, m, step), "float64")
    x[-8:, 4] = np.arange(8)
    macros = {"V_T": "__half", "X_T": "double", "OUT_T": "double"}
    sizes = (
        np.int32(m), np.int32(m), np.int32(k), np.int64(d), np.int32(width), np.int32(16)
    )  # fmt: skip
    grid, last = (count, m // 16, step), (count - 1, m // 16 - 1, 4)
    launch(
        source, "sparse.cu", "sparse_project", macros, grid, (128,), [last], indices, values, x,
        partial, *sizes,
    )  # fmt: skip
    yield partial[-1, -1, 4], 2 * 2 + 3 * 5 + 4 * 7
    weights = np.zeros((m, step))
    weights[-1, 4] = 10
    out = untouched((m // 16, d, step), "float64")
    launch(
        source, "sparse.cu", "sparse_combine", macros, grid, (128,), [last], indices, values,
        weights, x, np.float64(0.0), out, *sizes,
    )  # fmt: skip
    yield out[-1, -8:, 4], [10, 0, 20, 0, 0, 30, 0, 40]
    # The end of long rows.
    far, m = 2**20 + 1, 2
    d = far * 4096
    indices, values = untouched((far, m, 1), "int16"), untouched((far, m, 1), "float16")
    indices[-1, :, 0], values[-1, :, 0] = 4095, [2, 3]
    x, partial = untouched(d, "float64"), untouched((far, m), "float64")
    x[-1] = 5
    sizes = (
        np.int32(m), np.int32(m), np.int32(1), np.int64(d), np.int32(4096), np.int32(1)
    )  # fmt: skip
    out = untouched((m, d), "float64")
    for name, operands in (
        ("sparse_project", (x, partial)),
        ("sparse_combine", (np.array([7.0, 11.0]), x, np.float64(0.0), out)),
    ):
        launch(
            source, "sparse.cu", name, macros, (far, 2, 1), (128,),
            [(far - 1, 0, 0), (far - 1, 1, 0)], indices, values, *operands, *sizes,
        )  # fmt: skip
    yield partial[-1], [10, 15]
    yield out[:, -1], [14, 33]
    # More columns of x than 2³¹ elements allow, and of weights.
    count, step = 2**13 + 1, 2**16 - 1
    d = count * width
    indices, values = untouched((count, 16, k), "int16"), untouched((count, 16, k), "float16")
    indices[-1, -1], values[-1, -1] = [0, 2, 5, 7], [1, 2, 3, 4]
    x, out = untouched((d, step), "float64"), untouched((d, step), "float64")
    x[-8:, -1] = np.arange(8)
    partial = untouched((count, 16, step), "float64")
    sizes = (
        np.int32(16), np.int32(16), np.int32(k), np.int64(d), np.int32(width), np.int32(16)
    )  # fmt: skip
    last = (count - 1, 0, step - 1)
    launch(
        source, "sparse.cu", "sparse_project", macros, (count, 1, step), (128,), [last], indices,
        values, x, partial, *sizes,
    )  # fmt: skip
    yield partial[-1, -1, -1], 47
    weights = np.ones((16, step))
    launch(
        source, "sparse.cu", "sparse_combine", macros, (count, 1, step), (128,), [last], indices,
        values, weights, x, np.float64(1.0), out, *sizes,
    )  # fmt: skip
    yield out[-8:, -1], [1, 1, 4, 3, 4, 8, 6, 11]
    m = 2**15 + 16
    indices, values = untouched((1, m, k), "int16"), untouched((1, m, k), "float16")
    indices[-1, -1], values[-1, -1] = [0, 2, 5, 7], [1, 2, 3, 4]
    weights = untouched((m, step), "float64")
    weights[-1, -1] = 10
    slices = m // 16
    out = untouched((slices, 8, step), "float64")
    sizes = (
        np.int32(m), np.int32(m), np.int32(k), np.int64(8), np.int32(width), np.int32(16)
    )  # fmt: skip
    launch(
        source, "sparse.cu", "sparse_combine", macros, (1, slices, step), (128,),
        [(0, slices - 1, step - 1)], indices, values, weights, out[0], np.float64(0.0), out, *sizes,
    )  # fmt: skip
    yield out[-1, :, -1], [10, 0, 20, 0, 0, 30, 0, 40]


EXERCISES = {
    "project.cu": project,
    "combine.cu": combine,
    "sum.cu": sums,
    "dual.cu": dual,
    "diagonal.cu": diagonal,
    "entries.cu": entries,
    "blocks.cu": blocks,
    "sparse.cu": sparse_rows,
}

WIDE = "what it is multiplied by has 64 bits"
ROWS = "rows times columns stay below 2³¹: more are left to the generic path"
BLOCKS = "of 2³¹ columns in blocks the inverses alone fit no device"
EQUIVALENT = {
    "staged[i] = staging(c[(int)tile * COLUMNS + i]);": ROWS,
    "staged[i] = staging(c[(i64)((int)(tile * COLUMNS)) + i]);": ROWS,
    "sums[j] += g[j / COLUMNS] * c[(int)i * COLUMNS + j % COLUMNS];": ROWS,
    "load<WIDTH, (WIDTH > 1)>(G + (int)i * d + k, g);": WIDE,
    "load<WIDTH, (WIDTH > 1)>(G + (int)(tile + i) * d + k, g);": WIDE,
    "double* inverse = inverses + (i64)((int)(blockIdx.x * stride)) * stride;": BLOCKS,
    "const double* inverse = inverses + (i64)((int)(blockIdx.x * stride)) * stride;": BLOCKS,
    "const int step = gridDim.z, column = blockIdx.z;": WIDE,
}
"""Mutants that compute the same within the sizes the library launches, and why."""


def notices(source, file):
    try:
        for result, expected in EXERCISES[file](source):
            if not np.allclose(np.asarray(result, "float64"), expected, rtol=1e-12, atol=1e-12):
                return f"{result} where {expected} was expected"
    except KernelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("file", EXERCISES)
def test_the_far_end(file):
    assert notices(cuda_machine.source, file) is None


@functools.cache
def code_of(file):
    kernels = importlib.resources.files("mfac_core._ops") / "kernels"
    return (kernels / file).read_text().split('#include "common.cuh"\n')[-1]


SIZE = r"(?:d|stride|count|width|row_step|column_step|step|k|m|n|chunk|COLUMNS|capacity)(?![\w[(])"
NARROWED = re.compile(rf"\bi64\b|\((?:[^()]|\([^()]*\))+\) \* {SIZE}|[\w.]+ \* {SIZE}")
SMALL = re.compile(r"(WIDTH|ROWS|TILE|rows|r|i|j) \* COLUMNS|i \* stride")
"""Products within a tile."""


def mutants():
    """Each 64-bit number that is no parameter made an int, each product with a size cut to one."""
    for file in EXERCISES:
        code = code_of(file)
        signatures = [m.span() for m in re.finditer(r"__global__[^{]*\{", code)]
        for match in NARROWED.finditer(code):
            before = code[: match.start()].rsplit("\n", 1)[-1]
            after = code[match.end() :].split("\n", 1)[0]
            parameter = any(a <= match.start() < b for a, b in signatures)
            if "smaller(d - start" in before or (before.endswith("for (") and match[0] == "i64"):
                continue  # they do not compile, or never end
            if parameter or "//" in before or SMALL.fullmatch(match[0]):
                continue
            changed = "int" if match[0] == "i64" else f"((int)({match[0]}))"
            mutant = code[: match.start()] + changed + code[match.end() :]
            line = f"{before}{changed}{after}".strip()
            nth = code[: match.start()].count(f"{before}{match[0]}{after}")
            line = f"{line} #{nth}" if nth else line
            yield pytest.param(file, line, mutant, id=f"{file}: {line}")


@pytest.mark.parametrize(("file", "line", "mutant"), list(mutants()))
def test_a_narrowed_index_is_noticed(file, line, mutant):
    noticed = notices(lambda name: cuda_machine.source(name).replace(code_of(file), mutant), file)
    if line in EQUIVALENT:
        assert noticed is None, f"listed as equivalent, but: {noticed}"
    else:
        assert noticed is not None
