"""What is left of float64 where λ is next to nothing, against solves in many digits."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import scipy.linalg

from mfac_core.pruning import obs_update, prune

M, D, KEPT, DAMPING = 20, 30, 10, 1e-13


def many_digits(gradients, weights, kept, sizes):
    """Return w_R + F_RR⁻¹F_RS w_S block by block, and zeros, from solves with 60 digits."""
    result, start = np.zeros(len(weights)), 0
    with mpmath.workdps(60):
        for size in sizes:
            here = np.arange(start, start + size)
            inside, outside = here[kept[here]], here[~kept[here]]
            start += size
            if not len(inside):
                continue
            g = mpmath.matrix(gradients[:, inside].tolist())
            z = mpmath.matrix(gradients[:, outside].tolist()) * mpmath.matrix(weights[outside])
            fisher = g.T * g / len(gradients) + mpmath.mpf(DAMPING) * mpmath.eye(len(inside))
            change = mpmath.lu_solve(fisher, g.T * z / len(gradients))
            result[inside] = weights[inside] + np.array([float(c) for c in change])
    return result


@pytest.mark.parametrize("sizes", [None, [D], [12, 18], [10, 10, 10]])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fewer_kept_than_rows_keep_their_digits(rng, sizes, dtype):
    gradients = rng.standard_normal((M, D)).astype(dtype)
    weights, kept = rng.standard_normal(D), np.zeros(D, np.bool_)
    kept[rng.permutation(D)[:KEPT]] = True
    updated = obs_update(weights, gradients, kept, damping=DAMPING, block_size=sizes)
    expected = many_digits(gradients.astype(np.float64), weights, kept, sizes or [D])
    # Of G_RᵀG_R, without help from λ; and what rounding of G_S w_S is multiplied by.
    condition = np.linalg.cond(gradients[:, kept].astype(np.float64))
    bound = 64 * KEPT * (condition**2 * 2.0**-53 + condition * np.finfo(dtype).eps)
    assert bound < (1e-9 if dtype == "float64" else 2e-3)
    assert np.linalg.norm(updated - expected) <= bound * np.linalg.norm(expected)


@pytest.mark.parametrize("sizes", [None, [12, 18]])
def test_weights_that_no_digits_tell_apart_are_warned_of(rng, sizes):
    gradients, weights = rng.standard_normal((M, D)), rng.standard_normal(D)
    gradients[:, 1:D:2] = gradients[:, 0:D:2]  # pairs of weights alike
    kept = np.zeros(D, np.bool_)
    kept[:4] = kept[14:18] = True
    with pytest.warns(scipy.linalg.LinAlgWarning, match="few right digits"):
        obs_update(weights, gradients, kept, damping=1e-19, block_size=sizes)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="raise"):
        prune(weights, gradients, sparsity=0.5, damping=1e-19, block_size=sizes)
