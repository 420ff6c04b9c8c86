"""float32 gradients, any x, λ down to 1e-10 of ‖G‖²/m: an error of at most 1e-5, or a warning."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import torch
from conftest import numpy64
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import File

import mfac_core as mfac

Long = np.longdouble

pytestmark = pytest.mark.skipif(
    np.finfo(Long).eps > 1e-18, reason="the oracle needs more digits than float64 has"
)


def cholesky_solve(a, b):
    """Solve for a few columns by elimination, in the dtype given."""
    a, b = a.copy(), b.copy()
    for k in range(len(a)):
        factors = a[k + 1 :, k] / a[k, k]
        a[k + 1 :, k + 1 :] -= factors[:, None] * a[k, k + 1 :]
        b[k + 1 :] -= factors[:, None] * b[k]
    for k in reversed(range(len(a))):
        b[k] = (b[k] - a[k, k + 1 :] @ b[k + 1 :]) / a[k, k]
    return b


def exact(g, x, damping):
    """F⁻¹X in 64 bits of mantissa, by F itself or by Woodbury, whichever is smaller."""
    (m, d), g, x, damping = g.shape, g.astype(Long), x.astype(Long), Long(damping)
    if d < m:
        return cholesky_solve(g.T @ g / m + damping * np.eye(d, dtype=Long), x).astype(float)
    dual = g @ g.T + m * damping * np.eye(m, dtype=Long)
    return ((x - g.T @ cholesky_solve(dual, g @ x)) / damping).astype(float)


def network_rows(rng, m, d):
    """Rows (p − y) ⊗ a of a layer that knows some of its images, their lengths far apart."""
    classes = 10
    images = rng.random((m, max(-(-d // classes), 1)))
    scores = 8 * images @ rng.standard_normal((images.shape[1], classes)) / images.shape[1] ** 0.5
    p = scipy.special.softmax(scores, axis=1)
    labels = np.argmax(scores + rng.gumbel(size=scores.shape), axis=1)
    p[np.arange(m), labels] -= 1.0
    return (p[:, None, :] * images[:, :, None]).reshape(m, -1)[:, :d]


def decaying_rows(rng, m, d):
    spread = 10.0 ** -np.linspace(0, rng.uniform(1, 8), m)
    return (np.linalg.qr(rng.standard_normal((m, m)))[0] * spread) @ rng.standard_normal((m, d))


ROWS = {
    "random": lambda rng, m, d: rng.standard_normal((m, d)),
    "uniform": lambda rng, m, d: rng.random((m, d)),
    "equal": lambda rng, m, d: np.tile(rng.standard_normal(d), (m, 1)),
    "pairs": lambda rng, m, d: np.resize(rng.standard_normal((-(-m // 2), d)), (m, d)),
    "nearly equal": lambda rng, m, d: (
        rng.standard_normal(d) + 10.0 ** rng.uniform(-6, -1) * rng.standard_normal((m, d))
    ),
    "decaying": decaying_rows,
    "of many lengths": lambda rng, m, d: (
        rng.standard_normal((m, d)) * np.logspace(-3, 1, m)[:, None] + rng.random(d)
    ),
    "of many scales": lambda rng, m, d: rng.standard_normal((m, d)) * np.logspace(-3, 2, d),
    "of a network": network_rows,
    "large": lambda rng, m, d: 1e11 * rng.random((m, d)),
    "small": lambda rng, m, d: 1e-11 * rng.random((m, d)),
}


def vectors(rng, g):
    """Random and in the span of the rows, along its longest and shortest axes, and in between."""
    (m, d), size = g.shape, np.linalg.norm(g) / g.size**0.5
    axes = np.linalg.svd(g, full_matrices=False)[2] * size
    given = [
        rng.standard_normal(d) * size,
        rng.random(d) * size,
        np.eye(d)[d // 2] * size,
        g[m // 2],
        rng.standard_normal(m) @ g,
        g.sum(axis=0),
        g[0] + 10.0 ** rng.uniform(-7, -1) * size * rng.standard_normal(d),
        axes[0],
        axes[-1],
        axes[0] + 1e-4 * axes[-1],
    ]
    return np.stack(given, axis=1).astype(np.float32)


def window(rows, damping, convert):
    """A window that has been full twice over."""
    sliding = mfac.SlidingInverseFisher(rows.shape[1], len(rows), damping=damping)
    for row in (*rows[::-1], *rows):
        sliding.append(convert(row.copy()))
    return sliding


WAYS = {
    "NumPy": (np.asarray, lambda g, damping: mfac.InverseFisher(g, damping=damping)),
    "PyTorch": (
        torch.from_numpy,
        lambda g, damping: mfac.InverseFisher(torch.from_numpy(g), damping=damping),
    ),
    "JAX": (jnp.asarray, lambda g, damping: mfac.InverseFisher(jnp.asarray(g), damping=damping)),
    "parts": (
        np.asarray,
        lambda g, damping: mfac.InverseFisher(np.array_split(g, 2, axis=1), damping=damping),
    ),
    "slices": (np.asarray, lambda g, damping: mfac.InverseFisher(File(g), damping=damping)),
    "row chunks": (
        np.asarray,
        lambda g, damping: mfac.InverseFisher(
            mfac.RowShards([File(some, (1, g.shape[1])) for some in np.array_split(g, len(g))]),
            damping=damping,
        ),
    ),
    "Gram": (
        np.asarray,
        lambda g, damping: mfac.InverseFisher.from_gram(g, g @ g.T, damping=damping),
    ),
    "other damping": (
        np.asarray,
        lambda g, damping: mfac.InverseFisher(g, damping=1e5 * damping).with_damping(damping),
    ),
    "window": (np.asarray, lambda g, damping: window(g, damping, np.asarray)),
    "PyTorch window": (torch.from_numpy, lambda g, damping: window(g, damping, torch.from_numpy)),
}


def warned(act):
    """Return what ``act`` does, and whether it warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", scipy.linalg.LinAlgWarning)
        return act(), bool(caught)


def holds(name, g, damping, x):
    """Ask one way for F⁻¹X, by a vector at a time or all at once, and for that of a new row."""
    convert, make = WAYS[name]
    expected = exact(g, np.column_stack([x, g[0]]), damping)
    size = np.linalg.norm(expected, axis=0)

    def right(y, columns):
        error = np.linalg.norm((numpy64(y).T - expected[:, columns].T).T, axis=0)
        return np.all(error <= 1e-5 * size[columns])

    inverse, known = warned(lambda: make(g, damping))
    some = np.ascontiguousarray(x[:, ::2])
    product, doubt = warned(lambda: inverse @ convert(some))
    assert right(product, slice(0, -1, 2)) or known or doubt, "several"
    for i in range(x.shape[1]):
        product, doubt = warned(lambda i=i: inverse @ convert(x[:, i].copy()))
        assert right(product, i) or known or doubt, i
        if i % 4 == 0:
            product, doubt = warned(lambda i=i: inverse.matvec(convert(x[:, i].copy()), refine=1))
            assert right(product, i) or known or doubt, (i, "refined")
    if isinstance(inverse, mfac.SlidingInverseFisher):
        product, doubt = warned(lambda: inverse.append_matvec(convert(g[0].copy())))
        assert right(product, -1) or known or doubt, "newest"


@settings(max_examples=80)
@given(
    kind=st.sampled_from(list(ROWS)),
    way=st.sampled_from(list(WAYS)),
    m=st.sampled_from([1, 2, 3, 8, 24, 60]),
    d=st.sampled_from([2, 7, 30, 80, 500, 1100]),
    exponent=st.integers(-10, 0),
    seed=st.integers(0, 1000),
)
def test_five_digits_or_a_warning(kind, way, m, d, exponent, seed):
    rng = np.random.default_rng(seed)
    g = ROWS[kind](rng, m, d).astype(np.float32)
    wide = g.astype(np.float64)
    damping = float(np.linalg.norm(wide, 2) ** 2 / m * 10.0**exponent)
    holds(way, g, damping, vectors(rng, wide))


@pytest.mark.parametrize(
    ("kind", "way", "m", "d", "exponent"),
    [
        ("uniform", "NumPy", 2, 500, -2),  # the Gram's sums round the more, all being positive
        ("nearly equal", "Gram", 60, 80, -9),  # a float32 Gram that is indefinite
        ("decaying", "PyTorch", 24, 2500, -10),  # float64 has no more digits
        ("equal", "window", 200, 60, -2),  # as many terms in Gᵀc as rows, nearly cancelling
        ("equal", "PyTorch window", 200, 7, -2),  # F itself
        ("of a network", "NumPy", 300, 400, -5),
        ("of a network", "PyTorch", 16, 4000, -7),  # foreseen
        ("random", "NumPy", 16, 4000, -1),  # and not
    ],
)
def test_where_it_was_close(kind, way, m, d, exponent, rng):
    g = ROWS[kind](rng, m, d).astype(np.float32)
    wide = g.astype(np.float64)
    damping = float(np.linalg.norm(wide, 2) ** 2 / m * 10.0**exponent)
    holds(way, g, damping, vectors(rng, wide))
