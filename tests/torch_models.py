"""Models, their batches and what must not change of them."""

from __future__ import annotations

import copy

import torch
from torch.nn.functional import cross_entropy


def loss_fn(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))


def batches(count=6, size=4, shape=(5,)):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def state_of(model):
    return {
        "values": copy.deepcopy(model.state_dict()),
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "buffers": [id(b) for b in model.buffers()],
        "rng": torch.get_rng_state(),
    }


def assert_as_it_was(model, before):
    after = state_of(model)
    for key in ("modes", "flags", "buffers"):
        assert after[key] == before[key]
    assert all(a is b for a, b in zip(after["grads"], before["grads"], strict=True))
    assert torch.equal(after["rng"], before["rng"])
    assert after["values"].keys() == before["values"].keys()
    assert all(torch.equal(before["values"][name], x) for name, x in after["values"].items())


class Recurrent(torch.nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell(5, 4, batch_first=True), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.layer, self.head = torch.nn.TransformerEncoder(layer, 1), torch.nn.Linear(4, 3)

    def forward(self, x):
        x = x[:, :4].reshape(-1, 1, 4).expand(-1, 3, 4)
        pad = torch.zeros(x.shape[:2], dtype=torch.bool)
        pad[:, 2] = True
        return self.head(self.layer(x, src_key_padding_mask=pad).mean(1))


class Averaging(torch.nn.Module):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        out = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out - self.mean * out.square().mean()
