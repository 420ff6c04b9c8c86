"""The window under jax.jit: its passes beside bare ones, its dual beside Cholesky, and its error.

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
from mfac_core._jax import inverse, pairs
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
    state = state._replace(count=jnp.asarray(m, jnp.int32))  # nλ changes until a window is full
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

    ours()  # solves; the next forms the inverse
    ours_s, bare_s = medians(
        ours, lambda: (project(window, g), combine(window, c)), repeats=repeats
    )
    what = f"m {m}, d {d:,}, {'equal' if equal else 'random'} gradients"
    return [what, x64, f"{ours_s / bare_s:.2f} × the time", f"{memory:.1%}"]


def dual_row(rng: np.random.Generator, m: int, x64: str, repeats: int) -> list[str]:
    """Time the m-sized part of a step: a new row in the inverse, and a fresh factorisation."""
    g = rng.standard_normal((m, 2 * m))
    gram = g @ g.T
    kept = [
        np.stack([x, x * 0.0]).astype(np.float32) for x in (gram, np.linalg.inv(gram + np.eye(m)))
    ]
    unit = np.zeros((2, m), np.float32)
    unit[0, 0] = 1.0

    def slide(k: jax.Array, gram: jax.Array, unit: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift = jnp.array([1.0, 0.0], jnp.float32)
        k, column = inverse.replaced(k, gram[:, :, 0], 0, shift)
        return k, inverse.refined(k, gram, shift, unit, column)[0]

    one = jnp.asarray(1.0)
    gram, k, unit = (jnp.asarray(x) for x in (*kept, unit))
    sliding = jax.jit(slide)
    solving = jax.jit(lambda gram, unit: pairs.solve(gram, one, unit))
    ours_s, fresh_s = medians(
        lambda: sliding(k, gram, unit), lambda: solving(gram, unit), repeats=repeats
    )
    return [f"{m}", x64, f"{1000 * fresh_s:.2f}", f"{1000 * ours_s:.2f}"]


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

    steps, duals, accuracies = [], [], []
    for name, x64 in MODES.items():
        with jax.enable_x64(x64):
            m, d = 256 // scale, 200_000 // scale
            steps += [step_row(rng, m, d, name, equal, repeats) for equal in (False, True)]
            steps.append(step_row(rng, 1024 // scale, 20_000 // scale, name, False, repeats))
            duals += [dual_row(rng, m // scale, name, repeats) for m in (64, 256, 1024)]
            for kind, noise in NOISES.items():
                found = errors(rng, 128 // scale, 2000 // scale, noise)
                accuracies.append([kind, name, *found])
    print_table(["append_matvec", "x64", "against two bare passes", "memory / window"], *steps)
    print()
    print_table(["m", "x64", "Cholesky, ms", "the inverse, a row replaced, ms"], *duals)
    print()
    print_table(["gradients", "x64", *(f"λ = {x:.0e} · mean ‖g‖²" for x in DAMPINGS)], *accuracies)


if __name__ == "__main__":
    main()
