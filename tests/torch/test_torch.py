"""The PyTorch optimiser against dense inverses of the gradients it has seen."""

import copy
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from conftest import numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Ranks
from torch.nn.functional import cross_entropy, mse_loss
from torch.nn.utils import prune
from torch_training import batches, network, train, vector

from mfac_core.testing import dense_inverse, error_bound
from mfac_core.torch import MFAC, per_sample_gradients


def parameters_with(gradients):
    """Parameters, at 1, with these gradients."""
    parameters = [torch.nn.Parameter(torch.ones_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    return parameters


@settings(max_examples=30)
@given(
    d=st.integers(1, 30),
    size=st.integers(1, 6),
    steps=st.integers(1, 9),
    damping=st.floats(1e-3, 10.0),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**31),
)
def test_a_step_is_the_dense_inverse_times_the_gradient(d, size, steps, damping, dtype, seed):
    rows = np.random.default_rng(seed).standard_normal((steps, d)).astype(dtype)
    p = torch.nn.Parameter(torch.zeros(d, dtype=getattr(torch, dtype)))
    optimizer = MFAC([p], 0.1, window_size=size, damping=damping, momentum=0.0)
    for i, row in enumerate(rows):
        with torch.no_grad():
            p.zero_()  # so that p is the step, and nothing is lost in a sum
        p.grad = torch.from_numpy(row.copy())
        optimizer.step()
        held = rows[max(0, i + 1 - size) : i + 1].astype("float64")
        expected = -0.1 * dense_inverse(held, damping=damping) @ held[-1]
        tolerance = min(error_bound(held, damping=damping, dtype=dtype), 1e-5)
        assert relative_error(p, expected) <= tolerance


def test_groups_share_one_window_and_keep_their_own_rates(rng):
    shapes = [(3, 4), (5,), (2, 2, 2)]
    rows = [rng.standard_normal(25).astype("float32") for _ in range(4)]
    a, b, c = parameters_with([torch.zeros(shape) for shape in shapes])
    optimizer = MFAC(
        [{"params": [a, b], "lr": 0.1}, {"params": [c], "lr": 0.3, "weight_decay": 0.5}],
        window_size=3,
        damping=0.2,
        momentum=0.6,
    )
    expected, velocity = np.ones(25), np.zeros(25)
    rates = np.repeat([0.1, 0.3], [17, 8])
    for i, row in enumerate(rows):
        pieces = np.split(row, [12, 17])
        for p, piece in zip((a, b, c), pieces, strict=True):
            p.grad = torch.from_numpy(piece.reshape(p.shape).copy())
        optimizer.step()
        held = np.array(rows[max(0, i - 2) : i + 1], dtype="float64")
        velocity = 0.6 * velocity + 0.4 * (dense_inverse(held, damping=0.2) @ row)
        expected[17:] *= 1 - 0.3 * 0.5  # decoupled: times the learning rate, not preconditioned
        expected -= rates * velocity
    weights = torch.cat([p.detach().flatten() for p in (a, b, c)])
    assert relative_error(weights, expected) <= 1e-5
    assert optimizer.window.num_params == 25


def test_coupled_weight_decay_enters_the_window(rng):
    row = rng.standard_normal(6).astype("float32")
    (p,) = parameters_with([torch.from_numpy(row)])
    options = {"window_size": 2, "damping": 0.5, "weight_decay": 0.1}
    optimizer = MFAC([p], 0.1, **options, momentum=0.0, decoupled_weight_decay=False)
    optimizer.step()
    g = row + 0.1
    assert relative_error(optimizer.window.gradients[0], g) <= 1e-6
    expected = 1.0 - 0.1 * (dense_inverse(g[None], damping=0.5) @ g)
    assert relative_error(p, expected) <= 1e-6


def test_the_scale_free_step(rng):
    """Of unit gradients, each parameter's part of size lr: the loss's scale does not matter."""
    rows = rng.standard_normal((5, 12)).astype("float32")
    rows[:, 4] = 0.0  # a weight that no gradient reaches does not count
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for scale in (1.0, 1e-6, 1e6):
        a, b = parameters_with([torch.zeros(7), torch.zeros(5)])
        optimizer = MFAC([a, b], 0.1, window_size=3, momentum=0.0)
        for row in rows:
            with torch.no_grad():
                a.zero_()
                b.zero_()
            a.grad, b.grad = torch.from_numpy(scale * row).split([7, 5])
            optimizer.step()
        assert relative_error(optimizer.window.gradients, unit[2:]) <= 1e-6
        assert a[4] == 0.0
        for p, columns, count in ((a, slice(7), 6), (b, slice(7, 12), 5)):
            part = unit[2:, columns] / np.linalg.norm(unit[2:, columns], axis=1, keepdims=True)
            direction = -dense_inverse(part, damping=optimizer.window.damping) @ part[-1]
            expected = 0.1 * math.sqrt(count) / np.linalg.norm(direction) * direction
            assert relative_error(p, expected) <= 1e-5


def test_a_zero_gradient_is_no_step():
    (p,) = parameters_with([torch.zeros(4)])
    optimizer = MFAC([p], window_size=3)
    optimizer.step()
    assert (p == 1.0).all()
    assert optimizer.skipped_steps == 0


def test_it_learns_in_its_documented_setting():
    torch.manual_seed(0)
    x = torch.randn(256, 5)
    y = (x @ torch.randn(5, 3)).argmax(dim=1)
    model = network()
    optimizer = MFAC(model.parameters())
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    before = cross_entropy(model(x), y).item()
    train(model, optimizer, [(x[i::4], y[i::4]) for i in range(4)] * 75, scheduler)
    assert cross_entropy(model(x), y).item() < before / 3


def test_closure_and_return_value():
    model, (data,) = network(), batches(1)
    optimizer = MFAC(model.parameters(), 0.01, window_size=4, damping=0.1)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(data[0]), data[1])
        loss.backward()
        return loss

    before = vector(model)
    assert optimizer.step(closure).requires_grad
    assert (vector(model) != before).any()
    assert optimizer.step() is None


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scheduler_scales_the_step(rng, as_tensor):
    g = torch.from_numpy(rng.standard_normal(5))
    (p,) = parameters_with([g])
    lr = torch.tensor(0.1) if as_tensor else 0.1
    optimizer = MFAC([p], lr, window_size=1, damping=1.0, momentum=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps = []
    for _ in range(2):
        before = p.detach().clone()
        optimizer.step()
        scheduler.step()
        steps.append(p.detach() - before)
    assert relative_error(steps[1], 0.5 * numpy64(steps[0])) <= 1e-6


def test_one_cycle_cycles_the_momentum():
    optimizer = MFAC(network().parameters(), 0.1, window_size=2, damping=1.0, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    assert optimizer.param_groups[0]["momentum"] == pytest.approx(0.95)


def test_parameters_without_gradient_stay(rng):
    """Also when the window holds gradients of theirs from before they were frozen."""
    a, b = parameters_with([torch.randn(4), torch.randn(3)])
    optimizer = MFAC([a, b], 0.1, window_size=3, damping=0.1, momentum=0.5, weight_decay=0.1)
    optimizer.step()
    before = b.detach().clone()
    b.grad = None
    for _ in range(3):
        a.grad = torch.randn(4)
        optimizer.step()
    assert torch.equal(b, before)
    assert (optimizer.window.gradients[:, 4:] == 0.0).all()


def test_momentum_waits_for_the_next_gradient(rng):
    """As in torch.optim.SGD; with one gradient in the window F⁻¹g is g/(λ + ‖g‖²)."""
    a, b = parameters_with([torch.randn(4), torch.randn(3)])
    optimizer = MFAC([a, b], 1.0, window_size=1, damping=0.1, momentum=0.5)
    optimizer.step()
    velocity = 1.0 - b.detach()
    b.grad = None
    for _ in range(2):
        a.grad = torch.randn(4)
        optimizer.step()
    a.grad, b.grad = torch.zeros(4), torch.tensor([1.0, 0.0, 0.0])
    before = b.detach().clone()
    optimizer.step()
    expected = before - 0.5 * velocity - 0.5 * b.grad / 1.1
    torch.testing.assert_close(b.detach(), expected)


def test_a_step_without_any_gradient_does_nothing():
    model = network()
    optimizer = MFAC(model.parameters(), window_size=3)
    optimizer.step()
    assert optimizer.window is None


@pytest.mark.parametrize("damping", [None, 0.01])
def test_a_pruned_network_stays_pruned(damping):
    """Weights whose gradients a mask zeroes do not move."""
    model = network()
    prune.random_unstructured(model[0], "weight", amount=0.5)
    before = model[0].weight_orig.detach().clone()
    optimizer = MFAC(model.parameters(), 0.1, window_size=4, damping=damping, momentum=0.9)
    train(model, optimizer, batches(6))
    removed = model[0].weight_mask == 0
    assert removed.any()
    assert torch.equal(model[0].weight_orig[removed], before[removed])
    assert (model[0].weight_orig != before)[~removed].all()


@pytest.mark.parametrize("damping", [None, 1e-3])
@pytest.mark.parametrize("stop", [0, 3, 9])
@pytest.mark.parametrize(
    ("dtype", "window_dtype"),
    [("float32", None), ("float64", None), ("bfloat16", None), ("bfloat16", "float32")],
)
def test_a_resumed_run_is_the_uninterrupted_one(damping, stop, dtype, window_dtype):
    def start(seed):
        model = network(seed).to(getattr(torch, dtype))
        optimizer = MFAC(
            model.parameters(),
            0.02,
            window_size=5,
            damping=damping,
            momentum=0.9,
            weight_decay=0.01,
            window_dtype=window_dtype and getattr(torch, window_dtype),
        )
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7)

    data = [(x.to(getattr(torch, dtype)), y) for x, y in batches(14)]
    straight = start(0)
    train(*straight[:2], data, straight[2])

    first = start(0)
    train(*first[:2], data[:stop], first[2])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    second = start(1)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second[:2], data[stop:], second[2])

    for a, b in zip(straight[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(straight[1].window.gradients, second[1].window.gradients)
    expected = window_dtype or dtype
    assert str(second[1].window.dtype) == f"torch.{expected}"
    wide = "float64" if dtype == "float64" else "float32"
    assert str(second[1]._velocity.vector.dtype) == f"torch.{wide}"


def test_a_state_goes_on_in_a_wider_model():
    """The direction is then computed in float64, beside a velocity saved in float32."""
    model = network()
    optimizer = MFAC(model.parameters(), 0.1, window_size=4, damping=0.1, momentum=0.9)
    train(model, optimizer, batches(3))
    wide = network().double()
    wide.load_state_dict(model.state_dict())
    other = MFAC(wide.parameters(), 0.1, window_size=4, damping=0.1, momentum=0.9)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(3, seed=2))
    train(wide, other, ((x.double(), y) for x, y in batches(3, seed=2)))
    assert relative_error(vector(model), vector(wide)) < 1e-5


def test_a_refused_state_changes_nothing():
    model = network()
    optimizer = MFAC(model.parameters(), 0.1, window_size=4, damping=0.1)
    train(model, optimizer, batches(3))
    held = optimizer.window.gradients
    other = MFAC(network().parameters(), 0.2, window_size=5, damping=0.1)
    train(network(), other, batches(1))
    train(network(), other, batches(1))
    model2 = network()
    other = MFAC(model2.parameters(), 0.2, window_size=5, damping=0.1)
    train(model2, other, batches(2))
    groups = MFAC([{"params": [p]} for p in network().parameters()], window_size=4)
    for state, error in (
        (other.state_dict(), "window_size"),
        (groups.state_dict(), "different number of parameter groups"),
        (torch.optim.SGD(model.parameters(), lr=0.1).state_dict(), "'damping'"),
    ):
        with pytest.raises(ValueError, match=error):
            optimizer.load_state_dict(state)
        assert torch.equal(optimizer.window.gradients, held)
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("damping", [None, 0.1])
def test_a_sparse_window_preconditions_the_whole_gradient(rng, damping):
    rows = rng.standard_normal((5, 30)).astype("float32")
    (p,) = parameters_with([torch.zeros(30)])
    optimizer = MFAC([p], 0.1, window_size=3, damping=damping, density=0.2, momentum=0.0)
    for row in rows:
        with torch.no_grad():
            p.zero_()
        p.grad = torch.from_numpy(row.copy())
        optimizer.step()
    kept = numpy64(optimizer.window.gradients)
    assert (kept != 0.0).sum() == 3 * 6
    expected = -dense_inverse(kept, damping=optimizer.window.damping) @ rows[-1]
    if damping is None:
        expected *= math.sqrt(30) / np.linalg.norm(expected)
    assert relative_error(p, 0.1 * expected) <= 1e-5


def test_bfloat16_parameters_step_in_float32(rng):
    g = torch.from_numpy(rng.standard_normal((2, 40))).to(torch.bfloat16)
    p = torch.nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
    options = {"damping": 0.1, "momentum": 0.0, "window_dtype": torch.float32}
    optimizer = MFAC([p], 1.0, window_size=2, **options)
    for row in g:
        with torch.no_grad():
            p.zero_()
        p.grad = row.clone()
        optimizer.step()
    expected = -dense_inverse(g, damping=0.1) @ numpy64(g[1])
    # Nothing but the parameters' own rounding, half a unit in the last of 8 bits.
    assert (np.abs(numpy64(p) - expected) <= 2.0**-8 * np.abs(expected)).all()


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(rng, damping, bad):
    (p,) = parameters_with([torch.from_numpy(rng.standard_normal(6))])
    optimizer = MFAC([p], 0.1, window_size=2, damping=damping, momentum=0.5, weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
    before, held, good = p.detach().clone(), optimizer.window.gradients, p.grad.clone()
    p.grad[2] = bad
    with pytest.warns(RuntimeWarning, match="skipped a step") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    optimizer.step()  # warns once
    assert optimizer.skipped_steps == 2
    assert torch.equal(p, before)
    assert torch.equal(optimizer.window.gradients, held)
    p.grad = good
    optimizer.step()
    assert torch.isfinite(p).all()
    assert not torch.equal(p, before)
    other = MFAC([p], window_size=2)
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 2


def test_a_gradient_too_large_for_the_windows_dtype_is_skipped():
    (p,) = parameters_with([torch.full((3,), 1e5)])
    optimizer = MFAC([p], window_size=2, damping=1.0, window_dtype=torch.float16)
    with pytest.warns(RuntimeWarning, match="skipped a step"):
        optimizer.step()
    assert (p == 1.0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1"),
        ({"lr": math.nan}, "Invalid learning rate: nan"),
        ({"lr": torch.zeros(2)}, "Tensor lr must be 1-element"),
        ({"window_size": 0}, "Invalid window_size value: 0"),
        ({"window_size": 2.5}, "Invalid window_size value: 2.5"),
        ({"damping": 0.0}, "Invalid damping value: 0.0"),
        ({"damping": math.inf}, "Invalid damping value: inf"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
        ({"density": 0.0}, "Invalid density value: 0.0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MFAC(network().parameters(), **({"window_size": 3} | options))


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        MFAC([], window_size=2)
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = MFAC(embedding.parameters(), window_size=2)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_groups_of_a_sparse_window_come_before_the_first_step(rng):
    a, b, c = parameters_with([torch.randn(2) for _ in range(3)])
    optimizer = MFAC([a], 0.1, window_size=2, damping=0.1, density=0.5)
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    optimizer.step()
    assert optimizer.window.num_params == 4
    with pytest.raises(ValueError, match="after the first step"):
        optimizer.add_param_group({"params": [c]})
    assert len(optimizer.param_groups) == 2


def test_copies_of_an_optimizer_before_its_first_step():
    model = network()
    optimizer = MFAC(model.parameters(), 0.1, window_size=3, momentum=0.9)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert copied.window_size == 3
        assert copied.param_groups[0]["momentum"] == 0.9


def test_a_copy_in_the_middle_of_a_run_goes_on_alone():
    model = network()
    optimizer = MFAC(model.parameters(), 0.1, window_size=3, momentum=0.9)
    train(model, optimizer, batches(4))
    copied_model, copied = copy.deepcopy((model, optimizer))
    held = vector(copied_model)
    train(model, optimizer, batches(4, seed=2))
    assert np.array_equal(vector(copied_model), held)
    train(copied_model, copied, batches(4, seed=2))
    assert np.array_equal(vector(copied_model), vector(model))


@pytest.mark.filterwarnings("ignore:MFAC skipped")
@pytest.mark.parametrize("damping", [None, 0.1])
def test_ranks_that_hold_other_parameters(rng, damping):
    """Two ranks with a parameter each, and sums over both: as one optimiser with both."""
    rows = rng.standard_normal((4, 10)).astype("float32")
    rows[2, 7] = np.inf  # refused on one, so skipped on both
    ranks = Ranks(2)

    def run(columns, **options):
        (*parameters,) = parameters_with([torch.zeros(c.stop - c.start) for c in columns])
        optimizer = MFAC(parameters, 0.1, window_size=3, **options)
        for row in rows:
            for p, c in zip(parameters, columns, strict=True):
                p.grad = torch.from_numpy(row[c].copy())
            optimizer.step()
        assert optimizer.skipped_steps == 1
        return parameters

    columns = [slice(0, 4), slice(4, 10)]
    both = run(columns, damping=damping)
    alone = ranks.run(lambda i: run([columns[i]], damping=damping, reduce=ranks.reduce))
    for p, (q,) in zip(both, alone, strict=True):
        assert relative_error(q, numpy64(p)) <= 1e-6


# -- gradients of single samples ---------------------------------------------------------------


def loop(model, loss_fn, inputs, targets):
    """One backward pass after another."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(targets)):
        loss = loss_fn(model(*(x[i : i + 1] for x in inputs)), targets[i : i + 1])
        rows.append(torch.nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)))
    return numpy64(torch.stack(rows))


class Attention(torch.nn.Module):
    """Two inputs, weights used twice, and a transformer's layer."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 8)
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = torch.nn.Linear(8, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens, scale):
        return self.out(self.layer(self.embed(tokens)) * scale[:, None, None]).mean(1)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("training", [True, False])
def test_per_sample_gradients_are_those_of_a_loop(chunk_size, training):
    torch.manual_seed(0)
    model = Attention().double().train(training)
    model.layer.linear1.weight.requires_grad = False
    inputs = torch.randint(7, (9, 5)), torch.rand(9, dtype=torch.float64)
    targets = torch.randint(7, (9,))
    before = copy.deepcopy(model.state_dict())
    rows = per_sample_gradients(model, cross_entropy, inputs, targets, chunk_size)
    assert relative_error(rows, loop(model, cross_entropy, inputs, targets)) <= 1e-12
    assert not rows.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


def test_rows_of_several_samples_are_their_mean():
    model = network()
    (data,) = batches(1)
    single = per_sample_gradients(model, cross_entropy, *data)
    rows = per_sample_gradients(model, cross_entropy, *data, samples_per_row=4)
    assert relative_error(rows, numpy64(single).reshape(2, 4, -1).mean(axis=1)) <= 1e-6


def test_dropout_draws_anew_for_every_sample():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout(), torch.nn.Linear(6, 1))
    rows = per_sample_gradients(model, mse_loss, torch.ones(8, 6), torch.zeros(8, 1))
    assert len({tuple(row.tolist()) for row in rows}) > 1


def test_batch_normalisation_has_no_gradients_of_single_samples():
    norm = torch.nn.BatchNorm1d(5)
    model = torch.nn.Sequential(norm, torch.nn.Linear(5, 3))
    (data,) = batches(1)
    with pytest.raises(ValueError, match=r"BatchNorm1d '0'.*call model.eval\(\)"):
        per_sample_gradients(model, cross_entropy, *data)
    rows = per_sample_gradients(model.eval(), cross_entropy, *data)
    assert relative_error(rows, loop(model, cross_entropy, data[:1], data[1])) <= 1e-6
    model[0] = torch.nn.BatchNorm1d(5, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="batch statistics"):
        per_sample_gradients(model, cross_entropy, *data)


def test_bad_arguments_of_per_sample_gradients():
    model = network()
    ((x, y),) = batches(1)
    for options, message in (
        ({"inputs": x[:3]}, r"same number of samples.*got \[3\] and 8"),
        ({"samples_per_row": 3}, "multiple of samples_per_row 3"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1"),
    ):
        arguments = {"inputs": x, "targets": y} | options
        with pytest.raises(ValueError, match=message):
            per_sample_gradients(model, cross_entropy, **arguments)
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(ValueError, match="requires a gradient"):
        per_sample_gradients(model, cross_entropy, x, y)


def test_nothing_warns_in_a_normal_run():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, MFAC(model.parameters(), window_size=2), batches(4))
