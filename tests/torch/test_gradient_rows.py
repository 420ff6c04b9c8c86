"""Rows from a model and its batches, against a loop of plain autograd."""

import copy
import dataclasses
import json
import subprocess
import sys
import textwrap
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torch_models import (
    Averaging,
    Masked,
    Recurrent,
    assert_as_it_was,
    batches,
    loss_fn,
    network,
    state_of,
)

from mfac_core._validate import NonFiniteError
from mfac_core.torch import gradient_rows


def loop(model, data, loss=loss_fn, parameters=None):
    """The oracle: backward() and the gradients of the parameters side by side."""
    parameters = list(model.parameters()) if parameters is None else parameters
    rows = []
    for batch in data:
        twin = copy.deepcopy(model)
        chosen = [dict(twin.named_parameters())[name_of(model, p)] for p in parameters]
        loss(twin, batch).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def name_of(model, parameter):
    return next(name for name, p in model.named_parameters() if p is parameter)


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.second = torch.nn.Linear(5, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.first(x)
        return checkpoint(self.second, hidden, use_reentrant=self.reentrant)


MODELS = {
    "mlp": network,
    "lstm": lambda: Recurrent(torch.nn.LSTM),
    "gru": lambda: Recurrent(torch.nn.GRU),
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "masked attention": lambda: Masked().eval(),
    "batch statistics": lambda: torch.nn.Sequential(
        torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
    ),
    "a buffer put in another's place": Averaging,
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(5, 3)),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_rows_of_any_model_are_those_of_a_loop(make):
    torch.manual_seed(0)
    model = make().double()
    data = batches(shape=(6, 5) if isinstance(model, Recurrent) else (5,))
    data = [(x.double(), y) for x, y in data]
    held = torch.ones_like(next(model.parameters()))
    next(model.parameters()).grad = held
    before = state_of(model)
    rows = gradient_rows(model, loss_fn, data)
    assert_as_it_was(model, before)
    assert torch.equal(held, torch.ones_like(held))
    next(model.parameters()).grad = None
    expected = loop(model, data)
    assert rows.dtype is torch.float64
    assert (rows - expected).norm() <= 1e-12 * expected.norm()
    assert not rows.requires_grad
    model(data[0][0])  # is whole


def test_dropout_leaves_the_random_numbers_and_draws_anew_for_every_row():
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(), torch.nn.Linear(4, 3))
    before = state_of(model)
    rows = gradient_rows(model, loss_fn, [batches(1)[0]] * 4)
    assert_as_it_was(model, before)
    assert not torch.equal(rows[0], rows[1])


def test_a_shuffling_loader_and_its_short_last_batch():
    x, y = torch.randn(18, 5), torch.randint(3, (18,))
    model = network()
    before = state_of(model)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    rows = gradient_rows(model, loss_fn, loader)
    assert rows.shape == (5, sum(p.numel() for p in model.parameters()))
    assert_as_it_was(model, before)
    plain = DataLoader(TensorDataset(x, y), batch_size=4)
    expected = loop(model, [(x[i : i + 4], y[i : i + 4]) for i in range(0, 18, 4)])
    assert torch.allclose(gradient_rows(model, loss_fn, plain), expected, rtol=0, atol=1e-6)


def test_batches_without_a_length():
    model, data = network(), batches()
    expected = gradient_rows(model, loss_fn, data)
    assert torch.equal(gradient_rows(model, loss_fn, iter(data)), expected)
    source = iter(data)
    assert torch.equal(gradient_rows(model, loss_fn, source, rows=4), expected[:4])
    assert next(source) is data[4]  # none was fetched in vain


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "text stays"


@pytest.mark.parametrize(
    ("wrap", "loss"),
    [
        (lambda x, y: [x, y], loss_fn),
        (Pair, lambda m, b: cross_entropy(m(b.x), b.y)),
        (Sample, lambda m, b: cross_entropy(m(b.x), b.y)),
        (lambda x, y: {"x": [x], "y": y}, lambda m, b: cross_entropy(m(b["x"][0]), b["y"])),
        (lambda x, y: x, lambda m, b: m(b).square().mean()),
    ],
    ids=["list", "named tuple", "dataclass", "nested dict", "tensor"],
)
def test_batches_of_any_structure_reach_the_models_device(wrap, loss):
    model, device = network().to("meta"), set()
    data = [wrap(x, y) for x, y in batches(2)]

    def see(model, batch):
        stack = [batch]
        while stack:
            part = stack.pop()
            if isinstance(part, torch.Tensor):
                device.add(part.device.type)
            elif isinstance(part, dict):
                stack += part.values()
            elif isinstance(part, (list, tuple)):
                stack += part
            elif dataclasses.is_dataclass(part):
                stack += vars(part).values()
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        gradient_rows(model, see, data)
    assert device == {"meta"}
    real = network()
    rows = gradient_rows(real, loss, data)
    assert torch.allclose(rows, loop(real, data, loss), rtol=0, atol=1e-6)


def test_parameters_by_name_pattern_predicate_and_object():
    model, data = network(), batches(3)
    weight = model[2].weight
    expected = loop(model, data, parameters=[weight])
    for choice in ("2.weight", ["2.w*"], [weight], weight, lambda n, p: p is weight):
        assert torch.allclose(gradient_rows(model, loss_fn, data, parameters=choice), expected)
    both = loop(model, data, parameters=[model[0].weight, model[2].weight, model[2].bias])
    for choice in (["2", "0.weight"], lambda n, p: n != "0.bias"):
        assert torch.allclose(gradient_rows(model, loss_fn, data, parameters=choice), both)
    compiled = torch.compile(model, backend="eager")
    for choice in ("2.weight", "_orig_mod.2.weight"):
        assert torch.allclose(gradient_rows(compiled, loss_fn, data, parameters=choice), expected)


def test_frozen_parameters_are_taken_when_chosen():
    model, data = network(), batches(3)
    expected = loop(model, data, parameters=[model[0].weight])
    model[0].weight.requires_grad_(False)
    before = state_of(model)
    rows = gradient_rows(model, loss_fn, data, parameters="0.weight")
    assert torch.allclose(rows, expected)
    assert_as_it_was(model, before)
    left = [p for p in model.parameters() if p.requires_grad]
    assert torch.allclose(gradient_rows(model, loss_fn, data), loop(model, data, parameters=left))


def test_a_parameter_in_two_places_is_a_column_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x)))

    torch.manual_seed(0)
    model, data = Tied(), batches(3)
    rows = gradient_rows(model, loss_fn, data, parameters=["head.weight", "embed.weight"])
    assert rows.shape == (3, 25)
    assert torch.allclose(rows, loop(model, data, parameters=[model.embed.weight]), atol=1e-6)


def test_a_parameter_without_use_has_zeros():
    model = network()
    model.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    rows = gradient_rows(model, loss_fn, batches(2))
    assert torch.equal(rows[:, :2], torch.zeros(2, 2))


def test_mixed_dtypes_and_16_bits():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(5, 4).bfloat16(), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x.bfloat16())).float())

    torch.manual_seed(0)
    model, data = Mixed(), batches(3)
    rows = gradient_rows(model, loss_fn, data)
    assert rows.dtype is torch.float32
    assert torch.equal(rows, loop(model, data))
    half = gradient_rows(model, loss_fn, data, dtype=torch.bfloat16)
    assert torch.equal(half, rows.bfloat16())


def test_what_hangs_on_the_accumulation_of_gradients_does_not_run():
    model = Checkpointed(True)
    calls = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    gradient_rows(model, loss_fn, batches(2))
    assert calls == []
    loss_fn(model, batches(1)[0]).backward()
    assert len(calls) == 4


def test_under_no_grad_and_inference_mode():
    model, data = network(), batches(2)
    expected = gradient_rows(model, loss_fn, data)
    with torch.no_grad():
        assert torch.equal(gradient_rows(model, loss_fn, data), expected)
    with torch.inference_mode():
        rows = gradient_rows(model, loss_fn, data)
    assert torch.equal(rows, expected)


def out_of(kind, path, shape):
    if kind == "tensor":
        return torch.full(shape, torch.nan)
    if kind == "memmap":
        return np.memmap(path / "rows.f32", np.float32, "w+", shape=shape)
    if kind == "h5py":
        file = pytest.importorskip("h5py", reason="h5py is not installed").File(
            path / "rows.h5", "w"
        )
        return file.create_dataset("rows", shape, "f4")
    if kind == "zarr":
        zarr = pytest.importorskip("zarr", reason="zarr is not installed")
        return zarr.create_array(str(path / "rows.zarr"), shape=shape, chunks=shape, dtype="f4")
    return np.full(shape, np.nan)


@pytest.mark.parametrize("kind", ["tensor", "memmap", "h5py", "zarr", "numpy"])
def test_rows_are_written_into_any_array(tmp_path, kind):
    model, data = network(), batches()
    expected = gradient_rows(model, loss_fn, data)
    out = out_of(kind, tmp_path, expected.shape)
    assert gradient_rows(model, loss_fn, data, out=out) is out
    assert np.array_equal(np.asarray(out[:]), expected.numpy())
    out[:] = 0.0
    gradient_rows(model, loss_fn, data, out=out, start=2)
    assert np.array_equal(np.asarray(out[:]), torch.cat([0 * expected[:2], expected[2:]]).numpy())


def test_a_file_goes_on_where_a_run_was_cut_off(tmp_path):
    model, data = network(), batches()
    expected = gradient_rows(model, loss_fn, data)
    path = tmp_path / "rows.npy"
    seen = []

    def cut(model, batch):
        seen.append(batch)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss_fn(model, batch)

    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        gradient_rows(model, cut, data, out=path)
    assert_as_it_was(model, before)
    assert json.loads((tmp_path / "rows.npy.progress").read_text())["rows"] == 3

    def count(model, batch):
        seen.append(batch)
        return loss_fn(model, batch)

    seen.clear()
    rows = gradient_rows(model, count, data, out=path)
    assert len(seen) == 3
    assert isinstance(rows, np.memmap)
    assert np.array_equal(rows, expected.numpy())
    assert np.array_equal(np.load(path), expected.numpy())
    assert not (tmp_path / "rows.npy.progress").exists()
    seen.clear()
    gradient_rows(model, count, data, out=path)  # a finished one is of the past
    assert len(seen) == 6


def test_an_unfinished_file_of_other_weights_is_begun_anew(tmp_path):
    model, data = network(), batches()
    path = tmp_path / "rows.npy"
    with pytest.raises(ValueError, match="ran out after 2 of 6"):
        gradient_rows(model, loss_fn, iter(data[:2]), rows=6, out=path)
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    expected = gradient_rows(model, loss_fn, data)
    assert np.array_equal(gradient_rows(model, loss_fn, data, out=path), expected.numpy())


def test_a_full_disk_is_said_and_the_model_stays(tmp_path):
    """A limit on the size of files stands for the end of the disk."""
    script = textwrap.dedent("""
        import resource, sys, torch
        from mfac_core.torch import gradient_rows
        model = torch.nn.Linear(1000, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        before = [p.clone() for p in model.parameters()]
        data = [torch.randn(2, 1000) for _ in range(8)]
        try:
            gradient_rows(model, lambda m, x: m(x).square().mean(), data, out=sys.argv[1])
        except OSError as error:
            print(error)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    """)
    path = tmp_path / "rows.npy"
    run = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    assert "row 3 of 8 could not be written to out, 16016 bytes a row" in run.stdout

    class Full:
        shape, dtype = (8, 32), np.dtype("f4")

        def __setitem__(self, key, value):
            raise OSError(28, "No space left on device")

    model = network()
    out = Full()
    out.shape = (6, sum(p.numel() for p in model.parameters()))
    before = state_of(model)
    with pytest.raises(OSError, match=r"row 0 of 6 could not be written.*No space left"):
        gradient_rows(model, loss_fn, batches(), out=out)
    assert_as_it_was(model, before)


def test_failures_name_what_is_wrong_and_change_nothing(tmp_path):
    model, data = network(), batches()
    bad = [*data[:2], (torch.full((4, 5), torch.nan), data[2][1]), *data[3:]]
    d = sum(p.numel() for p in model.parameters())
    cases = (
        ({"rows": 7}, ValueError, "ran out after 6 of 7 rows"),
        ({"batches": iter(data), "rows": 7}, ValueError, "ran out after 6 of 7 rows"),
        ({"batches": []}, ValueError, "at least one batch"),
        ({"batches": iter([])}, ValueError, "ran out after 0"),
        ({"batches": 5}, TypeError, "must be iterable.*got int"),
        ({"rows": 0}, ValueError, "rows must be an integer of at least 1"),
        ({"loss_fn": lambda m, b: m(b[0])}, ValueError, r"scalar.*shape \(4, 3\) for batch 0"),
        ({"loss_fn": lambda m, b: 1.0}, TypeError, "scalar.*got float"),
        ({"loss_fn": lambda m, b: m(b[0]).sum().detach()}, ValueError, "without a graph"),
        ({"parameters": "2", "loss_fn": lambda m, b: m[0](b[0]).sum()}, ValueError, "depends on"),
        ({"batches": bad}, NonFiniteError, "for batch 2 in 0.weight, 0.bias, 2.weight, ..."),
        ({"parameters": "3.*"}, ValueError, r"'3\.\*' fits no parameter.*0\.weight, 0\.bias"),
        ({"parameters": [torch.ones(2)]}, ValueError, "parameters of the model"),
        ({"parameters": [3]}, TypeError, "got int"),
        ({"parameters": lambda n, p: False}, ValueError, "chose none"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a real floating"),
        ({"out": torch.zeros(6, 3)}, ValueError, rf"out must have shape \(6, {d}\), got \(6, 3\)"),
        ({"out": torch.zeros(7, d)}, ValueError, "ran out after 6 of 7"),
        ({"out": torch.zeros(6, d).int()}, TypeError, "real floating tensor"),
        ({"out": np.zeros((6, d), int)}, TypeError, "real floating array"),
        ({"out": tmp_path / "rows.bin"}, ValueError, "ends in .npy"),
        ({"out": tmp_path / "x.npy", "dtype": torch.bfloat16}, ValueError, "got bfloat16"),
        ({"out": tmp_path / "x.npy", "batches": iter(data)}, ValueError, "rows must be given"),
    )
    for options, error, message in cases:
        arguments = {"loss_fn": loss_fn, "batches": data} | options
        before = state_of(model)
        with pytest.raises(error, match=message):
            gradient_rows(model, **arguments)
        assert_as_it_was(model, before)
    with pytest.raises(NonFiniteError, match=r"gradient 0 overflows torch\.float16"):
        gradient_rows(model, lambda m, b: 1e6 * loss_fn(m, b), data, dtype=torch.float16)
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient, got none"):
        gradient_rows(model, loss_fn, data)
