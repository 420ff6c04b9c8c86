"""An empty window is I/λ, whatever is asked, and whatever is known of its arrays."""

import copy
import threading

import numpy as np
import pytest
import torch
from array_api_compat import torch as torch_namespace

import mfac_core as mfac

D, DAMPING = 6, 0.25


def never_filled():
    return mfac.SlidingInverseFisher(D, 3, damping=DAMPING)


def with_dtype():
    return mfac.SlidingInverseFisher(D, 3, damping=DAMPING, dtype=np.float32)


def with_library():
    return mfac.SlidingInverseFisher(D, 3, damping=DAMPING, xp=torch_namespace)


def with_both():
    return mfac.SlidingInverseFisher(
        D, 3, damping=DAMPING, xp=torch_namespace, dtype=torch.float32, normalization="window"
    )


def cleared():
    window = never_filled()
    window.append(np.arange(1.0, D + 1))
    window.clear()
    return window


def emptied():
    window = never_filled()
    window.append(np.arange(1.0, D + 1))
    window.remove(0)
    return window


def sparse():
    return mfac.SparseSlidingInverseFisher(D, 3, density=0.5, damping=DAMPING)


def sparse_emptied():
    window = sparse()
    window.append(np.arange(1.0, D + 1))
    window.remove(0)
    return window


@pytest.fixture(
    params=[
        *(never_filled, with_dtype, with_library, with_both, cleared, emptied),
        *(sparse, sparse_emptied),
    ],
    ids=lambda make: make.__name__,
)
def window(request):
    return request.param()


def vector(window, values):
    """An array of the library that the window answers in."""
    like = window.diagonal()
    return torch.asarray(values, dtype=like.dtype) if torch.is_tensor(like) else values


def test_every_query(window):
    x = np.arange(1.0, D + 1)
    held, eye = vector(window, x), np.eye(D) / DAMPING
    columns = vector(window, np.stack([x, -x], axis=1))
    np.testing.assert_array_equal(window @ held, x / DAMPING)
    np.testing.assert_array_equal(window.matvec(held, refine=2), x / DAMPING)
    np.testing.assert_array_equal(window.matmat(columns), np.stack([x, -x], axis=1) / DAMPING)
    np.testing.assert_array_equal(window.diagonal(), np.diagonal(eye))
    np.testing.assert_array_equal(window.column(1), eye[1])
    np.testing.assert_array_equal(window.entries([0, 1, 2], [0, 1, 3]), [4.0, 4.0, 0.0])
    np.testing.assert_array_equal(window.submatrix([3, 1]), np.eye(2) / DAMPING)
    np.testing.assert_array_equal(window.to_dense(), eye)
    np.testing.assert_array_equal(window.to_scipy() @ x.astype(np.float32), x / DAMPING)
    assert window.quadratic(held) == x @ x / DAMPING
    np.testing.assert_allclose(window.quadratic(columns), [x @ x / DAMPING] * 2, rtol=2**-22)
    assert window.logdet() == pytest.approx(-D * np.log(DAMPING), rel=1e-15)
    assert window.sample(3, 0).shape == (3, D)
    np.testing.assert_allclose(window.power(0.5) @ held, x / DAMPING**0.5, rtol=2**-22)
    assert window.power(2.0).logdet() == pytest.approx(-2 * D * np.log(DAMPING), rel=1e-15)
    assert window.gradients.shape == (0, D)
    assert window.gram.shape == window.dual.shape == (0, 0)


def test_samples_have_the_variance(window):
    draws = np.asarray(window.sample(20_000, 0), dtype=np.float64)
    # The variance of a sample variance is 2σ⁴/n: five of its roots, over D elements.
    bound = 5 * (2 / 20_000) ** 0.5 / DAMPING
    np.testing.assert_allclose(draws.var(axis=0), 1 / DAMPING, atol=bound)


def test_a_product_keeps_the_library_of_the_vector():
    """Nothing else is known of a window that has never held a gradient."""
    assert torch.is_tensor(never_filled() @ torch.ones(D))


def test_what_it_refuses(window):
    with pytest.raises(ValueError, match="must have shape"):
        window @ vector(window, np.ones(D + 1))
    with pytest.raises(IndexError):
        window.column(D)
    with pytest.raises(IndexError, match="it is empty"):
        window.remove(0)


def test_loading_a_state_keeps_the_lock():
    """A thread that waits for the window would else be let in beside one that comes later."""
    window = emptied()
    lock = window._lock
    window.load_state_dict(window.state_dict())
    assert window._lock is lock


def test_a_thread_waits_for_one_that_loads_a_state():
    window, state = emptied(), emptied().state_dict()
    inside, seen = threading.Event(), []

    class Slow(dict):
        """A state whose first entry is read while another thread knocks."""

        def __getitem__(self, key):
            if not inside.is_set():
                inside.set()
                visitor.join(0.2)
                seen.append(visitor.is_alive())
            return super().__getitem__(key)

    def visit():
        inside.wait()
        window.append(np.ones(D))

    visitor = threading.Thread(target=visit)
    visitor.start()
    window.load_state_dict(Slow(state))
    visitor.join()
    assert seen == [True]
    assert len(window) == 1


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_shares_neither_memory_nor_lock(copied):
    window = emptied()
    window.append(np.ones(D))
    other = copied(window)
    other.append(np.full(D, 2.0))
    np.testing.assert_array_equal(window.gradients, np.ones((1, D)))
    assert other._lock is not window._lock
