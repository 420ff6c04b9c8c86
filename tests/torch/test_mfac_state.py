"""The optimiser's state, as torch's own tools save, copy, load and wrap it."""

import copy
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import numpy64, relative_error
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch_training import batches, network, train, vector

from mfac_core.testing import dense_inverse
from mfac_core.torch import MFAC

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process

OPTIONS = {"window_size": 5, "momentum": 0.9, "weight_decay": 0.01}


def trained(steps=8, *, seed=0, **options):
    model = network(seed)
    optimizer = MFAC(model.parameters(), 0.02, **(OPTIONS | options))
    train(model, optimizer, batches(steps))
    return model, optimizer


def assert_goes_on_alike(model, optimizer, other_model, other, steps=7, exactly=True):
    """Both take the same steps; the window is exchanged once over in them."""
    train(model, optimizer, batches(steps, seed=5))
    train(other_model, other, batches(steps, seed=5))
    if exactly:
        assert np.array_equal(vector(model), vector(other_model))
    else:
        assert relative_error(vector(other_model), vector(model)) <= 1e-5


@pytest.mark.parametrize("steps", [2, 8])
def test_each_parameter_has_its_rows_and_velocity(steps):
    model, optimizer = trained(steps)
    held = optimizer.window.gradients
    # The ring's rows from the oldest on: after 8 steps it is the fourth of five.
    order = [3, 4, 0, 1, 2] if steps == 8 else [0, 1]
    rows = [optimizer.state[p]["window"][order].flatten(1) for p in model.parameters()]
    assert torch.equal(torch.cat(rows, dim=1), held)
    for p in model.parameters():
        assert optimizer.state[p]["window"].shape == (5, *p.shape)
        assert optimizer.state[p]["velocity"].shape == p.shape
        assert optimizer.state[p]["step"] == steps
    storages = {s["window"].untyped_storage().data_ptr() for s in optimizer.state.values()}
    assert len(storages) == 1
    model, optimizer = trained(steps, damping=0.1)
    squares = [name for s in optimizer.state.values() for name, x in s.items() if x.shape == (5, 5)]
    assert sorted(squares) == ["gram", "inverse"]  # once, not once a parameter


@pytest.mark.parametrize("steps", [0, 3, 8])
@pytest.mark.parametrize("damping", [None, 0.01])
@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints(tmp_path, steps, damping, flatten):
    """Saving leaves the run alone; a new optimizer goes on with it bit for bit."""
    model, optimizer = trained(steps, damping=damping)
    alone = copy.deepcopy((model, optimizer))
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save(saved, checkpoint_id=tmp_path)
    new_model = copy.deepcopy(model)
    new = MFAC(new_model.parameters(), 0.5, **OPTIONS, damping=damping)
    target = get_optimizer_state_dict(new_model, new, options=options)
    dcp.load(target, checkpoint_id=tmp_path)
    set_optimizer_state_dict(new_model, new, target, options=options)
    assert new.param_groups[0]["lr"] == 0.02
    assert len(new.window) == min(steps, 5)
    third = copy.deepcopy((new_model, new))
    assert_goes_on_alike(model, optimizer, *alone)
    assert np.array_equal(vector(third[0]), vector(new_model))
    train(new_model, new, batches(7, seed=5))
    assert np.array_equal(vector(new_model), vector(model))


@pytest.mark.parametrize("decoupled", [False, True])
def test_asking_a_new_optimizer_for_its_state_takes_no_step(decoupled):
    """Torch makes a state by a step of gradients of zeros, at rate 0."""
    model = network()
    before = vector(model)
    optimizer = MFAC(model.parameters(), 0.1, **OPTIONS, decoupled_weight_decay=decoupled)
    state = get_optimizer_state_dict(model, optimizer)
    assert len(state["state"]) == 4
    assert np.array_equal(vector(model), before)
    assert len(optimizer.window) == 0


def test_asynchronous_saving(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        model, optimizer = trained()
        expected = copy.deepcopy(optimizer.state_dict())
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        future = dcp.async_save(state, checkpoint_id=tmp_path / "saved")
        train(model, optimizer, batches(3, seed=5))  # meanwhile
        future.result()
        new_model = network()
        new = MFAC(new_model.parameters(), **OPTIONS)
        target = {"optimizer": get_optimizer_state_dict(new_model, new)}
        dcp.load(target, checkpoint_id=tmp_path / "saved")
        set_optimizer_state_dict(new_model, new, target["optimizer"])
    finally:
        torch.distributed.destroy_process_group()
    for i, entry in expected["state"].items():
        for name, x in entry.items():
            assert torch.equal(new.state_dict()["state"][i][name], x), name


def test_hooks_see_and_change_the_state():
    model, optimizer = trained()
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append(len(s["state"])))
    wrapped = {"wrapped": optimizer.state_dict()}
    assert seen == ["pre", 4]
    new_model = copy.deepcopy(model)
    new = MFAC(new_model.parameters(), **OPTIONS)
    new.register_load_state_dict_pre_hook(lambda o, s: s["wrapped"])
    new.register_load_state_dict_post_hook(lambda o: seen.append(len(o.window)))
    new.load_state_dict(copy.deepcopy(wrapped))
    assert seen == ["pre", 4, 5]
    assert_goes_on_alike(model, optimizer, new_model, new)


@pytest.mark.parametrize("way", ["state", "deepcopy", "pickle", "file"])
def test_copies_of_a_state(way):
    """Whatever copies ``optimizer.state`` has all of it; the m-sized part may be old."""
    model, optimizer = trained()
    new_model = copy.deepcopy(model)
    new = MFAC(new_model.parameters(), 0.02, **OPTIONS)
    if way == "state":  # as wrappers do that know nothing of load_state_dict
        for p, q in zip(model.parameters(), new_model.parameters(), strict=True):
            new.state[q] = copy.deepcopy(optimizer.state[p])
    elif way == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        windows = {s["window"].untyped_storage().data_ptr() for s in state["state"].values()}
        assert len(windows) == 1  # the flat window once, not once a parameter
        new.load_state_dict(state)
    elif way == "deepcopy":
        new_model, new = copy.deepcopy((model, optimizer))
    else:
        new_model, new = pickle.loads(pickle.dumps((model, optimizer)))
    assert_goes_on_alike(model, optimizer, new_model, new, exactly=way != "state")


def test_a_state_moved_by_hand_is_found():
    """Lightning and others replace the tensors of ``optimizer.state`` by moved ones."""
    model, optimizer = trained()
    alone = copy.deepcopy((model, optimizer))
    for entry in optimizer.state.values():
        for name, x in entry.items():
            entry[name] = x.clone()
    assert_goes_on_alike(*alone, model, optimizer, exactly=False)


def test_loading_copies():
    model, optimizer = trained()
    new = MFAC(copy.deepcopy(model).parameters(), **OPTIONS)
    new.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(2))
    first = next(iter(new.state.values()))
    assert first["step"] == 8
    assert first["window"].data_ptr() != optimizer.state[model[0].weight]["window"].data_ptr()


def test_parameters_are_matched_by_name():
    model, optimizer = network(), None
    optimizer = MFAC(model.named_parameters(), 0.02, **OPTIONS)
    train(model, optimizer, batches(8))
    new_model = copy.deepcopy(model)
    new = MFAC(reversed(list(new_model.named_parameters())), 0.02, **OPTIONS)
    new.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert new.param_groups[0]["param_names"][0] == "2.bias"
    assert_goes_on_alike(model, optimizer, new_model, new, exactly=False)
    other = MFAC(torch.nn.Linear(5, 4).named_parameters(), **OPTIONS)
    with pytest.raises(ValueError, match=r"lacks parameters \['bias', 'weight'\]"):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: MFAC([torch.nn.Parameter(torch.zeros(4, 6))], **OPTIONS), "shape"),
        (lambda: MFAC([torch.nn.Parameter(torch.zeros(5, 4))], window_size=4), "window_size of 5"),
        (lambda: MFAC([torch.nn.Parameter(torch.zeros(5, 4))], density=0.1, window_size=5), "dens"),
        (
            lambda: MFAC([torch.nn.Parameter(torch.ones(5, 4))], 1e-2, window_size=5, damping=1e3,
                         window_dtype=torch.float16),
            "overflow the window_dtype",
        ),
    ],
)  # fmt: skip
def test_states_of_other_shapes_are_refused(other, message):
    (p,) = [torch.nn.Parameter(torch.zeros(5, 4))]
    optimizer = MFAC([p], 1e-2, **(OPTIONS | {"damping": 1e3}))
    for _ in range(6):
        p.grad = 1e6 * torch.randn(5, 4)
        optimizer.step()
    new = other()
    (q,) = new.param_groups[0]["params"]
    q.grad = torch.rand_like(q)
    new.step()
    before = copy.deepcopy(new.state_dict())
    with pytest.raises(ValueError, match=message):
        new.load_state_dict(optimizer.state_dict())
    assert repr(new.state_dict()) == repr(before)


def test_a_state_of_adam_is_refused():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    train(model, adam, batches(2))
    with pytest.raises(ValueError, match="'damping'"):
        MFAC(model.parameters(), window_size=2).load_state_dict(adam.state_dict())


@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("window_dtype", [None, torch.bfloat16])
def test_a_state_in_another_dtype(damping, window_dtype):
    """It stays in its own, or is cast where that is asked for, and its Gram then fits."""
    d, m = 60, 8
    torch.manual_seed(0)
    base = torch.randn(d) / d**0.5
    p, q = (torch.nn.Parameter(torch.zeros(d, dtype=t)) for t in (torch.float32, torch.bfloat16))
    a = MFAC([p], 1.0, window_size=m, damping=damping)
    b = MFAC([q], 1.0, window_size=m, damping=damping, window_dtype=window_dtype)
    for _ in range(m):
        p.grad = base + 0.1 * torch.randn(d) / d**0.5
        a.step()
    b.load_state_dict(a.state_dict())
    assert b.window.dtype == (window_dtype or torch.float32)
    g = (base + 0.1 * torch.randn(d) / d**0.5).bfloat16().float()
    y = numpy64(b.window.append_matvec(g))
    held = numpy64(b.window.gradients)
    expected = dense_inverse(held, damping=damping) @ held[-1]
    assert relative_error(y, expected) <= 1e-4  # cond F ≤ 1e5, unit roundoff 6e-8


class Allocated(TorchDispatchMode):
    """The most bytes of new tensors alive at a time, beside those there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.seen or storage.nbytes() < 10_000:
            return
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.freed, key, storage.nbytes())

    def freed(self, key, size):
        self.seen.discard(key)
        self.now -= size


def test_saving_and_loading_take_one_window_at_most():
    d, m = 20_000, 16
    p, q = torch.nn.Parameter(torch.zeros(d)), torch.nn.Parameter(torch.zeros(d))
    a, b = MFAC([p], window_size=m), MFAC([q], window_size=m)
    for _ in range(m + 1):
        p.grad = torch.randn(d)
        a.step()
    window = 4 * d * m
    with Allocated() as saving:
        state = a.state_dict()
    assert saving.peak < 0.1 * window
    for _ in range(2):  # into a new optimizer, and back in the middle of a run
        with Allocated() as loading:
            b.load_state_dict(state)
        assert 0.9 * window < loading.peak < 1.2 * window  # d-sized vectors are 1/m each


# -- states of version 0.1.0 -------------------------------------------------------------------


def as_0_1_0(optimizer):
    """The state dict that version 0.1.0 returned for the run of this optimizer."""
    window = {
        name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        for name, x in optimizer.window.state_dict().items()
    }
    velocity = [optimizer.state[p]["velocity"].flatten() for p in optimizer.state]
    new = {"damping", "nesterov", "maximize"}
    groups = [
        {k: v for k, v in group.items() if k not in new}
        for group in optimizer.state_dict()["param_groups"]
    ]
    own = {
        "window": window,
        "velocity": torch.cat(velocity),
        "damping": optimizer.damping,
        "skipped_steps": 3,
    }
    return {"state": {}, "param_groups": groups, "mfac": own}


@pytest.mark.parametrize("steps", [3, 8])
@pytest.mark.parametrize("options", [{}, {"damping": 0.01}, {"density": 0.3}])
def test_states_of_0_1_0_load(steps, options):
    model, optimizer = trained(steps, nesterov=False, **options)
    state = copy.deepcopy(as_0_1_0(optimizer))
    new_model = copy.deepcopy(model)
    new = MFAC(new_model.parameters(), 0.5, **(OPTIONS | options | {"damping": None}))
    new.load_state_dict(state)
    assert new.skipped_steps == 3
    assert new.damping == options.get("damping")
    # Version 0.1.0 had no inverses of units, which are computed from the rows.
    assert_goes_on_alike(model, optimizer, new_model, new, exactly=bool(options))
    wrong = MFAC(network().parameters(), **(OPTIONS | options | {"window_size": 4}))
    with pytest.raises(ValueError, match="window_size"):
        wrong.load_state_dict(state)
