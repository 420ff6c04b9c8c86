"""float32 gradients, any x, λ down to 1e-10 of ‖G‖²/m: an error of at most 1e-5, or a warning."""

import warnings

import mpmath
import numpy as np
import pytest
import scipy
import torch

import mfac_core as mfac

ROWS = {
    "random": lambda rng: rng.standard_normal((12, 80)),
    "uniform": lambda rng: rng.random((12, 80)),
    "correlated": lambda rng: (
        (np.linalg.qr(rng.standard_normal((12, 12)))[0] * 1e3 ** -np.linspace(0, 1, 12))
        @ rng.standard_normal((12, 80))
    ),
    "of many lengths": lambda rng: (
        rng.standard_normal((12, 80)) * np.logspace(-2, 1, 12)[:, None] + rng.random(80)
    ),
}


def oracle(g):
    """Return (x, λ) ↦ (x − Gᵀ(mλI + GGᵀ)⁻¹Gx)/λ in 40 digits."""
    of = np.vectorize(mpmath.mpf, otypes=[object])
    rows = of(g.astype(float))
    gram = rows @ rows.T

    def exact(x, damping):
        wide, shift = of(x.astype(float)), mpmath.mpf(damping)
        dual = mpmath.matrix((gram + len(g) * shift * np.eye(len(g), dtype=int)).tolist())
        c = np.array(list(mpmath.cholesky_solve(dual, mpmath.matrix((rows @ wide).tolist()))))
        return ((wide - c @ rows) / shift).astype(np.float64)

    return exact


@pytest.mark.parametrize("like", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_five_digits_or_a_warning(kind, like, rng):
    g = ROWS[kind](rng).astype(np.float32)
    scale = np.linalg.norm(g.astype(float), 2) ** 2 / len(g)
    vectors = [
        rng.standard_normal(80).astype(np.float32),
        g[3],
        (rng.standard_normal(12) @ g).astype(np.float32),
        g[0] + np.float32(1e-3) * rng.standard_normal(80).astype(np.float32),
    ]
    with mpmath.workdps(40):
        exact = oracle(g)
        for exponent in range(-1, -11, -1):
            damping = float(scale * 10.0**exponent)
            for x in vectors:
                inverse = mfac.InverseFisher(like(g), damping=damping)
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always", scipy.linalg.LinAlgWarning)
                    y = np.asarray(inverse @ like(x), dtype=np.float64)
                expected = exact(x, damping)
                error = np.linalg.norm(y - expected) / np.linalg.norm(expected)
                assert error <= 1e-5 or caught, (exponent, error)
