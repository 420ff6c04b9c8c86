"""Wrong arguments of every kind, as newcomers give them: each is refused by its name."""

import numpy as np
import pytest
import torch

import mfac_core as mfac
from mfac_core import functional, pruning, testing
from mfac_core.influence import Influence
from mfac_core.torch import MFAC, ModelGradients, Pruner, gradient_rows, per_sample_gradients

G, X = np.ones((3, 4)) + np.eye(3, 4), np.ones(4)
INVERSE = mfac.InverseFisher(G, damping=0.1)
BATCHES, TARGETS = [torch.ones(2, 4)], torch.ones(2, 2)


def model():
    return torch.nn.Linear(4, 2)


def loss(model, batch):
    return model(batch).mean()


def window(**options):
    return mfac.SlidingInverseFisher(num_params=4, window_size=3, damping=1, **options)


def samples(inputs=BATCHES[0], targets=TARGETS, loss_fn=torch.nn.functional.mse_loss):
    return per_sample_gradients(model(), loss_fn, inputs, targets)


def prune(weights=X, gradients=G, **options):
    return pruning.prune(weights, gradients, **({"sparsity": 0.5, "damping": 0.1} | options))


WRONG = [
    (lambda: mfac.InverseFisher(np.ndarray, damping=1), "gradients must be an array .* got type"),
    (lambda: mfac.InverseFisher("wrong", damping=1), "gradients must be an array or .* 'wrong'"),
    (lambda: mfac.InverseFisher(G.tolist(), damping=1), "gradients must be an array .* got list"),
    (lambda: mfac.InverseFisher(G, damping=True), "damping must be a positive number, got True"),
    (lambda: mfac.InverseFisher(G, damping="1"), "damping must be a positive number, got '1'"),
    (lambda: mfac.InverseFisher(G, damping=1, reduce="sum"), "reduce must be a function .* 'sum'"),
    (lambda: window(reduce=3), "reduce must be a function .* got 3"),
    (lambda: mfac.BlockFisher(block_size=2, reduce=3), "reduce must be a function .* got 3"),
    (lambda: INVERSE @ torch.ones(4), "x must be an array of the gradients' library NumPy"),
    (lambda: INVERSE.power(1e9), "p must leave λᵖ within float64, got 1e.09"),
    (lambda: INVERSE.power(True), "p must be a number, got True"),
    (lambda: INVERSE.sample(2, -1), "rng must be .* a seed of at least 0, got -1"),
    (lambda: INVERSE.sample(2, "seed"), "rng must be a numpy.random.Generator"),
    (lambda: mfac.BlockInverseFisher.accumulate(None, damping=1, block_size=2), "gradients must"),
    (lambda: mfac.RowShards(None), "shards must be an iterable of arrays or files, got None"),
    (lambda: mfac.RowShards([X]), r"shards\[0\] must have shape \(rows, columns\), .* \(4,\)"),
    (lambda: window(xp="numpy"), "xp must be an array namespace, such as numpy or torch"),
    (lambda: window(dtype="wrong", xp=np), "dtype must be one of numpy.*'wrong'"),
    (lambda: window(dtype=np.float32, xp=torch), "dtype must be one of torch"),
    (lambda: window().load_state_dict(None), "state must be a mapping.* got NoneType"),
    (lambda: mfac.choose_damping(G, dampings=1.0), "dampings must be an iterable .* got 1.0"),
    (lambda: mfac.choose_damping(G, layers=4), "layers must be an iterable .* got 4"),
    (lambda: prune(loss="mse"), "loss must be a function of the weights, got 'mse'"),
    (lambda: prune(update="exakt"), "update must be 'joint' or 'independent', got 'exakt'"),
    (lambda: pruning.saliency(X, G), "inverse must be an operator, such as InverseFisher"),
    (lambda: pruning.gradual(X, G, sparsity=[0.5], damping=1), "gradients must be a function"),
    (lambda: Influence(G, damping=1).leave_out(None), "groups must be an iterable"),
    (lambda: functional.init(4, 3, damping=1, dtype="wrong"), "dtype must be .*'wrong'"),
    (lambda: testing.dense_inverse(None, damping=1), "the argument must be an array"),
    (lambda: MFAC(model().parameters(), "fast"), "lr must be a number, got 'fast'"),
    (lambda: MFAC(model().parameters(), window_size=None), "window_size must be a number"),
    (lambda: MFAC(model().parameters(), momentum=None), "momentum must be a number, got None"),
    (lambda: MFAC(model().parameters(), damping="auto"), "damping must be a number or None"),
    (lambda: MFAC(model().parameters(), density=[0.1]), "density must be a number or None"),
    (lambda: MFAC(model().parameters(), window_dtype="half"), "window_dtype must be .* 'half'"),
    (lambda: MFAC(model().parameters(), window_device="gpu"), "window_device must be a device"),
    (lambda: MFAC(model().parameters(), reduce=1), "reduce must be a function"),
    (lambda: gradient_rows("net", loss, BATCHES), "model must be a torch.nn.Module, got str"),
    (lambda: gradient_rows(model(), "mse", BATCHES), "loss_fn must be a function of .model, batch"),
    (lambda: gradient_rows(model(), loss, BATCHES, dtype="half"), "dtype must be .* got 'half'"),
    (lambda: gradient_rows(model(), loss, BATCHES, parameters=3), "parameters must be an iterable"),
    (lambda: ModelGradients(model(), None, BATCHES), "loss_fn must be a function"),
    (lambda: ModelGradients(None, loss, BATCHES), "model must be a torch.nn.Module, got NoneType"),
    (lambda: Pruner(model(), loss, BATCHES, pattern=[2, 4]), r"pattern must be .* got \[2, 4\]"),
    (lambda: Pruner(model(), loss, BATCHES, dtype=np.float32), "dtype must be a real floating"),
    (lambda: Pruner(None, loss, BATCHES), "model must be a torch.nn.Module, got NoneType"),
    (lambda: samples(inputs=G), "inputs must be of torch.Tensor, got ndarray; convert"),
    (lambda: samples(targets=[1, 2]), "targets must be of torch.Tensor, got list; convert"),
    (lambda: samples(loss_fn="mse"), "loss_fn must be a function of .output, targets., got 'mse'"),
]


@pytest.mark.parametrize(("act", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_argument_is_refused_by_its_name(act, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        act()
