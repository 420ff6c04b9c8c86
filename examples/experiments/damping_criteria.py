"""What to choose the damping, and the length of blocks, by: four criteria, by test.

Run ``python examples/experiments/damping_criteria.py``: prunes the digits' MLP to 80 % in one shot
by the joint update, under every power of ten for λ, with many rows and few, in blocks of several
lengths. Each criterion sees the rows alone, and the weights: the leave-one-out likelihood of
``mfac_core.damping_curve``; that of the rows' directions alone, so that a few long rows do not
decide (Tyler, 1987); the evidence, which asks for mλ‖w‖² = Σ s/(s + mλ) over the eigenvalues s of
GGᵀ (MacKay, 1992); and what the step that one half of the rows leads to does to the other half,
½ (gᵢᵀδ)². ``--network cnn`` prunes the convolutional network of ``prune_fashion.py`` to 95 % under
the λ of the first two. Writes tables and all numbers to ``docs/results``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import prune_digits
import prune_fashion
from choose_damping import Task, pruning
from data import fashion_mnist
from networks import track
from pruning_methods import Run, run_of
from scipy.optimize import brentq
from seeds import options, save, seeds_of, select, spread, table, unique

import mfac_core as mfac
from mfac_core.pruning import prune


class Setting(NamedTuple):
    """What is pruned, and how much.

    Attributes
    ----------
    sparsity : float
        Of the network pruned.
    rows : tuple of int
        Numbers of rows.
    sizes : tuple of int or None
        Lengths of blocks, None for the whole matrix.
    grid : tuple of float
        λ to prune under for comparison, and for the held-out step to choose from.
    """

    sparsity: float
    rows: tuple[int, ...]
    sizes: tuple[int | None, ...]
    grid: tuple[float, ...] = ()


SETTINGS = {
    "digits": Setting(0.8, (600, 50), (16, 128, 1024, None), tuple(10.0**k for k in range(-9, 1))),
    "cnn": Setting(0.95, (256, 64), (16, 128, 1024, None)),
}
QUICK = Setting(0.8, (50,), (16,), (1e-4, 1e-3))


def spectra(run: Run, size: int | None) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return length, squared left singular vectors and eigenvalues of GGᵀ of each block."""
    g = run.gradients.double().numpy()
    found = []
    for block in np.split(g, range(size or g.shape[1], g.shape[1], size or 1), axis=1):
        u, s, _ = np.linalg.svd(block, full_matrices=False)
        found.append((block.shape[1], u * u, s * s))
    return found


def evidence(run: Run, blocks: list) -> float:
    """Return the λ that the evidence asks for."""
    m, squares = len(run.gradients), float(run.weights.square().sum())
    s = np.concatenate([s for _, _, s in blocks])

    def excess(logarithm: float) -> float:
        shift = m * np.exp(logarithm)
        return float(np.sum(s / (s + shift))) - shift * squares

    return float(np.exp(brentq(excess, np.log(1e-15), np.log(1e5))))


def directions(run: Run, blocks: list) -> float:
    """Return the λ of lowest mean of log det F₋ᵢ + d log gᵢᵀF₋ᵢ⁻¹gᵢ."""
    m, d = run.gradients.shape

    def score(damping: float) -> float:
        logdet, quadratic = 0.0, 0.0
        for size, squares, s in blocks:
            rest = squares @ (s / (s + m * damping))
            r = np.clip(1.0 - rest, 1e-14, 1.0)
            logdet += size * np.log(damping) + np.log1p(s / (m * damping)).sum() + np.log(r)
            quadratic += m * rest / r
        some = quadratic > 0.0
        return float(np.mean(logdet[some] + d * np.log(quadratic[some])))

    return float(min(10.0 ** np.arange(-9, 1.1, 0.25), key=score))


def held_out(run: Run, task: Task, sparsity: float, damping: float) -> float:
    """Return the mean of ½ (gᵢᵀδ)² over each half of the rows, δ being the other's step."""
    rises = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        others = run.gradients[half.start ^ 1 :: 2]
        pruned = prune(
            run.weights, run.gradients[half], sparsity=sparsity, damping=damping,
            block_size=task.block_size, stages=1,
        )  # fmt: skip
        rises.append(float((others @ (pruned.weights - run.weights)).square().mean()) / 2)
    return float(np.mean(rises))


def runs_of(
    network: str, seed: int, args: object, setting: Setting
) -> Iterator[tuple[int, Run, list[Task]]]:
    """Yield numbers of rows, with what prunes by them in blocks of each length."""
    if network == "digits":
        model, (x, y, *test) = prune_digits.prepared(seed, prune_digits.EPOCHS)
        settings = prune_digits.SETTINGS
    else:
        data = fashion_mnist(args.data)
        model = prune_fashion.prepared(network, seed, data, args.cache, quick=args.quick)
        (x, y), test = prune_fashion.shuffled(data, seed), data[2:]
        settings = prune_fashion.SETTINGS[network]
    for m in setting.rows:
        run = run_of(model, x, y, **settings | {"rows": m})
        sizes = setting.sizes
        yield m, run, [pruning(network, model, run, test, setting.sparsity, n) for n in sizes]


def records_of(run: Run, task: Task, setting: Setting) -> list[dict]:
    """Prune under every λ of the grid, and of every criterion."""
    size = task.block_size
    curve = mfac.damping_curve(run.gradients, block_size=size)
    blocks = spectra(run, size)
    chosen = [("leave-one-out", curve.best, float(curve.scores.min()))]
    chosen.append(("directions", directions(run, blocks), None))
    if setting.grid:
        steps = [held_out(run, task, setting.sparsity, damping) for damping in setting.grid]
        chosen.append(("evidence", evidence(run, blocks), None))
        chosen.append(("held-out step", setting.grid[int(np.argmin(steps))], min(steps)))
        chosen += [("grid", λ, step) for λ, step in zip(setting.grid, steps, strict=True)]
    return [
        {"by": by, "damping": λ, "criterion": score, "accuracy": task.measure(λ)}
        for by, λ, score in track(chosen, task.name)
    ]


def length(size: int | None) -> str:
    """Write the length of blocks."""
    return "the whole F" if size is None else f"blocks of {size}"


def dampings(records: list[dict]) -> str:
    """Write the table of what each criterion's λ leaves."""
    criteria = [by for by in unique(records, "by") if by != "grid"]
    lines = []
    for m in unique(records, "rows"):
        for size in unique(records, "block_size"):
            here = [r for r in records if r["rows"] == m and r["block_size"] == size]
            cells = []
            for by in criteria:
                used = sorted(select(here, "damping", by=by))
                between = "–".join(dict.fromkeys((f"{used[0]:.0e}", f"{used[-1]:.0e}")))
                cells.append(f"{spread(select(here, 'accuracy', by=by))}, λ {between}")
            if grid := [r for r in here if r["by"] == "grid"]:
                λ, mean = best_of(grid)
                cells.insert(0, f"{mean}, λ {λ:.0e}")
            lines.append([f"{m} rows, {length(size)}", *cells])
    best = ["the grid's best"] * (len(criteria) < len(lines[0]) - 1)
    return table(["test accuracy", *best, *criteria], lines)


def best_of(grid: list[dict]) -> tuple[float, str]:
    """Return the λ of highest mean accuracy, and that accuracy."""

    def mean(damping: float) -> float:
        return float(np.mean(select(grid, "accuracy", damping=damping)))

    best = max(unique(grid, "damping"), key=mean)
    return best, spread(select(grid, "accuracy", damping=best))


def lengths(records: list[dict]) -> str:
    """Write the table of what leave-one-out and the held-out step say of lengths of blocks."""
    lines = []
    for m in unique(records, "rows"):
        for size in unique(records, "block_size"):
            cells = [f"{m} rows, {length(size)}"]
            for by, digits in (("leave-one-out", 0), ("held-out step", 3)):
                found = select(records, "criterion", rows=m, block_size=size, by=by)
                accuracy = select(records, "accuracy", rows=m, block_size=size, by=by)
                if found:
                    cells += [f"{np.mean(found):.{digits}f}", spread(accuracy)]
            lines.append(cells)
    header = ["leave-one-out score", "test accuracy at its λ"]
    header += ["½ (gᵢᵀδ)², held out", "test accuracy at its λ"]
    return table(["", *header[: len(lines[0]) - 1]], lines)


def main(argv: list[str] | None = None) -> None:
    """Train, prune, compare, write."""
    parser = options("criteria for the damping")
    parser.add_argument("--network", choices=list(SETTINGS), default="digits")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument(
        "--cache", type=Path, default=prune_fashion.CACHE, help="folder for trained networks"
    )
    args = parser.parse_args(argv)
    setting = QUICK if args.quick else SETTINGS[args.network]
    records = [
        {"seed": seed, "rows": m, "block_size": task.block_size, **record}
        for seed in seeds_of(args)
        for m, run, tasks in runs_of(args.network, seed, args, setting)
        for task in tasks
        for record in records_of(run, task, setting)
    ]
    name = "damping-criteria" + ("" if args.network == "digits" else f"-{args.network}")
    tables = {"table": dampings(records), "blocks": lengths(records)}
    save(args.output, name, setting._asdict(), records, tables)


if __name__ == "__main__":
    main()
