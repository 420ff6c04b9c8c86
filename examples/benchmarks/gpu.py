"""What the CUDA kernels make of a card: Markdown on the terminal, JSON in a file.

Each kernel is timed against its floor and against the libraries' way of doing the same. The floor
is what must be moved or computed at the least, over a rate measured in the same run: a plain copy
in memory, a copy within the L2 cache, a matrix product in float64 or float32. Times are of many
acts between two events of the device, divided by their number; the host's time to launch one
stands beside them. Each section is written as soon as it is known; where one fails, the others go
on. Needs CuPy and a CUDA device.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import mfac_core as mfac
from mfac_core._arrays import home_of
from mfac_core._ops import _int8_gram, dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks

Act = Callable[[], object]
Row = dict[str, Any]
GIB = 2**30
SECTOR = 32
"""Bytes of memory that are read at the least."""
ENOUGH_MS = 20.0
RUN = 8
"""Steps in a row, to see what it is worth that the host need not wait between them."""


def require_device() -> Any:
    """Return CuPy, or say what is missing and leave."""
    try:
        import cupy
    except ImportError:
        sys.exit("this benchmark needs CuPy: python -m pip install 'mfac_core[cuda13]'")
    if not cupy.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device, and CuPy sees none; nothing was measured")
    return cupy


class Card:
    """A card, its clock, and how fast it copies and multiplies."""

    def __init__(self, cupy: Any, repeats: int) -> None:
        self.cupy, self.repeats = cupy, repeats
        self.bytes_per_ms = self.copied(min(2 * GIB, self.free() // 8))
        self.l2_bytes = int(cupy.cuda.Device().attributes["L2CacheSize"])
        self.l2_bytes_per_ms = self.copied(self.l2_bytes // 4)  # source and target: half of it
        self.gemm = {dtype: self.multiplied(dtype) for dtype in ("float32", "float64")}
        self.free()

    def copied(self, size: int) -> float:
        """Return the bytes moved in a millisecond, read and written, by a copy of so many."""
        source, target = (self.cupy.zeros(size // 4, "float32") for _ in range(2))
        return float(2 * source.nbytes / self.time(lambda: self.cupy.copyto(target, source))[0])

    def multiplied(self, dtype: str) -> float:
        """Return the operations a millisecond of a matrix product, two for each multiplication."""
        square = self.cupy.random.standard_normal((4096, 4096)).astype(dtype)
        return 2 * 4096**3 / self.time(lambda: square @ square)[0]

    def free(self) -> int:
        """Return the bytes that can be allocated."""
        gc.collect()
        self.cupy.get_default_memory_pool().free_all_blocks()
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def time(self, act: Act) -> tuple[float, float]:
        """Return the milliseconds of an act on the device and on the host: medians, when warm.

        Each is of as many acts between two events as take some milliseconds.
        """
        self._between(act, 2)
        count = max(1, min(100, int(ENOUGH_MS / max(self._between(act, 1)[0], 1e-3))))
        pairs = [self._between(act, count) for _ in range(self.repeats)]
        device, host = (statistics.median(values) / count for values in zip(*pairs, strict=True))
        return device, host

    def _between(self, act: Act, count: int) -> tuple[float, float]:
        cuda = self.cupy.cuda
        start, end = cuda.Event(), cuda.Event()
        start.record()
        began = time.perf_counter()
        for _ in range(count):
            act()
        host = 1e3 * (time.perf_counter() - began)
        end.record()
        end.synchronize()
        return float(cuda.get_elapsed_time(start, end)), host

    def compare(self, what: str, act: Act, floor_ms: float, others: dict[str, Act]) -> list[Row]:
        """Time an act against the least it can take (0: not known), and against each other way."""
        ms, host_ms = self.time(act)
        row: Row = {"what": what, "ms": ms, "host_ms": host_ms}
        if floor_ms:
            row |= {"floor_ms": floor_ms, "times_floor": ms / floor_ms}
        rows = []
        for name, other in others.items():
            other_ms = self.time(other)[0]
            rows.append(
                {**row, "against": name, "other_ms": other_ms, "times_other": ms / other_ms}
            )
        return rows or [row]

    def moved(self, size: float) -> float:
        """Return the milliseconds in which so many bytes come from memory or go there."""
        return size / self.bytes_per_ms

    def random(self, m: int, d: int, dtype: str) -> Any:
        """Return random rows of norm about 1, in a dtype; bfloat16 by its bits."""
        scale = self.cupy.float32(d**-0.5)
        if dtype == "bfloat16":
            import ml_dtypes

            g = self.cupy.empty((m, d), ml_dtypes.bfloat16)
        else:
            g = self.cupy.empty((m, d), dtype)
        for i in range(m):
            row = self.cupy.random.standard_normal(d, dtype="float32") * scale
            if dtype == "bfloat16":  # cut to its upper half
                bits = (row.view("uint32") >> 16).astype("uint16")
                g.view("uint16")[i] = bits
            else:
                g[i] = row
        return g


def passes(card: Card, m: int, d: int, dtype: str) -> list[Row]:
    """Time the two passes over G, against those of cuBLAS and PyTorch."""
    cupy = card.cupy
    g = card.random(m, d, dtype)
    x, home = g[0].copy(), home_of(g)
    c = cupy.random.standard_normal(m)
    what = f"m {m}, d {d:,}, {dtype}"
    forth: dict[str, Act] = {}
    back: dict[str, Act] = {}
    if dtype != "bfloat16":  # CuPy multiplies no matrices of it
        weights = c.astype(dtype)
        forth["cuBLAS, G x"] = lambda: g @ x
        back["cuBLAS, Gᵀc"] = lambda: g.T @ weights
    if torch := torch_on_device():
        g2, x2 = torch.from_dlpack(g), torch.from_dlpack(x)
        c2 = torch.from_dlpack(c).to(g2.dtype)
        forth["PyTorch, G x"] = lambda: g2 @ x2
        back["PyTorch, Gᵀc"] = lambda: g2.T @ c2
    floor = card.moved(g.nbytes)
    project = functools.partial(rows.project, g, x, home=home)
    combine = functools.partial(rows.combine, g, c, x, 2.0, dtype=g.dtype)
    # The same where the card has much float64; else the others are sums in two float32.
    forth["sums in float64"] = lambda: project(float64=True)
    back["sums in float64"] = lambda: combine(float64=True)
    return [
        *card.compare(f"project, {what}", lambda: project(float64=False), floor, forth),
        *card.compare(f"exchange, {what}", lambda: rows.exchange(g, 3, x, home), floor, {}),
        *card.compare(f"combine, {what}", lambda: combine(float64=False), floor, back),
    ]


def torch_on_device() -> Any:
    """Return PyTorch where its build has this device, else None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def elements(card: Card, m: int, d: int, count: int, dtype: str) -> list[Row]:
    """Time elements of F⁻¹, and the kernels in them, against columns gathered by CuPy."""
    cupy = card.cupy
    g = card.random(m, d, dtype)
    i, j = np.random.default_rng(0).integers(0, d, (2, count))
    on_device = cupy.asarray(i)
    inverse = mfac.InverseFisher(g, damping=1e-3)
    right = cupy.random.standard_normal((m, count))
    dual = cupy.linalg.inv(inverse.dual)
    what = f"{count:,} elements, m {m}, d {d:,}, {dtype}"

    def gathered(columns: Any) -> Any:
        return cupy.take(g, cupy.asarray(columns), axis=1).astype("float64")

    def by_library() -> object:
        inner = (gathered(i) * (dual @ gathered(j))).sum(axis=0)
        return (cupy.asarray(i == j) - inner) / 1e-3

    return [
        *card.compare(
            f"take_columns, {what}",
            lambda: rows.take(g, i, home_of(g)),
            card.moved(count * m * (SECTOR + 8)),
            {"CuPy, take and astype": lambda: gathered(on_device)},
        ),
        *card.compare(
            f"pair_products, {what}",
            lambda: rows.pair_products(g, i, right, home_of(g)),
            card.moved(count * m * (SECTOR + 8)),
            {"CuPy, take, × and sum": lambda: (gathered(on_device) * right).sum(axis=0)},
        ),
        *card.compare(
            f"entries, {what}",
            lambda: inverse.entries(i, j),
            0,
            {"CuPy, with A⁻¹ known": by_library},
        ),
    ]


def sparse_passes(card: Card, m: int, d: int) -> list[Row]:
    """Time the two passes over a full window at density 1 %, against their entries and vectors."""
    cupy = card.cupy
    window = mfac.SparseSlidingInverseFisher(d, m, density=0.01, damping=1e-3)
    noise = card.random(1, d, "float32")[0]
    for i in range(m):
        window.append(cupy.roll(noise, 7919 * i))
    entries, home = window._rows.entries, window._rows.home
    c = cupy.random.standard_normal(m)
    size = entries.indices.nbytes + entries.values.nbytes + noise.nbytes
    what = f"m {m}, d {d:,}, density 1 %"
    steps = iter(range(10**9))
    return [
        *card.compare(
            f"project, {what}",
            lambda: sparse.project(entries, noise, float64=True, home=home),
            card.moved(size),
            {},
        ),
        *card.compare(
            f"combine, {what}",
            lambda: sparse.combine(entries, c, None, 1.0, dtype=noise.dtype, float64=True),
            card.moved(size),
            {},
        ),
        *card.compare(
            f"append_matvec, {what}",
            lambda: window.append_matvec(cupy.roll(noise, 104_729 * next(steps))),
            card.moved(2 * size),
            {},
        ),
    ]


def dual_update(card: Card, m: int) -> list[Row]:
    """Time the exchange of a row of the dual and its inverse, against factoring it anew."""
    cupy = card.cupy
    g = cupy.random.standard_normal((m, 2 * m)) / (2 * m) ** 0.5
    gram, identity = g @ g.T, cupy.eye(m)
    inverse = cupy.linalg.inv(gram + identity)
    inverse = cupy.ascontiguousarray((inverse + inverse.T) / 2)
    row = gram[5].copy()
    against: dict[str, Act] = {
        "cuSOLVER, a Cholesky": lambda: cupy.linalg.cholesky(gram + identity)
    }
    moved = 3 * inverse.nbytes  # the inverse: read for its product, read and written for the update
    rate = card.l2_bytes_per_ms if inverse.nbytes * 2 <= card.l2_bytes else card.bytes_per_ms
    return card.compare(
        f"update of the dual, m {m}",
        lambda: dense.replace(inverse, gram, 5, row, 1.0),
        moved / rate,
        against,
    )


def small_blocks(card: Card, m: int, width: int, count: int) -> list[Row]:
    """Time the inverses of small blocks against batched products and inverses of the libraries."""
    cupy = card.cupy
    g = card.random(m, width * count, "float32")
    lengths = np.full(count, width)
    identity = 1e-3 * cupy.eye(width)

    def batched() -> object:
        parts = g.reshape(m, count, width).transpose(1, 0, 2).astype("float64")
        return cupy.linalg.inv(cupy.matmul(parts.transpose(0, 2, 1), parts) / m + identity)

    operations = count * width**2 * (m + width)  # half of a product, and of an elimination
    moved = card.moved(g.nbytes + 8 * count * width**2)
    return card.compare(
        f"{count:,} blocks of {width}, m {m}",
        lambda: cuda_blocks.inverses(g, lengths, 1e-3, m),
        max(moved, operations / card.gemm["float64"]),
        {"batched cuBLAS and cuSOLVER": batched},
    )


def window_step(card: Card, m: int, d: int, dtype: str) -> list[Row]:
    """Time a step of a full window against two reads of G, with the wait in it and without."""
    g = card.random(2, d, dtype)
    window = mfac.SlidingInverseFisher(d, m, damping=1e-3)
    noise = card.random(1, d, dtype)[0]
    for i in range(m + 2):
        # Rolled by a prime each time, one random row serves as many.
        window.append(card.cupy.roll(noise, 7919 * i))
    steps = iter(range(10**9))
    size = 2 * m * d * g.itemsize
    del g

    def step(*, check_finite: bool) -> object:
        g = card.cupy.roll(noise, 104_729 * next(steps))
        return window.append_matvec(g, check_finite=check_finite)

    def run(*, check_finite: bool) -> None:
        for _ in range(RUN):
            step(check_finite=check_finite)

    what = f"m {m}, d {d:,}, {dtype}"
    others = {} if dtype == "bfloat16" else by_hand(card, window._rows.array, noise)
    return [
        *card.compare(
            f"{RUN} × append_matvec(check_finite=False), {what}",
            lambda: run(check_finite=False),
            card.moved(RUN * size),
            {"with check_finite=True": lambda: run(check_finite=True)},
        ),
        # The last: what is done by hand changes the rows behind the window's back.
        *card.compare(
            f"append_matvec, {what}", lambda: step(check_finite=True), card.moved(size), others
        ),
    ]


def by_hand(card: Card, ring: Any, x: Any) -> dict[str, Act]:
    """Return a step of a full window with a fresh Cholesky, and by the paper's recursion.

    The recursion keeps the products of all gradients, and goes through the coefficients of the new
    one row by row: m launches of vectors of length m. It runs in float64, as the dual does.
    """
    import cupyx.scipy.linalg

    cupy, m = card.cupy, len(ring)
    gram = (ring @ ring.T).astype("float64")
    damping = 1e-3

    def products() -> Any:
        ring[3] = x
        new = (ring @ x).astype("float64")
        gram[3, :] = gram[:, 3] = new
        return new

    def back(weights: Any) -> Any:
        return (x - ring.T @ weights.astype(ring.dtype)) / damping

    def cholesky() -> object:
        new = products()
        factor = cupy.linalg.cholesky(gram + m * damping * cupy.eye(m))
        solve = cupyx.scipy.linalg.solve_triangular
        half = solve(factor, new, lower=True, check_finite=False)
        return back(solve(factor.T, half, lower=False, check_finite=False))

    def recursion() -> object:
        new = products()
        d_matrix, b = gram / damping, new / damping
        for i in range(m):
            scaled = d_matrix[i] / (m + d_matrix[i, i])
            d_matrix[i + 1 :] -= scaled[i + 1 :, None] * d_matrix[i][None, :]
            b[i + 1 :] -= scaled[i + 1 :] * b[i]
        unit = cupy.triu(d_matrix, 1) / (m + cupy.diagonal(d_matrix))[:, None] + cupy.eye(m)
        weights = b / (m + cupy.diagonal(d_matrix))
        solve = cupyx.scipy.linalg.solve_triangular
        return back(solve(unit, weights, lower=False, check_finite=False))

    return {"by hand, a fresh Cholesky": cholesky, "the paper's recursion": recursion}


def static_setup(card: Card, m: int, d: int) -> list[Row]:
    """Time the static set-up; its floor is a matrix product of d·m² multiplications."""
    g = card.random(m, d, "float32")
    floor = 2 * d * m * m / card.gemm["float32"]
    measured = card.compare(
        f"static set-up, m {m}, d {d:,}", lambda: mfac.InverseFisher(g, damping=1e-3), floor, {}
    )
    return [{**row, "share_of_gemm_rate": row["floor_ms"] / row["ms"]} for row in measured]


def grams(card: Card, m: int, d: int) -> list[Row]:
    """Time the Gram by int8 products against those of float64 and float32; see ``_int8_gram``.

    Its floor is what cuBLAS writes and the sum reads: nine matrices of int32 a block of columns.
    """
    g = card.random(m, d, "float32")
    home = home_of(g)
    blocks = -(-d // _int8_gram.COLUMNS)
    return card.compare(
        f"Gram by int8 products, m {m}, d {d:,}",
        lambda: _int8_gram.gram(g, home),
        card.moved(2 * 9 * 4 * m * m * blocks),
        {
            f"{name} products": functools.partial(
                rows.gram, g, float64=name == "float64", home=home
            )
            for name in ("float64", "float32")
        },
    )


def markdown(results: list[Row]) -> str:
    """Return the results as a table."""
    lines = [
        "| what | ms | host ms | × floor | against | × its time |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in results:
        floor = f"{row['times_floor']:.2f}" if "times_floor" in row else ""
        other = f"{row['times_other']:.2f}" if "times_other" in row else ""
        if "share_of_gemm_rate" in row:
            floor = f"{row['share_of_gemm_rate']:.0%} of the GEMM rate"
        times = f"{row['ms']:.3f} | {row['host_ms']:.3f}"
        lines.append(f"| {row['what']} | {times} | {floor} | {row.get('against', '')} | {other} |")
    return "\n".join(lines)


Section = tuple[str, Callable[[], list[Row]]]


def sections(card: Card, *, quick: bool) -> Iterator[Section]:
    """Yield what is measured, by name; sizes are chosen when their turn has come."""
    m = 64 if quick else 1024
    sizes = [2_724, 270_000] if quick else [270_000, 272_474, 11_000_000, 11_173_962]
    yield "dual", lambda: dual_update(card, m)
    for width in (64, 128):
        count = 64 if quick else 4096
        yield f"blocks {width}", functools.partial(small_blocks, card, m // 4, width, count)
    for count in (1, 4096):
        act = functools.partial(elements, card, m, 270_000, count, "float32")
        yield f"elements {count}", act
    yield "sparse", lambda: sparse_passes(card, m, 270_000 if quick else 11_000_000)
    yield "gram", lambda: grams(card, m, 100_000 if quick else 1_000_000)
    yield "static", lambda: static_setup(card, m, 100_000 if quick else 5_000_000)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        largest = card.free() * 6 // 10 // (size * m)
        for d in sizes if quick else [*sizes, largest - largest % 8]:
            if d <= largest:
                yield f"passes {dtype} {d}", functools.partial(passes, card, m, d, dtype)
                yield f"window {dtype} {d}", functools.partial(window_step, card, m, d, dtype)


def measure(
    chosen: Iterable[Section], about: dict[str, Any], output: Path, clean: Callable[[], object]
) -> list[Row]:
    """Run sections one after another; write after each what is known, and where one has failed."""
    results: list[Row] = []
    failures: dict[str, str] = {}
    for name, act in chosen:
        try:
            results += act()
        except Exception:
            failures[name] = traceback.format_exc()
            print(f"{name} failed:\n{failures[name]}", file=sys.stderr)
        clean()
        report = {**about, "results": results, "failures": failures}
        unfinished = output.with_suffix(".tmp")
        unfinished.write_text(json.dumps(report, indent=1))
        unfinished.replace(output)
    return results


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args(argv)
    cupy = require_device()
    card = Card(cupy, repeats=3 if options.quick else 7)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    about = {
        "device": device,
        "copy_bytes_per_ms": card.bytes_per_ms,
        "l2_copy_bytes_per_ms": card.l2_bytes_per_ms,
        "gemm_operations_per_ms": card.gemm,
        "cupy": cupy.__version__,
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
    }
    results = measure(sections(card, quick=options.quick), about, options.output, card.free)
    print(f"{device}, copying {card.bytes_per_ms / 1e9:.2f} TB/s\n\n{markdown(results)}")


if __name__ == "__main__":
    main()
