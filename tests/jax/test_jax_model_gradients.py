"""Rows that are never stored, against rows that are, by plain differentiation in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import numpy64, relative_error

import mfac_core as mfac
from mfac_core._validate import NonFiniteError
from mfac_core.influence import Influence
from mfac_core.jax import ModelGradients
from mfac_core.testing import assert_rows, dense_inverse

CLASSES = 3


@pytest.fixture(autouse=True)
def quickly_compiled():
    """What is compiled runs a few times: XLA's optimisations take longer than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def normed(x):
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-3)


def mlp(p, x):
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]


def convolution(p, x):
    dimensions = ("NCHW", "OIHW", "NCHW")
    h = jax.lax.conv_general_dilated(x, p["k"], (2, 2), "SAME", dimension_numbers=dimensions)
    return jax.nn.gelu(h).reshape(len(x), -1) @ p["w"]


def attention(p, tokens):
    """Embedded and norm's own, attended to, and read out by the same table."""
    x = normed(p["table"][tokens]) * p["scale"]
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
    x = x + jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2), axis=-1) @ v
    return x.mean(1) @ p["table"][:CLASSES].T


def statistics(p, x):
    """The samples of a batch are mixed."""
    h = x @ p["w1"]
    return jnp.tanh((h - h.mean(0)) / (1 + h.var(0))) @ p["w2"]


MODELS = {
    "mlp": (mlp, {"w1": (5, 6), "b1": (6,), "w2": (6, CLASSES)}, (5,)),
    "convolution": (convolution, {"k": (4, 2, 3, 3), "w": (16, CLASSES)}, (2, 4, 4)),
    "attention": (attention, {"table": (7, 4), "scale": (4,), "qkv": (4, 12)}, "tokens"),
    "statistics": (statistics, {"w1": (5, 4), "w2": (4, CLASSES)}, (5,)),
}


def losses_of(forward):
    def each(params, batch):
        logs = jax.nn.log_softmax(forward(params, batch["x"]))
        return -jnp.take_along_axis(logs, batch["y"][:, None], axis=1)[:, 0]

    return each


def mean_of(forward):
    return lambda params, batch: jnp.mean(losses_of(forward)(params, batch))


def data(shape, sizes=(4, 4), seed=1):
    rng = np.random.default_rng(seed)

    def batch(n):
        x = rng.integers(7, size=(n, 4)) if shape == "tokens" else rng.standard_normal((n, *shape))
        x = x.astype(np.int32 if shape == "tokens" else np.float32)
        return {"x": x, "y": rng.integers(CLASSES, size=n).astype(np.int32)}

    return [batch(n) for n in sizes]


def problem(name):
    forward, shapes, shape = MODELS[name]
    rng = np.random.default_rng(0)
    params = {n: (rng.standard_normal(s) / 2).astype(np.float32) for n, s in shapes.items()}
    return forward, params, data(shape)


def stored(params, loss_fn, batches):
    """The oracle: JAX's Jacobian of every batch, in float64."""
    with jax.enable_x64(True):
        wide = {n: np.asarray(p, np.float64) for n, p in params.items()}
        jacobian = jax.jit(jax.jacrev(loss_fn))
        rows = []
        for batch in batches:
            x = batch["x"]
            batch = batch | {"x": x.astype(np.float64) if x.dtype == np.float32 else x}
            found = jacobian(wide, batch)
            parts = [np.asarray(found[n]) for n in sorted(params)]
            count = len(parts[0]) if parts[0].ndim > np.ndim(params[sorted(params)[0]]) else 1
            rows.append(np.concatenate([part.reshape(count, -1) for part in parts], axis=1))
        return np.concatenate(rows)


@functools.cache
def expected(name):
    """The oracle for a problem's losses: compiled once, in float64."""
    forward, params, batches = problem(name)
    return stored(params, losses_of(forward), batches)


def assert_same(rows, g, tolerance):
    rng = np.random.default_rng(0)
    m, d = g.shape
    xp = rows.__array_namespace__()
    assert rows.shape == (m, d)
    x = xp.asarray(rng.standard_normal((d, 2)), dtype=rows.dtype)
    c = xp.asarray(rng.standard_normal((m, 2)), dtype=rows.dtype)
    assert relative_error(rows.gram(), g @ g.T) <= tolerance
    for product, expected in (
        (rows.project(x), g @ numpy64(x)),
        (rows.combine(c), g.T @ numpy64(c)),
        (rows.project(x[:, 0]), g @ numpy64(x[:, 0])),
        (rows.combine(c[:, 0]), g.T @ numpy64(c[:, 0])),
    ):
        assert isinstance(product, type(x))
        assert product.dtype == x.dtype
        assert relative_error(product, expected) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_are_those_of_plain_differentiation(name):
    forward, params, batches = problem(name)
    g = expected(name)
    rows = ModelGradients(params, losses_of(forward), batches)
    assert rows.dtype == np.float32
    assert_same(rows, g, 1e-5)
    assert rows._are_apart is (name != "statistics")
    if name == "mlp":  # of JAX's arrays as well
        rows = ModelGradients(params, losses_of(forward), jax.tree.map(jnp.asarray, batches))
    assert_same(rows.in_float64(), g, 1e-10)


def test_a_row_a_batch():
    forward, params, _ = problem("mlp")
    batches = data((5,), (4, 3))
    g = stored(params, mean_of(forward), batches)
    assert_same(ModelGradients(params, mean_of(forward), batches), g, 1e-5)


def test_in_64_bits():
    forward, params, batches = problem("mlp")
    g = expected("mlp")
    with jax.enable_x64(True):
        wide = {n: jnp.asarray(p, jnp.float64) for n, p in params.items()}
        given = [b | {"x": b["x"].astype(np.float64)} for b in batches]
        rows = ModelGradients(wide, losses_of(forward), given)
        assert_same(rows, g, 1e-10)
        assert isinstance(rows.gram(), jax.Array)
        inverse = mfac.InverseFisher(rows, damping=1e-9)
        x = jnp.linspace(-1.0, 1.0, g.shape[1])
        assert relative_error(inverse @ x, dense_inverse(g, damping=1e-9) @ numpy64(x)) <= 1e-6


def test_they_go_where_arrays_go():
    forward, params, batches = problem("mlp")
    rows = ModelGradients(params, losses_of(forward), batches)
    assert_rows(rows)
    assert_rows(rows.in_float64())
    g = expected("mlp")
    x = jnp.linspace(-1, 1, g.shape[1])
    for damping in (1e-1, 1e-7):  # the second asks for float64
        product = mfac.InverseFisher(rows, damping=damping) @ x
        assert isinstance(product, jax.Array)
        assert product.dtype == np.float32
        assert relative_error(product, dense_inverse(g, damping=damping) @ numpy64(x)) <= 1e-5
    with pytest.raises(TypeError, match=r"diagonal needs columns.*ModelGradients"):
        mfac.InverseFisher(rows, damping=0.1).diagonal()


def test_influence_of_a_model():
    forward, params, batches = problem("mlp")
    train = ModelGradients(params, losses_of(forward), batches)
    asked = data((5,), (2, 3), seed=2)
    g, q = expected("mlp"), stored(params, losses_of(forward), asked)
    queries = ModelGradients(params, losses_of(forward), asked)
    for memory in (1, 1 << 28):  # batch by batch, and all at once
        train._memory = queries._memory = memory
        assert relative_error(train.cross(queries), g @ q.T) <= 1e-5
        scores = Influence(train, damping=0.1).scores(queries)
        assert isinstance(scores, jax.Array)
        assert relative_error(scores, q @ dense_inverse(g, damping=0.1) @ g.T / len(g)) <= 1e-5
    fewer = {n: p for n, p in params.items() if n != "b1"}
    others = ModelGradients(fewer, lambda p, b: b["x"] @ p["w1"][:, 0], asked)
    with pytest.raises(ValueError, match="other must be of parameters of shapes"):
        train.cross(others)


def test_the_gram_is_formed_within_the_budget(monkeypatch):
    forward, params, _ = problem("mlp")
    batches = data((5,), (8,) * 6)
    whole = ModelGradients(params, losses_of(forward), batches)
    expected = whole.gram()
    one = 8 * 4 * whole.shape[1]
    seen = []
    rows_of = ModelGradients._rows

    def counting(self, at, batch):
        seen.append(at.start // 8)
        return rows_of(self, at, batch)

    monkeypatch.setattr(ModelGradients, "_rows", counting)
    tiles = ModelGradients(params, losses_of(forward), batches, memory=4 * one)
    assert relative_error(tiles.gram(), expected) <= 1e-12
    assert seen == [*range(6), *range(2, 6), *range(4, 6)]


def test_functions_without_a_forward_mode():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, back: (2 * back,))
    forward, params, batches = problem("mlp")

    def loss_fn(params, batch):
        return twice(losses_of(forward)(params, batch))

    rows = ModelGradients(params, loss_fn, batches)
    assert_same(rows, 2 * expected("mlp"), 1e-5)
    assert not rows._has_forward_mode


def test_a_wrong_derivative_is_noticed():
    """Of a scale that is another one whenever it is compiled."""
    scales = itertools.count(2.0)

    @jax.custom_vjp
    def odd(x):
        return 2 * x

    odd.defvjp(lambda x: (2 * x, None), lambda _, back: (next(scales) * back,))
    forward, params, batches = problem("mlp")
    rows = ModelGradients(params, lambda p, b: odd(losses_of(forward)(p, b)), batches)
    with pytest.raises(RuntimeError, match="gradients must be the same in every pass"):
        rows.gram()


class Passes:
    """Batches that a pass can change."""

    def __init__(self, change):
        self.change, self.number = change, itertools.count()

    def __iter__(self):
        return iter(self.change(data((5,), (4, 4, 4)), next(self.number)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, n: b[::-1] if n else b, r"another order; shuffle them once"),
        (lambda b, n: [x | {"x": x["x"] + n} for x in b], "the data.*differ.*augmentation"),
        (lambda b, n: b[: 3 - n], "same in every pass, got 3 and then others"),
    ],
)
def test_batches_that_change_are_noticed(change, message):
    params = {"w": np.ones(5, np.float32)}  # a line: each of these is compiled anew
    for act in (
        lambda rows: rows.gram(),
        lambda rows: rows.project(np.ones(rows.shape[1], np.float32)),
        lambda rows: rows.combine(np.ones(rows.shape[0], np.float32)),
    ):
        rows = ModelGradients(params, lambda p, b: b["x"] @ p["w"], Passes(change))
        with pytest.raises(RuntimeError, match=message):
            act(rows)


def test_what_is_not_deterministic_is_noticed():
    forward, params, batches = problem("mlp")
    rng = np.random.default_rng(0)

    def loss_fn(params, batch):
        return losses_of(forward)(params, batch) * rng.random()

    with pytest.raises(RuntimeError, match="not deterministic"):
        ModelGradients(params, loss_fn, batches).combine(np.ones(8, np.float32))


def test_parameters_that_are_written_to_afterwards():
    forward, params, batches = problem("mlp")
    rows = ModelGradients(params, losses_of(forward), batches)
    params["w1"][:] = 7.0
    assert relative_error(rows.combine(np.ones(8, np.float32)), expected("mlp").sum(0)) <= 1e-5


def test_samples_that_are_fitted_to_the_last_digit():
    """1 − p of 1e-6 has a digit in float32, and the rows of such samples no more."""
    batches = data((5,), (4, 4))
    for batch in batches:
        batch["x"][:3] = 15.0 * np.eye(5, dtype=np.float32)[batch["y"][:3]]
    params = {"w": np.eye(5, CLASSES, dtype=np.float32)}
    loss_fn = losses_of(lambda p, x: x @ p["w"])
    rows = ModelGradients(params, loss_fn, batches)
    g = stored(params, loss_fn, batches)
    assert relative_error(rows.gram(), g @ g.T) <= 1e-5
    assert rows._are_apart


def test_refusals_by_name():
    forward, params, batches = problem("mlp")
    loss_fn = losses_of(forward)
    with pytest.raises(TypeError, match=r"batches must give the same.*list\(batches\)"):
        ModelGradients(params, loss_fn, iter(batches))
    with pytest.raises(ValueError, match="batches must hold at least one"):
        ModelGradients(params, loss_fn, [])
    with pytest.raises(ValueError, match="params must be a pytree of arrays, got none"):
        ModelGradients({}, loss_fn, batches)
    with pytest.raises(TypeError, match=r"params must be .* floating arrays, got a leaf of int"):
        ModelGradients(params | {"step": np.arange(3)}, loss_fn, batches)
    with pytest.raises(TypeError, match=r"loss_fn.*scalar.*vector.*\(4, 3\)"):
        ModelGradients(params, lambda p, b: forward(p, b["x"]), batches)
    with pytest.raises(NonFiniteError, match=r"losses must be finite.*batch 0"):
        ModelGradients(params, lambda p, b: loss_fn(p, b) * np.nan, batches)
    with pytest.raises(ValueError, match="memory"):
        ModelGradients(params, loss_fn, batches, memory=0)
    rows = ModelGradients(params, loss_fn, batches)
    with pytest.raises(ValueError, match="x must have shape"):
        rows.project(np.ones(3, np.float32))
