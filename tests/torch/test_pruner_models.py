"""A gradual run with fine-tuning on models as people have them."""

import pytest
import torch
from torch.nn.utils import prune as torch_prune
from torch_models import Recurrent, batches, loss_fn, network

from mfac_core.torch import Pruner, prune_model


def trainer(model, data, loss=loss_fn, steps=3, make=torch.optim.AdamW):
    optimizer = make(model.parameters(), lr=1e-3)

    def finetune(model):
        model.train()
        for batch in data[:steps]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    return finetune


def gradual(model, data, loss=loss_fn, **options):
    """What a stranger writes; then all that must hold afterwards."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    finetune = options.pop("finetune", trainer(model, data, loss))
    pruner = prune_model(model, loss, data, 0.75, steps=3, finetune=finetune, **options)
    masks = pruner.masks
    model.train(modes[0])
    loss(model, data[0]).backward()
    pruner.finalize()
    assert [name for name, _ in model.named_parameters()] == list(before)
    named = {name.removeprefix("_orig_mod."): p for name, p in model.named_parameters()}
    for name, mask in masks.items():
        assert torch.equal(named[name] != 0, mask)
    kept = sum(int(mask.sum()) for mask in masks.values())
    size = sum(mask.numel() for mask in masks.values())
    assert kept == size - round(0.75 * size)
    assert not torch_prune.is_pruned(model)
    loss(model, data[0]).backward()
    return pruner, before


@pytest.mark.parametrize("cell", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_recurrent_layers(cell):
    torch.manual_seed(0)
    pruner, _ = gradual(Recurrent(cell), batches(12, shape=(6, 5)))
    assert list(pruner.masks) == ["cell.weight_ih_l0", "cell.weight_hh_l0", "head.weight"]


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Conv2d(1, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8)
        )
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(8, 8, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
        )
        self.head = torch.nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x.reshape(-1, 1, 5, 5))
        return self.head((x + self.body(x)).mean((2, 3)))


def test_batch_normalisation():
    torch.manual_seed(0)
    model, data = Residual(), batches(12, 8, shape=(25,))
    trainer(model, data, steps=12)(model)
    pruner, _ = gradual(model, data)
    assert pruner.report().steps[-1].statistics in ("kept", "re-estimated")


def test_statistics_are_taken_anew_where_that_helps_and_only_there():
    torch.manual_seed(0)
    model, data = Residual(), batches(12, 8, shape=(25,))
    data = [(x + 0.5 * y[:, None], y) for x, y in data]
    for _ in range(20):
        trainer(model, data, steps=12)(model)
    model.train()
    with torch.no_grad():  # statistics of these batches, exactly
        torch.optim.swa_utils.update_bn([x for x, _ in data], model)
    model.eval()
    means = [b.clone() for name, b in model.named_buffers() if "running" in name]
    pruner = Pruner(model, loss_fn, data)
    assert pruner.step(0.0).statistics == "kept"
    assert all(
        torch.equal(a, b)
        for a, b in zip(means, (b for n, b in model.named_buffers() if "running" in n), strict=True)
    )
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer += 3.0
    report = pruner.step(0.0)
    assert report.statistics == "re-estimated"
    assert report.loss_after < 0.9 * report.loss_before


class Tied(torch.nn.Module):
    """A language model: the embedding is the last layer as well, read without a call."""

    def __init__(self, by):
        super().__init__()
        self.by = by
        self.embed, self.middle = torch.nn.Embedding(11, 6), torch.nn.Linear(6, 6)
        if by == "parameter":
            self.head = torch.nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, x):
        last = self.embed.weight  # read before the embedding's own call
        hidden = torch.tanh(self.middle(self.embed(x)))
        return self.head(hidden) if self.by == "parameter" else hidden @ last.T


@pytest.mark.parametrize("by", ["parameter", "reading"])
def test_tied_weights_are_pruned_once(by):
    torch.manual_seed(0)
    model = Tied(by)
    data = [torch.randint(11, (4, 7)) for _ in range(12)]

    def loss(model, x):
        return torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    pruner, _ = gradual(model, data, loss)
    assert list(pruner.masks) == ["embed.weight", "middle.weight"]
    if by == "parameter":
        assert model.head.weight is model.embed.weight


def test_a_module_used_twice():
    torch.manual_seed(0)
    shared = torch.nn.Linear(5, 5)
    model = torch.nn.Sequential(shared, torch.nn.Tanh(), shared, torch.nn.Linear(5, 3))
    pruner, _ = gradual(model, batches(12))
    assert list(pruner.masks) == ["0.weight", "3.weight"]


def test_frozen_layers_stay():
    model = network()
    model[0].requires_grad_(False)
    pruner, before = gradual(model, batches(12))
    assert list(pruner.masks) == ["2.weight"]
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not model[0].weight.requires_grad
    model = network()
    model[0].requires_grad_(False)
    gradual(model, batches(12), parameters="0.weight")
    assert not model[0].weight.requires_grad


def test_mixed_dtypes():
    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = torch.nn.Linear(5, 4).bfloat16(), torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x.bfloat16())).float())

    torch.manual_seed(0)
    model = Mixed()
    gradual(model, batches(12))
    assert model.body.weight.dtype is torch.bfloat16
    gradual(network().double(), [(x.double(), y) for x, y in batches(12)])


@pytest.mark.parametrize("order", ["compiled before", "compiled after"])
def test_a_compiled_model(order):
    model, plain, data = network(), network(), batches(12)
    torch.compiler.reset()
    if order == "compiled before":
        compiled = torch.compile(model, backend="aot_eager")
        loss_fn(compiled, data[0]).backward()  # compiled without masks
        model.zero_grad()
        pruner = Pruner(compiled, loss_fn, data)
    else:
        pruner = Pruner(model, loss_fn, data)
        compiled = torch.compile(model, backend="aot_eager")
    other = Pruner(plain, loss_fn, data)
    for share in (0.5, 0.75):
        pruner.step(share)
        other.step(share)
        assert torch.allclose(compiled(data[0][0]), plain(data[0][0]), atol=1e-6)
        trainer(compiled, data)(compiled)
        trainer(plain, data)(plain)
        assert torch.allclose(compiled(data[0][0]), plain(data[0][0]), atol=1e-6)
    assert list(pruner.masks) == ["0.weight", "2.weight"]
    pruner.finalize()
    other.finalize()
    assert torch.allclose(compiled(data[0][0]), plain(data[0][0]), atol=1e-6)


def test_an_encoder_whose_weights_are_read_by_its_fast_path():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    model, data = Encoder(), batches(12, shape=(4, 8))
    pruner = Pruner(model, loss_fn, data)
    pruner.step(0.75)
    trainer(model, data)(model)
    model.eval()
    with torch.no_grad():  # the fast path
        fast = model.encoder(data[0][0])
    slow = model.encoder(data[0][0].requires_grad_())
    assert torch.allclose(fast, slow, atol=1e-5)
    pruner.finalize()
    assert torch.allclose(model.encoder(data[0][0]), slow, atol=1e-6)


def test_a_transformer_classifier_of_hugging_face():
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        pytest.skip(f"transformers cannot be imported: {error}")
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    data = []
    for _ in range(10):
        ids, mask = torch.randint(5, 50, (4, 9)), torch.ones(4, 9, dtype=torch.long)
        mask[1, 5:] = 0
        labels = torch.randint(3, (4,))
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def loss(model, batch):
        return model(**batch).loss

    model = BertForSequenceClassification(config)
    pruner, _ = gradual(model, data, loss, exclude=["bert.embeddings", "classifier"])
    assert len(pruner.masks) == 2 * 6 + 1
    model = BertForSequenceClassification(config)
    heads = Pruner(model, loss, data, pattern="head", parameters="*.attention.self")
    heads.step(0.5)
    for name, mask in heads.masks.items():
        if name.endswith("weight"):
            rows = mask.reshape(2, -1).float().mean(1)
            assert set(rows.tolist()) <= {0.0, 1.0}
