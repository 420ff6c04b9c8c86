"""
Gradients larger than memory
============================

You have more gradients than memory holds, and a disk. This page writes them to a file, a row at a
time, and has the inverse of the Fisher matrix read them from there. The file is small here, so
that the page is made in seconds; the last section says what changes at 100 GB.
"""

# %%
# A model and its batches
# -----------------------

import tempfile
import tracemalloc
from contextlib import suppress
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import mfac_core as mfac
from mfac_core.torch import gradient_rows

torch.manual_seed(0)
x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
data = TensorDataset(x.float() / 16, y)
model = nn.Sequential(
    *(nn.Linear(64, 288), nn.ReLU(), nn.Linear(288, 288), nn.ReLU(), nn.Linear(288, 10))
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for inputs, labels in DataLoader(data, batch_size=32, shuffle=True):
    optimizer.zero_grad()
    cross_entropy(model(inputs), labels).backward()
    optimizer.step()

# %%
# Rows to a file
# --------------
#
# With a path for ``out``, :func:`~mfac_core.torch.gradient_rows` writes each row when it has it.
# No two rows are in memory at a time. A run that was interrupted, here by a loader that gives out
# after 60 batches, is gone on with by the same call. The batches must come in the same order; with
# other weights it begins anew.

folder = tempfile.TemporaryDirectory()
path, rows, DAMPING = Path(folder.name) / "gradients.npy", 224, 1e-6
loader = DataLoader(data, batch_size=8)


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


with suppress(ValueError):  # fewer batches than rows
    gradient_rows(model, loss_fn, islice(loader, 60), rows=rows, out=path)
assert path.with_name("gradients.npy.progress").exists()

gradients = gradient_rows(model, loss_fn, loader, rows=rows, out=path)
print(f"{type(gradients).__name__} of {gradients.shape}, {path.stat().st_size / 1e6:.0f} MB")

# %%
# Query the file
# --------------
#
# The path stands for the array. The file is read in slices of columns, each byte once in a pass:
# one pass at set-up, two in a product, one for the diagonal. What is kept is the Gram matrix and
# its factor, 224 × 224 numbers each.

inverse = mfac.InverseFisher(path, damping=DAMPING)
direction = np.random.default_rng(0).standard_normal(gradients.shape[1], dtype=np.float32)
product = inverse @ direction
variances = inverse.diagonal()

alone = mfac.InverseFisher(np.array(gradients), damping=DAMPING)  # of an array in memory
expected = alone @ direction
assert np.linalg.norm(product - expected) < 1e-5 * np.linalg.norm(expected)

# %%
# What it takes
# -------------
#
# The most that NumPy allocates meanwhile, over the first columns of the file and over all of
# them. It is that of a few buffers, of 16 MB in the diagonal, and hardly grows with the file.


def peak_of(act, *args, **kwargs):
    tracemalloc.start()
    act(*args, **kwargs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 1e6


sizes, peaks = [], {"set-up": [], "a product": [], "the diagonal": []}
for share in (0.25, 0.5, 1.0):
    part = gradients[:, : int(share * gradients.shape[1])]
    sizes.append(part.nbytes / 1e6)
    peaks["set-up"].append(peak_of(mfac.InverseFisher, part, damping=DAMPING))
    inverse = mfac.InverseFisher(part, damping=DAMPING)
    peaks["a product"].append(peak_of(inverse.matvec, direction[: part.shape[1]]))
    peaks["the diagonal"].append(peak_of(inverse.diagonal))

figure, axes = plt.subplots(layout="constrained")
axes.plot(sizes, sizes, ":", label="the gradients themselves")
for name, peak in peaks.items():
    axes.plot(sizes, peak, "o-", label=name)
    print(f"{name:13} {peak[-1]:5.1f} MB at most, beside {sizes[-1]:.0f} MB of gradients")
    assert peak[-1] < peak[0] + 0.1 * sizes[-1]
axes.set(xlabel="gradients, MB", ylabel="most that was allocated, MB", xlim=0, ylim=0)
_ = axes.legend()

# %%
# The diagonal, layer by layer
# ----------------------------
#
# Columns are in the order of ``model.parameters()``. An element is 1/λ for a weight of which the
# gradients say nothing, and smaller the more they say.

figure, axes = plt.subplots(layout="constrained")
start = 0
for name, p in model.named_parameters():
    values = variances[start : start + p.numel()]
    start += p.numel()
    if p.ndim == 2:
        axes.hist(values * DAMPING, bins=60, histtype="step", density=True, label=name)
axes.set(xlabel="λ · element of the diagonal", yscale="log", ylabel="density")
axes.legend(loc="upper left")
assert variances.min() > 0
assert variances.max() <= (1 + 1e-6) / DAMPING
folder.cleanup()

# %%
# At 100 GB
# ---------
#
# - **The passes are bound by the disk**, and each reads everything: count them. One at set-up, two
#   for a product, whether with one vector or with many: give ``inverse @ X`` all of them at once.
# - **Another λ** comes from ``inverse.with_damping(λ)``, without a pass.
# - **Bars**: ``progress=True`` shows how far a pass is, where tqdm is installed.
# - **Half the file**: ``dtype=torch.float16`` for the rows, if the gradients do not underflow in
#   it; the small matrices stay float64.
# - **Several files**: :class:`~mfac_core.RowShards` stacks files of some of the rows each, such as
#   those of several machines; a list of paths stands for columns side by side, such as layers that
#   were written by ``gradient_rows(..., parameters="layer1.*")``.
# - **Datasets** of h5py and zarr are read in the same way. Chunks of columns are the better ones.
# - **Blocks of F** are often enough, with fewer rows: :class:`~mfac_core.BlockInverseFisher` takes
#   the path as well, and lets go of the file where its blocks are shorter than the rows are many.
#
# :doc:`../storage` has the sizes for real models, and gradients spread over machines.
