"""Compare influence with retraining of networks without some samples, beside other packages.

An MLP on 1,000 of scikit-learn's digits, or a small convolutional network on 500 images of
Fashion-MNIST, is trained, and again many times without some of them: from the same start without a
half, and on from the solution without a tenth. The linear datamodeling score (Park et al., "TRAK",
ICML 2023) is the rank correlation, over these networks, of a test image's log p/(1 − p) after
training and as predicted from the samples that are left out, averaged over 100 test images. It is
the same for the loss −log p, which falls as the other rises.

Run ``python influence_networks.py`` and ``python influence_networks.py --task fashion``: they write
tables and all numbers to ``docs/results``. Packages that are not installed are left out.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import influence_peers as peers
import numpy as np
import torch
from data import digits, fashion_mnist
from influence_methods import DAMPED, METHODS, Method, Prediction, rows_of, summed
from networks import digits_mlp, small_cnn
from retraining import margins, outputs, retrained, start_of
from scipy.stats import rankdata
from seeds import options, save, seeds_of, select, spread, table, unique
from torch import nn
from torch.nn.functional import cross_entropy

import mfac_core as mfac

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from measure import peak_memory

SETTINGS = {"half": "half left out, from the start", "tenth": "a tenth left out, trained on"}
DAMPINGS = tuple(10.0**k for k in range(-6, 1))


class Sizes(NamedTuple):
    """How many samples, queries, networks in each setting, and epochs."""

    training: int
    queries: int
    networks: int
    epochs: int


class Task(NamedTuple):
    """A network, its data, and how it is trained."""

    model: Callable[[], nn.Module]
    load: Callable[..., tuple]
    penalty: float
    sizes: Sizes
    seeds: int


TASKS = {
    "digits": Task(
        digits_mlp, lambda folder, seed: digits(seed), 1e-3, Sizes(1000, 100, 32, 60), 2
    ),
    "fashion": Task(
        small_cnn, lambda folder, seed: fashion_mnist(folder), 1e-3, Sizes(500, 100, 24, 30), 2
    ),
}


def by_package(scores: peers.Scores) -> Method:
    """By scores of another package."""
    return lambda *problem: lambda damping: summed(scores(*problem, damping))


def all_methods(*, quick: bool) -> dict[str, Method]:
    """Return ours and those of the packages that are installed."""
    if quick:
        print("other packages: left out of a quick run")
        return METHODS
    return METHODS | {name: by_package(f) for name, f in peers.installed().items()}


# -- retraining ------------------------------------------------------------------------------


def correlation(predicted: np.ndarray, real: np.ndarray) -> float:
    """Return the rank correlation over networks, a mean over queries."""
    a, b = (rankdata(values, axis=0) for values in (predicted, real))
    a, b = (values - values.mean(axis=0) for values in (a, b))
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return float(np.mean(np.sum(a * b, axis=0) / np.maximum(norms, 1e-300)))


def run(
    task: Task,
    sizes: Sizes,
    methods: dict[str, Method],
    dampings: tuple[float, ...],
    seed: int,
    folder: Path | None,
) -> tuple[list[dict], list[dict], float]:
    """Return a record for each method, one for each λ, and the λ that is chosen."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = task.load(folder, seed)
    some = torch.randperm(len(y), generator=generator)[: sizes.training]
    asked = torch.randperm(len(y_test), generator=generator)[: sizes.queries]
    train, queries = (x[some], y[some]), (x_test[asked], y_test[asked])
    torch.manual_seed(seed)
    model = task.model().eval()
    m, number = sizes.training, sizes.networks
    order = torch.rand(2, number, m, generator=generator).argsort(2)
    stays = {"half": order[0] >= m // 2, "tenth": order[1] >= m // 10}
    how = {"penalty": task.penalty, "seed": seed, "batch": min(100, m)}

    everything = torch.cat([stays["half"].float(), torch.ones(1, m)])
    start = start_of(model, number + 1)
    trained = retrained(model, start, everything, *train, epochs=sizes.epochs, **how)
    model.load_state_dict({name: w[-1] for name, w in trained.items()})
    start = start_of(model, number)
    on = retrained(model, start, stays["tenth"].float(), *train, epochs=sizes.epochs // 2, **how)
    logits = {
        "half": outputs(model, trained, queries[0])[:-1],
        "tenth": outputs(model, on, queries[0]),
    }
    real = {key: margins(z, queries[1].expand(len(z), -1)).numpy() for key, z in logits.items()}
    groups = {key: [np.flatnonzero(~row) for row in kept.numpy()] for key, kept in stays.items()}
    with torch.no_grad():
        right = [float((model(x).argmax(1) == y).float().mean()) for x, y in (train, queries)]
    print(f"seed {seed}: {right[0]:.1%} of training, {right[1]:.1%} of queries right", flush=True)

    def judged(predict: Prediction) -> dict[str, float]:
        return {key: correlation(predict(groups[key]), real[key]) for key in SETTINGS}

    def prepared(method: Method) -> Callable[[float], Prediction]:
        return method(copy.deepcopy(model), train, queries)  # some packages leave it changed

    def measured(method: Method) -> dict[str, float | None]:
        scores: dict[str, float] = {}
        before = time.process_time()
        memory = peak_memory(lambda: scores.update(judged(prepared(method)(task.penalty))))
        return {"seconds": time.process_time() - before, "bytes": memory} | scores

    records = []
    for name, method in methods.items():
        records.append({"seed": seed, "method": name} | measured(method))
        print(records[-1], flush=True)
    chosen = mfac.choose_damping(rows_of(model, cross_entropy, train))
    curve = []
    for name in DAMPED:
        predict = prepared(METHODS[name])
        for damping in dampings:
            record = {"seed": seed, "damping": damping, "of": name}
            curve.append(record | judged(predict(damping)))
    return records, curve, chosen


# -- tables ----------------------------------------------------------------------------------


def table_of_methods(records: list[dict]) -> str:
    """Write correlations, time and memory."""
    rows = []
    for name in unique(records, "method"):
        scores = [spread(select(records, setting, method=name)) for setting in SETTINGS]
        seconds = np.median(select(records, "seconds", method=name))
        sizes = [size for size in select(records, "bytes", method=name) if size is not None]
        memory = f"{np.median(sizes) / 2**20:.0f}" if sizes else ""
        rows.append([name, *scores, f"{seconds:.1f}", memory])
    return table(["by", *SETTINGS.values(), "seconds", "MiB"], rows)


def table_of_dampings(curve: list[dict], dampings: tuple[float, ...]) -> str:
    """Write correlations under every λ of the grid."""
    kinds = [(name, setting) for name in DAMPED for setting in SETTINGS]
    rows = [
        [f"{λ:.0e}", *(spread(select(curve, s, damping=λ, of=name)) for name, s in kinds)]
        for λ in dampings
    ]
    return table(["λ", *(f"{name}: {SETTINGS[s]}" for name, s in kinds)], rows)


def table_of_choices(
    records: list[dict], curve: list[dict], penalty: float, chosen: list[float]
) -> str:
    """Write what ``scores`` give under the grid's best λ, the penalty's and the chosen one."""
    lambdas = " ".join(f"{λ:.0e}" for λ in chosen)
    rows = []
    for setting, title in SETTINGS.items():
        found = {
            λ: select(curve, setting, damping=λ, of="`scores`") for λ in unique(curve, "damping")
        }
        best = max(found, key=lambda λ: np.mean(found[λ]))
        by_penalty, by_choice = (
            spread(select(records, setting, method=name))
            for name in ("`scores`", "`scores`, λ by `choose_damping`")
        )
        rows.append(
            [
                title,
                f"{spread(found[best])}, λ {best:.0e}",
                f"{by_penalty}, λ {penalty:.0e}",
                f"{by_choice}, λ {lambdas}",
            ]
        )
    return table(["", "the grid's best", "the penalty", "leave-one-out"], rows)


def main(argv: list[str] | None = None) -> None:
    """Retrain, predict, compare, write."""
    parser = options("influence of training samples on networks")
    parser.set_defaults(seeds=None)
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    args = parser.parse_args(argv)
    task = TASKS[args.task]
    args.seeds = args.seeds or task.seeds
    sizes = Sizes(100, 10, 4, 2) if args.quick else task.sizes
    methods = all_methods(quick=args.quick)
    dampings = DAMPINGS[::3] if args.quick else DAMPINGS
    settings = {"penalty": task.penalty} | sizes._asdict()
    records, curve, chosen = [], [], []
    for seed in seeds_of(args):
        found = run(task, sizes, methods, dampings, seed, args.data)
        records += found[0]
        curve += found[1]
        chosen.append(found[2])
        tables = {
            "lds": table_of_methods(records),
            "damping": table_of_dampings(curve, dampings),
            "choices": table_of_choices(records, curve, task.penalty, chosen),
        }
        about = settings | {"chosen": chosen}
        save(args.output, f"influence-networks-{args.task}", about, records + curve, tables)


if __name__ == "__main__":
    main()
