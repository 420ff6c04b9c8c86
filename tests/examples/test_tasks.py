"""The tasks are short, run in a small form, and come to the right result."""

import ast

import numpy as np
import pytest
import torch
from scripts import EXAMPLES, load
from torch.func import functional_call, grad, vmap
from transformers import ResNetConfig, ResNetForImageClassification

from mfac_core.testing import dense_inverse, error_bound
from mfac_core.torch import Pruner


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a task in an empty folder, with other sizes at its top, and return its variables."""
    monkeypatch.chdir(tmp_path)

    def run(name, **sizes):
        torch.manual_seed(0)
        names = vars(load(f"tasks/{name}.py"))
        assert sizes.keys() <= names.keys()
        names |= sizes
        (*_, guarded) = ast.parse((EXAMPLES / "tasks" / f"{name}.py").read_text("utf-8")).body
        exec(compile(ast.Module(guarded.body, []), name, "exec"), names)
        return names

    return run


@pytest.mark.parametrize(
    "name", ["diagonal_memmap", "influence_cnn", "prune_resnet", "train_resume"]
)
def test_a_task_is_short(name):
    lines = (EXAMPLES / "tasks" / f"{name}.py").read_text("utf-8").splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 100


def test_pruning(run):
    """A tenth is left, of a network that works; both files give it back."""
    small = {
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "embedding_size": 16,
        "layer_type": "basic",
    }
    config = ResNetConfig(num_channels=1, num_labels=10, **small)
    ran = run("prune_resnet", SIDE=16, BATCH=64, SPARSITIES=(0.0, 0.0, 0.6, 0.9), RESNET=small)
    images = ran["images"]
    expected = ran["net"].eval()(images).logits
    assert (expected.argmax(1) == ran["labels"]).float().mean() > 0.8

    pruned = ResNetForImageClassification(config)
    pruned.load_state_dict(torch.load("pruned.pt"))
    assert torch.equal(pruned.eval()(images).logits, expected)
    weights = [
        layer.weight
        for layer in pruned.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    ]
    removed = sum(int((weight == 0).sum()) for weight in weights)
    assert removed == round(0.9 * sum(weight.numel() for weight in weights))

    last, resumed = torch.load("last.pt"), ResNetForImageClassification(config)
    pruner = Pruner(resumed, lambda net, batch: net(*batch).loss, ran["train"])
    pruner.load_state_dict(last["pruner"])
    resumed.load_state_dict(last["model"])
    assert torch.equal(resumed.eval()(images).logits, expected)


def test_training_goes_on(run, monkeypatch):
    """Interrupted after two of four epochs and run again, it ends where it would have ended."""
    sizes = {"SAMPLES": 256, "WINDOW": 6, "EPOCHS": 4}  # four steps each: the window wraps
    straight = run("train_resume", **sizes)
    straight["LAST"].unlink()
    save, saved = torch.save, []

    def save_and_stop(state, path):
        save(state, path)
        saved.append(state)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run("train_resume", **sizes)
    resumed = run("train_resume", **sizes)
    assert len(saved) == 4
    for ours, theirs in zip(resumed["net"].parameters(), straight["net"].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x, y = straight["data"].tensors
    assert torch.nn.functional.cross_entropy(straight["net"](x), y) < np.log(10) / 2


def test_influence(run, capsys):
    """The scores are those of a dense inverse in float64, over gradients by torch.func."""
    ran = run("influence_cnn", TRAIN=2, TEST=1, WIDE=2, EPOCHS=3)
    net = ran["net"].double()
    weights = dict(net.named_parameters())

    def loss(weights, x, y):
        return torch.nn.functional.cross_entropy(functional_call(net, weights, (x[None],)), y[None])

    gradients = vmap(grad(loss), (None, 0, 0))(weights, ran["images"].double(), ran["labels"])
    rows = torch.cat([part.flatten(1) for part in gradients.values()], dim=1).detach().numpy()
    train, test = rows[:200], rows[1700:]
    exact = test @ dense_inverse(train, damping=1e-3) @ train.T / 200
    scores = ran["scores"].numpy()
    assert scores.shape == (97, 200)
    bound = error_bound(train.astype(np.float32), damping=1e-3)
    assert np.linalg.norm(scores - exact) <= bound * np.linalg.norm(exact)
    worst = ran["scores"].mean(0).argsort()[:10]
    assert capsys.readouterr().out == f"{worst}\n"
    means = exact.mean(axis=0)
    assert np.all(means[worst] <= np.sort(means)[9] + bound * np.abs(exact).max())


def test_the_diagonal(run):
    ran = run("diagonal_memmap", M=12, D=40)
    gradients = np.load("gradients.npy")
    assert gradients.shape == (12, 40)
    exact = np.diagonal(
        np.linalg.inv(1e-3 * np.eye(40) + gradients.T.astype(float) @ gradients / 12)
    )
    error = np.abs(np.load("diagonal.npy") - exact)
    assert np.all(error <= error_bound(gradients, damping=1e-3) * exact)
    assert ran["diagonal"].dtype == np.float32
