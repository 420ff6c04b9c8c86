"""Time the influence of all training samples on some queries against the Gram matrix it needs.

The floor is the plain Gram matrix of the float32 gradients, one product of BLAS. Run ``python
examples/benchmarks/influence.py``; at its full size the gradients take 2 GB.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from mfac_core.influence import Influence


def seconds(function) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> None:
    """Time set-up and scores, and print them as ratios."""
    parser = argparse.ArgumentParser(description="influence against the Gram matrix it needs")
    parser.add_argument("-m", type=int, default=5000, help="training samples")
    parser.add_argument("-d", type=int, default=100_000, help="parameters")
    parser.add_argument("-q", type=int, default=100, help="queries")
    parser.add_argument("--quick", action="store_true", help="small")
    args = parser.parse_args(argv)
    m, d, q = (200, 4000, 10) if args.quick else (args.m, args.d, args.q)
    rng = np.random.default_rng(0)
    g, queries = (rng.standard_normal((n, d), dtype=np.float32) / 100 for n in (m, q))

    floor = seconds(lambda: g @ g.T)
    start = time.perf_counter()
    influence = Influence(g, damping=1e-2)
    set_up = time.perf_counter() - start
    scores = seconds(lambda: influence.scores(queries))
    groups = seconds(lambda: influence.leave_out([range(m // 10)], queries))

    print("| what | seconds | beside the plain Gram matrix |")
    print("| --- | --- | --- |")
    for what, taken in (
        (f"plain Gram matrix, m {m:,}, d {d:,}, float32", floor),
        ("set-up", set_up),
        (f"`scores` of {q} queries", scores),
        ("set-up and `scores`", set_up + scores),
        (f"`leave_out` of {m // 10} samples, for the same queries", groups),
    ):
        print(f"| {what} | {taken:.2f} | {taken / floor:.2f} × |")


if __name__ == "__main__":
    main()
