"""
Prune a PyTorch model
=====================

You have a trained ``nn.Module``, a DataLoader and a sparsity. This page goes from there to a
pruned, fine-tuned and exported model.
"""

# %%
# A model and its data
# --------------------
#
# Here a small residual network with batch normalisation, for the handwritten digits of
# scikit-learn.

import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from mfac_core.torch import Pruner, prune_model

torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
x = x.float().reshape(-1, 1, 8, 8) / 16
train, test = TensorDataset(x[:1300], y[:1300]), (x[1300:], y[1300:])


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x):
        return torch.relu(x + self.body(x))


def network():
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(Residual(16), Residual(16)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


def train_for(model, epochs, rate):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for inputs, labels in DataLoader(train, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return float((model(test[0]).argmax(1) == test[1]).float().mean())


model = network()
train_for(model, epochs=5, rate=3e-3)
dense, unpruned = accuracy(model), copy.deepcopy(model)
print(f"test accuracy {dense:.3f}")
assert dense > 0.9

# %%
# Gradually, with fine-tuning
# ---------------------------
#
# Two things say what the model is for: batches, and the loss of one. Batches of 16 to 32 samples
# serve well; each becomes one row of the Fisher matrix. Every step of
# :func:`~mfac_core.torch.prune_model` takes gradients at the weights as they are, chooses what goes
# by the inverse Fisher matrix, moves what stays to make up for it, and then calls ``finetune``.


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def finetune(model):
    train_for(model, epochs=1, rate=1e-2)


batches = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)
pruner = prune_model(model, loss_fn, batches, 0.9, steps=4, rows=48, finetune=finetune)
print(f"test accuracy {accuracy(model):.3f} with a tenth of the weights, {dense:.3f} with all")
assert accuracy(model) > dense - 0.1

# %%
# ``steps=16`` is the default: more steps lose less. What became of the model, by step and by layer,
# is in the report, which prints as a table and draws itself.

report = pruner.report()
print(report)
figure = report.plot()  # figure.savefig("report.png") writes it
plt.figure(figure)  # pyplot shows it: here, and in a notebook
assert [f"{step.sparsity:.0%}" for step in report.steps] == ["44%", "68%", "82%", "90%"]

# %%
# The masks hold
# --------------
#
# Removed weights stay zero under any optimiser. Each ``weight`` is now the product of a parameter,
# ``weight_orig``, and a mask, as :mod:`torch.nn.utils.prune` makes them; the parameter is the same
# object as before, so that an optimiser that you have already goes on with it.

train_for(model, epochs=1, rate=1e-3)
kept = pruner.masks["7.weight"]  # bool, True where a weight is kept
assert (model[7].weight[~kept] == 0).all()
print(f"test accuracy {accuracy(model):.3f} after another epoch")

# %%
# Save and resume
# ---------------
#
# To go on after a restart, save both states. The masks come first, since they give the model the
# names that its own state has.

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "pruned.pt"
    torch.save({"pruner": pruner.state_dict(), "model": model.state_dict()}, path)
    state = torch.load(path)

resumed = network()
resumed_pruner = Pruner(resumed, loss_fn, batches, rows=48)
resumed_pruner.load_state_dict(state["pruner"])
resumed.load_state_dict(state["model"])
assert accuracy(resumed) == accuracy(model)

# %%
# For good
# --------
#
# ``finalize()`` leaves plain parameters with zeros, under their old names, and no hooks: a model as
# :func:`torch.export.export` and other tools know it.

pruner.finalize()
parameters = dict(model.named_parameters())
zeros = sum(int((parameters[name] == 0).sum()) for name in pruner.masks)
print(f"{zeros} of {sum(mask.numel() for mask in pruner.masks.values())} weights are zero")

program = torch.export.export(model.eval(), (test[0][:2],))
assert torch.allclose(program.module()(test[0][:2]), model(test[0][:2]), atol=1e-6)

# %%
# Two of four
# -----------
#
# Some hardware multiplies faster by weights of which at most two of every four input channels are
# there. ``pattern="2:4"`` leaves out the layers whose channels four does not divide, here the
# first.

pruner = Pruner(unpruned, loss_fn, batches, rows=64, pattern="2:4")
print(pruner.step())
print(f"test accuracy {accuracy(unpruned):.3f} without fine-tuning, {dense:.3f} with all weights")
assert "0.weight" not in pruner.masks
weight = unpruned[3].body[0].weight  # (output, input, 3, 3)
assert ((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all()

# %%
# On a GPU, in 16 bits, ``pruner.finalize(semi_structured=True)`` converts the linear layers by
# :func:`torch.sparse.to_sparse_semi_structured`. Whole filters, rows, channels or attention heads
# go with ``pattern="filter"`` and so on; these need more fine-tuning for the same share.
#
# A transformer
# -------------
#
# Rows are cut into blocks within each parameter, so that a large model needs no more of them than
# a small one. What to prune is said by name; embeddings, which most batches do not touch, and the
# last layer are often better left alone.


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(torch.zeros(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.classify = nn.Linear(32, 10)

    def forward(self, x):  # a row of pixels is a token
        return self.classify(self.encoder(self.embed(x.squeeze(1)) + self.place).mean(1))


model = Encoder()
train_for(model, epochs=5, rate=5e-3)
dense, chosen = accuracy(model), {"parameters": "encoder.*weight", "exclude": "*norm*"}
pruner = prune_model(model, loss_fn, batches, 0.5, steps=2, rows=64, **chosen)
print(f"{len(pruner.masks)} layers, test accuracy {dense:.3f}, then {accuracy(model):.3f}")
assert accuracy(model) > dense - 0.05

# %%
# When accuracy drops
# -------------------
#
# Look at ``pruner.report()`` first.
#
# - **The loss rises much more than predicted** at a step: the step is too large. Take more
#   ``steps``, or fine-tune between them.
# - **It rises as predicted, and much**: the sparsity is too high for what these weights do. Look at
#   the layers: exclude those with the largest predicted rise, or that keep next to nothing.
# - **It does not rise, and the test accuracy falls**: the batches are too few, or not like the test
#   data. Give more ``rows``, each of 16 to 32 samples.
# - **Statistics**: a step takes the means and variances of batch normalisation anew where that
#   lowers the loss on batches that they were not taken from by more than 1 %. Otherwise, and in all
#   layers but these, nothing is changed but the weights.
# - **Large batches** make rows alike, and single samples make rows of a few misclassified ones.
#   Batches of another loader than that for training cost nothing.
#
# :doc:`../pruning` compares the methods behind this, and says what was measured.
