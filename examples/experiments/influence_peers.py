"""Scores of training samples by other packages, those that are installed.

Each function takes the model, (x, y) to train on, (x, y) to ask about, and the weight of the
penalty. It returns (queries, samples): the change of log p/(1 − p) of a query if the sample is left
out, up to a positive factor.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable

import numpy as np
import torch
from influence_methods import Data
from retraining import margins
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

Scores = Callable[[nn.Module, Data, Data, float], np.ndarray]

BATCH = 100
PROJECTED = 256
"""Dimensions of random projections: well below the number of samples, for want of a damping."""


def kronfluence(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by EK-FAC of the Fisher matrix of sampled labels."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(batch[0])
            y = torch.multinomial(logits.detach().softmax(-1), 1)[:, 0] if sample else batch[1]
            return cross_entropy(logits, y, reduction="sum")

        def compute_measurement(self, batch, model):
            return margins(model(batch[0]), batch[1]).sum()

    task = Classification()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "influence",
            prepare_model(model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=folder,
            disable_model_save=True,
        )
        analyzer.fit_all_factors("ekfac", TensorDataset(*train), per_device_batch_size=BATCH)
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            TensorDataset(*queries),
            TensorDataset(*train),
            score_args=ScoreArguments(damping_factor=penalty),
            per_device_query_batch_size=BATCH,
            per_device_train_batch_size=BATCH,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


def trak(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by TRAK from one model."""
    from trak import TRAKer

    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model,
            "image_classification",
            len(train[1]),
            save_dir=folder,
            device="cpu",
            proj_dim=PROJECTED,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(TensorDataset(*train), BATCH):
            traker.featurize(batch, num_samples=len(batch[1]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("scores", model.state_dict(), 0, len(queries[1]))
        for batch in DataLoader(TensorDataset(*queries), BATCH):
            traker.score(batch, num_samples=len(batch[1]))
        # Of a margin that is larger with a sample that is there.
        return -np.array(traker.finalize_scores("scores")).T


def dattri_datainf(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by DataInf: a mean of the inverses of single samples' Fisher matrices."""
    from dattri.algorithm.influence_function import IFAttributorDataInf

    return _dattri_scores(IFAttributorDataInf, 1, model, train, queries, penalty)


def dattri_arnoldi(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by the Hessian in a Krylov space."""
    from dattri.algorithm.influence_function import IFAttributorArnoldi

    return _dattri_scores(IFAttributorArnoldi, len(train[1]), model, train, queries, penalty)


def _dattri_scores(
    attributor_of, at_once: int, model: nn.Module, train: Data, queries: Data, penalty: float
) -> np.ndarray:
    from dattri.task import AttributionTask

    def logits_of(weights, samples):  # of one or of many
        y = samples[1].reshape(-1)
        x = samples[0].reshape(len(y), *train[0].shape[1:])
        return torch.func.functional_call(model, weights, (x,)), y

    def loss(weights, samples):
        return cross_entropy(*logits_of(weights, samples))

    def target(weights, samples):
        return margins(*logits_of(weights, samples)).sum()

    task = AttributionTask(loss, model, model.state_dict(), target_func=target)
    attributor = attributor_of(task, regularization=penalty)
    attributor.cache(DataLoader(TensorDataset(*train), at_once))
    # All training samples at once: for each batch of them the queries are solved for anew.
    loaders = (DataLoader(TensorDataset(*data), len(data[1])) for data in (train, queries))
    return attributor.attribute(*loaders).detach().numpy().T


def pydvl_nystroem(model: nn.Module, train: Data, queries: Data, penalty: float) -> np.ndarray:
    """Return scores by the Hessian in a random subspace."""
    from pydvl.influence.torch import NystroemSketchInfluence

    influence = NystroemSketchInfluence(model, cross_entropy, regularization=penalty, rank=100)
    influence.fit(DataLoader(TensorDataset(*train), BATCH))
    found = influence.influences(*queries, *train).detach().numpy()
    return -found  # of the loss, which rises where log p/(1 − p) falls


PEERS: dict[str, tuple[str, Scores]] = {
    "kronfluence, EK-FAC": ("kronfluence.analyzer", kronfluence),
    f"traker, TRAK, one model, {PROJECTED} projections": ("trak", trak),
    "dattri, DataInf": ("dattri.algorithm.influence_function", dattri_datainf),
    "dattri, Arnoldi, 100 dimensions": ("dattri.algorithm.influence_function", dattri_arnoldi),
    "pyDVL, Nyström, rank 100": ("pydvl.influence.torch", pydvl_nystroem),
}
"""What to import, and the function, by name."""


def installed() -> dict[str, Scores]:
    """Return those whose package is there, and print those that are left out."""
    found = {}
    for name, (module, scores) in PEERS.items():
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            print(f"{name}: left out, {module.partition('.')[0]} is not installed")
        else:
            found[name] = _quietly(scores)
    return found


def _quietly(scores: Scores) -> Scores:
    def quiet(*args):
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return scores(*args)

    return quiet
