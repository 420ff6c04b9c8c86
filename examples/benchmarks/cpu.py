"""How close the passes come to what this machine can do, as a Markdown table.

Every figure is a ratio of medians measured alternately in this one process, since absolute times
on a shared machine say little. NumPy arrays, float32.
"""

from __future__ import annotations

import argparse
import itertools
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from measure import medians, network_rows, two_passes, unit_rows

import mfac_core as mfac
from mfac_core.pruning import prune
from mfac_core.testing import StaticRecursion


def static_setup(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time the static inverse's set-up and one product, and its memory."""
    g = unit_rows(rng, m, d)
    x = rng.standard_normal(d, dtype=np.float32)
    square = rng.standard_normal((2000, 2000), dtype=np.float32)

    def ours() -> object:
        return mfac.InverseFisher(g, damping=1e-4) @ x

    def recursion() -> object:
        return StaticRecursion(g, damping=1e-4, dtype=np.float32).matvec(x)

    ours_s, gemm_s = medians(ours, lambda: square @ square, repeats=repeats)
    recursion_s, again_s = medians(recursion, ours, repeats=5)
    gemm_rate = 2 * 2000**3 / gemm_s
    tracemalloc.start()
    ours()
    extra = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    what = f"set-up and a product, m {m}, d {d:,}"
    return [
        [what, "the paper's recursion in NumPy", f"{recursion_s / again_s:.1f} × as fast"],
        [what, "sgemm rate, for d·m² operations", f"{d * m * m / ours_s / gemm_rate:.0%}"],
        [what, "memory of the gradients", f"{1 + extra / g.nbytes:.2f} × (with them)"],
    ]


def damping_choice(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time the curve of 1,000 dampings, its Gram included."""
    g = unit_rows(rng, m, d)
    dampings = np.logspace(-8, 2, 1000)
    ours, setup = medians(
        lambda: mfac.damping_curve(g, dampings=dampings),
        lambda: mfac.InverseFisher(g, damping=1e-4),
        repeats=repeats,
    )
    what = f"curve of 1,000 dampings, m {m}, d {d:,}"
    return [[what, "one set-up", f"{ours / setup:.2f} × the time"]]


def product(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time F⁻¹x."""
    g = unit_rows(rng, m, d)
    x = rng.standard_normal(d, dtype=np.float32)
    inverse = mfac.InverseFisher(g, damping=1e-4)
    ours, floor = medians(lambda: inverse @ x, two_passes(g, rng), repeats=repeats)
    return [[f"F⁻¹x, m {m}, d {d:,}", "two bare gemv passes", f"{ours / floor:.2f} × the time"]]


def block_recursion(g: np.ndarray, size: int, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the static recursion's v_k and q_k of every diagonal block, all blocks at once."""
    m, d = g.shape
    split = np.ascontiguousarray(g.reshape(m, -1, size).transpose(1, 0, 2))
    v, q = np.empty_like(split), np.empty((d // size, m), g.dtype)
    for k in range(m):
        row = split[:, k]
        weights = (v[:, :k] @ row[:, :, None])[:, :, 0] / q[:, :k]
        v[:, k] = row / g.dtype.type(damping) - (weights[:, None, :] @ v[:, :k])[:, 0]
        q[:, k] = m + np.sum(row * v[:, k], axis=1)
    return v, q


def block_setup(rng: np.random.Generator, m: int, d: int, size: int) -> list[list[str]]:
    """Time the block-diagonal inverse's set-up."""
    g = rng.standard_normal((m, d), dtype=np.float32)
    ours, recursion = medians(
        lambda: mfac.BlockInverseFisher(g, damping=1e-3, block_size=size),
        lambda: block_recursion(g, size, 1e-3),
        repeats=7,
    )
    what = f"blocks of {size}, set-up, m {m}, d {d:,}"
    return [[what, "the paper's recursion, batched", f"{recursion / ours:.1f} × as fast"]]


def window_step(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time a step of a full sliding window."""
    g = unit_rows(rng, m, d)
    window = mfac.SlidingInverseFisher(d, m, damping=1e-4)
    for row in g:
        window.append(row)
    again = itertools.cycle(g)  # each in its own place: the window never holds one twice
    window.append_matvec(next(again))
    dual = np.eye(m) + g[:, :1000].astype(np.float64) @ g[:, :1000].T
    ours, floor, cholesky = medians(
        lambda: window.append_matvec(next(again)),
        two_passes(g, rng),
        lambda: np.linalg.cholesky(dual),
        repeats=repeats,
    )
    what = f"append_matvec, m {m}, d {d:,}"
    return [
        [what, "two bare gemv passes", f"{ours / floor:.2f} × the time"],
        [
            f"{what}, less those passes",
            "one float64 Cholesky of size m",
            f"{(ours - floor) / cholesky:.2f} × the time",
        ],
    ]


def sparse_step(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time a step of a full window of gradients compressed to 1 %, and what it holds."""
    g = unit_rows(rng, m, d)
    small = mfac.SparseSlidingInverseFisher(d, 1, density=0.01, damping=1e-4)
    for row in g[:2]:
        small.append_matvec(row)  # imports what it takes, which is not the window's memory
    tracemalloc.start()
    window = mfac.SparseSlidingInverseFisher(d, m, density=0.01, damping=1e-4)
    for row in g:
        window.append(row)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    again = itertools.cycle(g)
    ours, floor = medians(
        lambda: window.append_matvec(next(again)), two_passes(g, rng), repeats=repeats
    )
    what = f"append_matvec at density 1 %, m {m}, d {d:,}"
    return [
        [what, "two bare gemv passes over all of G", f"{ours / floor:.2f} × the time"],
        [f"that window, m {m}, d {d:,}", "memory of all of G", f"1/{g.nbytes / held:.0f}"],
    ]


def network(m: int, channels: int, dampings: Sequence[float], repeats: int) -> list[list[str]]:
    """Time set-up, product and a window's step on rows of a network; nothing without PyTorch.

    Squared norms far apart and a small λ ask for products in float64.
    """
    try:
        import torch
    except ImportError:
        return []
    g = network_rows(m, channels)
    libraries = {"NumPy": np.asarray, "PyTorch": torch.from_numpy}
    return [
        line
        for damping in dampings
        for library, convert in libraries.items()
        for line in network_in(library, convert, g, damping, repeats)
    ]


def network_in(
    library: str, convert: Callable[[Any], Any], rows: Any, damping: float, repeats: int
) -> list[list[str]]:
    """Time these rows in one library."""
    m, d = rows.shape
    g, x, c = (convert(a) for a in (rows, np.ones(d, np.float32), np.ones(m, np.float32)))
    inverse = mfac.InverseFisher(g, damping=damping)
    window = mfac.SlidingInverseFisher(d, m, damping=damping)
    for row in g:
        window.append(row)
    again = itertools.cycle(g)
    setup_s, gram_s = medians(
        lambda: mfac.InverseFisher(g, damping=damping), lambda: g @ g.T, repeats=repeats
    )
    product_s, step_s, floor_s = medians(
        lambda: inverse @ x,
        lambda: window.append_matvec(next(again)),
        lambda: (g @ x, c @ g),
        repeats=repeats,
    )
    several_s, sgemms_s = several(convert, g, inverse, 8, repeats)
    what = f"rows of a network in {library}, m {m}, d {d:,}, λ {damping:g}"
    return [
        [f"{what}: set-up", "a bare float32 Gram", f"{setup_s / gram_s:.1f} × the time"],
        [f"{what}: F⁻¹x", "two bare gemv passes", f"{product_s / floor_s:.1f} × the time"],
        [f"{what}: append_matvec", "those", f"{step_s / floor_s:.1f} × the time"],
        [f"{what}: 8 vectors", "two bare sgemms", f"{several_s / sgemms_s:.1f} × the time"],
    ]


def few_vectors(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time F⁻¹X for a few columns."""
    g = unit_rows(rng, m, d)
    inverse = mfac.InverseFisher(g, damping=1e-4)
    lines = []
    for k in (2, 8, 32):
        ours, floor = several(np.asarray, g, inverse, k, repeats)
        what = f"F⁻¹X, m {m}, d {d:,}, {k} vectors"
        lines.append([what, "two bare sgemms", f"{ours / floor:.2f} × the time"])
    return lines


def several(
    convert: Callable[[Any], Any], g: Any, inverse: mfac.InverseFisher, k: int, repeats: int
) -> list[float]:
    """Return the seconds of a product with k columns, and of two sgemms of its shapes."""
    rng = np.random.default_rng(0)
    m, d = g.shape
    x, c = (convert(rng.standard_normal((n, k), dtype=np.float32)) for n in (d, m))
    return medians(lambda: inverse @ x, lambda: (g @ x, g.T @ c), repeats=repeats)


def few_parameters(rng: np.random.Generator, m: int, d: int, repeats: int) -> list[list[str]]:
    """Time a step of a window with more rows than parameters."""
    g = rng.standard_normal((m, d))
    window = mfac.SlidingInverseFisher(d, m, damping=1e-3)
    for row in g:
        window.append(row)
    again = itertools.cycle(g)
    ours, dense = medians(
        lambda: window.append_matvec(next(again)),
        lambda: np.linalg.solve(1e-3 * np.eye(d) + g.T @ g / m, next(again)),
        repeats=repeats,
    )
    what = f"append_matvec, m {m}, d {d:,}"
    return [[what, "forming F and one dense solve", f"{ours / dense:.2f} × the time"]]


def pruning_stages(rng: np.random.Generator, m: int, d: int, stages: int) -> list[list[str]]:
    """Time pruning to 90 %, beside the masked Gram that every stage at least stands for."""
    # Gradients of single samples differ much in length: the Gram then has to be exact.
    g = unit_rows(rng, m, d) * np.logspace(-3, 0, m, dtype=np.float32)[:, None]
    w = rng.standard_normal(d, dtype=np.float32)
    kept = [rng.permutation(d)[: int(d * 0.1 ** (k / stages))] for k in range(stages)]

    def grams() -> None:
        for columns in kept:
            masked = g[:, columns].astype(np.float64)
            masked @ masked.T

    def ours() -> object:
        return prune(w, g, sparsity=0.9, damping=1e-6, stages=stages)

    ours_s, grams_s = medians(ours, grams, repeats=3)
    what = f"pruning in {stages} stages, m {m}, d {d:,}"
    return [[what, "a masked float64 Gram a stage", f"{ours_s / grams_s:.2f} × the time"]]


def optimizer_step(
    rng: np.random.Generator, m: int, tensors: int, size: int, repeats: int
) -> list[list[str]]:
    """Time a step of the PyTorch optimiser against that of its window; nothing without PyTorch."""
    try:
        import torch
    except ImportError:
        return []
    from mfac_core.torch import MFAC

    rows = []
    d = tensors * size
    gradients = itertools.cycle(torch.from_numpy(unit_rows(rng, m, d)))
    g = torch.zeros(d)
    for name, damping in (("MFAC.step", 1e-3), ("MFAC.step, scale-free", None)):
        parameters = [torch.nn.Parameter(torch.zeros(15, size // 15)) for _ in range(tensors)]
        for p, piece in zip(parameters, g.split(size), strict=True):
            p.grad = piece.view(p.shape)
        optimizer = MFAC(parameters, window_size=m, damping=damping, momentum=0.9)

        def step(optimizer: MFAC = optimizer) -> None:
            g.copy_(next(gradients))
            optimizer.step()

        for _ in range(m):
            step()
        window = optimizer.window

        def append(window: mfac.SlidingInverseFisher = window) -> None:
            g.copy_(next(gradients))
            window.append_matvec(g)

        step_s, append_s = medians(step, append, repeats=repeats)
        what = f"{name}, m {m}, d {d:,}"
        rows.append([what, "append_matvec of its window", f"{step_s / append_s:.2f} × the time"])
    return rows


def measured(rng: np.random.Generator, scale: int, repeats: int) -> Iterator[list[list[str]]]:
    """Yield the lines of one act after the other."""
    yield static_setup(rng, 512 // scale, 40_000 // scale, repeats)
    yield block_setup(rng, 256 // scale, 32_768 // scale // 64 * 64, 64)
    yield block_setup(rng, 256 // scale, 32_768 // scale // 128 * 128, 128)
    yield damping_choice(rng, 512 // scale, 40_000 // scale, repeats)
    yield product(rng, 256 // scale, 400_000 // scale, repeats)
    yield few_vectors(rng, 256 // scale, 100_000 // scale, repeats)
    yield window_step(rng, 1024 // scale, 150_000 // scale, 2 * repeats)
    yield window_step(rng, 1024 // scale, 20_000 // scale, 2 * repeats)
    yield few_parameters(rng, 1024, 50, repeats)
    yield sparse_step(rng, 256 // scale, 1_000_000 // scale, repeats)
    yield network(256 // scale, 72 if scale == 1 else 12, (1e-3, 1e-6), repeats)
    yield pruning_stages(rng, 512 // scale, 20_000 // scale, 16)
    yield optimizer_step(rng, 256 // scale, 60, 4_500 // scale, 4 * repeats)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    scale, repeats = (50, 3) if options.quick else (1, 15)

    print("| what | against | measured |\n| --- | --- | --- |")
    for rows in measured(rng, scale, repeats):
        for row in rows:
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
