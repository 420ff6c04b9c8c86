"""Memory of optimisers and the least time of a step on a card, computed, for two well-known models.

Run ``python examples/benchmarks/optimizer_costs.py``. Nothing is measured: memory is the state's
numbers, time the bytes that a step has to read and write once, at the bandwidth of an H100's data
sheet. The model's own pass is not in it, nor are the matrix products of SOAP and Shampoo and of
M-FAC's singular values, which take longer than their bytes. Writes a table to ``docs/results``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from math import ceil, prod
from pathlib import Path

BANDWIDTH = 3.35e12  # bytes a second: H100 SXM, of the data sheet
WINDOW, DENSITY = 64, 0.01
BLOCK, LARGEST, SHAMPOO_LARGEST, EVERY = 512, 10_000, 8192, 10  # of the others, as they come
RESULTS = Path(__file__).parents[2] / "docs" / "results"

Shapes = Sequence[tuple[int, ...]]


def resnet50() -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of ResNet-50."""
    shapes: list[tuple[int, ...]] = []

    def convolution(outputs: int, inputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of GPT-2's smallest model."""
    d = 768
    norm = [(d,), (d,)]
    layer = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d)]
    return [(50_257, d), (1024, d), *12 * [*layer, (d,)], *norm]


def elements(shapes: Shapes) -> int:
    """Return d."""
    return sum(prod(shape) for shape in shapes)


def soap_matrices(shapes: Shapes) -> int:
    """Return the elements of SOAP's covariances, one along each axis that is not too long."""
    return sum(n * n for shape in shapes if len(shape) > 1 for n in shape if n <= LARGEST)


def shampoo_matrices(shapes: Shapes) -> int:
    """Return the elements of Shampoo's statistics, by blocks, as pytorch_optimizer cuts them."""
    total = 0
    for shape in shapes:
        if max(shape) > SHAMPOO_LARGEST:
            continue
        merged, last = [], 1
        for n in shape:  # neighbours are one axis as long as they fit into a block
            if last * n > BLOCK:
                merged.append(last)
                last = n
            else:
                last *= n
        merged.append(last)
        cuts = [[min(BLOCK, n - i) for i in range(0, n, BLOCK)] for n in merged]
        if len(merged) > 1:
            total += sum(n * n for block in product(*cuts) for n in block)
    return total


def inverses(shapes: Shapes) -> int:
    """Return the elements of M-FAC's inverses, one for each unit of a parameter."""
    units = [shape if len(shape) > 1 else (1, *shape) for shape in shapes]
    return sum(n * min(WINDOW, prod(rest)) ** 2 for n, *rest in units)


def costs(shapes: Shapes) -> dict[str, tuple[float, float]]:
    """Return bytes of state, and bytes that a step moves, by optimiser; numbers are float32.

    A step reads the gradient, reads and writes weights, and reads and writes its state.
    """
    d, soap, shampoo = elements(shapes), soap_matrices(shapes), shampoo_matrices(shapes)
    kept, unit = ceil(DENSITY * d), inverses(shapes)
    rest = 4.0 * d * 11  # gradient in, row out, the rest both: direction, momentum, step, weights
    by_unit = rest + 4.0 * 3 * unit  # read for a product, then read and written
    return {
        "SGD with momentum": (4.0 * d, 4.0 * 5 * d),
        "Adam": (8.0 * d, 4.0 * 7 * d),
        "SOAP": (8.0 * d + 8.0 * soap, 4.0 * (7 * d + 3 * soap + 2 * soap / EVERY)),
        "Shampoo": (12.0 * d + 8.0 * shampoo, 4.0 * (9 * d + 3 * shampoo + shampoo / EVERY)),
        f"M-FAC, window {WINDOW}": (
            (4.0 * WINDOW + 4) * d + 4.0 * unit,
            8.0 * WINDOW * d + by_unit,
        ),
        f"M-FAC, window {WINDOW} of bfloat16": (
            (2.0 * WINDOW + 4) * d + 4.0 * unit,
            4.0 * WINDOW * d + by_unit,
        ),
        f"M-FAC, window {WINDOW}, density {DENSITY}": (
            8.0 * WINDOW * kept + 8.0 * d,
            16.0 * WINDOW * kept + rest + 8.0 * d,
        ),
    }


MODELS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "ResNet-50": resnet50,
    "GPT-2, smallest": gpt2,
}


def written() -> str:
    """Write the table."""
    lines = [
        "| model | optimiser | state, GB | least ms a step |",
        "| --- | --- | --- | --- |",
    ]
    for model, shapes in MODELS.items():
        title = f"{model}, {elements(shapes()) / 1e6:.1f} M"
        for name, (state, moved) in costs(shapes()).items():
            lines.append(
                f"| {title} | {name} | {state / 1e9:.2f} | {1000 * moved / BANDWIDTH:.2f} |"
            )
            title = ""
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    text = written()
    (args.output / "optimizer-costs.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
