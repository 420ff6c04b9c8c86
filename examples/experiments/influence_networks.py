"""Compare scores of training samples with retraining, for networks, beside other packages.

An MLP on scikit-learn's digits, or a small convolutional network on Fashion-MNIST, is trained on
1,000 images, and again many times without some of them: from the same start without a half, and on
from the solution without a tenth. The linear datamodeling score (Park et al., "TRAK", ICML 2023)
is the rank correlation, over these networks, of a test image's log p/(1 − p) after training and as
predicted by adding up scores, averaged over 100 test images. That of its loss is the same: the one
falls as the other rises.

Run ``python influence_networks.py`` and ``python influence_networks.py --task fashion``: they write
tables and all numbers to ``docs/results``. Packages that are not installed are left out.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import influence_peers as peers
import numpy as np
import torch
from data import digits, fashion_mnist
from networks import digits_mlp, small_cnn
from retraining import margins, outputs, retrained, start_of
from scipy.stats import rankdata
from seeds import options, save, seeds_of, select, spread, table, unique
from torch import nn
from torch.nn.functional import cross_entropy

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.torch import ModelGradients, per_sample_gradients

TRAINING, QUERIES = 1000, 100
DRAWS = 1
"""Labels that are drawn from the model for each sample."""

SETTINGS = {"half": "half left out, from the start", "tenth": "a tenth left out, trained on"}
DAMPINGS = tuple(float(λ) for λ in np.logspace(-6, 0, 13))

Data = tuple[torch.Tensor, torch.Tensor]
Method = Callable[[nn.Module, Data, Data, float], np.ndarray]


class Task(NamedTuple):
    """A network, its data, and how it is trained."""

    model: Callable[[], nn.Module]
    load: Callable[..., tuple]
    penalty: float
    epochs: int
    rate: float


TASKS = {
    "digits": Task(digits_mlp, lambda folder, seed: digits(seed), 1e-3, 60, 0.05),
    "fashion": Task(small_cnn, lambda folder, seed: fashion_mnist(folder), 1e-3, 30, 0.05),
}


# -- scores: the change of what is measured when a sample is left out ------------------------


def rows_of(model: nn.Module, function: Callable, data: Data) -> torch.Tensor:
    """Return the gradients of a function of logits and label, one a row."""
    return per_sample_gradients(model, lambda z, y: function(z, y).mean(), *data)


def by_penalty(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return ``scores`` with the penalty's weight for λ."""
    influence = Influence(rows_of(model, cross_entropy, train), damping=penalty)
    return influence.scores(rows_of(model, margins, queries)).numpy()


def never_stored(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return the same from gradients that are never stored."""

    def rows(function: Callable, data: Data) -> ModelGradients:
        batches = list(zip(*(part.split(50) for part in data), strict=True))
        return ModelGradients(model, lambda model, b: function(model(b[0]), b[1]), batches)

    train_rows = rows(lambda z, y: cross_entropy(z, y, reduction="none"), train)
    influence = Influence(train_rows, damping=penalty)
    return influence.scores(rows(margins, queries)).numpy()


def by_gradients(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return ``scores`` with the λ that the gradients choose."""
    influence = Influence(rows_of(model, cross_entropy, train), damping="auto")
    return influence.scores(rows_of(model, margins, queries)).numpy()


def of_margins(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by rows that are gradients of log p/(1 − p): TRAK's, without projection.

    The gradient of a loss is −(1 − p) times that row.
    """
    influence = Influence(rows_of(model, margins, train), damping="auto")
    scores = influence.scores(rows_of(model, margins, queries)).numpy()
    with torch.no_grad():
        return -scores * torch.sigmoid(-margins(model(train[0]), train[1])).numpy()


def of_drawn_labels(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by the Fisher matrix of labels that are drawn from the model."""
    x, _ = train
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        p = model(x).softmax(-1)
    drawn = torch.multinomial(p, DRAWS, replacement=True, generator=generator).T.flatten()
    rows = rows_of(model, cross_entropy, (x.repeat(DRAWS, *[1] * (x.ndim - 1)), drawn))
    inverse = mfac.InverseFisher(rows, damping=penalty)
    asked = rows_of(model, margins, queries)
    return (inverse @ asked.T).T.numpy() @ rows_of(model, cross_entropy, train).numpy().T


def products(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return products of gradients."""
    asked = rows_of(model, margins, queries)
    return (asked @ rows_of(model, cross_entropy, train).T).numpy()


METHODS: dict[str, Method] = {
    "`scores`, λ of the penalty": by_penalty,
    "the same, gradients never stored": never_stored,
    "`scores`, λ by `choose_damping`": by_gradients,
    "`scores` of rows of log p/(1 − p), λ by `choose_damping`": of_margins,
    "`InverseFisher` of drawn labels, λ of the penalty": of_drawn_labels,
    "products of gradients": products,
}


def measure(method: Method, *args: Any) -> tuple[np.ndarray, float, float]:
    """Return the scores, the processor's seconds and the MiB that they took, in a process apart."""

    def work(pipe: Any) -> None:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            start = time.process_time()  # of this process alone: others may hold it up
            scores = np.asarray(method(*args), np.float64)
            seconds = time.process_time() - start
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            pipe.send((scores, seconds, (after - before) / 1024))
        except Exception as error:
            pipe.send(error)

    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    process = fork.Process(target=work, args=(there,))
    process.start()
    result = here.recv()
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


# -- retraining ------------------------------------------------------------------------------


def correlation(scores: np.ndarray, stays: np.ndarray, real: np.ndarray) -> float:
    """Return the rank correlation over networks, a mean over test samples."""
    predicted = (~stays).astype(float) @ scores.T
    a, b = (rankdata(values, axis=0) for values in (predicted, real))
    a, b = (values - values.mean(axis=0) for values in (a, b))
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return float(np.mean(np.sum(a * b, axis=0) / np.maximum(norms, 1e-300)))


def run(task: Task, seed: int, args: Any) -> tuple[list[dict], list[dict], float]:
    """Return a record for each method, one for each λ, and the λ that was chosen."""
    generator = torch.Generator().manual_seed(seed)
    x, y, x_test, y_test = task.load(args.data, seed)
    some = torch.randperm(len(y), generator=generator)[: args.training]
    asked = torch.randperm(len(y_test), generator=generator)[:QUERIES]
    train, queries = (x[some], y[some]), (x_test[asked], y_test[asked])
    torch.manual_seed(seed)
    model = task.model()
    number, m = args.networks, args.training
    choices: dict[str, Any] = {
        "penalty": task.penalty,
        "rate": task.rate,
        "seed": seed,
        "batch": min(100, m),
    }

    stays = torch.rand(number, m, generator=generator).argsort(1) < m // 2
    everything = torch.ones(1, m)
    all_stays = torch.cat([stays.float(), everything])
    start = start_of(model, number + 1)
    epochs = args.epochs or task.epochs
    from_start = retrained(model, start, all_stays, *train, epochs=epochs, **choices)
    model.load_state_dict({name: w[-1] for name, w in from_start.items()})
    model.eval()
    fewer = torch.rand(number, m, generator=generator).argsort(1) >= m // 10
    on = retrained(
        model,
        start_of(model, number),
        fewer.float(),
        *train,
        epochs=epochs // 2,
        **choices,
    )
    real = {
        "half": (stays.numpy(), outputs(model, from_start, queries[0])[:-1]),
        "tenth": (fewer.numpy(), outputs(model, on, queries[0])),
    }

    def judged(scores: np.ndarray) -> dict[str, float]:
        return {
            setting: correlation(
                scores, kept, margins(logits, queries[1].expand(len(logits), -1)).numpy()
            )
            for setting, (kept, logits) in real.items()
        }

    with torch.no_grad():
        right = float((model(queries[0]).argmax(1) == queries[1]).float().mean())
    print(f"seed {seed}: {right:.0%} of the queries right", flush=True)
    records = []
    for name, method in (METHODS | ({} if args.quick else peers.installed())).items():
        scores, seconds, memory = measure(method, model, train, queries, task.penalty)
        record = {"seed": seed, "method": name, "seconds": seconds, "MiB": memory}
        records.append(record | judged(scores))
        print(records[-1], flush=True)
    influence = Influence(rows_of(model, cross_entropy, train), damping="auto")
    asked_rows = rows_of(model, margins, queries)
    curve = []
    for damping in DAMPINGS:
        scores = influence.with_damping(damping).scores(asked_rows).numpy()
        curve.append({"seed": seed, "damping": damping} | judged(scores))
    return records, curve, influence.damping


def main(argv: list[str] | None = None) -> None:
    """Retrain, score, compare, write."""
    parser = options("influence of training samples on networks")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--networks", type=int, default=48, help="trained again in each setting")
    args = parser.parse_args(argv)
    args.training, args.epochs = (TRAINING, None) if not args.quick else (200, 4)
    args.networks = 6 if args.quick else args.networks
    records, curve, chosen = [], [], []
    for seed in seeds_of(args):
        found = run(TASKS[args.task], seed, args)
        records += found[0]
        curve += found[1]
        chosen.append(found[2])

    def cells(name: str) -> list[str]:
        scores = [spread(select(records, setting, method=name)) for setting in SETTINGS]
        seconds, memory = (select(records, key, method=name) for key in ("seconds", "MiB"))
        return [*scores, f"{np.median(seconds):.1f}", f"{np.median(memory):.0f}"]

    tables = {
        "lds": table(
            ["scores", *SETTINGS.values(), "seconds", "MiB"],
            [[name, *cells(name)] for name in unique(records, "method")],
        ),
        "damping": table(
            ["λ", *SETTINGS.values()],
            [
                [f"{λ:.1e}", *(spread(select(curve, setting, damping=λ)) for setting in SETTINGS)]
                for λ in DAMPINGS
            ],
        ),
    }
    settings = {
        "penalty": TASKS[args.task].penalty,
        "training": args.training,
        "queries": QUERIES,
        "networks": args.networks,
        "chosen": chosen,
    }
    save(args.output, f"influence-{args.task}-network", settings, records + curve, tables)


if __name__ == "__main__":
    main()
