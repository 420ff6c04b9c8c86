"""Compare influence with retraining, for groups of left out digits, by the rank of the changes.

Softmax regression on scikit-learn's digits is trained again without random groups of its samples.
The linear datamodeling score (Park et al., "TRAK", ICML 2023) is the rank correlation, over the
groups, of the predicted and the real change of a test sample's loss, averaged over test samples.
Beside it stands the median over test samples of the error of the changes, relative to their size.

Run ``python examples/experiments/influence_digits.py``: it writes a table and all numbers to
``docs/results``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import softmax
from scipy.stats import spearmanr
from seeds import options, save, seeds_of, select, spread, table, unique

from mfac_core.influence import Influence

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from softmax import CLASSES, fit, gradients, l2, load, logits, losses

PENALTY = 1e-2
TRAINING, QUERIES = 600, 100
PROJECTED = 64
"""Dimensions of the random projection."""

SHARES = (0.01, 0.1, 0.5)
"""Of the training samples that are left out."""

Data = tuple[np.ndarray, np.ndarray]
Prediction = Callable[[list[np.ndarray]], np.ndarray]
"""From groups to the change of every test loss, (groups, queries)."""


def retrained(groups: list[np.ndarray], weights: np.ndarray, train: Data, test: Data) -> np.ndarray:
    """Return the real changes: the same objective less the terms of a group, minimised."""
    x, y = train
    before, changes = losses(weights, *test), []
    for group in groups:
        stays = np.delete(np.arange(len(y)), group)
        penalty = l2(PENALTY * len(y) / len(stays))
        without = fit(x[stays], y[stays], penalty, start=weights)
        changes.append(losses(without, *test) - before)
    return np.array(changes)


def hessian(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the Hessian of the sum of the losses, (d, d)."""
    p = softmax(logits(weights, x), axis=1)
    blocks = np.einsum("mc,ce->mce", p, np.eye(CLASSES)) - p[:, :, None] * p[:, None, :]
    d = x.shape[1] * CLASSES
    return np.einsum("mi,mj,mce->icje", x, x, blocks, optimize=True).reshape(d, d)


def summed(scores: np.ndarray) -> Prediction:
    """Return the prediction that adds up the scores (queries, samples) of a group."""
    return lambda groups: np.array([scores[:, group].sum(axis=1) for group in groups])


def predictions(
    weights: np.ndarray, train: Data, test: Data, rng: np.random.Generator
) -> dict[str, Callable[[], Prediction]]:
    """Return what makes each method's prediction."""
    x = train[0]
    g, q = gradients(weights, *train), gradients(weights, *test)
    m, d = g.shape

    def dense() -> np.ndarray:
        return PENALTY * np.eye(d) + hessian(weights, x) / m

    def newton(groups: list[np.ndarray]) -> np.ndarray:
        whole = dense()
        steps = [
            np.linalg.solve(whole - hessian(weights, x[group]) / m, g[group].sum(axis=0) / m)
            for group in groups
        ]
        return np.array(steps) @ q.T

    def projected() -> Prediction:
        random = rng.standard_normal((d, PROJECTED)) / PROJECTED**0.5
        a, b = g @ random, q @ random
        return summed(b @ np.linalg.solve(a.T @ a / m + PENALTY * np.eye(PROJECTED), a.T) / m)

    def by_groups() -> Prediction:
        influence = Influence(g, damping=PENALTY)
        return lambda groups: influence.leave_out(groups, q)

    return {
        "`leave_out`, groups exactly": by_groups,
        "`scores`, added up": lambda: summed(Influence(g, damping=PENALTY).scores(q)),
        f"`scores` of {PROJECTED} random projections": projected,
        "products of gradients": lambda: summed(q @ g.T / m / PENALTY),
        "Hessian, dense, added up": lambda: summed(q @ np.linalg.solve(dense(), g.T) / m),
        "Hessian, dense, groups exactly": lambda: newton,
    }


def run(seed: int, number: int, shares: tuple[float, ...]) -> list[dict]:
    """Return a record for each method and share of samples."""
    rng = np.random.default_rng(seed)
    x, y = load(rng)
    train = x[:TRAINING], y[:TRAINING]
    test = x[TRAINING : TRAINING + QUERIES], y[TRAINING : TRAINING + QUERIES]
    weights = fit(*train, l2(PENALTY))
    methods = predictions(weights, train, test, rng)
    records = []
    for share in shares:
        size = max(round(share * TRAINING), 1)
        groups = [rng.choice(TRAINING, size, replace=False) for _ in range(number)]
        actual = retrained(groups, weights, train, test)
        for method, prepare in methods.items():
            start = time.perf_counter()
            predicted = prepare()(groups)
            seconds = time.perf_counter() - start
            pairs = list(zip(predicted.T, actual.T, strict=True))
            error = [np.linalg.norm(p - a) / np.linalg.norm(a) for p, a in pairs]
            records.append(
                {
                    "seed": seed,
                    "method": method,
                    "share": share,
                    "score": float(np.mean([spearmanr(p, a).statistic for p, a in pairs])),
                    "error": float(np.median(error)),
                    "seconds": seconds,
                }
            )
    return records


def main(argv: list[str] | None = None) -> None:
    """Retrain, predict, compare, write."""
    args = options("influence of groups of digits").parse_args(argv)
    number, shares = (6, SHARES[1:]) if args.quick else (60, SHARES)
    records = [record for seed in seeds_of(args) for record in run(seed, number, shares)]

    def cells(value: str, method: str) -> list[str]:
        return [spread(select(records, value, method=method, share=s)) for s in shares]

    tables = {
        key: table(
            [corner, *(f"{s:.0%} left out" for s in shares)],
            [[method, *cells(value, method)] for method in unique(records, "method")],
        )
        for key, value, corner in (
            ("lds", "score", "rank correlation"),
            ("error", "error", "relative error"),
        )
    }
    settings = {"penalty": PENALTY, "training": TRAINING, "queries": QUERIES, "groups": number}
    save(args.output, "influence-digits", settings, records, tables)


if __name__ == "__main__":
    main()
