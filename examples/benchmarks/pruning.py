"""Pruning by diagonal blocks against the paper's recursion, both on the CPU, in one run.

The recursion is the official one of M-FAC written as tightly as PyTorch allows: float32, in place,
all blocks at once. It inverts the blocks row by row and prunes in one stage by the paper's update.
Ours prunes by the exact joint update, in float64.

    python examples/benchmarks/pruning.py                 the table of docs/pruning.md
    python examples/benchmarks/pruning.py --busy 4        beside four processes that never rest
    python examples/benchmarks/pruning.py --file 25.5e6   the size of a ResNet-50, from a file
    python examples/benchmarks/pruning.py --file 25.5e6 --group 576   the same, filter by filter
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import medians

import mfac_core as mfac
from mfac_core.pruning import prune

DAMPING = 1e-5

CACHE = 1 << 21
"""Bytes of blocks that the recursion works on at a time: of several sizes the fastest here."""

SETTINGS = [(64, 128, 2**20), (16, 16, 2**18), (256, 128, 2**17), (512, 64, 2**16)]
"""Rows, length of a block, weights."""


def gradients(m: int, d: int) -> np.ndarray[Any, Any]:
    """Return rows like those of a network: norms over two orders, a few directions shared."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((m, d), dtype=np.float32)
    rows += rng.standard_normal((m, 8), dtype=np.float32) @ rng.standard_normal(
        (8, d), dtype=np.float32
    )
    rows *= np.logspace(-3, -1, m, dtype=np.float32)[:, None]
    return rows


class Recursion:
    """The paper's v_k and q_k, block by block: v_k = F_{k-1}⁻¹g_k, q_k = m + g_kᵀv_k.

    F⁻¹x = x/λ − Σ_k (v_kᵀx/q_k) v_k. All blocks at once, a cache's worth at a time.
    """

    def __init__(self, rows: torch.Tensor, size: int) -> None:
        m, d = rows.shape
        self.v = rows.reshape(m, -1, size).transpose(0, 1).contiguous()
        self.q = torch.empty(d // size, m, 1)
        some = max(CACHE // (4 * m * size), 1)
        for first in range(0, d // size, some):
            v, q = self.v[first : first + some], self.q[first : first + some]
            for k in range(m):
                g = v[:, k].clone()
                v[:, k] /= DAMPING
                if k:
                    before = v[:, :k]
                    c = (before * g[:, None]).sum(2, keepdim=True).div_(q[:, :k])
                    v[:, k] -= (before * c).sum(1)
                q[:, k, 0] = m + (g * v[:, k]).sum(1)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal."""
        return (1.0 / DAMPING - (self.v.square() / self.q).sum(1)).reshape(-1)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with a vector."""
        blocks = x.reshape(len(self.v), 1, -1)
        c = (self.v * blocks).sum(2, keepdim=True).div_(self.q)
        return x / DAMPING - (self.v * c).sum(1).reshape(-1)

    def prune(self, w: torch.Tensor, sparsity: float) -> torch.Tensor:
        """Remove the least salient weights, and add up their updates."""
        diagonal = self.diagonal()
        scores = w.square() / diagonal
        limit = torch.kthvalue(scores, round(sparsity * len(w))).values
        gone = scores <= limit
        return torch.where(gone, 0.0, w - self.product(torch.where(gone, w / diagonal, 0.0)))


def seconds(act: Callable[[], Any], repeats: int) -> float:
    """Return the least time of several."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(repeats: int) -> None:
    """Print times, and how many times as fast ours is."""
    print(
        "| m | B | d | recursion | prune, 1 stage | | 16 stages | set-up, then the recursion's "
        "| product, beside reading d·B numbers |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for m, size, d in SETTINGS:
        rows = gradients(m, d)
        w = np.random.default_rng(1).standard_normal(d, dtype=np.float32)
        g, there = torch.from_numpy(rows), torch.from_numpy(w)
        options: dict[str, Any] = {"sparsity": 0.5, "damping": DAMPING, "block_size": size}
        theirs, ours = medians(
            lambda g=g, s=size, x=there: Recursion(g, s).prune(x, 0.5),
            lambda w=w, r=rows, o=options: prune(w, r, stages=1, **o),
            repeats=repeats,
        )
        again, staged = medians(
            lambda w=w, r=rows, o=options: prune(w, r, stages=1, **o),
            lambda w=w, r=rows, o=options: prune(w, r, stages=16, **o),
            repeats=max(repeats // 2, 1),
        )

        def set_up(r: Any = rows, s: int = size) -> mfac.BlockInverseFisher:
            return mfac.BlockInverseFisher(r, damping=DAMPING, block_size=s)

        setting_up, alone = medians(set_up, lambda g=g, s=size: Recursion(g, s), repeats=repeats)
        inverse, numbers = set_up(), np.ones(d * size)
        product, reading = medians(
            lambda i=inverse, w=w: i @ w, lambda n=numbers: n @ n, repeats=3 * repeats
        )
        print(
            f"| {m} | {size} | {d:,} | {theirs:.3f} s | {ours:.3f} s | {theirs / ours:.1f} × | "
            f"{staged / again:.1f} × one | {setting_up:.3f} s, {alone / setting_up:.1f} × | "
            f"{product / reading:.2f} × |",
            flush=True,
        )


def neighbours(repeats: int, d: int = 2**17) -> None:
    """Print what one row more or less does around the length of a block."""
    print("\n| m | B | set-up | product | diagonal | prune, 4 stages |")
    print("| --- | --- | --- | --- | --- | --- |")
    w = np.random.default_rng(1).standard_normal(d, dtype=np.float32)
    for size in (16, 32, 128):
        for m in (size // 2, size - 1, size, size + 1, 2 * size):
            g = gradients(m, d)
            inverse = mfac.BlockInverseFisher(g, damping=DAMPING, block_size=size)
            options: dict[str, Any] = {"sparsity": 0.9, "damping": DAMPING, "block_size": size}
            times = [
                seconds(
                    lambda g=g, s=size: mfac.BlockInverseFisher(g, damping=DAMPING, block_size=s),
                    repeats,
                ),
                seconds(lambda i=inverse: i @ w, 3 * repeats),
                seconds(inverse.diagonal, repeats),
                seconds(lambda g=g, o=options: prune(w, g, stages=4, **o), repeats),
            ]
            print(f"| {m} | {size} | " + " | ".join(f"{t * 1e3:.1f} ms" for t in times) + " |")


def from_file(d: int, m: int, size: int, group: int) -> None:
    """Prune a network of this many weights, or groups of them, with its gradients in a file."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "rows.f32"
        rows = np.memmap(path, np.float32, "w+", shape=(m, d))
        for i in range(m):
            rows[i] = np.random.default_rng(i).standard_normal(d, dtype=np.float32) * 0.01
        rows.flush()
        del rows
        rows = np.memmap(path, np.float32, "r", shape=(m, d))
        w = np.random.default_rng(99).standard_normal(d, dtype=np.float32)
        options: dict[str, Any] = {"pattern": np.arange(d) // group} if group > 1 else {}
        before = anonymous()
        start = time.perf_counter()
        for first in range(0, d, 2**18):
            rows[:, first : first + 2**18].max()
        reading = time.perf_counter() - start
        with peak() as most:
            start = time.perf_counter()
            pruned = prune(
                w,
                rows,
                sparsity=0.9,
                damping=DAMPING,
                block_size=size,
                stages=1,
                progress=True,
                **options,
            )
            took = time.perf_counter() - start
        print(
            f"d = {d:,}, m = {m}, B = {size}, groups of {group}, one stage: {took:.1f} s, "
            f"reading the file once {reading:.1f} s, "
            f"anonymous memory +{(most[0] - before) / 2**30:.2f} GiB, "
            f"{pruned.mask.mean():.4f} kept"
        )


def anonymous() -> int:
    """Return the bytes of memory that are this process's own."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """Watch the memory in a thread."""
    most, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            most[0] = max(most[0], anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def spin() -> None:
    """Never rest."""
    while os.getppid() != 1:
        sum(range(10**6))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=0, help="processes that never rest beside it")
    parser.add_argument("--file", type=float, help="number of weights to prune from a file")
    parser.add_argument("--group", type=int, default=1, help="remove so many together, with --file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--neighbours", action="store_true", help="rows around a block's length")
    parser.add_argument("--smaller", type=int, default=1, help="divide the weights by this")
    given = parser.parse_args(argv)
    SETTINGS[:] = [(m, size, d // given.smaller) for m, size, d in SETTINGS]
    others = [multiprocessing.Process(target=spin, daemon=True) for _ in range(given.busy)]
    for process in others:
        process.start()
    try:
        if given.file:
            from_file(int(given.file), 64, 128, given.group)
        elif given.neighbours:
            neighbours(given.repeats)
        else:
            compare(given.repeats)
    finally:
        for process in others:
            process.terminate()


if __name__ == "__main__":
    main()
