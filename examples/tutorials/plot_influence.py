"""
Wrong labels and helpful samples
================================

You have a trained network and the data that it was trained on. Which of the labels are wrong?
Which samples does a prediction rest on? What if some had not been there?
:class:`~mfac_core.influence.Influence` answers from one gradient for each sample.
"""

# %%
# A network, and labels of which a tenth are wrong
# ------------------------------------------------
#
# 600 handwritten digits to train a small convolutional network on, 60 of them with a wrong label,
# and 600 more, whose labels are right. The training minimises the mean loss plus
# :math:`\frac\lambda2 \lVert w \rVert^2`, and λ will be the damping.

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from mfac_core.influence import Influence
from mfac_core.torch import per_sample_gradients

M, WRONG, PENALTY = 600, 60, 1e-2
rng = np.random.default_rng(0)
x, truth = load_digits(return_X_y=True)
order = rng.permutation(len(truth))[: 2 * M]
x = torch.tensor(x[order], dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
truth = torch.tensor(truth[order])
is_wrong = np.zeros(M, bool)
is_wrong[rng.choice(M, WRONG, replace=False)] = True
labels = truth[:M].clone()
labels[is_wrong] = (labels[is_wrong] + torch.tensor(rng.integers(1, 10, WRONG))) % 10
test_x, test_y = x[M:], truth[M:]


def trained(x, y):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, weight_decay=PENALTY)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model


model = trained(x[:M], labels)
with torch.no_grad():
    own_loss = cross_entropy(model(x[:M]), labels, reduction="none").numpy()
    test_loss = float(cross_entropy(model(test_x), test_y))
    accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
print(f"test loss {test_loss:.3f}, accuracy {accuracy:.3f}")

# %%
# Which labels are wrong?
# -----------------------
#
# Rows are gradients of single samples. A sample that is alone in what it says has a large
# influence on its own loss, ``self_influence()``. Its loss is what one would look at without any
# of this; and where other samples are known to be right, those that harm them are suspect:
# ``scores`` are what leaving a sample out does to a query's loss, negative for one that harms.

gradients = per_sample_gradients(model, cross_entropy, x[:M], labels)
queries = per_sample_gradients(model, cross_entropy, test_x[:300], test_y[:300])
influence = Influence(gradients, damping=PENALTY)
print(gradients.shape)

suspicion = {
    "self-influence": influence.self_influence().numpy(),
    "its own loss": own_loss,
    "harm to 300 right ones": -influence.scores(queries.mean(0)).numpy()[0],
}
figure, axes = plt.subplots(layout="constrained")
k = np.arange(1, 2 * WRONG + 1)
for name, score in suspicion.items():
    hits = is_wrong[np.argsort(-score)].cumsum()[: len(k)]
    axes.plot(k, hits / k, label=name)
    print(f"{name:22} {hits[WRONG - 1]} of the {WRONG} wrong labels among the first {WRONG}")
    assert hits[WRONG - 1] > WRONG / 2
axes.plot(k, np.minimum(1, WRONG / k), ":", label="the best there is")
axes.set(xlabel="k, labels looked at", ylabel="share of wrong ones among them", ylim=(0, 1.05))
_ = axes.legend()

# %%
# On which samples does a prediction rest?
# ----------------------------------------
#
# All three find most of the wrong labels, and a sample's own loss is as good as any. What it does
# not say is which others a sample helps or harms. For one test image, here are the training images
# without which its loss would rise most, and those without which it would fall most, each with the
# label that the training has seen.

with torch.no_grad():
    test_losses = cross_entropy(model(test_x), test_y, reduction="none")
asked = int(test_losses[:300].argmax())  # the one that the network is most wrong about
query = per_sample_gradients(model, cross_entropy, test_x[[asked]], test_y[[asked]])
helpful, harmful = influence.most_helpful(query, 5), influence.most_harmful(query, 5)

figure, axes = plt.subplots(2, 6, figsize=(9, 3.6), layout="constrained")
for row, name, found in zip(axes, ("helps", "harms"), (helpful, harmful), strict=True):
    row[0].imshow(test_x[asked, 0].numpy(), cmap="gray")
    row[0].set_title(f"asked: a {test_y[asked]}")
    for place, i, score in zip(row[1:], found.indices[0], found.scores[0], strict=True):
        place.imshow(x[i, 0].numpy(), cmap="gray")
        place.set_title(f"{name}: “{labels[i]}”\n{score:+.3f}", fontsize="small")
for place in axes.flat:
    place.set_axis_off()
assert (helpful.scores > 0).all()
assert (harmful.scores < 0).all()

# %%
# What if some had not been there?
# --------------------------------
#
# ``leave_out`` takes groups, and is exact for them under the quadratic model: the samples of a
# group do not just add up. Here the 60 most suspect by the first list above, at once, and what it
# does to the mean loss on the 300 images that were not asked about yet. Then the training is done
# again without them.

suspects = np.argsort(-suspicion["self-influence"])[:WRONG]
others = per_sample_gradients(model, cross_entropy, test_x[300:], test_y[300:]).mean(0)
exact = float(influence.leave_out([suspects], others)[0, 0])
summed = float(influence.scores(others)[0, suspects].sum())

stay = np.setdiff1d(np.arange(M), suspects)
again = trained(x[stay], labels[stay])
with torch.no_grad():
    before, after = (cross_entropy(net(test_x[300:]), test_y[300:]) for net in (model, again))
print(f"predicted {exact:+.3f} for the group, {summed:+.3f} as a sum of its samples")
print(f"after training again {after - before:+.3f}: {before:.3f} before, {after:.3f} now")
assert exact < 0
assert after < before

# %%
# The sign is right, and the order of groups mostly is. Sizes are not to be relied on: the
# empirical Fisher matrix stands for the Hessian, and a network that is trained again may go to
# another minimum. :doc:`../influence` has the formulas, what was measured against retraining, and
# gradients that are never stored, for data sets whose rows do not fit.
