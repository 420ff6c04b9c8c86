"""The masked Gram from stage to stage."""

import numpy as np
import pytest
from conftest import BACKENDS, numpy64
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import constrained_optimum, problems

from mfac_core._rows.storage import rows_of
from mfac_core.pruning._kept import KeptFisher
from mfac_core.testing import dense_fisher, error_bound


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@settings(max_examples=20)
@given(problem=problems(max_params=24), data=st.data())
def test_any_sequence_of_masks_is_as_if_each_were_the_first(backend, problem, data):
    gradients, damping = problem
    dtype = backend.dtypes()[-1]
    g = backend.asarray(gradients, dtype)
    d = g.shape[1]
    w = np.linspace(-1.0, 2.0, d)
    dense = dense_fisher(g, damping=damping)
    bound = error_bound(g, damping=damping) * np.linalg.norm(w)
    fisher = KeptFisher(rows_of(g), damping, None)
    kept = np.ones(d, bool)
    for _ in range(3):
        drawn = np.array(data.draw(st.lists(st.booleans(), min_size=d, max_size=d)))
        kept = kept & drawn if data.draw(st.booleans()) else drawn
        fisher.restrict(fisher.home.xp.asarray(kept.copy(), device=fisher.home.device))
        diagonal = numpy64(fisher.diagonal())  # which may ask for exact products from now on
        assert (
            np.linalg.norm(
                numpy64(fisher.joint(fisher.home.receive(w))) - constrained_optimum(dense, w, kept)
            )
            <= bound
        )
        assert (diagonal[kept] > 0).all()


def test_the_gram_is_computed_anew_where_little_is_left_of_a_row(rng):
    """Ten weights hold nearly all of a row: its rounding errors are larger than what is left."""
    g = rng.standard_normal((5, 40))
    g[0, :10] *= 1e9
    kept = np.arange(40) >= 10
    fresh, staged = (KeptFisher(rows_of(g), 1e-3, None) for _ in range(2))
    staged.restrict(np.ones(40, bool))
    for fisher in (fresh, staged):
        fisher.restrict(kept)
    assert (staged.diagonal() == fresh.diagonal()).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_stages_keep_the_diagonal(rng, dtype):
    g = (rng.standard_normal((20, 200)) / 10).astype(dtype)
    fisher = KeptFisher(rows_of(g), 1e-3, None)
    kept = np.ones(200, bool)
    for _ in range(12):
        fisher.restrict(kept)
        actual = fisher.diagonal()[kept]
        expected = np.diagonal(np.linalg.inv(dense_fisher(g[:, kept], damping=1e-3)))
        assert actual == pytest.approx(expected, rel=1e-5 if dtype == "float32" else 1e-10)
        kept[rng.choice(np.flatnonzero(kept), kept.sum() // 6, replace=False)] = False
