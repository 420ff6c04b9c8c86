"""What works on which array library: the documentation's table, from the tests' own backends.

Run ``python tests/test_support.py`` to write the table anew.
"""

from pathlib import Path

import jax
import numpy as np
import scipy.linalg
from conftest import BACKENDS, numpy64, relative_error

import mfac_core as mfac
from mfac_core import pruning
from mfac_core._arrays import array_namespace
from mfac_core._arrays import device as array_device
from mfac_core.influence import Influence
from mfac_core.testing import assert_operator_close, dense_fisher, dense_inverse, error_bound

TABLE = Path(__file__).parents[1] / "docs" / "results" / "support.md"
LIBRARIES = {"numpy": "NumPy", "torch": "PyTorch", "jax": "JAX", "strict": "array-api-strict"}
DTYPES = ("float16", "bfloat16", "float32", "float64")

DAMPING = 0.1
ROWS = np.random.default_rng(0).standard_normal((6, 20))
VECTOR = np.linspace(-1.0, 1.0, 20)
KEPT = np.arange(20) % 2 == 0


def asarray(backend, x, dtype):
    """Make an array, of 16 bits too."""
    if dtype in backend.dtypes():
        return backend.asarray(x, dtype)
    return backend.xp.asarray(backend.asarray(x), dtype=getattr(backend.xp, dtype))


def dtypes_of(backend):
    return [
        dtype
        for dtype in DTYPES
        if dtype in backend.dtypes() or ("16" in dtype and hasattr(backend.xp, dtype))
    ]


def window_of(g, size):
    """A window into which all gradients have gone, and the product that the last of them gave."""
    window = mfac.SlidingInverseFisher(20, size, damping=DAMPING)
    for i in range(len(ROWS)):
        product = window.append_matvec(g[i, :])
    return window, product


def assert_close(actual, expected, g):
    assert actual.dtype == g.dtype
    assert relative_error(actual, expected) <= error_bound(g, damping=DAMPING)


def forward(g, x, mask):
    fisher = mfac.EmpiricalFisher(g, damping=DAMPING)
    dense = dense_fisher(g, damping=DAMPING)
    assert_operator_close(fisher, dense, rtol=error_bound(g, damping=DAMPING))


def static(g, x, mask):
    inverse = mfac.InverseFisher(g, damping=DAMPING)
    dense = dense_inverse(g, damping=DAMPING)
    assert_operator_close(inverse, dense, rtol=error_bound(g, damping=DAMPING))
    assert_close(inverse.matvec(x, refine=1), dense @ numpy64(x), g)


def blocks(g, x, mask):
    inverse = mfac.BlockInverseFisher(g, damping=DAMPING, block_size=5)
    dense = [dense_inverse(g[:, i : i + 5], damping=DAMPING) for i in range(0, 20, 5)]
    bound = error_bound(g, damping=DAMPING)
    assert_operator_close(inverse, scipy.linalg.block_diag(*dense), rtol=bound)


def sliding(g, x, mask):
    window, product = window_of(g, 4)
    dense = dense_inverse(numpy64(g)[2:], damping=DAMPING)
    assert_operator_close(window, dense, rtol=error_bound(g, damping=DAMPING))
    assert_close(product, dense @ numpy64(g)[5], g)
    window.replace(0, g[1, :])
    window.remove(2)
    dense = dense_inverse(numpy64(g)[[1, 3, 5]], damping=DAMPING)
    assert_close(window @ x, dense @ numpy64(x), g)


def compressed(g, x, mask):
    window = mfac.SparseSlidingInverseFisher(20, 4, density=0.3, damping=DAMPING)
    for i in range(len(ROWS)):
        product = window.append_matvec(g[i, :])
    rows = window.gradients
    assert (numpy64(rows) != 0).sum(axis=1).tolist() == [6] * 4
    dense = dense_inverse(rows, damping=DAMPING)
    assert_operator_close(window, dense, rtol=error_bound(rows, damping=DAMPING))
    assert_close(product, dense @ numpy64(rows)[3], rows)


def saved(g, x, mask):
    window, _ = window_of(g, 4)
    restored = mfac.SlidingInverseFisher(20, 4, damping=DAMPING)
    restored.load_state_dict(window.state_dict())
    assert np.array_equal(numpy64(restored @ x), numpy64(window @ x))


def one_call(g, x, mask):
    product = mfac.ihvp(g, x, damping=DAMPING)
    assert_close(product, dense_inverse(g, damping=DAMPING) @ numpy64(x), g)


def parts(g, x, mask):
    inverse = mfac.InverseFisher([g[:, :7], g[:, 7:]], damping=DAMPING)
    assert_close(inverse @ x, dense_inverse(g, damping=DAMPING) @ numpy64(x), g)


def compiled(g, x, mask):
    assert isinstance(x, jax.Array)
    expected = dense_inverse(g, damping=DAMPING) @ numpy64(x)
    inverse = mfac.InverseFisher(g, damping=DAMPING)
    assert_close(jax.jit(inverse.matvec)(x), expected, g)
    assert_close(jax.jit(lambda x: mfac.ihvp(g, x, damping=DAMPING))(x), expected, g)


def saliencies(g, x, mask):
    scores = pruning.saliency(x, mfac.InverseFisher(g, damping=DAMPING))
    diagonal = np.diagonal(dense_inverse(g, damping=DAMPING))
    assert_close(scores, numpy64(x) ** 2 / (2 * diagonal), g)


def pruned(g, x, mask):
    fisher, w = dense_fisher(g, damping=DAMPING), numpy64(x)
    best = np.where(KEPT, w, 0.0)
    inner, across = fisher[np.ix_(KEPT, KEPT)], fisher[np.ix_(KEPT, ~KEPT)]
    best[KEPT] += np.linalg.solve(inner, across @ w[~KEPT])
    assert_close(pruning.obs_update(x, g, mask, damping=DAMPING), best, g)
    result = pruning.prune(x, g, sparsity=0.5, mask=mask, damping=DAMPING)
    assert np.array_equal(numpy64(result.mask), KEPT)
    assert_close(result.weights, best, g)


def shards(g, x, mask):
    inverse = mfac.InverseFisher(mfac.RowShards([g[:2, :], g[2:, :]]), damping=DAMPING)
    assert_close(inverse @ x, dense_inverse(g, damping=DAMPING) @ numpy64(x), g)


class Products:
    """Rows that are only functions."""

    def __init__(self, g):
        self.g, self.shape, self.dtype, self.device = g, g.shape, g.dtype, array_device(g)

    def __array_namespace__(self):
        return array_namespace(self.g)

    def gram(self):
        return self.g @ self.g.T

    def project(self, x):
        return self.g @ x

    def combine(self, c):
        return self.g.T @ c


def functions(g, x, mask):
    inverse = mfac.InverseFisher(Products(g), damping=DAMPING)
    assert_close(inverse @ x, dense_inverse(g, damping=DAMPING) @ numpy64(x), g)


def influences(g, x, mask):
    influence = Influence(g, damping=DAMPING)
    wide = numpy64(g)
    expected = wide @ dense_inverse(g, damping=DAMPING) @ wide.T / len(wide)
    bound = error_bound(g, damping=DAMPING)
    scores = influence.scores(g)
    assert array_namespace(scores) is array_namespace(g)
    assert relative_error(scores, expected) <= bound
    assert relative_error(influence.self_influence(), np.diagonal(expected)) <= bound
    each = expected.T / (1 - np.diagonal(expected))[:, None]
    assert relative_error(influence.leave_out(range(6), g), each) <= 4 * bound
    best, worst = influence.most_helpful(g, 2), influence.most_harmful(g, 2)
    assert np.array_equal(numpy64(best.indices)[:, 0], expected.argmax(axis=1))
    assert np.array_equal(numpy64(worst.indices)[:, 0], expected.argmin(axis=1))


def online(g, x, mask):
    fisher = mfac.BlockFisher(block_size=5)
    fisher.add(g[:2, :])
    fisher.add(g[2:, :])
    dense = [dense_inverse(g[:, i : i + 5], damping=DAMPING) for i in range(0, 20, 5)]
    product = fisher.inverse(damping=DAMPING) @ x
    assert_close(product, scipy.linalg.block_diag(*dense) @ numpy64(x), g)


def chosen(g, x, mask):
    found = mfac.choose_damping(g)
    curve = mfac.damping_curve(g)
    assert isinstance(curve, mfac.DampingCurve)
    assert curve.best == found
    expected = mfac.choose_damping(numpy64(g))
    assert abs(found - expected) <= error_bound(g, damping=found) * expected


CHECKS = {
    "`EmpiricalFisher`, all queries": forward,
    "`InverseFisher`, all queries": static,
    "`BlockInverseFisher`, all queries": blocks,
    "`SlidingInverseFisher`, its steps and all queries": sliding,
    "`SlidingInverseFisher`, its state saved and restored": saved,
    "`SparseSlidingInverseFisher`, its steps and all queries": compressed,
    "`ihvp`": one_call,
    "gradients in several parts": parts,
    "gradients stacked by rows, `RowShards`": shards,
    "rows that are only functions, `GradientRows`": functions,
    "`BlockFisher`, its inverse": online,
    "`choose_damping`, `damping_curve`, `DampingCurve`": chosen,
    "`ihvp`, `InverseFisher.matvec` inside `jax.jit`": compiled,
    "`influence.Influence`, all queries": influences,
    "`pruning.saliency`": saliencies,
    "`pruning.obs_update`, `pruning.prune`": pruned,
}


def works(check, backend, dtype):
    g, x = (asarray(backend, array, dtype) for array in (ROWS, VECTOR))
    options = {} if backend.device is None else {"device": backend.device}
    try:
        check(g, x, backend.xp.asarray(KEPT, **options))
    except Exception:
        return False
    return True


def cell(check, library):
    """✓ if a check holds in all data types, on all devices; or those in which it holds."""
    backends = [b for b in BACKENDS if b.name.partition("-")[0] == library]
    dtypes = dtypes_of(backends[0])
    good = [dtype for dtype in dtypes if all(works(check, b, dtype) for b in backends)]
    return "✓" if good == dtypes else ", ".join(good) or "no"


def table():
    first = {name: next(b for b in BACKENDS if b.name == name) for name in LIBRARIES}
    rows = [["", *LIBRARIES.values()], ["---"] * (len(LIBRARIES) + 1)]
    rows.append(["data types", *(", ".join(dtypes_of(first[name])) for name in LIBRARIES)])
    rows += [[label, *(cell(check, name) for name in LIBRARIES)] for label, check in CHECKS.items()]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def test_the_table_is_what_is_so():
    assert table() == TABLE.read_text(encoding="utf-8"), (
        "What works has changed. If that was meant, run: python tests/test_support.py"
    )


def test_every_public_name_and_library_is_in_it():
    names = {word for label in CHECKS for word in label.replace("`", " ").split()}
    assert set(mfac.__all__) - {"Reduce"} <= names  # which is a type, of functions
    assert {backend.name.partition("-")[0] for backend in BACKENDS} == set(LIBRARIES)


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
