"""Small matrices in NumPy at sizes on both sides of every tile, against SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from conftest import relative_error

from mfac_core._arrays import home_of
from mfac_core._ops import _block_host, dense

SIZES = (0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130)


@pytest.mark.parametrize("size", SIZES)
def test_inverses_of_factors(rng, size):
    g = rng.standard_normal((3, size, 2 * size + 1))
    matrices = g @ g.transpose(0, 2, 1) + np.eye(size)
    condition = max((np.linalg.cond(a) for a in matrices if size), default=1.0)
    bound = 8 * max(size, 1) * condition * 2.0**-53
    factors = _block_host.inverse_factor(matrices)
    for a, factor in zip(matrices, factors, strict=True):
        assert (np.triu(factor, 1) == 0.0).all()
        if size:
            lower = scipy.linalg.cholesky(a, lower=True)
            expected = scipy.linalg.solve_triangular(lower, np.eye(size), lower=True)
            assert relative_error(factor, expected) <= bound
            assert relative_error(dense.inverse_lower(home_of(a), lower), expected) <= bound


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inner", [1, 70, 600])
def test_products(rng, size, inner):
    a, b = rng.standard_normal((2, size, inner)), rng.standard_normal((2, inner, 37))
    scale = 8 * inner * 2.0**-53
    product = _block_host.multiply(a, b)
    assert (abs(product - np.einsum("nik,nkj->nij", a, b)) <= scale * (abs(a) @ abs(b))).all()
    vector = b[:, :, :1]
    bound = scale * (abs(a) @ abs(vector))
    for multiply in (_block_host.multiply, _block_host.stream):
        assert (abs(multiply(a, vector) - np.einsum("nik,nkj->nij", a, vector)) <= bound).all()
    square = _block_host.square(a)
    assert (square == square.transpose(0, 2, 1)).all()
    bound = scale * (abs(a) @ abs(a.transpose(0, 2, 1)))
    assert (abs(square - np.einsum("nik,njk->nij", a, a)) <= bound).all()
