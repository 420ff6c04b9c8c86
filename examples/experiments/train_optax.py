"""Train a network on handwritten digits with M-FAC and optax, beside optax's own optimisers.

Prints a Markdown table and writes it to ``docs/results/train_optax.md``. Each optimiser has its
learning rate chosen from five, by the training loss of a run of its own seed; everything else is
fixed beforehand.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from mfac_core.optax import mfac

Array = jax.Array
Weights = list[dict[str, Array]]
Make = Callable[[Any], optax.GradientTransformation]

BATCH, MOMENTUM, WINDOW, DAMPING = 64, 0.9, 64, 0.01
WIDTHS = (64, 128, 32, 10)
OPTIMISERS: dict[str, tuple[Make, tuple[float, ...]]] = {
    "SGD, momentum": (lambda lr: optax.sgd(lr, MOMENTUM), (0.01, 0.03, 0.1, 0.3, 1.0)),
    "Adam": (optax.adam, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "M-FAC": (mfac, (0.001, 0.003, 0.01, 0.03, 0.1)),
    "M-FAC, plain": (
        lambda lr: mfac(lr, WINDOW, DAMPING, momentum=MOMENTUM),
        (0.001, 0.003, 0.01, 0.03, 0.1),
    ),
}
DOCS = Path(__file__).parents[2] / "docs" / "results" / "train_optax.md"


def initial_weights(key: Array) -> Weights:
    """Draw the weights of each layer, of variance 2 / (number of inputs)."""
    layers = []
    for rows, columns in pairwise(WIDTHS):
        key, draw = jax.random.split(key)
        w = jax.random.normal(draw, (rows, columns)) * np.sqrt(2 / rows)
        layers.append({"w": w, "b": jnp.zeros(columns)})
    return layers


def logits(params: Weights, x: Array) -> Array:
    """Apply the network, with ReLU between its layers."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def loss(params: Weights, x: Array, y: Array) -> Array:
    """Return the mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


@partial(jax.jit, static_argnames="make")
def run(make: Make, rate: float, params: Weights, x: Array, y: Array, batches: Array) -> Weights:
    """Train through batches of indices, by a rate that falls to zero."""
    optimiser = make(optax.linear_schedule(rate, 0.0, len(batches)))

    def step(carry: Any, batch: Array) -> tuple[Any, None]:
        params, state = carry
        g = jax.grad(loss)(params, x[batch], y[batch])
        updates, state = optimiser.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), batches)
    return params


def train(make: Make, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Train from one start; return the training loss and the test accuracy."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        np.float32(x / 16), y, train_size=1200, stratify=y, random_state=seed
    )
    rng = np.random.default_rng(seed)
    batches = np.stack([rng.choice(len(y), BATCH, replace=False) for _ in range(steps)])
    params = run(make, rate, initial_weights(jax.random.key(seed)), x, y, batches)
    right = jnp.argmax(logits(params, x_test), axis=1) == y_test
    return float(loss(params, x, y)), float(jnp.mean(right))


def compare(seed: int, runs: int, steps: int) -> list[str]:
    """Choose each optimiser's rate and train with it; return the lines of the table."""
    lines = [
        "| optimiser | learning rate | training loss | test accuracy |",
        "| --- | --- | --- | --- |",
    ]
    for name, (make, rates) in OPTIMISERS.items():
        losses = [train(make, rate, seed + 1000, steps)[0] for rate in rates]
        rate = rates[int(np.nanargmin(losses))]
        found = np.array([train(make, rate, seed + i, steps) for i in range(runs)])
        cells = [f"{x:.4f} ± {s:.4f}" for x, s in zip(found.mean(0), found.std(0), strict=True)]
        lines.append(f"| {name} | {rate:g} | {cells[0]} | {cells[1]} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--quick", action="store_true", help="short runs of one seed")
    parser.add_argument("--output", type=Path, default=DOCS, help="the table's file")
    args = parser.parse_args(argv)
    runs, steps = (1, 20) if args.quick else (3, 300)
    size = sum((a + 1) * b for a, b in pairwise(WIDTHS))
    text = "\n".join(
        [
            *compare(args.seed, runs, steps),
            "",
            f"{size:,} weights, 1,200 images, batches of {BATCH}, {steps} steps; mean ± standard "
            f"deviation over {runs} seeds. Momentum {MOMENTUM}; window {WINDOW}, damping "
            f"{DAMPING}. One learning rate of five for each, chosen on a further seed.",
        ]
    )
    print(text)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
