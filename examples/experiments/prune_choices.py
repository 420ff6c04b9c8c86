"""How the choice of gradients, damping and blocks changes what pruning in one shot leaves.

Run ``python examples/prune_choices.py --network digits`` or ``cnn``: changes one thing at a time
from the settings of ``prune_digits.py`` or ``prune_fashion.py``, and prunes by the paper's update
and by the joint one, without and with ``loss=``. Then prunes by the joint update alone for several
lengths of blocks and numbers of rows, each at the best of a few dampings. Writes tables and all
numbers to ``docs/results``.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import prune_digits
import prune_fashion
from data import Split, fashion_mnist
from networks import evaluate, set_weights, track
from pruning_methods import METHODS, run_of
from pruning_report import Yardstick
from seeds import options, save, seeds_of, select, spread, table, unique
from torch import nn

METHOD_NAMES = ("the paper's", "joint", "joint, `loss=`")
SPARSITY = {"digits": 0.8, "cnn": 0.95}
SETTINGS = {"digits": prune_digits.SETTINGS, **prune_fashion.SETTINGS}
CHANGES: dict[str, list[dict]] = {
    "digits": [
        {},
        *({"rows": rows} for rows in (50, 150)),
        {"rows": 75, "average": 8},
        *({"damping": damping} for damping in (1e-5, 1e-4, 1e-2, 1e-1)),
        *({"block_size": size} for size in (16, 128)),
        {"rows": 50, "damping": 1e-1},
        {"rows": 50, "block_size": 16},
    ],
    "cnn": [
        {},
        {"average": 1},
        {"average": 1, "damping": 1e-1},
    ],
}
BLOCKS = (4, 16, 64, 256, 1024, None)
"""Lengths of blocks, None for the whole Fisher matrix."""
ROWS = {"digits": (50, 150, 600), "cnn": (64, 256)}
"""Numbers of rows that the lengths of blocks are tried with."""
DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
"""What λ is chosen from for each length of blocks and number of rows."""


def records_of(
    network: str, model: nn.Module, data: Split, seed: int, changes: list[dict]
) -> list[dict]:
    """Prune one network under each change of the settings, and measure."""
    x, y, x_test, y_test = data
    records = []
    for change in track(changes, f"{network}, seed {seed}"):
        settings = SETTINGS[network] | change
        run = run_of(model, x, y, **settings)
        measure = Yardstick(model, run, x_test, y_test, average=settings["average"])
        for method in METHOD_NAMES:
            (weights,) = METHODS[method](run, [SPARSITY[network]])
            about = {"seed": seed, "settings": written(change), "method": method}
            records.append({**about, **measure(weights)})
        set_weights(model, run.weights)
    return records


def block_records_of(
    network: str, model: nn.Module, data: Split, seed: int, quick: bool
) -> list[dict]:
    """Prune one network by the joint update for every number of rows, block length and λ."""
    x, y, x_test, y_test = data
    records = []
    for rows in ROWS[network][: 1 if quick else None]:
        run = run_of(model, x, y, **SETTINGS[network] | {"rows": rows})
        choices = list(product(BLOCKS[::3] if quick else BLOCKS, DAMPINGS))
        for size, damping in track(choices, f"{network}, {rows} rows, seed {seed}"):
            pruned = run.prune(sparsity=SPARSITY[network], block_size=size, damping=damping)
            set_weights(model, pruned)
            loss, accuracy = evaluate(model, x_test, y_test)
            about = {"seed": seed, "rows": rows, "block_size": size, "damping": damping}
            records.append({**about, "accuracy": accuracy, "loss": loss})
        set_weights(model, run.weights)
    return records


def change_table(network: str, records: list[dict]) -> str:
    """Write a table of changes of the settings against methods."""

    def cell(change: str, method: str) -> str:
        return spread(select(records, "accuracy", settings=change, method=method))

    header = [f"test accuracy at {SPARSITY[network]:.0%} with", *METHOD_NAMES]
    rows = [[c, *(cell(c, m) for m in METHOD_NAMES)] for c in unique(records, "settings")]
    return table(header, rows)


def block_table(network: str, records: list[dict]) -> str:
    """Write a table of block lengths against numbers of rows, each cell at its best λ."""

    def cell(size: int | None, rows: int) -> str:
        best = max(
            DAMPINGS,
            key=lambda damping: sum(
                select(records, "accuracy", rows=rows, block_size=size, damping=damping)
            ),
        )
        values = select(records, "accuracy", rows=rows, block_size=size, damping=best)
        return f"{spread(values)}, λ {best}"

    all_rows = unique(records, "rows")
    header = [f"test accuracy at {SPARSITY[network]:.0%} with", *(f"m {m}" for m in all_rows)]
    lines = [
        [
            "the whole matrix" if size is None else f"blocks of {size}",
            *(cell(size, m) for m in all_rows),
        ]
        for size in unique(records, "block_size")
    ]
    return table(header, lines)


def written(change: dict) -> str:
    """Write what a change of the settings is."""
    names = {"rows": "m", "average": "averaged over", "damping": "λ", "block_size": "blocks of"}
    return ", ".join(f"{names[key]} {value}" for key, value in change.items()) or "as above"


def main(argv: list[str] | None = None) -> None:
    """Train, prune, write."""
    parser = options("choices in one-shot pruning")
    parser.add_argument("--network", choices=list(CHANGES), default="digits")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's four IDX files")
    parser.add_argument(
        "--cache", type=Path, default=prune_fashion.CACHE, help="folder for trained networks"
    )
    args = parser.parse_args(argv)

    network = args.network
    changes = CHANGES[network][1:3] if args.quick else CHANGES[network]
    records, block_records = [], []
    for seed in seeds_of(args):
        if network == "digits":
            model, data = prune_digits.prepared(seed, prune_digits.EPOCHS)
        else:
            data = fashion_mnist(args.data)
            model = prune_fashion.prepared(network, seed, data, args.cache, quick=args.quick)
            data = (*prune_fashion.shuffled(data, seed), *data[2:])
        records += records_of(network, model, data, seed, changes)
        block_records += block_records_of(network, model, data, seed, args.quick)
    settings = SETTINGS[network]
    one_by_one = {"table": change_table(network, records)}
    save(args.output, f"choices-{network}", settings, records, one_by_one)
    blocks = {"table": block_table(network, block_records)}
    save(args.output, f"blocks-{network}", settings, block_records, blocks)


if __name__ == "__main__":
    main()
