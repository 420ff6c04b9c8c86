"""Time the influence of all training samples on some queries against the Gram matrix it needs.

The floor is the plain Gram matrix of the float32 gradients, one product of BLAS. Run ``python
examples/benchmarks/influence.py``; at its full size the gradients take 2 GB, and the run some
minutes. ``--repeats 1`` takes every time once, without an act before that warms up.
"""

from __future__ import annotations

import argparse

import numpy as np
from measure import medians

from mfac_core.influence import Influence

DAMPING = 1e-2


def main(argv: list[str] | None = None) -> None:
    """Time set-up and scores, and print them as ratios."""
    parser = argparse.ArgumentParser(description="influence against the Gram matrix it needs")
    parser.add_argument("-m", type=int, default=5000, help="training samples")
    parser.add_argument("-d", type=int, default=100_000, help="parameters")
    parser.add_argument("-q", type=int, default=100, help="queries")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median counts")
    parser.add_argument("--quick", action="store_true", help="small")
    args = parser.parse_args(argv)
    m, d, q = (200, 4000, 10) if args.quick else (args.m, args.d, args.q)
    rng = np.random.default_rng(0)
    g, queries = (rng.standard_normal((n, d), dtype=np.float32) / 100 for n in (m, q))
    influence = Influence(g[: m // 10], damping=DAMPING)  # what is loaded on first use

    def set_up() -> None:
        nonlocal influence
        influence = Influence(g, damping=DAMPING)

    floor, start, scores, groups = medians(
        lambda: g @ g.T,
        set_up,
        lambda: influence.scores(queries),
        lambda: influence.with_damping(DAMPING).leave_out([range(m // 10)], queries),
        repeats=args.repeats,
        warm=args.repeats > 1,
    )
    print("| what | seconds | beside the plain Gram matrix |")
    print("| --- | --- | --- |")
    for what, taken in (
        (f"plain Gram matrix, m {m:,}, d {d:,}, float32", floor),
        ("set-up", start),
        (f"`scores` of {q} queries", scores),
        ("set-up and `scores`", start + scores),
        (f"`leave_out` of {m // 10} samples, for the same queries, A⁻¹ included", groups),
    ):
        print(f"| {what} | {taken:.2f} | {taken / floor:.2f} × |")


if __name__ == "__main__":
    main()
