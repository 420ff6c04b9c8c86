"""Warnings name the line that called the library, wherever in it they are issued."""

import inspect
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

import mfac_core as mfac
from mfac_core.torch import MFAC

ALL_ONE = np.ones((3, 5))
"""Equal gradients: with a tiny damping F is singular in float64."""


def window():
    window = mfac.SlidingInverseFisher(5, 3, damping=1e-30)
    for g in ALL_ONE:
        window.append(g)
    return window


def static():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mfac.InverseFisher(ALL_ONE, damping=1e-30)


def skipped_step(*_):
    weights = torch.nn.Parameter(torch.ones(3))
    weights.grad = torch.full((3,), torch.nan)
    optimizer = MFAC([weights], window_size=2)
    return optimizer.step()


CALLS = {
    "set-up": (lambda: None, lambda _: mfac.InverseFisher(ALL_ONE, damping=1e-30)),
    "ihvp": (lambda: None, lambda _: mfac.ihvp(ALL_ONE, np.ones(5), damping=1e-30)),
    "static product": (static, lambda op: op @ np.ones(5)),
    "static logdet": (static, lambda op: op.logdet()),
    "static refined": (static, lambda op: op.matvec(np.ones(5), refine=1)),
    "window's product": (window, lambda op: op.matvec(np.ones(5))),
    "window's column": (window, lambda op: op.column(1)),
    "window's entries": (window, lambda op: op.entries(0, 0)),
    "window's step": (window, lambda op: op.append_matvec(np.ones(5))),
    "optimiser's step": (lambda: None, skipped_step),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_callers_line(name):
    prepare, call = CALLS[name]
    operator = prepare()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(operator)
    lines, first = inspect.getsourcelines(call)
    assert caught
    for warning in caught:
        assert issubclass(warning.category, (scipy.linalg.LinAlgWarning, RuntimeWarning))
        assert warning.filename == __file__
        assert first <= warning.lineno < first + len(lines)
