"""
Choose the damping
==================

λ in :math:`F = \\lambda I + G^\\top G/m` is measured in squared gradients, so that no number is
right for two models. You have the gradients; this page reads λ off them, looks at the whole curve,
and then compares with what it could not know: the best λ by test.
"""

# %%
# A task that depends on λ
# ------------------------
#
# A network for the handwritten digits, of whose weights 70 % are to be removed in one shot. 400
# gradients, each the mean over three training images, say which, and what becomes of the others.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import mfac_core as mfac
from mfac_core.pruning import prune
from mfac_core.torch import per_sample_gradients

torch.manual_seed(0)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
train, test = (x[:1200], y[:1200]), (x[1200:], y[1200:])

model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(150):
    optimizer.zero_grad()
    cross_entropy(model(train[0]), train[1]).backward()
    optimizer.step()

weights = parameters_to_vector(model.parameters()).detach()
gradients = per_sample_gradients(model, cross_entropy, *train, samples_per_row=3)
print(gradients.shape)


@torch.no_grad()
def accuracy(damping):
    pruned = prune(weights, gradients, sparsity=0.7, damping=damping, stages=1)
    vector_to_parameters(pruned.weights, model.parameters())
    share = float((model(test[0]).argmax(1) == test[1]).float().mean())
    vector_to_parameters(weights.clone(), model.parameters())
    return share


# %%
# The curve
# ---------
#
# Take one row away: how likely is it under :math:`\mathcal N(0, F)` of the others? A small λ is
# surprised by what the other rows do not hold, a large one wastes likelihood on directions that
# hold nothing. :func:`~mfac_core.damping_curve` answers for all rows and dampings at once, from
# one eigenvalue problem of the Gram matrix.

curve = mfac.damping_curve(gradients)
print(f"{len(curve.dampings)} dampings tried, the best is {curve.best:.2g}")

# %%
# ``damping="auto"`` is short for it, wherever there is a ``damping``. Look at the curve before you
# believe it: a minimum at the end of what was tried, or a valley with another one beside it, says
# that the gradients do not decide.

inverse = mfac.InverseFisher(gradients, damping="auto")
assert inverse.damping == curve.best
assert curve.dampings[0] < curve.best < curve.dampings[-1]

# %%
# Many dampings
# -------------
#
# :meth:`~mfac_core.InverseFisher.with_damping` shares the Gram matrix, and makes no pass over the
# gradients. Here it does by hand what the curve has predicted: how likely, under each λ, are the
# gradients of images that no row has seen?

unseen = per_sample_gradients(model, cross_entropy, test[0][:300], test[1][:300], samples_per_row=3)
grid = 10.0 ** np.arange(-7, 1)
held_out = []
for damping in grid:
    other = inverse.with_damping(damping)
    held_out.append(float(other.quadratic(unseen.T).mean()) - float(other.logdet()))

# %%
# Against the best by test
# ------------------------

accuracies = [accuracy(damping) for damping in grid]
chosen = accuracy(curve.best)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogx(curve.dampings, curve.scores, label="each row by the others")
left.semilogx(grid, held_out, "o--", label="unseen rows by all")
low = curve.scores.min()
left.set(xlabel="λ", ylabel="−2 log likelihood, lower is better", ylim=(1.1 * low, -low))
left.legend()
right.semilogx(grid, accuracies, "o-")
right.set(xlabel="λ", ylabel="test accuracy after pruning")
for axes in (left, right):
    axes.axvline(curve.best, linestyle=":")
print(f"test accuracy {chosen:.3f} under the chosen λ")
print(f"best of the grid {max(accuracies):.3f}, worst {min(accuracies):.3f}")
assert chosen > max(accuracies) - 0.03
assert grid[np.argmin(held_out)] > curve.best

# %%
# The curve is about rows like those it has: images that the network was trained on. It is less
# sure of others, whose gradients are longer, so that they would have a larger λ. For pruning
# either does.
#
# Layers
# ------
#
# Layers may differ by powers of ten. Where each has an inverse of its own, let each have its λ.
# For biases, far fewer than there are rows, the rows explain one another whatever λ is, and next
# to none is needed.

layers = [p.numel() for p in model.parameters()]
dampings = mfac.choose_damping(gradients, layers=layers)
for (name, _), damping in zip(model.named_parameters(), dampings, strict=True):
    print(f"{name:9} {damping:.1e}")

# %%
# Where λ has a meaning, give it that: the weight of the penalty in influence functions, the
# precision of the prior in a Laplace approximation. A choice from the rows knows nothing of these.
# :doc:`../damping` measures the choice on more tasks, and says where it is behind.
