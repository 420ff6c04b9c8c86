"""Problems and stand-ins that several test modules share."""

import threading

import numpy as np
import scipy.linalg
from conftest import numpy64
from hypothesis import strategies as st

from mfac_core.testing import dense_inverse

SHAPES = [(1, 1), (1, 33), (2, 3), (3, 40), (4, 4), (5, 17), (6, 1), (7, 8), (8, 7), (9, 31)]
SHAPES += [(10, 2), (11, 40), (12, 11), (12, 24)]
"""Of gradients, for a library that compiles every operation anew for every shape."""


@st.composite
def problems(draw, max_rows=12, max_params=40, backend=None):
    """Gradients with awkward shapes, scales, and equal, zero or collinear rows; and a damping."""
    if backend is not None and backend.name == "jax":
        m, d = draw(st.sampled_from(SHAPES))
    else:
        m, d = draw(st.integers(1, max_rows)), draw(st.integers(1, max_params))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-3, 3))
    g = scale * rng.standard_normal((m, d)) / np.sqrt(d)
    match draw(st.sampled_from(["general", "equal", "zero", "collinear", "all zero"])):
        case "equal":
            g[:] = g[0]
        case "zero":
            g[m // 2] = 0.0
        case "collinear":
            g[-1] = -3.0 * g[0]
        case "all zero":
            g[:] = 0.0
    damping = scale**2 * 10.0 ** draw(st.floats(-5, 2))
    return g, damping


@st.composite
def cuts(draw, d):
    """Block lengths that sum to d, and what to pass for them."""
    if draw(st.booleans()):
        size = draw(st.integers(1, d + 3))
        return size, [min(size, d - start) for start in range(0, d, size)]
    inner = sorted(draw(st.sets(st.integers(1, d - 1), max_size=5))) if d > 1 else []
    lengths = np.diff([0, *inner, d]).tolist()
    return draw(st.sampled_from([lengths, tuple(lengths), np.array(lengths)])), lengths


def blocks_of(fisher, lengths):
    """The diagonal blocks of a dense matrix."""
    owner = np.repeat(np.arange(len(lengths)), lengths)
    return np.where(owner[:, None] == owner, fisher, 0.0)


def constrained_optimum(fisher, w, mask):
    """Minimise ½ δᵀFδ under δ_S = −w_S, by the dense equations."""
    best = np.where(mask, w, 0.0)
    if mask.any():
        inner = fisher[np.ix_(mask, mask)]
        best[mask] += np.linalg.solve(inner, fisher[np.ix_(mask, ~mask)] @ w[~mask])
    return best


def increase(fisher, w, pruned):
    delta = np.asarray(pruned) - w
    return 0.5 * delta @ fisher @ delta


class File:
    """What h5py and zarr have in common, with a record of what was read."""

    def __init__(self, array, chunks=None):
        self._array = array
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, chunks
        self.read = np.zeros(array.shape, int)

    def __getitem__(self, key):
        self.read[key] += 1
        return self._array[key]


class Ranks:
    """Ranks as threads; their reduce adds in a fixed order, and times out if one is absent."""

    def __init__(self, size):
        self.size = size
        self._slots = [None] * size
        self._barrier = threading.Barrier(size, timeout=20)
        self._local = threading.local()

    def reduce(self, x):
        self._slots[self._local.rank] = x
        self._barrier.wait()
        total = sum(self._slots[1:], self._slots[0].copy())
        self._barrier.wait()
        return total

    def run(self, body):
        """Return what ``body(rank)`` returned, or raised, on each rank."""
        results = [None] * self.size

        def work(rank):
            self._local.rank = rank
            try:
                results[rank] = body(rank)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def dense_blocks(g, sizes, damping):
    stops = np.cumsum(sizes)
    blocks = [
        dense_inverse(numpy64(g)[:, stop - size : stop], damping=damping)
        for size, stop in zip(sizes, stops, strict=True)
    ]
    return scipy.linalg.block_diag(*blocks)
