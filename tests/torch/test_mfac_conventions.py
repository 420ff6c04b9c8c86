"""What torch's own optimisers do, and so what everything that is built on them expects."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch_training import batches, network, train

from mfac_core.torch import MFAC

FORMS = {
    "scale-free": {},
    "plain": {"damping": 0.1},
    "sparse": {"density": 0.5},
    "sparse plain": {"density": 0.5, "damping": 0.1},
}
FULL = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
DTYPES = ("bfloat16", "float16", "float32", "float64", "complex64", "complex128")


@pytest.fixture(params=FORMS, name="form")
def form_fixture(request):
    return FORMS[request.param]


def make(params, form, **more):
    return MFAC(params, 0.05, window_size=4, **(FULL | form | more))


def parameters(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.nn.Parameter(torch.randn(s, dtype=wide, generator=generator).to(dtype))
        for s in shapes
    ]


def give_gradients(params, generator):
    """The same numbers for a parameter and for what equals it in another layout."""
    for p in params:
        wide = torch.promote_types(p.dtype, torch.float32)
        p.grad = torch.randn(p.shape, dtype=wide, generator=generator).to(p.dtype)


def steps(optimizer, params, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        give_gradients(params, generator)
        optimizer.step()


def types_of(optimizer):
    """Shapes and dtypes of all that the state holds."""
    return {
        (i, name): (x.shape, x.dtype)
        for i, entry in optimizer.state_dict()["state"].items()
        for name, x in entry.items()
    }


# -- what stays --------------------------------------------------------------------------------


def test_shapes_and_dtypes_of_the_state_stay(form):
    params = parameters((3, 2), (5,), ())
    optimizer = make(params, form)
    steps(optimizer, params, 1)
    first = types_of(optimizer)
    places = {key: id(x) for key, x in optimizer.state[params[0]].items() if key != "error"}
    for count in (2, 4, 7):
        steps(optimizer, params, count)
        assert types_of(optimizer) == first
    assert {key: id(x) for key, x in optimizer.state[params[0]].items() if key in places} == places


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_of_parameters_stay(form, dtype):
    dtype = getattr(torch, dtype)
    params = parameters((3, 2), (5,), dtype=dtype)
    before = [p.detach().clone() for p in params]
    optimizer = make(params, form)
    steps(optimizer, params, 6)
    for p, old in zip(params, before, strict=True):
        assert p.dtype == dtype
        assert torch.isfinite(torch.view_as_real(p) if p.is_complex() else p).all()
        assert not torch.equal(p, old)


def test_dtypes_may_be_mixed():
    params = [parameters((3,), dtype=getattr(torch, dtype))[0] for dtype in DTYPES]
    optimizer = make(params, {})
    steps(optimizer, params, 6)
    assert [str(p.dtype) for p in params] == [f"torch.{dtype}" for dtype in DTYPES]
    assert optimizer.state[params[0]]["window"].dtype == torch.float64


def test_gradients_are_left_alone(form):
    """As accumulation, and whoever logs their norm after the step, rely on."""
    params = parameters((3, 2), (5,))
    optimizer = make(params, form, decoupled_weight_decay=False, maximize=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        give_gradients(params, generator)
        before = [(p.grad, p.grad.clone()) for p in params]
        optimizer.step()
        for p, (g, value) in zip(params, before, strict=True):
            assert p.grad is g
            assert torch.equal(g, value)


def test_gradients_accumulate():
    """Two passes over halves of a batch are one pass over it."""
    runs = []
    for parts in (1, 2):
        model = network().double()
        optimizer = make(model.parameters(), {})
        for x, y in batches(6):
            optimizer.zero_grad()
            for some, labels in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                loss = torch.nn.functional.cross_entropy(model(some), labels)
                (loss / parts).backward()
            optimizer.step()
        runs.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_after_zero_grad_a_step_does_nothing(form, set_to_none):
    params = parameters((3, 2), (5,))
    optimizer = make(params, form)
    steps(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad(set_to_none=set_to_none)
    optimizer.step()
    assert all(map(torch.equal, params, before))


# -- complex parameters ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("decoupled", [True, False])
def test_complex_parameters_are_pairs_of_real_ones(form, dtype, decoupled):
    """To the last bit, also through a state that is saved and loaded."""
    z, w = parameters((3, 2), (5,), dtype=getattr(torch, dtype))
    w = torch.nn.Parameter(w.detach().real.clone())
    pairs = torch.nn.Parameter(torch.view_as_real(z.detach()).clone())
    same = torch.nn.Parameter(w.detach().clone())
    optimizer = make([w, z], form, decoupled_weight_decay=decoupled)
    reference = make([same, pairs], form, decoupled_weight_decay=decoupled)
    generator = torch.Generator().manual_seed(1)
    for i in range(9):
        if i == 5:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = make([w, z], form, decoupled_weight_decay=decoupled)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        give_gradients([w, z], generator)
        same.grad, pairs.grad = w.grad.clone(), torch.view_as_real(z.grad).clone()
        optimizer.step()
        reference.step()
        assert torch.equal(torch.view_as_real(z), pairs)
        assert torch.equal(w, same)
    assert optimizer.state[z]["velocity"].shape == (3, 2, 2)
    if "density" not in form:
        assert optimizer.state[z]["window"].shape == (4, 3, 2, 2)


def test_a_complex_loss_is_minimised():
    """As torch's own tests of its optimisers do: |z² − 1|, whose gradient is a conjugate."""
    (z,) = parameters((4,), dtype=torch.complex64)
    optimizer = MFAC([z], 0.03, window_size=4, momentum=0.5)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (z * z - 1).abs().square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_a_complex_state_does_not_fit_a_real_parameter():
    z, w = parameters((3,), dtype=torch.complex64)[0], parameters((3,))[0]
    optimizer = make([z], {})
    steps(optimizer, [z], 2)
    with pytest.raises(ValueError, match=r"have shape \(3, 2\), the parameter \(3,\)"):
        make([w], {}).load_state_dict(optimizer.state_dict())


# -- layouts, rates, closures ------------------------------------------------------------------


def test_parameters_need_not_be_contiguous(form):
    """channels_last, transposed, a part of another: the same numbers in another order."""
    plain = parameters((2, 3, 4, 4), (3, 5), (4,))
    others = [
        torch.nn.Parameter(plain[0].detach().clone().to(memory_format=torch.channels_last)),
        torch.nn.Parameter(plain[1].detach().t().contiguous().t()),
        torch.nn.Parameter(torch.stack([plain[2].detach()] * 2, dim=1)[:, 0]),
    ]
    strides = [p.stride() for p in others]
    for params in (plain, others):
        steps(make(params, form), params, 6)
    for p, q, stride in zip(plain, others, strides, strict=True):
        assert torch.equal(p, q)
        assert q.stride() == stride


@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_rate_may_be_a_tensor(shape):
    """It is kept, not copied, and read at each step."""
    (p,), (q,) = parameters((5,)), parameters((5,))
    rate = torch.full(shape, 0.05)
    tensor = MFAC([p], rate, window_size=4, **FULL)
    number = MFAC([q], 0.05, window_size=4, **FULL)
    assert tensor.param_groups[0]["lr"] is rate
    for new in (0.05, 0.02):
        rate.fill_(new)
        number.param_groups[0]["lr"] = rate.item()
        steps(tensor, [p], 2)
        steps(number, [q], 2)
    assert torch.equal(p, q)
    fresh = MFAC([p], torch.zeros(shape), window_size=4, **FULL)
    fresh.load_state_dict(tensor.state_dict())
    assert fresh.param_groups[0]["lr"].shape == shape


def test_a_closure_is_called_once_with_gradients_on(form):
    params = parameters((5,))
    optimizer, calls = make(params, form), []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first = optimizer.step(closure)
        for _ in range(20):
            last = optimizer.step(closure)
    assert calls == [True] * 21
    assert last < first


def test_maximize_is_a_descent_of_the_negative(form):
    (p,), (q,) = parameters((5,)), parameters((5,))
    up, down = make([p], form, maximize=True), make([q], form)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        give_gradients([p], generator)
        q.grad = -p.grad
        up.step()
        down.step()
    assert torch.equal(p, q)


# -- copies ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["state", "saved state", "deep copy", "pickle"])
def test_a_copy_goes_on_as_the_original(form, dtype, way):
    params = parameters((3, 2), (5,), dtype=getattr(torch, dtype))
    optimizer = make(params, form)
    steps(optimizer, params, 5)
    if way in ("state", "saved state"):
        state = copy.deepcopy(optimizer.state_dict())
        if way == "saved state":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        other = make(others, form)
        other.load_state_dict(state)
    elif way == "deep copy":
        others, other = copy.deepcopy((params, optimizer))
    else:
        others, other = pickle.loads(pickle.dumps((params, optimizer)))
        for p, q in zip(params, others, strict=True):
            p.grad = q.grad = None
    for o, ps in ((optimizer, params), (other, others)):
        steps(o, ps, 4, seed=2)
    assert all(map(torch.equal, params, others))
    assert types_of(optimizer) == types_of(other)


def test_a_state_dict_is_the_same_twice(form):
    params = parameters((3, 2), (5,))
    optimizer = make(params, form)
    steps(optimizer, params, 5)
    first, second = copy.deepcopy(optimizer.state_dict()), optimizer.state_dict()
    assert first["param_groups"] == second["param_groups"]
    for i, entry in first["state"].items():
        assert all(torch.equal(x, second["state"][i][name]) for name, x in entry.items())


# -- torch.compile -----------------------------------------------------------------------------


def test_a_compiled_model_is_compiled_once():
    """Steps change weights in place: no graph of the model's goes out of date."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = make(model.parameters(), {})
    train(compiled, optimizer, batches(2))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(compiled, optimizer, batches(8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_scheduler_of_a_tensor_rate_compiles_nothing_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (p,) = parameters((5,))
    optimizer = MFAC([p], torch.tensor(0.05), window_size=4, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=8)
    step = torch.compile(optimizer.step, backend="eager")
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        give_gradients([p], generator)
        step()
        scheduler.step()
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) <= 1
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0, abs=1e-6)
