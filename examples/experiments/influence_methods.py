"""Changes of a network's outputs without some training samples, as the library predicts them.

Each method takes the model, (x, y) to train on and (x, y) to ask about. It returns what gives the
prediction under any λ: from groups of samples that are left out to the change of log p/(1 − p) of
every query, up to a positive factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from retraining import margins
from torch import nn
from torch.nn.functional import cross_entropy

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.torch import ModelGradients, per_sample_gradients

Data = tuple[torch.Tensor, torch.Tensor]
Groups = list[np.ndarray]
Prediction = Callable[[Groups], np.ndarray]
"""From groups to the change of every query, (groups, queries)."""

Method = Callable[[nn.Module, Data, Data], Callable[[float], Prediction]]


def rows_of(model: nn.Module, function: Callable, data: Data) -> torch.Tensor:
    """Return the gradients of a function of logits and label, one a row."""
    return per_sample_gradients(model, lambda z, y: function(z, y).mean(), *data)


def summed(scores: Any) -> Prediction:
    """Return the prediction that adds up the scores (queries, samples) of a group."""
    scores = np.asarray(scores, np.float64)
    return lambda groups: np.array([scores[:, group].sum(axis=1) for group in groups])


def drawn(model: nn.Module, x: torch.Tensor) -> Data:
    """Return the images with labels that are drawn from the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return x, torch.multinomial(model(x).softmax(-1), 1, generator=generator)[:, 0]


def by_scores(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By ``scores``."""
    influence = Influence(rows_of(model, cross_entropy, train), damping=1.0)
    asked = rows_of(model, margins, queries)
    return lambda damping: summed(influence.with_damping(damping).scores(asked))


def by_chosen(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By ``scores`` with the λ that the gradients choose."""
    influence = Influence(rows_of(model, cross_entropy, train), damping="auto")
    asked = rows_of(model, margins, queries)
    return lambda _: summed(influence.scores(asked))


def never_stored(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By ``scores`` from gradients that are never stored."""

    def rows(function: Callable, data: Data) -> ModelGradients:
        batches = list(zip(*(part.split(50) for part in data), strict=True))
        return ModelGradients(model, lambda model, b: function(model(b[0]), b[1]), batches)

    each = rows(lambda z, y: cross_entropy(z, y, reduction="none"), train)
    asked = rows(margins, queries)
    return lambda damping: summed(Influence(each, damping=damping).scores(asked))


def by_groups(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By ``leave_out``, exact under the quadratic model."""
    influence = Influence(rows_of(model, cross_entropy, train), damping=1.0)
    asked = rows_of(model, margins, queries)

    def under(damping: float) -> Prediction:
        damped = influence.with_damping(damping)
        return lambda groups: damped.leave_out(groups, asked).numpy()

    return under


def by_drawn_labels(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By the Fisher matrix of labels that are drawn from the model."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        labels = torch.multinomial(model(train[0]).softmax(-1), 1, generator=generator)[:, 0]
    inverse = mfac.InverseFisher(rows_of(model, cross_entropy, (train[0], labels)), damping=1.0)
    g, asked = rows_of(model, cross_entropy, train), rows_of(model, margins, queries)
    return lambda damping: summed((inverse.with_damping(damping) @ asked.T).T @ g.T)


def by_products(model: nn.Module, train: Data, queries: Data) -> Callable[[float], Prediction]:
    """By products of gradients."""
    asked = rows_of(model, margins, queries)
    return lambda _: summed(asked @ rows_of(model, cross_entropy, train).T)


METHODS: dict[str, Method] = {
    "`scores`": by_scores,
    "the same, gradients never stored": never_stored,
    "`leave_out`, groups exactly": by_groups,
    "`InverseFisher` of drawn labels": by_drawn_labels,
    "`scores`, λ by `choose_damping`": by_chosen,
    "products of gradients": by_products,
}
DAMPED = ("`scores`", "`leave_out`, groups exactly", "`InverseFisher` of drawn labels")
"""Those that are tried under every λ."""
