"""What is refused, with which words, and that refusing changes nothing."""

import sys
import types

import array_api_compat
import array_api_strict
import numpy as np
import pytest
import torch

import mfac_core as mfac

GOOD = np.ones((3, 4))


@pytest.mark.parametrize(
    ("gradients", "error", "words"),
    [
        ([[1.0, 2.0]], TypeError, "gradients must be an array .* got list"),
        (3.0, TypeError, "gradients must be an array .* got float"),
        (np.ones((3, 4), int), TypeError, "gradients must be real floating .* int64"),
        (np.ones((3, 4), complex), TypeError, "gradients must be real floating .* complex128"),
        (np.ones((3, 4), bool), TypeError, "gradients must be real floating .* bool"),
        (np.ones((3, 4), object), TypeError, "gradients must be real floating .* object"),
        (np.ma.ones((3, 4)), TypeError, "gradients must be a plain array, got a masked"),
        (np.ones(4), ValueError, r"shape \(m, d\).* got shape \(4,\)"),
        (np.ones((1, 2, 3)), ValueError, r"shape \(m, d\).* got shape \(1, 2, 3\)"),
        (np.ones((0, 4)), ValueError, r"at least one row .* got shape \(0, 4\)"),
        (np.ones((3, 0)), ValueError, r"at least one row and one column"),
        (np.full((3, 4), np.inf), ValueError, "finite, got NaN or infinity in 3 of 3 rows"),
        (np.full((3, 4), 1e200), ValueError, "overflow float64; scale them down"),
    ],
)
def test_gradients(gradients, error, words):
    with pytest.raises(error, match=words):
        mfac.InverseFisher(gradients, damping=0.1)


def test_a_nan_is_said_with_its_row():
    g = np.ones((5, 4), "float32")
    g[3, 2] = np.nan
    with pytest.raises(ValueError, match="1 of 5 rows, at index 3; drop"):
        mfac.ihvp(g, np.ones(4, "float32"), damping=0.1)


@pytest.mark.parametrize("make", [mfac.InverseFisher, mfac.EmpiricalFisher])
@pytest.mark.parametrize(
    ("damping", "error"),
    [(0.0, ValueError), (-1.0, ValueError), (np.nan, ValueError), (np.inf, ValueError),
     ("a", TypeError), (None, TypeError), (1j, TypeError)],
)  # fmt: skip
def test_damping(make, damping, error):
    with pytest.raises(error, match="damping must be"):
        make(GOOD, damping=damping)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        ([1.0] * 4, TypeError, "x must be an array .* got list"),
        (np.ones(4, int), TypeError, "x must be real floating"),
        (np.ones(5), ValueError, r"x must have shape \(4,\) or \(4, k\), got \(5,\)"),
        (np.ones((3, 4)), ValueError, r"x must have shape .* got \(3, 4\)"),
        (torch.ones(4), TypeError, "x must be an array of the gradients' library"),
    ],
)
def test_vectors(x, error, words):
    with pytest.raises(error, match=words):
        mfac.ihvp(GOOD, x, damping=0.1)


def test_matvec_and_matmat_want_their_own_shape():
    inverse = mfac.InverseFisher(GOOD, damping=0.1)
    with pytest.raises(ValueError, match=r"x must have shape \(4,\), got \(4, 1\)"):
        inverse.matvec(np.ones((4, 1)))
    with pytest.raises(ValueError, match=r"x must have shape \(4, k\), got \(4,\)"):
        inverse.matmat(np.ones(4))
    with pytest.raises(ValueError, match="refine must be an integer of at least 0, got -1"):
        inverse.matvec(np.ones(4), refine=-1)


def test_devices_do_not_mix():
    device = array_api_strict.Device("device1")
    g = array_api_strict.ones((3, 4), device=device)
    with pytest.raises(ValueError, match=r"x must be on the gradients' device .*device1"):
        mfac.ihvp(g, array_api_strict.ones(4), damping=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_params": 0}, ValueError, "num_params must be an integer of at least 1, got 0"),
        ({"num_params": 2.0}, TypeError, "num_params must be an integer"),
        ({"window_size": -1}, ValueError, "window_size must be an integer of at least 1"),
        ({"damping": 0.0}, ValueError, "damping must be finite and positive"),
        ({"normalization": "mean"}, ValueError, "normalization must be one of .* got 'mean'"),
        ({"device": "cpu"}, ValueError, "device needs xp"),
    ],
)
def test_window_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        mfac.SlidingInverseFisher(
            **({"num_params": 4, "window_size": 3, "damping": 0.1} | arguments)
        )


@pytest.fixture
def window(rng):
    window = mfac.SlidingInverseFisher(4, 3, damping=0.1)
    for row in rng.standard_normal((5, 4)).astype("float32"):
        window.append_matvec(row)
    return window


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda w: w.append(np.array([1, np.nan, 0, 0])), ValueError, "g must be finite"),
        (lambda w: w.append_matvec(np.full(4, np.inf)), ValueError, "g must be finite"),
        (
            lambda w: w.append_matvec(np.full(4, np.inf), check_finite=False),
            ValueError,
            r"^g must be finite",
        ),
        (lambda w: w.append(np.full(4, 1e300)), ValueError, "float32.*overflow"),
        (lambda w: w.append(np.ones(5)), ValueError, r"g must have shape \(4,\), got \(5,\)"),
        (lambda w: w.append(np.ones((1, 4))), ValueError, r"g must have shape \(4,\)"),
        (lambda w: w.append([1.0] * 4), TypeError, "g must be an array"),
        (lambda w: w.append(torch.ones(4)), TypeError, "g must be an array of the gradients'"),
        (lambda w: w.replace(3, np.ones(4)), IndexError, "i 3 is out of range.* 0 to 2"),
        (lambda w: w.replace(0, np.full(4, np.nan)), ValueError, "g must be finite"),
        (lambda w: w.remove(-4), IndexError, "i -4 is out of range"),
        (lambda w: w.remove(1.5), TypeError, "i must be an integer"),
        (lambda w: setattr(w, "damping", -1.0), ValueError, "damping must be finite"),
        (lambda w: w.load_state_dict({}), ValueError, "state has no entry 'version'"),
        (
            lambda w: w.load_state_dict(w.state_dict() | {"window_size": 9}),
            ValueError,
            r"state must have .* \(1, 4, 3\), got \(1, 4, 9\)",
        ),
        (
            lambda w: w.load_state_dict(w.state_dict() | {"gram": np.eye(2)}),
            ValueError,
            "it is damaged",
        ),
    ],
)
def test_what_a_window_refuses_changes_nothing(window, act, error, words):
    before = window.state_dict()
    with pytest.raises(error, match=words):
        act(window)
    after = window.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_window_of_a_given_library_refuses_others():
    window = mfac.SlidingInverseFisher(4, 3, damping=0.1, xp=torch)
    with pytest.raises(TypeError, match="g must be an array of the gradients' library"):
        window.append(np.ones(4))


def test_removing_from_an_empty_window():
    with pytest.raises(IndexError, match="it is empty"):
        mfac.SlidingInverseFisher(4, 3, damping=0.1).remove(0)


TESTED = {"numpy", "cupy", "torch", "jax", "array_api_strict", "dask"}
REFUSED = {  # what array-api-compat knows their arrays by, and what is said of them
    "ndonnx": ("Array", "must hold its values in memory, got ndonnx.Array; compute it first"),
    "pydata_sparse": ("SparseArray", "must hold its values .* got sparse.SparseArray.* dense"),
    "dpnp": ("dpnp_array", "tested with, got dpnp.dpnp_array; convert it to NumPy"),
    "mparray": ("MPArray", "tested with, got mparray.MPArray; convert it to NumPy"),
}


def test_every_library_of_array_api_compat_is_tested_or_refused():
    names = [name for name in dir(array_api_compat) if name.startswith("is_")]
    known = {name[3:-10] for name in names if name.endswith("_namespace")}
    assert known <= TESTED | REFUSED.keys()


@pytest.mark.parametrize("library", list(REFUSED))
def test_a_library_that_is_refused(library, monkeypatch):
    """Stand-ins with the names that array-api-compat looks for: none is installed."""
    kind, words = REFUSED[library]
    module = types.ModuleType(library.removeprefix("pydata_"))
    members = {
        "__module__": module.__name__,
        "__array_namespace__": lambda self, api_version=None: module,
        "shape": (3, 4),
        "ndim": 2,
        "dtype": np.dtype("float64"),
        "__getitem__": lambda self, key: np.ones((3, 4))[key],
    }
    setattr(module, kind, type(kind, (), members))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    array, good = getattr(module, kind)(), mfac.InverseFisher(GOOD, damping=0.1)
    for act in (
        lambda: mfac.InverseFisher(array, damping=0.1),
        lambda: mfac.InverseFisher([array, array], damping=0.1),
        lambda: mfac.BlockInverseFisher(array, damping=0.1, block_size=2),
        lambda: mfac.EmpiricalFisher(array, damping=0.1),
        lambda: mfac.RowShards([array]),
        lambda: mfac.SlidingInverseFisher(4, 2, damping=0.1).append(array),
        lambda: good @ array,
    ):
        with pytest.raises(TypeError, match="must be a NumPy array|" + words):
            act()


def test_libraries_are_called_what_people_call_them():
    inverse = mfac.InverseFisher(GOOD, damping=0.1)
    with pytest.raises(TypeError, match="library NumPy, got one of PyTorch; convert one of them"):
        inverse @ torch.ones(4)
    with pytest.raises(TypeError, match="library PyTorch, got one of NumPy"):
        mfac.InverseFisher(torch.ones(3, 4), damping=0.1) @ np.ones(4)
