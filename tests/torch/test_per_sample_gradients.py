"""Gradients of single samples of models that write to their buffers, or cannot be vectorised."""

import io

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from torch.nn.functional import cross_entropy
from torch_models import Averaging, Masked, Recurrent, assert_as_it_was, state_of

from mfac_core.torch import gradient_rows, per_sample_gradients


def samples(n=6, shape=(5,)):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, *shape, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def rows_of(model, x, y):
    """The oracle: one sample a batch, by plain autograd."""
    pairs = list(zip(x.split(1), y.split(1), strict=True))
    return gradient_rows(model, lambda m, b: cross_entropy(m(b[0]), b[1]), pairs)


@pytest.mark.parametrize(
    "make",
    [Averaging, lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 3))],
    ids=["another tensor in its place", "in place"],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_model_that_writes_to_its_buffers_is_as_it_was(make, chunk_size):
    torch.manual_seed(0)
    model, (x, y) = make(), samples()
    before = state_of(model)
    rows = per_sample_gradients(model, cross_entropy, x, y, chunk_size)
    assert_as_it_was(model, before)
    expected = rows_of(model, x, y)
    assert (rows - expected).norm() <= 1e-5 * expected.norm()
    model(x)
    torch.save(model.state_dict(), io.BytesIO())


def test_a_pruned_model_is_whole_afterwards():
    model, (x, y) = torch.nn.Sequential(torch.nn.Linear(5, 3)), samples()
    mask = torch.arange(15).reshape(3, 5) % 2
    torch.nn.utils.prune.custom_from_mask(model[0], "weight", mask)
    held = model[0].weight
    rows = per_sample_gradients(model, cross_entropy, x, y)
    assert model[0].weight is held
    assert torch.equal(rows[:, 3:] == 0, (mask.reshape(1, 15) == 0).expand(6, 15))
    cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("cell", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_models_go_one_by_one_and_say_so_once(cell):
    torch.manual_seed(0)
    model, (x, y) = Recurrent(cell), samples(shape=(6, 5))
    before = state_of(model)
    with pytest.warns(UserWarning, match="one row at a time.*cannot be vectorised") as record:
        rows = per_sample_gradients(model, cross_entropy, x, y, 2)
    assert len(record) == 1
    assert_as_it_was(model, before)
    expected = rows_of(model, x, y)
    assert (rows - expected).norm() <= 1e-5 * expected.norm()
    with pytest.warns(UserWarning, match="one row at a time"):
        pairs = per_sample_gradients(model, cross_entropy, x, y, samples_per_row=2)
    expected = expected.reshape(3, 2, -1).mean(1)
    assert (pairs - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.filterwarnings("ignore:model is run on one row at a time")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_with_a_padding_mask():
    torch.manual_seed(0)
    model, (x, y) = Masked().eval(), samples()
    rows = per_sample_gradients(model, cross_entropy, x, y)
    expected = rows_of(model, x, y)
    assert (rows - expected).norm() <= 1e-5 * expected.norm()


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(5, 3)

    def forward(self, x, *, scale=None):
        return self.linear(x) * scale[:, None]


@pytest.mark.parametrize("vectorised", [True, False])
def test_inputs_by_keyword_and_chosen_parameters(vectorised):
    torch.manual_seed(0)
    model, (x, y) = Scaled(), samples()
    scale = torch.linspace(1.0, 2.0, 6)

    def loss(output, target):
        if not vectorised and output.sum().item() is None:
            raise AssertionError
        return cross_entropy(output, target)

    model.linear.bias.requires_grad_(False)
    with torch.no_grad():
        softmax = (model.linear(x) * scale[:, None]).softmax(1)
    error = softmax - torch.nn.functional.one_hot(y, 3)
    expected = error * scale[:, None]  # the gradient by the bias, by hand
    inputs = {"x": x, "scale": scale}
    arguments = (model, loss, inputs, y)
    if vectorised:
        rows = per_sample_gradients(*arguments, parameters="linear.bias")
    else:
        with pytest.warns(UserWarning, match="one row at a time"):
            rows = per_sample_gradients(*arguments, parameters="linear.bias")
    assert (rows - expected).norm() <= 1e-5 * expected.norm()
    assert not model.linear.bias.requires_grad


def test_rows_go_into_out_chunk_by_chunk(tmp_path):
    torch.manual_seed(0)
    model, (x, y) = torch.nn.Linear(5, 3), samples()
    expected = per_sample_gradients(model, cross_entropy, x, y)
    out = np.full((6, 18), np.nan, np.float32)
    assert per_sample_gradients(model, cross_entropy, x, y, 4, out=out) is out
    assert np.array_equal(out, expected.numpy())
    rows = per_sample_gradients(model, cross_entropy, x, y, 4, out=tmp_path / "rows.npy")
    assert np.array_equal(rows, expected.numpy())


def test_the_default_chunk_bounds_memory(monkeypatch):
    from mfac_core.torch import _per_sample

    model, (x, y) = torch.nn.Linear(5, 3), samples()
    sizes = []

    def loss(output, target):
        sizes.append(output)
        return cross_entropy(output, target)

    per_sample_gradients(model, loss, x, y)
    assert len(sizes) == 1
    # Two gradients of 18 float32, and 64 times 5 float32 of x with one int64 of y, for each row.
    monkeypatch.setattr(_per_sample, "CHUNK_BYTES", 2 * (2 * 72 + 64 * (20 + 8)))
    per_sample_gradients(model, loss, x, y)
    assert len(sizes) == 1 + 3


def test_an_error_of_the_model_itself_is_raised_as_it_is():
    model, (x, y) = torch.nn.Linear(4, 3), samples()
    before = state_of(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_sample_gradients(model, cross_entropy, x, y)
    assert_as_it_was(model, before)
    with pytest.raises(ValueError, match=r"scalar.*shape \(1,3\)|scalar.*shape \(1, 3\)"):
        per_sample_gradients(torch.nn.Linear(5, 3), lambda out, y: out, x, y)


@pytest.mark.parametrize("shared", ["module", "weight"])
def test_what_a_model_uses_twice_stays_its_own(shared):
    torch.manual_seed(0)
    first, norm = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)
    last = first if shared == "module" else torch.nn.Linear(3, 3, bias=False)
    last.weight = first.weight
    model = torch.nn.Sequential(first, norm, torch.nn.Tanh(), last, norm).eval()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    rows = per_sample_gradients(model, torch.nn.functional.mse_loss, x, y)
    for module in (first, last):
        assert isinstance(module.weight, torch.nn.Parameter)
        assert module.weight is parameters[0]
    assert all(now is then for now, then in zip(model.buffers(), buffers, strict=True))
    for i, row in enumerate(rows):
        loss = torch.nn.functional.mse_loss(model(x[i : i + 1]), y[i : i + 1])
        expected = torch.cat([g.ravel() for g in torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(row, expected)
