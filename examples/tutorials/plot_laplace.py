"""
Error bars for a trained network
================================

You have a network for regression and want to know how far to trust it, at each input. In a Laplace
approximation its weights are normal around the trained ones, with the covariance :math:`F^{-1}/m`.
:class:`~mfac_core.InverseFisher` gives the variance of a prediction, draws of whole networks, and
the evidence, which chooses λ without test data.
"""

# %%
# Data with a gap
# ---------------
#
# 60 measurements of a curve, with noise of a known size σ, and none between 0 and 1.

import copy
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

import mfac_core as mfac
from mfac_core.torch import per_sample_gradients

NOISE, M, HIDDEN = 0.2, 60, 16
rng = np.random.default_rng(0)


def measured(x):
    return torch.tensor(np.sin(2 * x) + 0.3 * x + NOISE * rng.standard_normal(len(x)))


x = np.append(rng.uniform(-2, 0, M // 2), rng.uniform(1, 2, M // 2))
y, x = measured(x), torch.tensor(x)[:, None]

# %%
# Training, and rows
# ------------------
#
# What is minimised is the mean of :math:`(f(x) - y)^2/2\sigma^2` plus :math:`\frac\lambda2 \lVert
# w \rVert^2`: the damping is the weight of the penalty, and mλ the precision of a normal prior.
# The rows of the Fisher matrix are the derivatives J of the outputs by the weights, over σ:
# :func:`~mfac_core.torch.per_sample_gradients` of a loss that is the output.


torch.manual_seed(0)
start = nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)).double()


def trained(damping, start):
    model = copy.deepcopy(start)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        weights = parameters_to_vector(model.parameters())
        errors = (model(x)[:, 0] - y) / NOISE
        value = errors.square().mean() / 2 + damping / 2 * weights @ weights
        value.backward()
        return value

    optimizer.step(loss)
    return model


def jacobian(model, x):
    return per_sample_gradients(model, lambda output, _: output.sum(), x, x)


# %%
# Which λ?
# --------
#
# The evidence is the probability of the training data under the model, for which the weights are
# integrated out (MacKay, 1992):
#
# .. math::
#
#     \log p(y \mid w) - \frac{m\lambda}2 \lVert w \rVert^2
#     + \frac12 (d \log\lambda + \log\det F^{-1}).
#
# It needs no test data. Each λ has a training of its own, since the penalty is part of it; each
# goes on from the network before.


def evidence(model, inverse):
    weights = parameters_to_vector(model.parameters()).detach()
    errors = (model(x)[:, 0] - y).detach() / NOISE
    likelihood = -(errors @ errors) / 2 - M * math.log(NOISE * math.sqrt(2 * math.pi))
    prior = len(weights) * math.log(inverse.damping) - M * inverse.damping * weights @ weights
    return float(likelihood + (prior + inverse.logdet()) / 2)


dampings, results, model = 10.0 ** np.arange(-4, 0.1, 0.5), [], start
for damping in dampings:
    model = trained(damping, model)
    inverse = mfac.InverseFisher(jacobian(model, x) / NOISE, damping=damping)
    results.append((evidence(model, inverse), model, inverse))
evidences = [result[0] for result in results]
best = int(np.argmax(evidences))
_, model, inverse = results[best]
print(f"λ {dampings[best]:.1g}, prior precision {M * dampings[best]:.2g}")
assert 0 < best < len(dampings) - 1

# %%
# The band
# --------
#
# The variance of the output is :math:`J F^{-1} J^\top/m`, which ``quadratic`` gives for many
# inputs at once; a measurement has that of the noise besides. ``sample`` draws weights, and with
# J what each draw says of every input.

grid = torch.linspace(-3, 3, 121, dtype=torch.float64)[:, None]
mean, rows = model(grid)[:, 0].detach(), jacobian(model, grid)
variance = inverse.quadratic(rows.T) / M
deviation = (variance + NOISE**2).sqrt()
draws = mean + inverse.sample(400, rng=1) @ rows.T / math.sqrt(M)

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
left.semilogx(dampings, evidences, "o-")
left.axvline(dampings[best], linestyle=":")
left.set(xlabel="λ", ylabel="log evidence")
reach = 1.645 * deviation  # 90 % of a normal distribution
right.fill_between(grid[:, 0], mean - reach, mean + reach, alpha=0.3, label="90 %")
right.plot(grid, draws[:8].T, linewidth=0.6, alpha=0.7, color="C2")
right.plot(grid, mean, label="the network")
right.plot(x, y, ".", label="measurements")
right.set(xlabel="x", ylim=(-3.5, 3.5))
_ = right.legend(loc="upper left")

# %%
# What holds of it
# ----------------
#
# The draws have the variance that ``quadratic`` says. Where there are no data the band is wider,
# and of new measurements where there are some about 90 % are inside.

assert torch.allclose(draws.std(0), variance.sqrt(), rtol=0.2)
gap, data = (variance[(grid[:, 0] - place).abs().argmin()].sqrt() for place in (0.5, -1.0))
print(f"deviation of the output: {gap:.3f} in the gap, {data:.3f} where there are data")
assert gap > 2 * data

new_x = np.append(rng.uniform(-2, 0, 500), rng.uniform(1, 2, 500))
new_y, new_x = measured(new_x), torch.tensor(new_x)[:, None]
spread = (inverse.quadratic(jacobian(model, new_x).T) / M + NOISE**2).sqrt()
inside = float(((model(new_x)[:, 0] - new_y).abs() <= 1.645 * spread).double().mean())
print(f"{inside:.1%} of 1,000 new measurements are inside the band")
assert 0.85 < inside < 0.95

# %%
# The approximation knows what the data leave open near this one network; not that other networks
# might fit as well, nor that the model may be wrong. A real data set, with test likelihoods over
# λ, is in :doc:`../recipes`.
