"""Memory of gradients that are never stored, in a process of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path

import torch
from torch import nn

import mfac_core as mfac
from mfac_core.torch import ModelGradients

m, width, budget = (int(word) for word in sys.argv[1:])


def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def product(model, batches):
    rows = ModelGradients(model, loss_fn, batches, memory=budget)
    mfac.InverseFisher(rows, damping=1e-2) @ torch.ones(rows.shape[1])
    return rows.shape[1]


model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
batches = [(torch.randn(32, width), torch.randint(10, (32,))) for _ in range(m // 32)]
product(nn.Linear(width, 10), batches[:1])  # code, not data
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = held("VmRSS")
d = product(model, batches)
print(d, held("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_memory_is_the_budget_the_dual_and_a_few_vectors():
    m, budget = 128, 1 << 24
    command = [sys.executable, "-c", PROGRAM, str(m), "700", str(budget)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    d, taken = (int(word) for word in printed.split())
    allowed = budget + 8 * (4 * m * m + 8 * d)  # float64: A, its factor; x, Gᵀc, a model's leaves
    assert allowed < 4 * m * d / 4  # of the gradients, stored
    assert taken <= allowed
