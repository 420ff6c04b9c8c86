"""Rows that are never stored, against rows that are, by a loop of plain autograd in float64."""

import copy
import itertools

import numpy as np
import pytest
import torch
from conftest import numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader, TensorDataset

import mfac_core as mfac
from mfac_core._validate import NonFiniteError
from mfac_core.influence import Influence
from mfac_core.testing import assert_rows, dense_inverse
from mfac_core.torch import ModelGradients, gradient_rows
from mfac_core.torch._layer_grams import LayerGrams

CLASSES = 3


def each(model, batch):
    """A loss for each sample."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.out = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


class Written(nn.Module):
    """Self-attention from linear layers, applied at every place, and a learned start."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, 1, 4))
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = torch.cat([self.start.expand(len(x), 1, 4), x], 1)
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


class Shared(nn.Module):
    """One layer used twice, one weight in two layers, and once by hand."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(torch.tanh(self.one(x))))
        return self.out(linear(torch.tanh(self.two(x)), self.two.bias.diag()))


class Language(nn.Module):
    """Tokens and their places looked up; the output tied to the table."""

    def __init__(self, tied):
        super().__init__()
        self.tokens = nn.Embedding(7, 5, padding_idx=2)
        self.places = nn.Embedding(4, 5)
        self.mix, self.norm = nn.Linear(5, 5), nn.LayerNorm(5)
        self.out = nn.Linear(5, 7, bias=False)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        return self.out(self.norm(h + torch.tanh(self.mix(h)))).mean(1)[:, :CLASSES]


class InPlace(nn.Module):
    """What comes out of layers is written to by what follows."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.out = nn.BatchNorm2d(3), nn.Linear(48, CLASSES)

    def forward(self, x):
        x = nn.functional.relu(self.norm(self.one(x)), inplace=True)
        h = self.two(x)
        h += x
        return self.out(nn.functional.elu(h, inplace=True).flatten(1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.out(self.lstm(x)[0][:, -1])


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1, dilation=1),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.Conv2d(6, 6, 2, groups=3),
        nn.Tanh(),
        nn.Conv2d(6, 8, 1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def registered_twice():
    layer = nn.Linear(5, 5)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(5, CLASSES))


MODELS = {
    "registered twice": (registered_twice, (5,)),
    "linear": (lambda: nn.Linear(5, CLASSES), (5,)),
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, CLASSES)), (5,)),
    "no bias": (lambda: nn.Linear(5, CLASSES, bias=False), (5,)),
    "convolutions": (convolutions, (2, 4, 4)),
    "long convolution": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, CLASSES)),
        (2, 6),
    ),
    "convolution in 3-d": (
        lambda: nn.Sequential(nn.Conv3d(1, 3, 2), nn.Flatten(), nn.Linear(3, CLASSES)),
        (1, 2, 2, 2),
    ),
    "in place": (lambda: InPlace().eval(), (2, 4, 4)),
    "embedding": (lambda: Language(False), "tokens"),
    "tied embedding": (lambda: Language(True), "tokens"),
    "attention": (Attention, (3, 4)),
    "attention by hand": (Written, (3, 4)),
    "shared": (Shared, (5,)),
    "recurrent": (Recurrent, (3, 4)),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(12, CLASSES),
        ),
        (3, 4),
    ),
}


def data(shape, sizes=(4, 4, 3), dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size in sizes:
        if shape == "tokens":
            x = torch.randint(7, (size, 4), generator=generator)
        else:
            x = torch.randn(size, *shape, generator=generator).to(dtype)
        batches.append((x, torch.randint(CLASSES, (size,), generator=generator)))
    return batches


def stored(model, loss_fn, batches, dtype=torch.float64):
    """The oracle: a loop of plain autograd over the losses of every batch."""
    model = copy.deepcopy(model).to(dtype)
    rows = []
    for batch in batches:
        batch = [x.to(dtype) if x.is_floating_point() else x for x in batch]
        for loss in loss_fn(model, batch).reshape(-1):
            parts = torch.autograd.grad(
                loss, list(model.parameters()), retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def model_of(name, dtype):
    make, shape = MODELS[name]
    torch.manual_seed(0)
    return make().to(dtype), data(shape, dtype=dtype)


def assert_same(rows, g, tolerance, seed=0):
    rng = np.random.default_rng(seed)
    m, d = g.shape
    assert rows.shape == (m, d)
    x = torch.from_numpy(rng.standard_normal((d, 2))).to(rows.dtype)
    c = torch.from_numpy(rng.standard_normal((m, 2))).to(rows.dtype)
    assert relative_error(rows.gram(), numpy64(g @ g.T)) <= tolerance
    assert relative_error(rows.project(x), numpy64(g) @ numpy64(x)) <= tolerance
    assert relative_error(rows.combine(c), numpy64(g).T @ numpy64(c)) <= tolerance
    assert relative_error(rows.project(x[:, 0]), numpy64(g) @ numpy64(x[:, 0])) <= tolerance
    assert relative_error(rows.combine(c[:, 0]), numpy64(g).T @ numpy64(c[:, 0])) <= tolerance


@pytest.mark.parametrize("loss_fn", [each, mean])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_those_of_plain_autograd(name, dtype, loss_fn):
    model, batches = model_of(name, dtype)
    state = copy.deepcopy(model.state_dict())
    rows = ModelGradients(model, loss_fn, batches)
    assert rows.dtype == dtype
    g = stored(model, loss_fn, batches)
    assert_same(rows, g, 1e-5 if dtype == torch.float32 else 1e-10)
    if dtype == torch.float32:
        assert_same(rows.in_float64(), g, 1e-10)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_which_gradients_the_layers_explain():
    """Where the fast way is taken is known, not only that the result is right."""
    slow = {
        "attention": {"attention.in_proj_weight", "attention.in_proj_bias"}
        | {"attention.out_proj.weight", "attention.out_proj.bias"},
        "embedding": {"places.weight"},
        "tied embedding": {"places.weight"},
        "shared": {"two.bias"},
        "recurrent": {n for n, _ in Recurrent().named_parameters() if n.startswith("lstm")},
        "encoder": {f"0.self_attn.{n}_{k}" for n in ("in_proj",) for k in ("weight", "bias")}
        | {f"0.self_attn.out_proj.{k}" for k in ("weight", "bias")},
    }
    for name in MODELS:
        model, batches = model_of(name, torch.float64)
        rows = ModelGradients(model, each, batches)
        rows.gram()
        assert set(rows._grams.rest) == slow.get(name, set()), name


@st.composite
def networks(draw):
    """Small nets of layers in any order, used once or twice, with sums around them."""
    width = draw(st.integers(2, 6))
    kinds = st.sampled_from(["linear", "norm", "group", "tanh", "twice", "around"])
    layers, last = [], None
    for kind in draw(st.lists(kinds, max_size=5)):
        match kind:
            case "linear":
                last = nn.Linear(width, width, bias=draw(st.booleans()))
                layers.append(last)
            case "norm":
                layers.append(nn.LayerNorm(width))
            case "group":
                layers.append(nn.GroupNorm(1, width))
            case "tanh":
                layers.append(nn.Tanh())
            case "twice" if last is not None:
                layers.append(last)
            case "around":
                layers.append(Around(nn.Linear(width, width)))
    return nn.Sequential(nn.Linear(3, width), *layers, nn.Linear(width, CLASSES))


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + torch.tanh(self.inner(x))


@settings(max_examples=25)
@given(
    model=networks(),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    memory=st.integers(1, 2000),
    loss_fn=st.sampled_from([each, mean]),
    seed=st.integers(0, 100),
)
def test_drawn_networks(model, sizes, memory, loss_fn, seed):
    torch.manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p))
    batches = data((3,), sizes, torch.float64)
    rows = ModelGradients(model, loss_fn, batches, memory=memory)
    g = stored(model, loss_fn, batches)
    scale = float(g.norm())
    assert float((rows.gram() - g @ g.T).norm()) <= 1e-10 * scale**2
    x = torch.randn(g.shape[1], dtype=torch.float64)
    assert float((rows.project(x) - g @ x).norm()) <= 1e-10 * scale * float(x.norm())


def test_they_go_where_arrays_go():
    model, batches = model_of("mlp", torch.float32)
    rows = ModelGradients(model, each, batches)
    assert_rows(rows)
    g = numpy64(stored(model, each, batches))
    x = torch.linspace(-1, 1, g.shape[1])
    for damping in (1e-1, 1e-7):  # the second asks for float64
        product = mfac.InverseFisher(rows, damping=damping) @ x
        assert product.dtype == torch.float32
        dense = dense_inverse(g, damping=damping)
        assert relative_error(product, dense @ numpy64(x)) <= 1e-5
    influence = Influence(rows, damping=0.1)
    scores = influence.scores(ModelGradients(model, each, batches[:2]))
    assert relative_error(scores, g[:8] @ dense_inverse(g, damping=0.1) @ g.T / len(g)) <= 1e-5
    with pytest.raises(TypeError, match=r"diagonal needs columns.*ModelGradients"):
        mfac.InverseFisher(rows, damping=0.1).diagonal()


def test_chosen_and_frozen_parameters():
    model, batches = model_of("mlp", torch.float64)
    model[0].weight.requires_grad_(False)
    chosen = ModelGradients(model, mean, batches, ["0.weight", "2.bias"])
    expected = gradient_rows(model, mean, batches, parameters=["0.weight", "2.bias"])
    assert_same(chosen, expected, 1e-10)
    assert_same(ModelGradients(model, mean, batches), gradient_rows(model, mean, batches), 1e-10)
    assert not model[0].weight.requires_grad


def test_batch_statistics_are_told_from_what_layers_see():
    """Samples of a batch are mixed: no layer knows a sample's gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, CLASSES))
    model, batches = model.double(), data((5,), dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    rows = ModelGradients(model, each, batches)
    assert_same(rows, stored(model, each, batches), 1e-10)
    assert set(rows._grams.rest) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Twice(torch.autograd.Function):
    """Without a forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, back):
        return 2 * back


def test_models_without_a_forward_mode():
    class Model(nn.Linear):
        def forward(self, x):
            return super().forward(Twice.apply(torch.tanh(super().forward(x))))

    torch.manual_seed(0)
    model, batches = Model(CLASSES, CLASSES).double(), data((CLASSES,), dtype=torch.float64)
    rows = ModelGradients(model, each, batches)
    assert_same(rows, stored(model, each, batches), 1e-10)
    assert not rows._directions.has_forward_mode


def test_models_that_cannot_be_differentiated_twice():
    """Nor in forward mode: as the sums of embeddings that PyTorch has a layer for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, CLASSES)).double()
    for loss_fn in (each, mean):
        rows = ModelGradients(model, loss_fn, data("tokens"))
        assert_same(rows, stored(model, loss_fn, data("tokens")), 1e-10)
        assert rows._directions._first == 2


def test_what_fails_in_the_model_is_said_as_it_is():
    broken = itertools.count()

    def loss_fn(model, batch):
        if next(broken):
            msg = "a loss of their own"
            raise RuntimeError(msg)
        return each(model, batch)

    model, _ = model_of("mlp", torch.float32)
    rows = ModelGradients(model, loss_fn, data((5,), (4,)))
    with pytest.raises(RuntimeError, match="a loss of their own"):
        rows.project(torch.ones(rows.shape[1]))


def test_a_wrong_derivative_in_forward_mode_is_noticed():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return 2 * x

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, back):
            return 2 * back

        @staticmethod
        def jvp(ctx, along):
            return 3 * along

    def loss_fn(model, batch):
        return Wrong.apply(each(model, batch))

    model, batches = model_of("linear", torch.float64)
    rows = ModelGradients(model, loss_fn, batches)
    assert rows._directions.has_forward_mode
    rows.gram()
    assert not rows._directions.has_forward_mode
    assert_same(rows, stored(model, loss_fn, batches), 1e-10)


def test_samples_that_are_fitted_to_the_last_digit():
    """1 − p of 1e-6 has a digit in float32, and the rows of such samples no more."""
    model, batches = nn.Linear(5, CLASSES), data((5,))
    nn.init.eye_(model.weight)
    for x, y in batches:
        x[:3] = 15.0 * torch.eye(5)[y[:3]]
    g = stored(model, each, batches)
    rows = ModelGradients(model, each, batches)
    assert relative_error(rows.gram(), numpy64(g @ g.T)) <= 1e-5


def test_gradients_that_change_are_noticed():
    class Random(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, back):
            return (2 + torch.rand(())) * back

    model, batches = model_of("linear", torch.float64)
    rows = ModelGradients(model, lambda m, b: Random.apply(each(m, b)), batches)
    with pytest.raises(RuntimeError, match="gradients must be the same in every pass"):
        rows.gram()


def test_what_the_first_batch_did_not_show_is_noticed_in_the_end(monkeypatch):
    monkeypatch.setattr(LayerGrams, "_unexplained", lambda *_: [])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, CLASSES))
    model, batches = model.double(), data((5,), dtype=torch.float64)
    rows = ModelGradients(model, each, batches)
    g = numpy64(stored(model, each, batches))
    with pytest.warns(UserWarning, match="computed one by one"):
        gram = rows.gram()
    assert relative_error(gram, g @ g.T) <= 1e-10


class Passes:
    """Batches that a pass can change."""

    def __init__(self, change):
        self.change, self.number = change, itertools.count()

    def __len__(self):
        return 3

    def __iter__(self):
        return iter(self.change(data((5,)), next(self.number)))


def reordered(batches, number):
    return [batches[1], batches[0], batches[2]] if number else batches


def noisy(batches, number):
    return [(x + number, y) for x, y in batches]


def shorter(batches, number):
    return batches[: 3 - number]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reordered, r"row 0|row [123].*another order.*shuffle=False"),
        (noisy, "the data differ.*augmentation"),
        (shorter, "same in every pass"),
    ],
)
def test_batches_that_change_are_noticed(change, message):
    model, _ = model_of("mlp", torch.float32)
    for act in (
        lambda rows: rows.gram(),
        lambda rows: rows.project(torch.ones(rows.shape[1])),
        lambda rows: rows.combine(torch.ones(rows.shape[0])),
    ):
        rows = ModelGradients(model, each, Passes(change))
        with pytest.raises(RuntimeError, match=message):
            act(rows)


def test_a_shuffling_loader_is_noticed():
    x, y = (torch.cat(parts) for parts in zip(*data((5,), (8, 8, 8)), strict=True))
    model, _ = model_of("mlp", torch.float32)
    good = ModelGradients(model, each, DataLoader(TensorDataset(x, y), batch_size=4))
    assert good.gram().shape == (24, 24)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    with pytest.raises(RuntimeError, match="another order; pass shuffle=False"):
        ModelGradients(model, each, loader).gram()


def test_dropout_in_training_mode_is_noticed():
    model = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, CLASSES))
    rows = ModelGradients(model, each, data((5,)))
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"dropout is in training mode in 1; call model\.eval"):
        rows.gram()
    assert torch.equal(torch.get_rng_state(), before)
    model.eval()
    assert_rows(ModelGradients(model, each, data((5,))))


def test_what_is_not_deterministic_is_noticed():
    def loss_fn(model, batch):
        return each(model, (batch[0] + torch.rand(()), batch[1]))

    model, batches = model_of("mlp", torch.float32)
    with pytest.raises(RuntimeError, match="not deterministic"):
        ModelGradients(model, loss_fn, batches).combine(torch.ones(11))


def test_a_model_that_was_trained_meanwhile_is_noticed():
    model, batches = model_of("mlp", torch.float32)
    rows = ModelGradients(model, each, batches)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="the model has been changed since"):
        rows.project(torch.ones(rows.shape[1]))
    assert model.training
    assert all(not m._forward_hooks for m in model.modules())


def test_refusals_by_name():
    model, batches = model_of("mlp", torch.float32)
    with pytest.raises(TypeError, match=r"batches must give the same.*list\(batches\)"):
        ModelGradients(model, each, iter(batches))
    with pytest.raises(ValueError, match="batches must hold at least one"):
        ModelGradients(model, each, [])
    with pytest.raises(TypeError, match=r"loss_fn.*scalar.*vector.*4, 3"):
        ModelGradients(model, lambda model, batch: model(batch[0]), batches)
    with pytest.raises(NonFiniteError, match=r"losses must be finite.*batch 0"):
        ModelGradients(model, lambda model, batch: each(model, batch) * np.nan, batches)
    with pytest.raises(ValueError, match="memory"):
        ModelGradients(model, each, batches, memory=0)
    rows = ModelGradients(model, lambda model, batch: each(model, batch).detach(), batches)
    with pytest.raises(ValueError, match="depend on the chosen parameters"):
        rows.combine(torch.ones(11))
    with pytest.raises(ValueError, match="x must have shape"):
        rows.project(torch.ones(3))


def test_memory_is_bounded_by_the_budget(monkeypatch):
    """Factors of a wide layer in tiles: never more held than half the budget and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, CLASSES))
    batches = data((64,), (8,) * 12)
    seen = []

    factors_of = LayerGrams._factors

    def counting(self, batch, at):
        factors = factors_of(self, batch, at)
        seen.append((at.start, sum(f.nbytes for f in factors.values())))
        return factors

    monkeypatch.setattr(LayerGrams, "_factors", counting)
    whole = ModelGradients(model, each, batches)
    expected = whole.gram()
    assert [at for at, _ in seen] == list(range(0, 96, 8))
    one = seen[0][1]
    assert one < 4 * 8 * (whole.shape[1] + 512) / 10  # less than a tenth of the gradients
    seen.clear()
    tiles = ModelGradients(model, each, batches, memory=8 * one)
    assert relative_error(tiles.gram(), numpy64(expected)) <= 1e-12
    assert [at // 8 for at, _ in seen] == [*range(12), *range(4, 12), *range(8, 12)]


@pytest.mark.parametrize("name", ["mlp", "convolutions", "tied embedding", "attention"])
@pytest.mark.parametrize("memory", [1, 1 << 28])
def test_queries_meet_the_rows_layer_by_layer(name, memory):
    model, batches = model_of(name, torch.float64)
    passes = []

    class Counting(ModelGradients):
        def project(self, x):
            passes.append(x.shape)
            return super().project(x)

    train = Counting(model, each, batches, memory=memory)
    queries = Counting(model, each, data(MODELS[name][1], (2, 3), torch.float64)[::-1])
    g, q = (numpy64(stored(model, each, rows._arguments[2])) for rows in (train, queries))
    assert relative_error(train.cross(queries), g @ q.T) <= 1e-10
    scores = Influence(train, damping=0.1).scores(queries)
    assert relative_error(scores, q @ dense_inverse(g, damping=0.1) @ g.T / len(g)) <= 1e-9
    assert all(len(shape) == 1 for shape in passes)  # the checks alone


def test_queries_of_another_model_are_refused():
    model, batches = model_of("mlp", torch.float64)
    rows = ModelGradients(model, each, batches)
    with pytest.raises(ValueError, match="same names and shapes"):
        rows.cross(ModelGradients(model, each, batches, "0.*"))
    with pytest.raises(ValueError, match=r"queries must have shape \(q, "):
        Influence(rows, damping=0.1).scores(ModelGradients(model, each, batches, "0.*"))


def test_a_model_in_bfloat16():
    model, batches = model_of("mlp", torch.bfloat16)
    rows = ModelGradients(model, each, batches)
    g = numpy64(stored(model, each, batches))
    assert relative_error(rows.gram(), g @ g.T) <= 0.05
    product = mfac.InverseFisher(rows, damping=1.0) @ torch.ones(g.shape[1], dtype=torch.bfloat16)
    assert relative_error(product, dense_inverse(g, damping=1.0).sum(axis=1)) <= 0.05
