"""The pure window against dense inverses and the window as an object, inside and outside jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

import mfac_core as mfac
from mfac_core import functional
from mfac_core._jax import inverse as _inverse
from mfac_core._jax import pairs as _pairs
from mfac_core.testing import dense_inverse, error_bound

D, M = 700, 4  # of most windows here: compiled once for all of them

step = jax.jit(functional.append_matvec, donate_argnums=0)
project = jax.jit(_pairs.project)


@pytest.fixture(params=[False, True], ids=["x32", "x64"])
def x64(request):
    with jax.enable_x64(request.param):
        yield request.param


def filled(gradients, window_size, damping, **options):
    """Return a window after the gradients, and the last product."""
    state = functional.init(gradients.shape[1], window_size, damping=damping, **options)
    for g in gradients:
        state, y = step(state, g)
    return state, y


def correlated(rng, m, d, noise):
    return (rng.standard_normal(d) + noise * rng.standard_normal((m, d))).astype(np.float32)


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_every_step_while_it_fills_and_slides(rng, x64):
    gradients = rng.standard_normal((10, D)).astype(np.float32)
    x = rng.standard_normal(D).astype(np.float32)
    state = functional.init(D, M, damping=0.1)
    window = mfac.SlidingInverseFisher(D, M, damping=0.1)
    for i, g in enumerate(gradients):
        held = gradients[max(0, i + 1 - M) : i + 1]
        bound, dense = error_bound(held, damping=0.1), dense_inverse(held, damping=0.1)
        eager = functional.append_matvec(state, g)[1]
        state, y = step(state, g)
        assert y.dtype == jnp.float32
        assert int(state.count) == len(held)
        assert relative_error(y, dense @ g) <= bound
        assert relative_error(eager, dense @ g) <= bound
        assert relative_error(y, window.append_matvec(g).astype(np.float64)) <= 2 * bound
        assert relative_error(functional.matvec(state, x), dense @ x) <= bound
        order = (int(state.oldest) + np.arange(len(held))) % M
        np.testing.assert_array_equal(state.gradients[order], held)


@pytest.mark.parametrize("damping", [1e-2, 1e-4])
@pytest.mark.parametrize("noise", [None, 0.1, 1e-3, 0.0])
def test_float32_is_enough_for_gradients_however_correlated(rng, x64, noise, damping):
    m, d = 96, 500
    gradients = rng.standard_normal((m + 10, d)).astype(np.float32)
    if noise is not None:
        gradients = correlated(rng, m + 10, d, noise)
    damping *= np.mean(np.sum(gradients.astype(np.float64) ** 2, axis=1))
    state, y = filled(gradients, m, damping)
    dense = dense_inverse(gradients[-m:], damping=float(state.damping))
    assert relative_error(y, dense @ gradients[-1]) <= (1e-6 if noise is None else 1e-3)
    x = rng.standard_normal(d).astype(np.float32)
    assert relative_error(functional.matvec(state, x), dense @ x) <= 1e-3


def test_a_float64_window(rng):
    with jax.enable_x64(True):
        gradients = rng.standard_normal((8, D))
        _, y = filled(gradients, M, 1e-3, dtype="float64")
        bound = error_bound(gradients[-M:], damping=1e-3)
        assert y.dtype == jnp.float64
        dense = dense_inverse(gradients[-M:], damping=1e-3)
        assert relative_error(y, dense @ gradients[-1]) <= bound


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_window_holds_rounded_gradients(rng, dtype):
    gradients = rng.standard_normal((6, D)).astype(np.float32)
    rounded = np.asarray(jnp.asarray(gradients).astype(dtype).astype(jnp.float32))
    state, y = filled(gradients, M, 0.1, dtype=dtype)
    assert state.gradients.dtype == dtype
    bound = error_bound(rounded[-M:], damping=0.1)
    dense = dense_inverse(rounded[-M:], damping=0.1)
    assert relative_error(y, dense @ rounded[-1]) <= bound
    assert y.dtype == jnp.float32
    assert functional.matvec(state, jnp.ones(D, dtype)).dtype == dtype


def test_sums_of_products_keep_twice_the_digits(rng):
    row, x = np.zeros((2, 100_001), np.float32)
    places = slice(None, None, _pairs.SUMMED_COLUMNS)  # one product for each sum
    row[places], x[places] = rng.standard_normal(row[places].shape), 1.0
    exact = np.sum(row.astype(np.float64))
    sums = np.asarray(project(row[None, :], x), np.float64)
    n = row[places].size
    assert abs(np.sum(sums) - exact) <= n**2 * 2.0**-48 * np.sum(np.abs(row))


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("held", [0, 2, 6])
def test_a_gradient_that_is_not_finite_changes_nothing(rng, x64, bad, held):
    gradients = rng.standard_normal((7, D)).astype(np.float32)
    state = functional.init(D, M, damping=0.1)
    for g in gradients[:held]:
        state = functional.append(state, g)
    one_bad = np.where(np.arange(D) == 7, np.float32(bad), gradients[6])
    after, y = functional.append_matvec(state, one_bad)
    assert np.isnan(y).all()
    assert_same(after, state)
    assert_same(functional.append(state, np.full(D, bad, np.float32)), state)
    assert_same(functional.append(after, gradients[6]), functional.append(state, gradients[6]))


def test_the_window_is_written_in_place_and_not_copied(x64):
    state = functional.init(20_000, 64, damping=0.1)
    window_bytes = state.gradients.nbytes
    for function in (functional.append, functional.append_matvec):
        compiled = jax.jit(function, donate_argnums=0).lower(state, state.gradients[0]).compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= window_bytes
        assert memory.temp_size_in_bytes < window_bytes / 4
    pointer = state.gradients.unsafe_buffer_pointer()
    state, _ = step(state, jnp.ones(20_000, jnp.float32))
    assert state.gradients.unsafe_buffer_pointer() == pointer


def test_several_windows_under_vmap(rng, x64):
    gradients = rng.standard_normal((3, 7, D)).astype(np.float32)
    states = jax.vmap(lambda damping: functional.init(D, M, damping=damping))(
        jnp.array([0.1, 0.2, 0.3])
    )
    for i in range(7):
        states, y = jax.jit(jax.vmap(functional.append_matvec))(states, gradients[:, i])
    for k, damping in enumerate((0.1, 0.2, 0.3)):
        held = gradients[k, -M:]
        expected = dense_inverse(held, damping=damping) @ held[-1]
        assert relative_error(y[k], expected) <= error_bound(held, damping=damping)


def test_in_a_scan(rng, x64):
    gradients = rng.standard_normal((9, D)).astype(np.float32)
    state, ys = jax.jit(lambda s, g: jax.lax.scan(functional.append_matvec, s, g))(
        functional.init(D, M, damping=0.1), gradients
    )
    expected, y = filled(gradients, M, 0.1)
    np.testing.assert_array_equal(state.gradients, expected.gradients)
    assert relative_error(ys[-1], np.asarray(y)) <= error_bound(gradients[-M:], damping=0.1)


def test_the_damping_can_be_changed(rng, x64):
    gradients = rng.standard_normal((M, D)).astype(np.float32)
    state, _ = filled(gradients, M, 0.1)
    state = state._replace(damping=jnp.asarray(0.7, state.damping.dtype))
    dense = dense_inverse(gradients, damping=0.7)
    y = functional.matvec(state, gradients[0])
    assert relative_error(y, dense @ gradients[0]) <= error_bound(gradients, damping=0.7)


@pytest.mark.filterwarnings("ignore:the dual nλI:scipy.linalg.LinAlgWarning")  # of the host
def test_damping_below_rounding_and_no_number(rng, x64):
    gradients = np.tile(rng.standard_normal(D).astype(np.float32), (M, 1))
    assert np.isfinite(filled(gradients, M, 1e-30)[1]).all()
    state, _ = filled(gradients, M, 0.1)
    nan = state._replace(damping=jnp.full_like(state.damping, jnp.nan))
    assert np.isnan(functional.matvec(nan, gradients[0])).all()


def test_an_empty_window_and_zero_gradients(rng, x64):
    x = rng.standard_normal(D).astype(np.float32)
    state = functional.init(D, M, damping=0.5)
    np.testing.assert_array_equal(functional.matvec(state, x), 2 * x)
    state, y = step(state, jnp.zeros(D, jnp.float32))
    np.testing.assert_array_equal(y, np.zeros(D))
    np.testing.assert_array_equal(functional.matvec(state, x), 2 * x)


@pytest.fixture
def kept(monkeypatch):
    """Keep the inverse of the dual in small windows, too."""
    monkeypatch.setattr(functional, "KEPT_FROM", 1)


def test_small_windows_keep_no_inverse():
    sizes = [functional.init(2, m, damping=1.0).inverse.shape for m in (127, 128)]
    assert sizes == [(2, 0, 0), (2, 128, 128)]


def test_the_inverse_is_brought_up_to_date(rng, x64, kept):
    """It is formed once the window is full, then every M steps; in between O(m²) does."""
    gradients = correlated(rng, 5 * M, D, 0.1)
    state, left = functional.init(D, M, damping=1.0), []
    for i, g in enumerate(gradients):
        state, y = step(state, g)
        left.append(int(state.inverse_left))
        held = gradients[max(0, i + 1 - M) : i + 1]
        expected = dense_inverse(held, damping=1.0) @ g
        assert relative_error(y, expected) <= error_bound(held, damping=1.0)
    assert left[: 2 * M + 2] == [*[0] * M, *range(M, -1, -1), M]
    assert min(left) == 0


def test_an_inverse_that_is_not_good_is_found_out(rng, x64, kept):
    gradients = rng.standard_normal((2 * M + 3, D)).astype(np.float32)
    state, _ = filled(gradients[:-1], M, 0.1)
    assert int(state.inverse_left) > 0
    state = state._replace(inverse=state.inverse + 0.1 * jnp.max(state.inverse))
    held = gradients[-M - 1 : -1]
    dense, bound = dense_inverse(held, damping=0.1), error_bound(held, damping=0.1)
    assert relative_error(functional.matvec(state, gradients[0]), dense @ gradients[0]) <= bound
    appended = functional.append(state, gradients[-1])
    state, y = step(state, gradients[-1])
    expected = dense_inverse(gradients[-M:], damping=0.1) @ gradients[-1]
    assert relative_error(y, expected) <= bound
    assert int(state.inverse_left) == int(appended.inverse_left) == -functional.PATIENCE


def test_an_inverse_does_not_drift(rng):
    """Row after row, far longer than a window keeps one, and with a condition of about 1e3."""
    m, d, shift = 12, 40, np.float32(0.4)
    rows = rng.standard_normal(d) + 0.1 * rng.standard_normal((200, d))
    held = rows[:m].copy()
    wide = np.float64(shift) * np.eye(m)
    first = np.linalg.inv(held @ held.T + wide)
    inverse = np.stack([first.astype(np.float32), np.zeros((m, m), np.float32)])
    inverse[1] = first - inverse[0]
    replaced = jax.jit(_inverse.replaced)
    for i, row in enumerate(rows[m:]):
        held[i % m] = row
        gram = held @ held.T
        column = np.stack([gram[:, i % m].astype(np.float32)] * 2)
        column[1] = gram[:, i % m] - column[0]
        inverse, found = replaced(inverse, column, i % m, np.array([shift, 0.0], np.float32))
    expected = np.linalg.inv(gram + wide)
    assert relative_error(np.asarray(inverse, np.float64).sum(axis=0), expected) <= 1e-8
    assert relative_error(np.asarray(found, np.float64).sum(axis=0), expected[i % m]) <= 1e-8


def test_a_large_system_does_not_hang(rng):
    m = 700
    state = functional.init(m, m, damping=0.1)
    state = state._replace(
        gradients=jnp.eye(m),
        gram=state.gram.at[0].set(jnp.eye(m)),
        count=jnp.asarray(m, jnp.int32),
    )
    x = rng.standard_normal(m).astype(np.float32)
    expected = x / (0.1 + 1 / m)
    assert relative_error(jax.jit(functional.matvec)(state, x), expected) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_params": 0}, ValueError, "num_params must be an integer of at least 1"),
        ({"window_size": 2.5}, TypeError, "window_size must be an integer"),
        ({"damping": 0.0}, ValueError, "damping must be finite and positive"),
        ({"damping": "much"}, TypeError, "damping must be a positive number"),
        ({"dtype": "int32"}, TypeError, "dtype must be real floating point, got 'int32'"),
    ],
)
def test_init_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        functional.init(**{"num_params": 4, "window_size": 2, "damping": 0.1, **arguments})


def test_vectors_of_another_kind_are_refused():
    state = functional.init(4, 2, damping=0.1)
    for function, name in (
        (functional.append, "g"),
        (functional.append_matvec, "g"),
        (functional.matvec, "x"),
    ):
        for call in (function, jax.jit(function)):
            with pytest.raises(ValueError, match=rf"{name} must have shape \(4,\), got \(5,\)"):
                call(state, jnp.ones(5))
            with pytest.raises(TypeError, match=f"{name} must be real floating point"):
                call(state, jnp.ones(4, jnp.int32))
