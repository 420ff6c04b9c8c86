"""
Train a transformer
===================

:class:`~mfac_core.torch.MFAC` takes the place of ``AdamW`` in a loop that you have already. This
page trains a small transformer to predict text, with warm-up and a cosine schedule, stops in the
middle, and goes on from a file.
"""

# %%
# A model and its data
# --------------------
#
# The text is scikit-learn's descriptions of its data sets; the model guesses each next character.

import tempfile
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from mfac_core.torch import MFAC

pages = sorted(files("sklearn.datasets.descr").iterdir(), key=lambda page: page.name)
text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.suffix == ".rst")
alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
ids = torch.tensor([alphabet[character] for character in text])
LENGTH, WIDTH, STEPS, WARMUP = 16, 32, 160, 16


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(len(alphabet), WIDTH)
        self.place = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.output = nn.Linear(WIDTH, len(alphabet))
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x):
        h = self.layers(self.embed(x) + self.place, mask=self.mask, is_causal=True)
        return self.output(h)


def loss_of(model, samples):
    starts = torch.randint(len(ids) - LENGTH - 1, (16,), generator=samples)
    pieces = ids[starts[:, None] + torch.arange(LENGTH + 1)]
    return cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


# %%
# The loop
# --------
#
# Nothing in it knows which optimiser it has. The schedule is PyTorch's: from a tenth of the rate
# to all of it while the window fills, then along a cosine to zero. It has to end at zero: a step
# of :class:`~mfac_core.torch.MFAC` is as long as the rate says, and does not get shorter as the
# gradients do.


def start(optimizer_of):
    torch.manual_seed(0)
    model = Transformer()
    optimizer = optimizer_of(model.parameters())
    warm_up = LinearLR(optimizer, 0.1, 1.0, WARMUP)
    cosine = CosineAnnealingLR(optimizer, STEPS - WARMUP)
    return model, optimizer, SequentialLR(optimizer, [warm_up, cosine], [WARMUP])


def train(model, optimizer, scheduler, samples, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, samples)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def mfac(parameters):
    return MFAC(parameters, lr=2e-2)


# %%
# Stop in the middle
# ------------------
#
# The state of the optimiser has the whole window of gradients, by parameter, and is saved like any
# other: beside those of the model, of the schedule, and of the generator that draws the batches.

run, samples = start(mfac), torch.Generator().manual_seed(1)
losses = {"MFAC": train(*run, samples, STEPS // 2)}

folder = tempfile.TemporaryDirectory()
path = Path(folder.name) / "checkpoint.pt"
torch.save([*(part.state_dict() for part in run), samples.get_state()], path)
weights = sum(p.numel() for p in run[0].parameters())
print(f"{weights:,} weights, a file of {path.stat().st_size / 1e6:.1f} MB")

losses["MFAC"] += train(*run, samples, STEPS - STEPS // 2)

# %%
# Go on
# -----
#
# As after a restart: everything made anew, then loaded. The second half equals that of the run
# that was not interrupted, bit for bit.

resumed, fresh = start(mfac), torch.Generator()
*states, position = torch.load(path)
folder.cleanup()
for part, state in zip(resumed, states, strict=True):
    part.load_state_dict(state)
fresh.set_state(position)
again = train(*resumed, fresh, STEPS - STEPS // 2)

assert again == losses["MFAC"][STEPS // 2 :]
for p, q in zip(run[0].parameters(), resumed[0].parameters(), strict=True):
    assert torch.equal(p, q)

# %%
# Beside AdamW
# ------------
#
# The same model, batches and schedule. AdamW has the best rate of those tried for this run, 0.001,
# 0.003, 0.01, 0.02 and 0.03; MFAC twice its default, as the run is short. It ends a little lower.
# One run on a network this small shows how a loss goes down and no more; :doc:`../optimisers`
# compares over seeds and networks, and says where MFAC is ahead and where it is not.

run = start(lambda parameters: torch.optim.AdamW(parameters, lr=3e-2))
losses["AdamW"] = train(*run, torch.Generator().manual_seed(1), STEPS)

figure, axes = plt.subplots(layout="constrained")
for name, course in losses.items():
    smooth = np.convolve(course, np.ones(15) / 15, mode="valid")
    axes.plot(np.arange(len(smooth)) + 15, smooth, label=name)
axes.axvline(STEPS // 2, linestyle=":", label="saved and resumed")
axes.set(xlabel="step", ylabel="training loss, mean of 15 steps")
axes.legend()
for name, course in losses.items():
    print(f"{name:5} {np.mean(course[-30:]):.3f} nats a character over the last 30 steps")
assert np.mean(losses["MFAC"][-30:]) < np.mean(losses["AdamW"][-30:])

# %%
# Clipping
# --------
#
# Without ``damping`` gradients enter the window at length 1, and only the direction of the step is
# kept. So a clipped norm changes nothing but rounding: one huge gradient cannot throw the weights
# far away, and ``clip_grad_norm_`` may stay in your loop, or go. A gradient with a NaN or an
# infinity is skipped, and counted in ``skipped_steps``. In the plain form, with ``damping=``,
# lengths count, and clipping changes the step.

ends = []
for limit in (None, 1e-3):
    model, optimizer, _ = start(mfac)
    loss_of(model, torch.Generator().manual_seed(1)).backward()
    if limit is not None:
        nn.utils.clip_grad_norm_(model.parameters(), limit)
    optimizer.step()
    ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
torch.testing.assert_close(*ends, rtol=0, atol=1e-6)
