"""Every kernel in every dtype, run on the CPU by way of the library's own launches.

Oracles are float64 NumPy. A product of n terms accumulated in float64 is off by at most
n·ε·Σ|aᵢbᵢ|, in whatever order it is summed; narrowing the result adds half a spacing of the
narrower dtype. In two float32 ε is 2⁻⁴⁵.
"""

import ml_dtypes
import numpy as np
import pytest
import torch
from cuda_on_cpu import host_array, host_view
from host_machine import NUMPY_DTYPES, DeviceHome, HostMachine
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_core._ops import dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks
from mfac_core._ops.cuda import machine as cuda_machine
from mfac_core._ops.cuda import passes as cuda_passes
from mfac_core._ops.cuda import queries as cuda_queries
from mfac_core._ops.cuda import sparse as cuda_sparse

EPS = np.finfo("float64").eps
TWOFOLD_EPS = 2.0**-45
STORAGE = ["float32", "float64", "float16", "bfloat16"]
ORDERS = st.sampled_from(["forward", "backward", "random"])


@pytest.fixture(params=["fast", "check"])
def machine(request, monkeypatch):
    machine = HostMachine(request.param)
    monkeypatch.setattr(cuda_machine, "current", machine)
    return machine


def stored(rng, shape, dtype, scale=1.0):
    """Random numbers in a dtype, and their exact values in float64."""
    values = (scale * rng.standard_normal(shape)).astype(NUMPY_DTYPES[dtype])
    return values, values.astype("float64")


def half_spacing(x, dtype):
    """Half the distance of neighbouring numbers of a dtype around ``x``."""
    info = ml_dtypes.finfo(NUMPY_DTYPES[dtype])
    return np.maximum(abs(x) * float(info.eps), float(info.smallest_subnormal)) / 2


def ran(machine, *names):
    """Whether exactly these kernels were launched since last asked."""
    seen = set(machine.launches)
    machine.launches.clear()
    return seen == set(names)


def contract(a, b, twofold=False):
    """a @ b summed exactly enough for an oracle, and the bound on its rounding."""
    epsilon = TWOFOLD_EPS if twofold else EPS
    return a @ b, (a.shape[-1] + 8) * epsilon * (abs(a) @ abs(b))


SIZES = {
    "m": st.integers(1, 18),
    "d": st.one_of(st.integers(1, 70), st.sampled_from([256, 512, 1000, 2048, 2056, 4100])),
    "order": ORDERS,
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("other", ["same", "float32", "float64"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_project(machine, dtype, other):
    x_dtype = dtype if other == "same" else other

    @settings(max_examples=16)
    @given(columns=st.integers(0, 4), little=st.booleans(), float64=st.booleans(), **SIZES)
    def check(m, d, order, seed, columns, little, float64):
        machine.order, machine.seed, machine.little_float64 = order, seed, little
        rng = np.random.default_rng(seed)
        g, exact_g = stored(rng, (m, d), dtype)
        x, exact_x = stored(rng, (d, columns) if columns else (d,), x_dtype)
        product = rows.project(host_array(g), host_array(x), float64=float64, home=DeviceHome())
        twofold = little and not float64 and "float64" not in (dtype, x_dtype)
        assert ran(machine, "project twofold" if twofold else "project", "sum_parts")
        expected, bound = contract(exact_g, exact_x, twofold)
        assert product.dtype == np.float64
        assert product.shape == expected.shape
        assert (abs(host_view(product) - expected) <= bound).all()

    check()


@pytest.mark.parametrize("dtype", STORAGE)
def test_exchange_writes_the_row_it_reads(machine, dtype):
    @settings(max_examples=15)
    @given(where=st.floats(0, 0.999), **SIZES)
    def check(m, d, order, seed, where):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        g, _ = stored(rng, (m, d), dtype)
        row, exact_row = stored(rng, d, dtype)
        i = int(where * m)
        # The slot's old row does not matter: what is read there would spoil every sum.
        g[i] = np.nan
        ring = host_array(g)
        assert rows.exchanges(ring, host_array(row))
        product, norm2 = rows.exchange(ring, i, host_array(row), DeviceHome())
        assert ran(machine, "project", "sum_parts")
        assert host_view(norm2)[0] == pytest.approx(exact_row @ exact_row, rel=(d + 8) * EPS)
        expected_ring = g.copy()
        expected_ring[i] = row
        assert (host_view(ring) == expected_ring).all()
        expected, bound = contract(expected_ring.astype("float64"), exact_row)
        assert (abs(host_view(product) - expected) <= bound).all()

    check()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_exchange_keeps_the_row_where_the_new_one_is_not_finite(machine, rng, value):
    g, exact_g = stored(rng, (11, 2100), "float32")
    row, _ = stored(rng, 2100, "float32")
    row[77] = value
    for machine.order in ("forward", "backward", "random"):
        ring = host_array(g.copy())
        product, norm2 = rows.exchange(ring, 8, host_array(row), DeviceHome())
        assert not np.isfinite(host_view(norm2)[0])
        assert (host_view(ring) == g).all()
        expected, bound = contract(exact_g, exact_g[8])
        assert (abs(host_view(product) - expected) <= bound).all()


@pytest.mark.parametrize("out", ["same", "float32", "float64", None])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("threads", ["few", "many"])
def test_combine(machine, monkeypatch, dtype, out, threads):
    """With many threads wanted and few columns, the rows are cut into slices."""
    out = dtype if out == "same" else out
    monkeypatch.setattr(cuda_passes, "COMBINE_THREADS", 1 if threads == "few" else 1 << 17)
    monkeypatch.setattr(cuda_passes, "COMBINE_ROWS", 3)

    @settings(max_examples=10)
    @given(
        columns=st.integers(0, 4),
        alpha=st.sampled_from([None, 0.0, -0.7, 40.0]),
        little=st.booleans(),
        **SIZES,
    )
    def check(m, d, order, seed, columns, alpha, little):
        machine.order, machine.seed, machine.little_float64 = order, seed, little
        rng = np.random.default_rng(seed)
        g, exact_g = stored(rng, (m, d), dtype)
        c = rng.standard_normal((m, columns) if columns else (m,))
        base, exact_base = stored(rng, (d, columns) if columns else (d,), out or "float64")
        result = rows.combine(
            host_array(g),
            host_array(c),
            None if alpha is None else host_array(base),
            1.0 if alpha is None else alpha,
            dtype=None if out is None else NUMPY_DTYPES[out],
            float64=seed % 2 == 0,
        )
        sliced = threads == "many" and m >= 6
        twofold = little and seed % 2 and dtype != "float64"
        name = "combine twofold" if twofold else "combine"
        assert ran(machine, name, *(["sum_parts"] if sliced else []))
        expected, bound = contract(exact_g.T, c, twofold)
        if alpha is not None:
            expected = expected + alpha * exact_base
            bound += (m + 8) * EPS * abs(alpha * exact_base)
        bound += half_spacing(abs(expected) + bound, out or "float64")
        assert result.dtype == NUMPY_DTYPES[out or "float64"]
        assert result.shape == expected.shape
        assert (abs(host_view(result).astype("float64") - expected) <= bound).all()

    check()


def test_combine_stages_more_rows_than_shared_memory_holds(machine, monkeypatch, rng):
    g, exact_g = stored(rng, (1100, 5), "float32")
    c = rng.standard_normal((1100, 2))
    monkeypatch.setattr(cuda_passes, "COMBINE_THREADS", 1)  # one slice, of three tiles
    for machine.order in ("forward", "backward", "random"):
        y = rows.combine(host_array(g), host_array(c), None, 1.0, dtype=None, float64=True)
        assert ran(machine, "combine")
        expected, bound = contract(exact_g.T, c)
        assert (abs(host_view(y) - expected) <= bound).all()


def test_square_norm(machine, rng):
    for dtype in ("float32", "float64"):
        g, exact = stored(rng, 5000, dtype)
        norm2 = rows.square_norms(torch.from_numpy(g))
        assert ran(machine, "project", "sum_parts")
        assert float(norm2) == pytest.approx(exact @ exact, rel=5008 * EPS)


def inverse_problem(rng, m, shift, scale=1.0):
    g = scale * rng.standard_normal((m, 2 * m + 3))
    gram = g @ g.T
    gram = (gram + gram.T) / 2
    inverse = np.linalg.inv(gram + shift * np.eye(m))
    return g, gram, (inverse + inverse.T) / 2


def test_the_dual_inverse_follows_a_replaced_row(machine):
    @settings(max_examples=25)
    @given(
        m=st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 257, 300])),
        where=st.floats(0, 0.999),
        shift=st.sampled_from([1e-2, 1.0]),
        order=ORDERS,
        seed=st.integers(0, 2**31),
    )
    def check(m, where, shift, order, seed):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        g, gram, inverse = inverse_problem(rng, m, shift)
        i = int(where * m)
        g[i] = rng.standard_normal(g.shape[1])
        row = g @ g[i]
        held, held_gram = host_array(inverse), host_array(gram)
        failed = dense.replace(held, held_gram, i, host_array(row), shift)
        assert ran(machine, "dual_products", "dual_update")
        assert host_view(failed)[0] == 0
        gram[i, :] = gram[:, i] = row
        assert (host_view(held_gram) == gram).all()
        matrix = gram + shift * np.eye(m)
        updated = host_view(held)
        assert (updated == updated.T).all()
        # The perturbations of one update, seen through the old and through the new inverse.
        norms = np.linalg.norm(inverse, 2), np.linalg.norm(np.linalg.inv(matrix), 2)
        condition = max(norms) * max(np.linalg.norm(matrix, 2), np.linalg.norm(row))
        error = np.linalg.norm(updated - np.linalg.inv(matrix), 2)
        assert error <= 10 * m * EPS * condition * max(norms)

    check()


@pytest.mark.parametrize("damage", ["pivot", "nan", "schur"])
def test_a_replacement_that_rounding_forbids_leaves_the_inverse(machine, rng, damage):
    g, gram, inverse = inverse_problem(rng, 9, 0.1)
    row = g @ g[4]
    if damage == "pivot":
        inverse[4, 4] = -1.0
    elif damage == "nan":
        inverse[4, 4] = np.nan
    else:
        row[4] = -5.0
    held, held_gram = host_array(inverse.copy()), host_array(gram)
    failed = dense.replace(held, held_gram, 4, host_array(row), 0.1)
    assert host_view(failed)[0] == 1
    assert np.array_equal(host_view(held), inverse, equal_nan=True)
    assert (host_view(held_gram)[4] == row).all()
    assert (host_view(held_gram)[:, 4] == row).all()


def test_clamped_diagonal(machine):
    @settings(max_examples=25)
    @given(
        m=st.integers(1, 40),
        width=st.integers(1, 100),
        damping=st.sampled_from([1e-6, 1e-2, 1.0]),
        transposed=st.booleans(),
        order=ORDERS,
        seed=st.integers(0, 2**31),
    )
    def check(m, width, damping, transposed, order, seed):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        columns = rng.standard_normal((m, width))
        # Whitened rows of a true inverse, some of them spoilt beyond the range on either side.
        whitened = columns / np.sqrt(m * damping + (columns**2).sum(axis=0))
        whitened *= rng.choice([0.0, 0.5, 1.0, 1.5], width)
        diagonal, rest = dense.clamped_diagonal(
            DeviceHome(),
            host_array(whitened.T).T if transposed else host_array(whitened),
            host_array(columns),
            damping,
            m,
        )
        assert ran(machine, "clamped_diagonal")
        diagonal, rest = host_view(diagonal), host_view(rest)
        taken = (whitened**2).sum(axis=0)
        bound = (m + 8) * EPS * (1 + taken)
        assert (abs(rest - (1 - taken)) <= bound).all()
        low = 1 / (damping + (columns**2).sum(axis=0) / m)
        expected = np.clip((1 - taken) / damping, low, 1 / damping)
        slack = 1 + (m + 8) * EPS
        assert (diagonal >= low / slack).all()
        assert (diagonal <= 1 / damping * slack).all()
        assert (abs(diagonal - expected) <= bound / damping + low * (slack - 1)).all()

    check()


PAIRS = {
    "m": st.one_of(st.integers(1, 40), st.sampled_from([64, 130])),
    "d": st.integers(1, 70),
    "count": st.one_of(st.integers(1, 40), st.sampled_from([64, 100])),
    "order": ORDERS,
    "seed": st.integers(0, 2**31),
}


@pytest.mark.parametrize("dtype", STORAGE)
def test_columns_by_index(machine, monkeypatch, dtype):
    @settings(max_examples=15)
    @given(tall=st.booleans(), **PAIRS)
    def check(m, d, count, order, seed, tall):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        g, exact = stored(rng, (m, d), dtype)
        columns = rng.integers(0, d, count)
        with monkeypatch.context() as patch:
            if not tall:  # a grid that does not reach the last row
                patch.setattr(cuda_queries, "LARGEST_GRID_Y", 2)
            taken = rows.take(host_array(g), columns, DeviceHome())
        assert ran(machine, "take_columns")
        assert taken.dtype == np.float64
        assert (host_view(taken) == exact[:, columns]).all()

    check()


@pytest.mark.parametrize("dtype", STORAGE)
def test_pair_products(machine, dtype):
    @settings(max_examples=20)
    @given(transposed=st.booleans(), unused=st.integers(0, 3), **PAIRS)
    def check(m, d, count, order, seed, transposed, unused):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        g, exact = stored(rng, (m + unused, d), dtype)
        g[m:] = np.nan
        columns, right = rng.integers(0, d, count), rng.standard_normal((m, count))
        products = rows.pair_products(
            host_array(g),
            columns,
            host_array(right.T).T if transposed else host_array(right),
            DeviceHome(),
        )
        assert ran(machine, "pair_products")
        terms = exact[:m, columns] * right
        bound = (m + 8) * EPS * abs(terms).sum(axis=0)
        assert (abs(host_view(products) - terms.sum(axis=0)) <= bound).all()

    check()


@pytest.mark.parametrize("dtype", STORAGE)
def test_blocks(machine, dtype):
    @settings(max_examples=10)
    @given(
        m=st.integers(1, 20),
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
        damping=st.sampled_from([1e-3, 1.0]),
        order=ORDERS,
        seed=st.integers(0, 2**31),
    )
    def check(m, lengths, damping, order, seed):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        g, exact = stored(rng, (m, sum(lengths)), dtype)
        x, exact_x = stored(rng, sum(lengths), dtype)
        assert cuda_blocks.serves_blocks(host_array(g), max(lengths))
        inverses, failed = cuda_blocks.inverses(host_array(g), np.array(lengths), damping, m)
        y = cuda_blocks.product(inverses, np.array(lengths), host_array(x), dtype=g.dtype)
        assert ran(machine, "block_inverses", "block_product")
        assert not host_view(failed).any()
        start = 0
        for inverse, size in zip(host_view(inverses), lengths, strict=True):
            part = slice(start, start + size)
            matrix = damping * np.eye(size) + exact[:, part].T @ exact[:, part] / m
            expected = np.linalg.inv(matrix)
            # Elimination of a positive definite matrix without pivoting is off by its condition.
            bound = 10 * size * np.linalg.cond(matrix) * EPS * np.linalg.norm(expected, 2)
            assert (inverse[:size, :size] == inverse[:size, :size].T).all()
            assert np.linalg.norm(inverse[:size, :size] - expected, 2) <= bound
            product = expected @ exact_x[part]
            error = abs(host_view(y)[part].astype("float64") - product)
            bound *= np.linalg.norm(exact_x[part])
            assert (error <= bound + half_spacing(abs(product) + bound, dtype)).all()
            start += size

    check()


@pytest.mark.parametrize("width", [64, 65, 128])
def test_the_widest_blocks(machine, rng, width):
    g = rng.standard_normal((40, 2 * width))
    lengths = np.array([width, width])
    inverses, failed = cuda_blocks.inverses(host_array(g), lengths, 0.5, 40)
    assert not host_view(failed).any()
    for number in range(2):
        part = g[:, number * width : (number + 1) * width]
        matrix = 0.5 * np.eye(width) + part.T @ part / 40
        error = np.linalg.norm(host_view(inverses)[number] - np.linalg.inv(matrix), 2)
        assert error <= 10 * width * np.linalg.cond(matrix) * EPS / 0.5
    assert not cuda_blocks.serves_blocks(host_array(g), 129)


def test_a_block_that_rounding_makes_indefinite_is_told(machine):
    g = np.full((3, 4), 1e12)
    g[0, 1] = np.nan
    _, failed = cuda_blocks.inverses(host_array(g), np.array([2, 2]), 1e-9, 3)
    assert host_view(failed)[0] == 1


def sparse_rows(rng, m, d, width, k, dtype, capacity):
    """Random entries, rows that are not in use full of NaN, and the dense rows they stand for."""
    blocks = -(-d // width)
    indices = np.argsort(rng.random((blocks, capacity, width)), axis=2)[..., :k]
    indices = np.sort(indices, axis=2).astype("int16")
    values, exact = stored(rng, indices.shape, dtype)
    place = indices + width * np.arange(blocks)[:, None, None]
    values[place >= d] = exact[place >= d] = 0.0
    padded = np.zeros((m, blocks * width))
    for i in range(m):
        padded[i, place[:, i]] = exact[:, i]
    values[:, m:] = np.nan
    entries = sparse.Entries(host_array(indices), host_array(values), m, d, width)
    return entries, padded[:, :d]


@pytest.mark.parametrize("other", ["same", "float32", "float64"])
@pytest.mark.parametrize("dtype", STORAGE)
@pytest.mark.parametrize("slices", ["one", "many"])
def test_sparse_rows(machine, monkeypatch, dtype, other, slices):
    out = dtype if other == "same" else other
    monkeypatch.setattr(cuda_sparse, "SLICE_ROWS", 3 if slices == "many" else 64)

    @settings(max_examples=8)
    @given(
        m=st.integers(1, 30),
        width=st.one_of(st.integers(1, 70), st.sampled_from([700, 4096])),
        blocks=st.integers(1, 3),
        short=st.floats(0, 0.999),
        density=st.sampled_from([0.01, 0.1, 1.0]),
        spare=st.integers(0, 3),
        columns=st.integers(0, 2),
        alpha=st.sampled_from([None, 0.0, -0.7]),
        order=ORDERS,
        seed=st.integers(0, 2**31),
    )
    def check(m, width, blocks, short, density, spare, columns, alpha, order, seed):
        machine.order, machine.seed = order, seed
        rng = np.random.default_rng(seed)
        m = m if width < 700 else min(m, 7)
        d, k = blocks * width - int(short * width), int(np.ceil(density * width))
        entries, exact = sparse_rows(rng, m, d, width, k, dtype, m + spare)
        x, exact_x = stored(rng, (d, columns) if columns else (d,), out)
        product = sparse.project(entries, host_array(x), float64=False, home=DeviceHome())
        assert ran(machine, "sparse_project", "sum_parts")
        expected, bound = contract(exact, exact_x)
        assert product.dtype == np.float64
        assert (abs(host_view(product) - expected) <= bound).all()

        c = rng.standard_normal((m, columns) if columns else (m,))
        base = None if alpha is None else host_array(x)
        result = sparse.combine(
            entries, host_array(c), base, alpha or 0.0, dtype=NUMPY_DTYPES[out], float64=True
        )
        sliced = slices == "many" and m >= 6
        assert ran(machine, "sparse_combine", *(["sum_parts"] if sliced else []))
        expected, bound = contract(exact.T, c)
        if alpha is not None:
            expected = expected + alpha * exact_x
            bound += (m + 8) * EPS * abs(alpha * exact_x)
        bound += half_spacing(abs(expected) + bound, out)
        assert result.dtype == NUMPY_DTYPES[out]
        assert (abs(host_view(result).astype("float64") - expected) <= bound).all()

    check()


@pytest.mark.parametrize(
    "change",
    ["transposed", "strided", "integers", "empty", "many columns", "other dtype"],
)
def test_what_no_kernel_takes_is_left_to_the_generic_path(machine, rng, change):
    g, x = rng.standard_normal((6, 8)), rng.standard_normal(8)
    if change == "transposed":
        g = g.T.copy()
        assert not cuda_passes.serves_product(host_array(g).T, host_array(x))
        return
    if change == "strided":
        strided = host_array(g)[:, ::2]
        assert not cuda_passes.serves_product(strided, host_array(x[:4]))
        assert not cuda_queries.serves_columns(strided)
        right = host_array(rng.standard_normal((6, 3)))
        assert not cuda_queries.serves_pairs(strided, right)
        assert cuda_queries.serves_pairs(host_array(g), right)
        assert not cuda_queries.serves_pairs(host_array(g), right[:, ::2])
        assert not cuda_queries.serves_pairs(host_array(g), right[:, :0])
        return
    if change == "integers":
        g = g.astype("int64")
    elif change == "empty":
        g = g[:0]
    elif change == "many columns":
        x = rng.standard_normal((8, 5))
    else:
        x = x.astype("complex128")
    assert not cuda_passes.serves_product(host_array(g), host_array(x))
    assert not machine.launches


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_rows_that_start_anywhere_are_read_rightly(machine, rng, offset):
    """A view into an array need not start at a multiple of 16 bytes."""
    storage = rng.standard_normal(3 * 64 + offset).astype("float32")
    x = rng.standard_normal(64).astype("float32")
    g = host_array(storage)[offset:].reshape(3, 64)
    exact = storage[offset:].reshape(3, 64).astype("float64")
    product = rows.project(g, host_array(x), float64=False, home=DeviceHome())
    assert ran(machine, "project", "sum_parts")
    expected, bound = contract(exact, x.astype("float64"))
    assert (abs(host_view(product) - expected) <= bound).all()


def test_pytorch_tensors_take_the_same_kernels(machine, rng):
    for dtype in STORAGE:
        values, exact = stored(rng, (5, 40), dtype)
        g = torch.from_numpy(values.astype("float32")).to(getattr(torch, dtype))
        if dtype == "float64":
            g = torch.from_numpy(values)
        c = torch.from_numpy(rng.standard_normal(5))
        y = rows.combine(g, c, g[0], 2.0, dtype=g.dtype, float64=True)
        assert ran(machine, "combine")
        assert isinstance(y, torch.Tensor)
        assert y.dtype == g.dtype
        expected, bound = contract(exact.T, c.numpy())
        expected += 2.0 * exact[0]
        bound += 16 * EPS * abs(2.0 * exact[0])
        bound += half_spacing(abs(expected) + bound, dtype)
        assert (abs(y.double().numpy() - expected) <= bound).all()


def test_indices_pass_32_bits():
    """d·m beyond 2³¹: the chunks and the grid a row is cut into stay within a device's limits."""
    for d in [1, 2048, 10**7, 2**31 + 5, 2**36]:
        chunk = cuda_passes._chunk(d, cuda_passes.PROJECT_CHUNK)
        assert chunk * -(-d // chunk) >= d
        assert chunk % (256 * 8) == 0
        assert -(-d // chunk) <= cuda_passes.LARGEST_GRID_Y
