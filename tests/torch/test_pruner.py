"""Pruning a model in place: masks, life cycle, reports, and failures that change nothing."""

import copy
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.utils import prune as torch_prune
from torch.utils.data import DataLoader, TensorDataset
from torch_models import assert_as_it_was, batches, loss_fn, network, state_of

from mfac_core import choose_damping
from mfac_core.pruning import prune
from mfac_core.torch import MFAC, Pruner, gradient_rows, prune_model


def zeros(parameter):
    return int((parameter == 0).sum())


def flat(tensors):
    return torch.cat([x.detach().reshape(-1) for x in tensors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_is_prune_on_the_rows_of_the_weights(dtype):
    """The oracle is the flat function, on rows that a loop could have taken."""
    model, data = network().to(dtype), [(x.to(dtype), y) for x, y in batches(12)]
    weights = [model[0].weight, model[2].weight]
    rows = gradient_rows(model, loss_fn, data, parameters=weights)
    expected = prune(
        flat(weights), rows, sparsity=0.5, damping=1e-3, block_size=[8, 8, 4, 8, 4], stages=1
    )
    pruner = Pruner(model, loss_fn, data, damping=1e-3, block_size=8)
    with torch.no_grad():
        before = float(np.mean([float(loss_fn(model, batch)) for batch in data]))
    report = pruner.step(0.5)
    assert torch.equal(flat([model[0].weight, model[2].weight]), expected.weights)
    assert torch.equal(flat(pruner.masks.values()), expected.mask)
    assert report.sparsity == 0.5
    assert report.loss_before == pytest.approx(before, rel=1e-6)
    with torch.no_grad():
        after = float(np.mean([float(loss_fn(model, batch)) for batch in data]))
    assert report.loss_after == pytest.approx(after, rel=1e-6)
    change = expected.weights - flat(w.detach() for w in state_weights(pruner, data))
    assert len(change) == 32
    assert [layer.kept for layer in report.layers] == [
        int(expected.mask[:20].sum()),
        int(expected.mask[20:].sum()),
    ]


def state_weights(pruner, data):
    model = network()
    return [model[0].weight, model[2].weight]


def test_the_predicted_rise_is_that_of_the_quadratic_model():
    model, data = network().double(), [(x.double(), y) for x, y in batches(12)]
    old = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    rows = gradient_rows(model, loss_fn, data, parameters=["*.weight"]).numpy()
    report = Pruner(model, loss_fn, data).step(0.6)
    new = [model[0].weight, model[2].weight]
    change = (flat(new) - flat(old)).numpy()
    # Rows of 4 samples: the Fisher matrix of single ones is 4 times theirs.
    assert report.loss_increase == pytest.approx(2 * np.mean((rows @ change) ** 2), rel=1e-5)
    first = rows[:, :20] @ change[:20]
    assert report.layers[0].loss_increase == pytest.approx(2 * np.mean(first**2), rel=1e-5)
    assert report.damping == pytest.approx(0.1 * np.mean(rows**2), rel=1e-5)


def test_the_rows_of_each_step_choose_the_damping():
    """Those of the weights that are left: the columns of the others are zero."""
    model, data = network().double(), [(x.double(), y) for x, y in batches(12)]
    pruner = Pruner(model, loss_fn, data, damping="leave-one-out", block_size=8)
    sizes, names = [8, 8, 4, 8, 4], ["0.weight", "2.weight"]
    kept = np.ones(32, bool)
    for share in (0.4, 0.7):
        rows = gradient_rows(model, loss_fn, data, parameters=names).numpy()
        left = [int(part.sum()) for part in np.split(kept, np.cumsum(sizes)[:-1]) if part.any()]
        expected = choose_damping(rows[:, kept], block_size=left)
        assert pruner.step(share).damping == pytest.approx(expected, rel=1e-9)
        kept = flat(pruner.masks.values()).numpy()
        names = ["0.weight_orig", "2.weight_orig"]


def test_rows_without_a_gradient_choose_nothing():
    model, data = network(), batches(6)
    pruner = Pruner(model, lambda model, batch: 0.0 * loss_fn(model, batch), data)
    assert pruner.step(0.5).damping > 0.0
    pruner = Pruner(
        network(), lambda model, batch: 0.0 * loss_fn(model, batch), data, damping="leave-one-out"
    )
    assert_unchanged_by(
        pruner.model, lambda: pruner.step(0.5), ValueError, "gradients must not all be zero"
    )


def test_masks_are_those_of_torch_and_only_grow():
    model, data = network(), batches(12)
    parameters = [*model.parameters()]
    pruner = Pruner(model, loss_fn, data)
    assert not torch_prune.is_pruned(model)
    assert all(mask.all() for mask in pruner.masks.values())
    masks = [pruner.step(share) and pruner.masks for share in (0.3, 0.6, 0.9)]
    assert torch_prune.is_pruned(model)
    assert set(model.parameters()) == set(parameters)
    for before, after in pairwise(masks):
        assert all(not (after[name] & ~before[name]).any() for name in before)
    for name, mask in pruner.masks.items():
        module = model[int(name[0])]
        assert torch.equal(module.weight_mask, mask.float())
        assert torch.equal(module.weight_orig != 0, mask)
        assert torch.equal(module.weight, module.weight_orig)
    copy.deepcopy(model)
    torch.save(model, io.BytesIO())
    assert pruner.finalize() is model
    assert set(model.parameters()) == set(parameters)
    assert not torch_prune.is_pruned(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.state_dict().keys() == network().state_dict().keys()
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    with pytest.raises(RuntimeError, match="was finalized"):
        pruner.step(0.95)
    with pytest.raises(RuntimeError, match="was finalized"):
        pruner.finalize()


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
    "MFAC": lambda p: MFAC(p, 0.01, window_size=4, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_masks_hold_under_any_optimiser_made_before_or_after(make):
    model, data = network(), batches(12)
    optimizer = make(model.parameters())

    def train(steps):
        for batch in data[:steps]:

            def closure(batch=batch):
                optimizer.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure) if isinstance(optimizer, torch.optim.LBFGS) else (
                closure(),
                optimizer.step(),
            )

    train(3)
    pruner = Pruner(model, loss_fn, data)
    pruner.step(0.5)
    for fresh in (optimizer, make(model.parameters())):
        optimizer = fresh
        before = model[0].weight.detach().clone()
        train(6)
        model(data[0][0])
        for name, mask in pruner.masks.items():
            weight = model[int(name[0])].weight
            assert torch.equal(weight != 0, mask)
        assert not torch.equal(model[0].weight, before)
    pruner.step(0.75)
    pruner.finalize()
    assert sum(zeros(model.get_parameter(name)) for name in pruner.masks) == 24


def run(model, data, shares, pruner=None):
    pruner = pruner or Pruner(model, loss_fn, data)
    for share in shares:
        pruner.step(share)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for batch in list(data)[:2]:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return pruner


def test_it_goes_on_after_a_restart_bit_for_bit():
    x, y = torch.randn(48, 5), torch.randint(3, (48,))

    def loader():
        return DataLoader(TensorDataset(x, y), 4, shuffle=True)

    torch.manual_seed(5)
    model = network()
    torch.manual_seed(5)
    pruner = Pruner(model, loss_fn, loader(), rows=6)
    pruner.step(0.3)
    pruner.step(0.5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, file)
    expected = pruner.step(0.8)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    torch.manual_seed(6)
    other = network()
    resumed = Pruner(other, loss_fn, loader(), rows=6)
    resumed.load_state_dict(saved["pruner"])
    other.load_state_dict(saved["model"])
    assert resumed.report() == resumed.report()
    assert str(resumed.report()) == str(type(pruner.report())(pruner.report().steps[:2]))
    assert resumed.step(0.8) == expected
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="state must be of the parameters"):
        Pruner(torch.nn.Linear(5, 3), loss_fn, loader()).load_state_dict(saved["pruner"])


def test_reports_print_as_tables_and_draw(tmp_path):
    model, data = network(), batches(12)
    pruner = Pruner(model, loss_fn, data)
    assert str(pruner.report()) == "nothing pruned yet"
    with pytest.raises(ValueError, match="call step"):
        pruner.report().plot()
    report = pruner.step(0.5)
    pruner.step(0.75)
    lines = str(report).splitlines()
    assert lines[0].startswith("step 1: 50.0% removed, loss ")
    assert lines[2].split() == ["layer", "shape", "kept", "share", "predicted", "rise"]
    assert lines[4].split()[:4] == ["0.weight", "4", "×", "5"]
    assert lines[-1].split()[:4] == ["all", "32", "16", "50.0%"]
    assert "75.0%" in str(pruner.report())
    pruner.report().plot().savefig(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


@pytest.mark.parametrize("storage", ["device", "host", "file", "folder", None])
def test_where_rows_are_kept_makes_no_difference(storage, tmp_path):
    data = batches(12)
    weights = []
    for place in ("device", tmp_path if storage == "folder" else storage):
        model = network()
        Pruner(model, loss_fn, data, storage=place).step(0.5)
        weights.append(flat(model.parameters()))
    assert torch.allclose(*weights, rtol=0, atol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_16_bits():
    model, data = network(), batches(12)
    Pruner(model, loss_fn, data, dtype=torch.bfloat16).step(0.5)
    assert zeros(model[0].weight) + zeros(model[2].weight) == 16


def test_the_whole_schedule_in_one_call():
    model, data, trained = network(), batches(12), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def finetune(model):
        trained.append(zeros(model[0].weight) + zeros(model[2].weight))
        optimizer.zero_grad()
        loss_fn(model, data[0]).backward()
        optimizer.step()

    pruner = prune_model(
        model,
        loss_fn,
        data,
        0.75,
        steps=2,
        finetune=finetune,
        progress=True,
    )
    assert trained == [16, 24]
    assert [step.sparsity for step in pruner.report().steps] == [0.5, 0.75]
    assert zeros(pruner.finalize()[0].weight) + zeros(model[2].weight) == 24


def assert_unchanged_by(model, call, error, message):
    before, names = state_of(model), [name for name, _ in model.named_parameters()]
    hooks = [dict(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(error, match=message):
        call()
    assert_as_it_was(model, before)
    assert names == [name for name, _ in model.named_parameters()]
    assert hooks == [dict(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize("steps", [0, 1])
def test_failures_leave_the_model_as_it_was(steps, monkeypatch):
    data = batches(6)
    calls = []

    def nth(n, what):
        """A loss that goes wrong at its n-th call."""

        def loss(model, batch):
            calls.append(None)
            return what(model, batch) if len(calls) == n else loss_fn(model, batch)

        return loss

    def full(*arguments):
        raise OSError(28, "No space left on device")

    def interrupt(model, batch):
        raise KeyboardInterrupt

    cases = [
        ({"batches": iter(data[:3]), "rows": 6}, 0.5, ValueError, "ran out after 3 of 6"),
        ({"loss_fn": lambda m, b: m(b[0])}, 0.5, ValueError, "must return a scalar"),
        ({"loss_fn": nth(3, lambda m, b: loss_fn(m, b) * torch.nan)}, 0.5, ValueError, "finite"),
        ({"loss_fn": nth(8, lambda m, b: m(b[0]))}, 0.5, ValueError, "must return a scalar"),
        ({"loss_fn": nth(9, interrupt)}, 0.5, KeyboardInterrupt, None),
        ({}, 0.1, ValueError, "must not be below"),
        ({}, 1.0, ValueError, r"in \[0, 1\)"),
        ({}, "half", TypeError, "sparsity must be a number"),
        ({}, None, ValueError, "sparsity must be given"),
        ({"storage": "file"}, 0.5, OSError, "row 0 of 6 could not be written.*No space left"),
    ]
    for options, share, error, message in cases:
        model = network()
        before = data if steps else options.get("batches", data)
        pruner = Pruner(
            model, loss_fn, before, **{k: v for k, v in options.items() if k in ("rows", "storage")}
        )
        if steps:
            pruner.step(0.2)
        elif share == 0.1:
            continue
        pruner.batches = options.get("batches", data)
        pruner.loss_fn = options.get("loss_fn", loss_fn)
        calls.clear()
        with monkeypatch.context() as patch:
            if error is OSError:
                patch.setattr("mfac_core.torch._store.FileStore.write", full)
            assert_unchanged_by(model, lambda p=pruner, s=share: p.step(s), error, message)
        assert len(pruner.report().steps) == steps
        pruner.batches, pruner.loss_fn = data, loss_fn
        pruner.step(0.5)


def test_arguments_that_are_refused_at_once():
    data = batches(6)
    for options, error, message in (
        ({"pattern": "4:2"}, ValueError, "pattern must be 'N:M'.*got '4:2'"),
        ({"layers": "each"}, ValueError, "layers must be 'global' or 'uniform', got 'each'"),
        ({"update": "paper"}, ValueError, "update must be 'joint' or 'independent'"),
        ({"damping": 0.0}, ValueError, "damping must be finite and positive"),
        ({"damping": "oas"}, ValueError, "a number, 'auto' or 'leave-one-out', got 'oas'"),
        ({"block_size": 0}, ValueError, "block_size must be an integer of at least 1"),
        ({"rows": 7}, ValueError, "ran out after 6 of 7"),
        ({"storage": "/nowhere/at/all"}, ValueError, "storage must be"),
        ({"parameters": "0.wrong"}, ValueError, "fits no parameter"),
        ({"exclude": ["0", "2"]}, ValueError, "must have a weight to prune"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be a function"),
        ({"batches": []}, ValueError, "at least one batch"),
    ):
        model = network()
        arguments = {"loss_fn": loss_fn, "batches": data} | options
        assert_unchanged_by(model, lambda m=model, a=arguments: Pruner(m, **a), error, message)
    with pytest.raises(TypeError, match="gone through once for each step"):
        prune_model(network(), loss_fn, iter(data), 0.5, steps=2)
    with pytest.raises(TypeError, match="finetune must be a function"):
        prune_model(network(), loss_fn, data, 0.5, finetune=3)


def test_masks_of_somebody_else_are_refused():
    model, data = network(), batches(6)
    pruner = Pruner(model, loss_fn, data)
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    message = r"pruned by torch.nn.utils.prune already, got a mask of 0\.weight.*remove\(module"
    assert_unchanged_by(model, lambda: Pruner(model, loss_fn, data), ValueError, message)
    assert_unchanged_by(model, lambda: pruner.step(0.5), ValueError, message)
    torch_prune.remove(model[0], "weight")
    pruner.step(0.5)


def test_choice_of_parameters():
    data = batches(6)
    for options, names in (
        ({}, ["0.weight", "2.weight"]),
        ({"parameters": "0.*"}, ["0.weight", "0.bias"]),
        ({"exclude": "2"}, ["0.weight"]),
        ({"parameters": lambda n, p: "bias" in n}, ["0.bias", "2.bias"]),
    ):
        assert list(Pruner(network(), loss_fn, data, **options).masks) == names


def test_uniform_layers_have_the_same_share_each():
    model = network()
    report = Pruner(model, loss_fn, batches(12), layers="uniform").step(0.5)
    assert [layer.kept for layer in report.layers] == [10, 6]


class Convolutional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, 3)
        self.body = torch.nn.Conv2d(8, 12, 3)
        self.head = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.body(torch.relu(self.first(x))).mean((2, 3)))


def images(count=12, size=4):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def test_two_of_four_goes_along_the_input_channels():
    torch.manual_seed(0)
    model, data = Convolutional(), images()
    pruner = Pruner(model, loss_fn, data, pattern="2:4")
    report = pruner.step()
    assert list(pruner.masks) == ["body.weight", "head.weight"]  # not the first: 3 channels
    for mask in pruner.masks.values():
        groups = mask.movedim(1, -1).reshape(-1, 4).sum(1)
        assert torch.equal(groups, torch.full_like(groups, 2))
    assert report.sparsity == 0.5
    with pytest.raises(ValueError, match=r"multiple of 4 input channels, and 'first\.weight' has"):
        Pruner(Convolutional(), loss_fn, data, pattern="2:4", parameters="*.weight")
    with pytest.raises(ValueError, match="no layer has one"):
        Pruner(torch.nn.Linear(5, 3), loss_fn, data, pattern="2:4")


def test_two_of_four_in_steps_and_its_update_are_those_of_prune_on_turned_rows():
    torch.manual_seed(0)
    model, data = Convolutional(), images()
    turned = model.body.weight.detach().permute(0, 2, 3, 1).reshape(-1)
    rows = gradient_rows(model, loss_fn, data, parameters="body.weight")
    rows = rows.reshape(12, 12, 8, 3, 3).permute(0, 1, 3, 4, 2).reshape(12, -1)
    expected = prune(turned, rows, pattern="2:4", sparsity=0.25, damping=1e-3, stages=1)
    pruner = Pruner(
        model, loss_fn, data, pattern="2:4", parameters="body.weight", damping=1e-3, block_size=None
    )
    pruner.step(0.25)
    got = model.body.weight.permute(0, 2, 3, 1).reshape(-1)
    assert torch.allclose(got, expected.weights, rtol=0, atol=1e-6)
    assert pruner.step().sparsity == 0.5


@pytest.mark.parametrize(("pattern", "axis"), [("filter", 0), ("channel", 1)])
def test_structured_groups_go_as_a_whole(pattern, axis):
    torch.manual_seed(0)
    model, data = Convolutional(), images()
    pruner = Pruner(
        model, loss_fn, data, pattern=pattern, parameters=["body.weight", "first.weight"]
    )
    report = pruner.step(0.5)
    gone = 0
    for mask in pruner.masks.values():
        whole = mask.movedim(axis, 0).flatten(1)
        assert torch.equal(whole.all(1), whole.any(1))
        gone += int((~whole.any(1)).sum())
    assert gone > 0
    assert abs(report.sparsity - 0.5) < 0.1


def test_heads_go_as_a_whole():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(8, 4, batch_first=True)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x):
            x = x[:, :, None] * torch.linspace(0, 1, 8) + torch.arange(8.0)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model, data = Attention(), batches(12)
    pruner = Pruner(model, loss_fn, data, pattern="head", parameters="attention.*weight")
    pruner.step(0.5)
    rows = pruner.masks["attention.in_proj_weight"].reshape(3, 4, 2 * 8)
    columns = (
        pruner.masks["attention.out_proj.weight"].reshape(8, 4, 2).movedim(1, 0).reshape(4, -1)
    )
    kept = rows[0].any(1)
    assert int(kept.sum()) == 2
    for part in (*rows, columns):
        assert torch.equal(part.all(1), kept)
        assert torch.equal(part.any(1), kept)
    for _ in range(2):  # the output's weight is read without a call of its module
        loss_fn(model, data[0]).backward()
    with pytest.raises(ValueError, match="pattern 'head' needs attention"):
        Pruner(network(), loss_fn, data, pattern="head")


def test_the_24_form_is_refused_in_words_where_there_is_none():
    model, data = network(), batches(6)
    pruner = Pruner(model, loss_fn, data)
    pruner.step(0.5)
    with pytest.raises(ValueError, match="pruned with pattern='2:4'"):
        pruner.finalize(semi_structured=True)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3))
    data = batches(6, shape=(64,))
    pruner = Pruner(model, loss_fn, data, pattern="2:4", parameters="0.weight")
    pruner.step()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"0\.weight of shape \(64, 64\).*cannot be converted"):
        pruner.finalize(semi_structured=True)
    assert_as_it_was(model, before)
    pruner.finalize()


def test_the_finalized_model_can_be_exported():
    model, data = network(), batches(6)
    pruner = Pruner(model, loss_fn, data)
    pruner.step(0.5)
    model = pruner.finalize().eval()
    program = torch.export.export(model, (data[0][0],))
    assert torch.allclose(program.module()(data[0][0]), model(data[0][0]))
