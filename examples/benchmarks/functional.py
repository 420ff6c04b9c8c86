"""The window under jax.jit: how its passes compare with bare ones, and its error, as two tables.

Times are ratios of medians measured alternately in this one process. Errors are of F⁻¹g for the
newest gradient, relative, against a dense float64 inverse. On a CPU with few cores the host's
BLAS, which solves the small system when x64 is off, takes the cores from XLA: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mfac_core import functional
from mfac_core.testing import dense_inverse

MODES = {"off": False, "on": True}
DAMPINGS = (1e-2, 1e-4, 1e-6)
NOISES = {"random": None, "base + 10 % noise": 0.1, "base + 0.1 % noise": 1e-3, "all equal": 0.0}


def medians(*acts: Callable[[], object], repeats: int) -> list[float]:
    """Return the median seconds of each act, all of them taken in turn."""
    times: list[list[float]] = [[] for _ in acts]
    for act in acts:
        act()
    for _ in range(repeats):
        for act, seconds in zip(acts, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(act())
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def step_row(
    rng: np.random.Generator, m: int, d: int, x64: str, equal: bool, repeats: int
) -> list[str]:
    """Time a donated step, and ask the compiler for its memory."""
    state = functional.init(d, m, damping=1e-3)
    window = jnp.asarray(rng.standard_normal((m, d), dtype=np.float32))
    g, c = window[0], window[:, 0]
    fresh = itertools.cycle([g] if equal else list(window[:repeats]))
    step = jax.jit(functional.append_matvec, donate_argnums=0).lower(state, g).compile()
    project = jax.jit(lambda window, g: jnp.matmul(window, g, precision="highest"))
    combine = jax.jit(lambda window, c: jnp.matmul(c, window, precision="highest"))
    memory = step.memory_analysis().temp_size_in_bytes / window.nbytes

    def ours() -> object:
        nonlocal state
        state, y = step(state, next(fresh))
        return y

    ours_s, bare_s = medians(
        ours, lambda: (project(window, g), combine(window, c)), repeats=repeats
    )
    what = f"m {m}, d {d:,}, {'equal' if equal else 'random'} gradients"
    return [what, x64, f"{ours_s / bare_s:.2f} × the time", f"{memory:.1%}"]


def errors(rng: np.random.Generator, m: int, d: int, noise: float | None) -> list[str]:
    """Measure the error of a full window for each damping, relative to the mean ‖g‖²."""
    gradients = rng.standard_normal((m + 5, d))
    if noise is not None:
        gradients = rng.standard_normal(d) + noise * gradients
    gradients = gradients.astype(np.float32)
    squares = np.mean(np.sum(gradients.astype(np.float64) ** 2, axis=1))
    step = jax.jit(functional.append_matvec, donate_argnums=0)
    found = []
    for damping in DAMPINGS:
        state = functional.init(d, m, damping=damping * squares)
        for g in gradients:
            state, y = step(state, g)
        dense = dense_inverse(gradients[-m:], damping=float(state.damping))
        exact = dense @ gradients[-1]
        found.append(f"{np.linalg.norm(np.asarray(y) - exact) / np.linalg.norm(exact):.0e}")
    return found


def print_table(*rows: list[str]) -> None:
    """Print Markdown, the first row its header."""
    for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]):
        print(f"| {' | '.join(row)} |")


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    rng = np.random.default_rng(options.seed)
    scale, repeats = (20, 3) if options.quick else (1, 21)

    steps, accuracies = [], []
    for name, x64 in MODES.items():
        with jax.enable_x64(x64):
            m, d = 256 // scale, 200_000 // scale
            steps += [step_row(rng, m, d, name, equal, repeats) for equal in (False, True)]
            for kind, noise in NOISES.items():
                found = errors(rng, 128 // scale, 2000 // scale, noise)
                accuracies.append([kind, name, *found])
    print_table(["append_matvec", "x64", "against two bare passes", "memory / window"], *steps)
    print()
    print_table(["gradients", "x64", *(f"λ = {x:.0e} · mean ‖g‖²" for x in DAMPINGS)], *accuracies)


if __name__ == "__main__":
    main()
