"""Steps of the optimiser against plain float64 recursions: every size of gradient, every option."""

import copy
import itertools
import math
import signal
import warnings

import numpy as np
import pytest
import torch
from conftest import numpy64, relative_error
from torch.nn.functional import cross_entropy, triplet_margin_loss

from mfac_core.torch import MFAC, _orthogonal, _units

FAINT = 2.0**-12  # of the docstring
RIDGE = 0.6


def parameters(*sizes, dtype=torch.float32):
    return [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]


class Oracle:
    """The scale-free step, in NumPy and float64, from its description."""

    def __init__(self, shapes, m, lr, momentum=0.0, nesterov=False):
        self.shapes = [(x,) if isinstance(x, int) else x for x in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.m, self.lr, self.momentum, self.nesterov = m, lr, momentum, nesterov
        self.rows, self.velocity = [], np.zeros(sum(self.sizes))

    def step(self, g):
        """What the weights move by."""
        if not np.isfinite(g).all() or not g.any():
            return np.zeros(len(g))
        g = g / np.linalg.norm(g)
        self.rows = [*self.rows, g][-self.m :]
        rows, d = np.array(self.rows), len(g)
        move, cuts = np.zeros(d), np.cumsum([0, *self.sizes])
        for shape, (a, b) in zip(self.shapes, itertools.pairwise(cuts), strict=True):
            size = np.linalg.norm(g[a:b]) / math.sqrt(b - a) * math.sqrt(d)
            if not size:
                continue
            units = rows[:, a:b].reshape(len(rows), shape[0] if len(shape) > 1 else 1, -1)
            y = np.concatenate([self.unit(units[:, i]) for i in range(units.shape[1])])
            seen = np.abs(units).max(axis=0) > 0.0
            used = (seen & units[-1].any(axis=1, keepdims=True)).ravel()
            used &= np.abs(y) > 1e-14 * np.abs(y).max()  # else it is zero but for rounding
            direction = y * used * math.sqrt(used.sum()) / np.linalg.norm(y * used)
            direction *= min(1.0, size / FAINT)
            v = self.momentum * self.velocity[a:b] + (1.0 - self.momentum) * direction
            self.velocity[a:b] = v
            if self.nesterov:
                v = self.momentum * v + (1.0 - self.momentum) * direction
            if len(shape) > 1:
                v = evened(v.reshape(shape[0], -1)).ravel()
            move[a:b] = -self.lr * v
        return move

    @staticmethod
    def unit(rows):
        """(ridge·I + Σ ûᵢûᵢᵀ)⁻¹g of the last row g, ûᵢ the rows at length 1, of a neuron."""
        lengths = np.linalg.norm(rows, axis=1)
        unit = rows / np.where(lengths > 0.0, lengths, 1.0)[:, None]
        return np.linalg.solve(RIDGE * np.eye(rows.shape[1]) + unit.T @ unit, rows[-1])


def evened(x):
    """Five steps of aX + bXXᵀX + c(XXᵀ)²X from X = x/‖x‖, at the length of x, its zeros kept."""
    y = x / np.linalg.norm(x)
    for _ in range(5):
        gram = y @ y.T
        y = 3.4445 * y - 4.7750 * gram @ y + 2.0315 * gram @ gram @ y
    y = y * (x != 0.0)
    return y * np.linalg.norm(x) / np.linalg.norm(y)


def follow(optimizer, params, oracle, gradients):
    """Step through gradients; return the largest error of a step, relative to the step."""
    worst, sizes = 0.0, [p.numel() for p in params]
    for g in gradients:
        for p, piece in zip(params, torch.from_numpy(g).split(sizes), strict=True):
            with torch.no_grad():
                p.zero_()  # so that p is the step, and nothing is lost in a sum
            p.grad = piece.clone().view(p.shape)
        optimizer.step()
        expected = oracle.step(g.astype(np.float64))
        found = np.concatenate([numpy64(p).ravel() for p in params])
        for a, b in itertools.pairwise(np.cumsum([0, *sizes])):
            size = np.linalg.norm(expected[a:b])
            error = np.linalg.norm(found[a:b] - expected[a:b])
            worst = max(worst, error / size if size else error)
    return worst


@pytest.mark.parametrize("window_dtype", [None, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("m", [1, 5, 16])
def test_units_shorter_and_longer_than_the_window(rng, m, dtype, window_dtype):
    """Neurons, filters, wide and tall matrices, a vector; dead units, masked and rare elements."""
    shapes = [(3, 20), (4, 3, 2), (12, 2), (7,), (1, 6), (5, 1)]
    d = sum(map(math.prod, shapes))
    rows = (rng.standard_normal(d) + rng.standard_normal((40, d))).astype(dtype)
    rows[:, 20:40] = 0.0  # a dead neuron
    rows[:, [3, 50, 61]] = 0.0  # masked
    rows[rng.random(rows.shape) < 0.2] = 0.0
    rows[::3, 60:84] = 0.0
    params = parameters(*shapes, dtype=getattr(torch, dtype))
    options = {"window_size": m, "momentum": 0.9, "nesterov": True, "window_dtype": window_dtype}
    optimizer = MFAC(params, 0.1, **options)
    bound = 1e-2 if window_dtype else 1e-5 if dtype == "float32" else 1e-12
    assert follow(optimizer, params, Oracle(shapes, m, 0.1, 0.9, True), rows) <= bound
    assert not params[0][1].any()
    assert params[0][0, 3] == 0.0
    for p in params:
        state = optimizer.state[p]
        units, c = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, p.numel())
        assert state["unit_inverse"].shape == (units, min(m, c), min(m, c))


@pytest.mark.parametrize("shape", [(3, 8), (8, 3), (1, 5), (5, 1), (4, 3, 2)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_steps_of_matrices_are_even(rng, shape, size):
    """The plain recursion; a row that is dead to 1e-25 of the others stays, without subnormals."""
    x = size * rng.standard_normal(shape)
    expected = evened(x.reshape(shape[0], -1)).reshape(shape)
    found = _orthogonal.evened(torch.from_numpy(x.astype(np.float32)))
    assert relative_error(found, expected) <= 1e-5
    values = np.linalg.svd(numpy64(found).reshape(shape[0], -1), compute_uv=False)
    assert values.max() <= 2.5 * values.min()
    if shape[0] > 1:
        x[0] = 0.0
        expected = evened(x.reshape(shape[0], -1)).reshape(shape)
        x[0] = 1e-25 * size
        found = _orthogonal.evened(torch.from_numpy(x))
        assert relative_error(found, expected) <= 1e-12
        found = _orthogonal.evened(torch.from_numpy(x.astype(np.float32)))
        assert not found[0].any()
        assert relative_error(found, expected) <= 1e-5


def test_an_interrupt_leaves_rows_and_inverses_that_fit(rng, monkeypatch):
    """Ctrl-C when the row has been written and the inverses do not know of it yet."""
    p, q = parameters((2, 9), (3, 2))
    optimizer = MFAC([p, q], window_size=4)

    def step():
        p.grad, q.grad = torch.randn(2, 9), torch.randn(3, 2)
        optimizer.step()

    for _ in range(6):
        step()
    direction = _units.Units.direction

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return direction(*arguments)

    monkeypatch.setattr(_units.Units, "direction", interrupted)
    # A shell lets what runs in its background ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            step()
    finally:
        signal.signal(signal.SIGINT, before)
    for x, units in ((p, 2), (q, 3)):
        state = optimizer.state[x]
        rows = numpy64(state["window"]).reshape(4, units, -1).swapaxes(0, 1)
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        products = rows @ rows.mT if x is p else rows.mT @ rows
        expected = np.linalg.inv(RIDGE * np.eye(products.shape[1]) + products)
        assert relative_error(state["unit_inverse"], expected) <= 1e-5


def test_inverses_do_not_drift(rng):
    """After many windows; rows of a neuron that are alike, where errors would grow first."""
    m, steps = 8, 2_000
    (p,) = parameters((2, 30))
    base = rng.standard_normal(60)
    rows = (3.0 * base + rng.standard_normal((steps, 60))).astype(np.float32)
    optimizer = MFAC([p], 1.0, window_size=m, momentum=0.0)
    assert follow(optimizer, [p], Oracle([(2, 30)], m, 1.0), rows) <= 2e-4


def test_gradients_of_every_size_for_long():
    """Correlated, of sizes 1e-30 … 1e15, with zeros and what is not finite among them."""
    rng = np.random.default_rng(0)
    steps, sizes = 5_000, (4, 3)
    base = rng.standard_normal(7)
    sizes_of_gradients = 10.0 ** rng.uniform(-30, 15, steps)
    gradients = (base + rng.standard_normal((steps, 7))) * sizes_of_gradients[:, None]
    gradients = gradients.astype(np.float32)
    gradients[rng.random(steps) < 0.02] = 0.0
    for bad in (math.nan, math.inf):
        gradients[rng.random(steps) < 0.01, rng.integers(7)] = bad
    params = parameters(*sizes)
    optimizer = MFAC(params, 1e-2, window_size=4, momentum=0.9)
    oracle = Oracle(sizes, 4, 1e-2, 0.9, nesterov=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the first step that is skipped
        worst = follow(optimizer, params, oracle, gradients)
    assert worst <= 1e-4
    assert optimizer.skipped_steps == (~np.isfinite(gradients).all(axis=1)).sum() > 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e30, 1e38])
def test_the_gradients_size_does_not_matter(rng, dtype, size):
    """Alone, and in turn with gradients of size 1."""
    shape = (20, 9)
    for turn in (1, 2):
        rows = rng.standard_normal(shape) + 1.0
        rows[::turn] *= size / 4.0  # no element beyond float32
        rows = rows.astype(dtype)
        params = parameters(5, 4, dtype=getattr(torch, dtype))
        optimizer = MFAC(params, 0.1, window_size=4, momentum=0.0)
        worst = follow(optimizer, params, Oracle((5, 4), 4, 0.1), rows)
        assert worst <= 1e-5
        assert optimizer.skipped_steps == 0


@pytest.mark.parametrize("size", [1e-38, 1e-19, 1.0, 1e19])
def test_the_plain_step_of_gradients_of_every_size(rng, size):
    """One gradient: F⁻¹g = g/(λ + ‖g‖²)."""
    g = (size * rng.standard_normal(6)).astype(np.float32)
    (p,) = parameters(6)
    optimizer = MFAC([p], 1.0, window_size=3, damping=1e-3, momentum=0.0)
    p.grad = torch.from_numpy(g)
    optimizer.step()
    wide = g.astype(np.float64)
    expected = -(wide / (1e-3 + wide @ wide))
    # Half an element's unit of subnormal numbers, where the step is one.
    assert np.abs(numpy64(p) - expected).max() <= 1e-6 * np.abs(expected).max() + 2.0**-149


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
def test_options_of_the_step(rng, nesterov, maximize):
    rows = rng.standard_normal((12, 9)).astype(np.float32)
    params = parameters(5, 4)
    optimizer = MFAC(params, 0.1, window_size=4, momentum=0.8, nesterov=nesterov, maximize=maximize)
    oracle = Oracle((5, 4), 4, -0.1 if maximize else 0.1, 0.8, nesterov)
    assert follow(optimizer, params, oracle, rows) <= 1e-5


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_sgd(rng, nesterov):
    """With a damping that leaves nothing but g/λ; SGD sums what this averages."""
    rows = rng.standard_normal((6, 5))
    (p,), (q,) = parameters(5, dtype=torch.float64), parameters(5, dtype=torch.float64)
    options = {"momentum": 0.7, "nesterov": nesterov, "maximize": True}
    ours = MFAC([p], 1e12, window_size=2, damping=1e12, **options)
    theirs = torch.optim.SGD([q], 0.3, **options)
    for row in rows:
        p.grad = torch.from_numpy(row)
        q.grad = torch.from_numpy(row)
        ours.step()
        theirs.step()
    assert relative_error(p, numpy64(q)) <= 1e-9


def test_maximize_and_decay_of_the_gradient_are_as_in_sgd(rng):
    """Torch turns the gradient's sign, then adds the decay."""
    g = torch.from_numpy(rng.standard_normal(5))
    p, q = (torch.nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2))
    options = {"weight_decay": 0.1, "maximize": True, "momentum": 0.0}
    p.grad, q.grad = g, g.clone()
    MFAC([p], 1e12, window_size=1, damping=1e12, decoupled_weight_decay=False, **options).step()
    torch.optim.SGD([q], 1.0, **options).step()
    assert relative_error(p, numpy64(q)) <= 1e-9


# -- zeros, noise ------------------------------------------------------------------------------


@pytest.mark.parametrize("damping", [None, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_gradient_of_zeros_changes_nothing(damping, dtype):
    """Neither weights nor momentum nor window, once that is full."""
    torch.manual_seed(0)
    (p,) = parameters(50, dtype=getattr(torch, dtype))
    options = {"momentum": 0.9, "weight_decay": 0.1, "decoupled_weight_decay": False}
    optimizer = MFAC([p], 1e-2, window_size=8, damping=damping, **options)
    for _ in range(12):
        p.grad = torch.randn(50).to(p.dtype)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    weights = p.detach().clone()
    p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    assert torch.equal(p, weights)
    for name, x in optimizer.state_dict()["state"][0].items():
        assert torch.equal(x, before["state"][0][name]), name
    assert optimizer.skipped_steps == 0


def test_a_loss_that_is_satisfied():
    """The triplet loss gives gradients of zeros, and of all sizes before."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(4, 16)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    optimizer = MFAC(model.parameters(), lr=1e-2, window_size=16, momentum=0.9)
    zeros = 0
    for _ in range(150):
        c = torch.randint(4, (16,))
        a, q, n = (centres[k] + 0.3 * torch.randn(16, 16) for k in (c, c, (c + 1) % 4))
        optimizer.zero_grad()
        triplet_margin_loss(model(a), model(q), model(n)).backward()
        zeros += not any(p.grad.any() for p in model.parameters())
        optimizer.step()
    assert zeros > 10
    assert max(p.abs().max() for p in model.parameters()) < 150 * 1e-2 * 10


def test_a_separable_task_whose_loss_vanishes():
    torch.manual_seed(0)
    x = torch.randn(256, 10)
    y = (x[:, 0] > 0).long()
    x[:, 0] += 2 * y - 1
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    optimizer = MFAC(model.parameters(), lr=0.1, window_size=16, momentum=0.9)
    smallest = math.inf
    for _ in range(400):
        j = torch.randint(256, (32,))
        optimizer.zero_grad()
        loss = cross_entropy(model(x[j]), y[j])
        loss.backward()
        optimizer.step()
        smallest = min(smallest, loss.item())
    assert smallest == 0.0
    # A step has an rms of at most the rate over a parameter, so √n times that in an element.
    assert max(p.abs().max() for p in model.parameters()) < 400 * 0.1 * 160**0.5


def test_a_part_that_is_noise_beside_the_whole_hardly_moves(rng):
    """A closed gate lets 1e-22 of the gradient through: Adam's ε stops it, here the floor does."""
    a, b = parameters(40, 40)
    optimizer = MFAC([a, b], 0.1, window_size=4, momentum=0.9)
    for _ in range(20):
        a.grad, b.grad = torch.randn(40), 1e-22 * torch.randn(40)
        optimizer.step()
    assert b.abs().max() <= 20 * 0.1 * 40**0.5 * 2e-22 / FAINT
    assert a.square().mean().sqrt() > 0.1


def test_a_gate_that_closes_stops_the_step(rng):
    """Although the window holds gradients of it from before, which correlate with the others'."""
    a, b = parameters(40, 40)
    optimizer = MFAC([a, b], 0.1, window_size=8, momentum=0.0)
    for _ in range(10):
        a.grad, b.grad = 1.0 + torch.randn(40), 1.0 + torch.randn(40)
        optimizer.step()
    before = b.detach().clone()
    for _ in range(8):
        a.grad, b.grad = 1.0 + torch.randn(40), 1e-22 * torch.randn(40)
        optimizer.step()
    assert (b - before).abs().max() <= 1e-15


def test_an_unused_branch_walks_no_farther_than_under_adam():
    def walk(make):
        torch.manual_seed(0)
        used, sometimes = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
        optimizer = make([*used.parameters(), *sometimes.parameters()])
        length, before = 0.0, None
        for i in range(60):
            x = torch.randn(16, 8)
            y = used(x) + (sometimes(x) if i < 20 else 0.0 * sometimes(x))
            optimizer.zero_grad()
            (y - x.roll(1, 1)).square().mean().backward()
            before = sometimes.weight.detach().clone()
            optimizer.step()
            if i >= 20:
                length += (sometimes.weight - before).norm().item()
        return length

    ours = walk(lambda p: MFAC(p, 1e-2, window_size=16, momentum=0.9))
    adam = walk(lambda p: torch.optim.Adam(p, 1e-2))
    assert ours <= adam


# -- torch's manners ---------------------------------------------------------------------------


def test_frozen_parameters_take_no_window():
    """Also integer ones, of a quantised backbone; they come in with their first gradient."""
    a, frozen = parameters(5, 1000)
    frozen.requires_grad_(False)
    codes = torch.nn.Parameter(torch.zeros(100, dtype=torch.uint8), requires_grad=False)
    optimizer = MFAC([a, codes, frozen], 0.1, window_size=3, momentum=0.9)
    for _ in range(4):
        a.grad = torch.randn(5)
        optimizer.step()
    assert optimizer.window.num_params == 5
    assert set(optimizer.state) == {a}
    held = optimizer.window.gradients
    frozen.requires_grad_(True)
    frozen.grad = a.grad = None
    a.grad, frozen.grad = torch.zeros(5), torch.zeros(1000)
    optimizer.step()
    assert torch.equal(optimizer.window.gradients[:, :5], held)
    assert not optimizer.window.gradients[:, 5:].any()


@pytest.mark.parametrize("damping", [None, 0.1])
def test_a_group_may_come_in_the_middle_of_a_run(rng, damping):
    """As if its gradients had been zeros until then."""
    rows = rng.standard_normal((9, 11)).astype(np.float32)
    rows[:5, 6:] = 0.0
    joined, (late,), (early,) = parameters(6, 5), parameters(5), parameters(6)
    whole = MFAC(joined, 0.1, window_size=4, damping=damping, momentum=0.5)
    optimizer = MFAC([early], 0.1, window_size=4, damping=damping, momentum=0.5)
    for i, row in enumerate(rows):
        if i == 5:
            optimizer.add_param_group({"params": [late]})
        joined[0].grad, joined[1].grad = torch.from_numpy(row.copy()).split([6, 5])
        early.grad = joined[0].grad.clone()
        if i >= 5:
            late.grad = joined[1].grad.clone()
        whole.step()
        optimizer.step()
    for p, q in zip((early, late), joined, strict=True):
        assert relative_error(p, numpy64(q)) <= 1e-5
    assert optimizer.window.num_params == 11


def test_groups_share_the_damping():
    a, b = parameters(2, 3)
    optimizer = MFAC([a], window_size=2, damping=0.1)
    with pytest.raises(ValueError, match=r"share one window and its damping, 0.1, got 0.2"):
        optimizer.add_param_group({"params": [b], "damping": 0.2})
    assert len(optimizer.param_groups) == 1
    optimizer.damping = 0.5  # as a scheduler would
    a.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.window.damping == 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_compiled_step_is_the_step(momentum):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        (p,) = parameters(50)
        optimizer = MFAC([p], 1e-2, window_size=4, damping=0.1, momentum=momentum)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            p.grad = torch.randn(50, generator=generator)
            step()
        results.append(p.detach())
    assert torch.equal(*results)


def test_without_arguments_it_is_where_to_start(rng):
    """A window of 64 and Nesterov's momentum of 0.9: what the documentation recommends."""
    rows = rng.standard_normal((70, 14)).astype(np.float32)
    params = parameters(5, (3, 3))
    optimizer = MFAC(params)
    assert follow(optimizer, params, Oracle((5, (3, 3)), 64, 0.0125, 0.9, True), rows) <= 1e-4
    assert len(optimizer.window) == optimizer.window.window_size == 64


def test_what_is_not_supported_is_refused_by_name():
    (p,) = parameters(3)
    with pytest.raises(TypeError, match="differentiable"):
        MFAC([p], window_size=2, differentiable=True)
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        MFAC([p], window_size=2, momentum=0.0, nesterov=True)
    for name in ("foreach", "fused", "capturable"):
        with pytest.raises(TypeError, match=name):
            MFAC([p], window_size=2, **{name: True})


def test_empty_lists_are_as_in_adam():
    for make in (torch.optim.Adam, lambda p: MFAC(p, window_size=2)):
        with pytest.raises(ValueError, match="empty parameter list"):
            make([])
        optimizer = make([{"params": []}])
        optimizer.step()
        (p,) = parameters(3)
        optimizer.add_param_group({"params": [p]})
        p.grad = torch.ones(3)
        optimizer.step()
        assert p.any()
        assert list(optimizer.state_dict()["state"]) == [0]


def test_scalars_and_empty_parameters_have_columns():
    scalar, empty = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.zeros(0, 3))
    optimizer = MFAC([scalar, empty], 0.1, window_size=2, momentum=0.0)
    scalar.grad, empty.grad = torch.tensor(2.0), torch.zeros(0, 3)
    optimizer.step()
    assert scalar.item() == pytest.approx(0.9)
    assert optimizer.state[scalar]["window"].shape == (2,)
    assert optimizer.state[empty]["window"].shape == (2, 0, 3)
