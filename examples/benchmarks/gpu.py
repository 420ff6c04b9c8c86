"""What the CUDA kernels make of a card: Markdown on the terminal, JSON in a file.

Each kernel is timed against its floor, the bytes it must move over the bandwidth of a plain copy
measured in the same run, and against the libraries' way of doing the same. Times are medians by
the device's own clock. Needs CuPy and a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import mfac_core as mfac
from mfac_core._arrays import home_of
from mfac_core._ops import dense, rows, sparse
from mfac_core._ops.cuda import blocks as cuda_blocks

Act = Callable[[], object]
Row = dict[str, Any]
GIB = 2**30
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
    """A card, its clock, and how fast it copies."""

    def __init__(self, cupy: Any, repeats: int) -> None:
        self.cupy, self.repeats = cupy, repeats
        size = min(2 * GIB, self.free() // 4)
        source, target = (cupy.zeros(size // 4, "float32") for _ in range(2))
        self.bytes_per_ms = 2 * source.nbytes / self.time(lambda: cupy.copyto(target, source))

    def free(self) -> int:
        """Return the bytes that can be allocated."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        return int(self.cupy.cuda.runtime.memGetInfo()[0])

    def time(self, act: Act) -> float:
        """Return the median milliseconds of an act, after two to warm up."""
        cuda, times = self.cupy.cuda, []
        for repeat in range(self.repeats + 2):
            start, end = cuda.Event(), cuda.Event()
            start.record()
            act()
            end.record()
            end.synchronize()
            if repeat >= 2:
                times.append(cuda.get_elapsed_time(start, end))
        return statistics.median(times)

    def compare(self, what: str, act: Act, size: float, others: dict[str, Act]) -> Row:
        """Time an act that must move ``size`` bytes against its floor and against others."""
        ms = self.time(act)
        row: Row = {"what": what, "ms": ms}
        if size:
            row["floor_ms"] = size / self.bytes_per_ms
            row["times_floor"] = ms / row["floor_ms"]
        for name, other in others.items():
            row["against"], row["other_ms"] = name, self.time(other)
            row["times_other"] = ms / row["other_ms"]
        return row

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
    """Time the two passes over G."""
    cupy = card.cupy
    g = card.random(m, d, dtype)
    x, home = g[0].copy(), home_of(g)
    c = cupy.random.standard_normal(m)
    what = f"m {m}, d {d:,}, {dtype}"
    libraries = dtype != "bfloat16"  # CuPy multiplies no matrices of it
    weights = c.astype(dtype) if libraries else None
    gemv: dict[str, Act] = {"cuBLAS, G x": lambda: g @ x} if libraries else {}
    back: dict[str, Act] = {"cuBLAS, Gᵀc": lambda: g.T @ weights} if libraries else {}
    return [
        card.compare(
            f"project, {what}",
            lambda: rows.project(g, x, exact=False, home=home),
            g.nbytes,
            gemv,
        ),
        card.compare(f"exchange, {what}", lambda: rows.exchange(g, 3, x, home), g.nbytes, gemv),
        card.compare(
            f"combine, {what}",
            lambda: rows.combine(g, c, x, 2.0, dtype=g.dtype, exact=False),
            g.nbytes,
            back,
        ),
    ]


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
        card.compare(
            f"take_columns, {what}",
            lambda: rows.take(g, i, home_of(g)),
            count * m * (g.itemsize + 8),
            {"CuPy, take and astype": lambda: gathered(on_device)},
        ),
        card.compare(
            f"pair_products, {what}",
            lambda: rows.pair_products(g, i, right, home_of(g)),
            count * m * (g.itemsize + 8),
            {"CuPy, take, × and sum": lambda: (gathered(on_device) * right).sum(axis=0)},
        ),
        card.compare(
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
        card.compare(
            f"project, {what}",
            lambda: sparse.project(entries, noise, exact=True, home=home),
            size,
            {},
        ),
        card.compare(
            f"combine, {what}",
            lambda: sparse.combine(entries, c, None, 1.0, dtype=noise.dtype, exact=True),
            size,
            {},
        ),
        card.compare(
            f"append_matvec, {what}",
            lambda: window.append_matvec(cupy.roll(noise, 104_729 * next(steps))),
            2 * size,
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
    return [
        card.compare(
            f"update of the dual, m {m}",
            lambda: dense.replace(inverse, gram, 5, row, 1.0),
            2 * inverse.nbytes,
            against,
        )
    ]


def small_blocks(card: Card, m: int, width: int, count: int) -> list[Row]:
    """Time the inverses of small blocks against batched products and inverses of the libraries."""
    cupy = card.cupy
    g = card.random(m, width * count, "float32")
    lengths = np.full(count, width)
    identity = 1e-3 * cupy.eye(width)

    def batched() -> object:
        parts = g.reshape(m, count, width).transpose(1, 0, 2).astype("float64")
        return cupy.linalg.inv(cupy.matmul(parts.transpose(0, 2, 1), parts) / m + identity)

    return [
        card.compare(
            f"{count:,} blocks of {width}, m {m}",
            lambda: cuda_blocks.inverses(g, lengths, 1e-3, m),
            g.nbytes + 8 * count * width**2,
            {"batched cuBLAS and cuSOLVER": batched},
        )
    ]


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
    return [
        card.compare(f"append_matvec, {what}", lambda: step(check_finite=True), size, {}),
        card.compare(
            f"{RUN} × append_matvec(check_finite=False), {what}",
            lambda: run(check_finite=False),
            RUN * size,
            {"with check_finite=True": lambda: run(check_finite=True)},
        ),
    ]


def static_setup(card: Card, m: int, d: int) -> list[Row]:
    """Time the static set-up; its rate is d·m² operations over the time."""
    cupy = card.cupy
    g = card.random(m, d, "float32")
    square = cupy.random.standard_normal((8192, 8192), dtype="float32")
    gemm = 2 * 8192**3 / card.time(lambda: square @ square)
    row = card.compare(
        f"static set-up, m {m}, d {d:,}", lambda: mfac.InverseFisher(g, damping=1e-3), 0, {}
    )
    row["share_of_gemm_rate"] = d * m * m / row["ms"] / gemm
    return [row]


def markdown(results: list[Row]) -> str:
    """Return the results as a table."""
    lines = ["| what | ms | × floor | against | × its time |", "| --- | --- | --- | --- | --- |"]
    for row in results:
        floor = f"{row['times_floor']:.2f}" if "times_floor" in row else ""
        other = f"{row['times_other']:.2f}" if "times_other" in row else ""
        if "share_of_gemm_rate" in row:
            floor = f"{row['share_of_gemm_rate']:.0%} of the GEMM rate"
        lines.append(
            f"| {row['what']} | {row['ms']:.3f} | {floor} | {row.get('against', '')} | {other} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    options = parser.parse_args(argv)
    cupy = require_device()
    card = Card(cupy, repeats=3 if options.quick else 20)
    m = 64 if options.quick else 1024
    results: list[Row] = []
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        largest = card.free() * 7 // 10 // (size * m)
        sizes = [270_000] if options.quick else [270_000, 11_000_000, largest - largest % 8]
        for d in sizes:
            if d <= largest:
                results += passes(card, m, d, dtype)
                results += window_step(card, m, d, dtype)
    for count in (1, 4096):
        results += elements(card, m, 270_000, count, "float32")
    results += sparse_passes(card, m, 270_000 if options.quick else 11_000_000)
    results += dual_update(card, m)
    for width in (64, 128):
        results += small_blocks(card, m // 4, width, 64 if options.quick else 4096)
    results += static_setup(card, m, 100_000 if options.quick else 10_000_000)
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    report = {
        "device": device,
        "copy_bytes_per_ms": card.bytes_per_ms,
        "cupy": cupy.__version__,
        "cuda": cupy.cuda.runtime.runtimeGetVersion(),
        "results": results,
    }
    options.output.write_text(json.dumps(report, indent=1))
    print(f"{device}, copying {card.bytes_per_ms / 1e9:.2f} TB/s\n\n{markdown(results)}")


if __name__ == "__main__":
    main()
