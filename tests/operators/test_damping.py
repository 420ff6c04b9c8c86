"""The choice of λ against the dense definition, and against scikit-learn's shrinkage."""

import warnings

import numpy as np
import pytest
import scipy.linalg
from conftest import BACKENDS, CASES, numpy64, relative_error
from hypothesis import given
from hypothesis import strategies as st
from problems import File, Ranks, cuts, problems
from sklearn.covariance import ledoit_wolf_shrinkage, oas

import mfac_core as mfac
from mfac_core._rows.base import Rows
from mfac_core.testing import dense_inverse

DECADES = np.logspace(-6, 1, 8)


def dense_score(g, damping):
    """The mean of log det F₋ᵢ + gᵢᵀF₋ᵢ⁻¹gᵢ, one row after the other."""
    m, d = g.shape
    scores = []
    for i in range(m):
        rest = np.delete(g, i, 0)
        fisher = damping * np.eye(d) + rest.T @ rest / m
        scores.append(np.linalg.slogdet(fisher)[1] + g[i] @ np.linalg.solve(fisher, g[i]))
    return np.mean(scores)


def correlated(rng, m=15, d=40, rank=3):
    """Rows of a common subspace and noise."""
    strong = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, d))
    return strong + 0.3 * rng.standard_normal((m, d))


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (1, 5), (5, 1)])
def test_the_curve_is_the_dense_one(backend, dtype, shape, rng):
    g = backend.asarray(0.3 * rng.standard_normal(shape), dtype)
    wide = numpy64(g)
    curve = mfac.damping_curve(g, dampings=DECADES)
    expected = [dense_score(wide, damping) for damping in DECADES]
    # The Gram's rounding over λ, in the quadratic form; and the dense oracle's own condition.
    unit = 2.0**-21 if dtype == "float32" else 2.0**-45
    scale = 1.0 + np.sum(wide**2) / DECADES
    assert np.all(np.abs(curve.scores - expected) <= unit * scale * (1.0 + np.abs(expected)))


def test_the_best_is_that_of_a_fine_search(rng):
    g = correlated(rng)
    best = mfac.choose_damping(g)
    around = best * np.logspace(-0.3, 0.3, 601)
    finest = around[np.argmin([dense_score(g, damping) for damping in around])]
    # A parabola over a fifth of a power of ten misses by the third derivative: a tenth of a step.
    assert abs(np.log10(best / finest)) <= 0.01


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10))
def test_scale_order_and_rotation(method, scale, seed):
    rng = np.random.default_rng(seed)
    g = correlated(rng)
    damping = mfac.choose_damping(g, method=method)
    rotation = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    assert mfac.choose_damping(scale * g, method=method) == pytest.approx(
        scale**2 * damping, rel=1e-9
    )
    others = g[rng.permutation(15)], g[:, rng.permutation(40)], g @ rotation
    for other in others:
        assert mfac.choose_damping(other, method=method) == pytest.approx(damping, rel=1e-9)


def test_duplicates_of_every_row_as_the_definition_says(rng):
    """Each row then has its twin among the others, and the least λ predicts it best."""
    g = np.repeat(correlated(rng), 2, axis=0)
    curve = mfac.damping_curve(g, dampings=DECADES)
    expected = [dense_score(g, damping) for damping in DECADES]
    np.testing.assert_allclose(curve.scores, expected, rtol=1e-7)


def test_ledoit_wolf_and_oas_are_scikit_learns(rng):
    for shape in [(30, 8), (10, 50)]:
        g = rng.standard_normal(shape) * np.linspace(0.2, 2.0, shape[1])
        mean = np.mean(g * g)
        for method, share in [
            ("ledoit-wolf", ledoit_wolf_shrinkage(g, assume_centered=True)),
            ("oas", oas(g, assume_centered=True)[1]),
        ]:
            expected = mean * share / (1.0 - share) if share < 1.0 else mean * 100.0
            assert mfac.choose_damping(g, method=method) == pytest.approx(expected, rel=1e-9)


def test_one_row():
    """F₋₁ is λI: d log λ + ‖g‖²/λ is lowest at ‖g‖²/d."""
    g = np.array([[3.0, 4.0, 0.0, 0.0]])
    step = np.log(10.0) / 10.0  # of log λ, in which a parabola misses x + e⁻ˣ by a sixth of h²
    assert mfac.choose_damping(g) == pytest.approx(25.0 / 4.0, rel=step**2 / 5.0)


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
def test_equal_rows_give_a_number_without_a_warning(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damping = mfac.choose_damping(np.ones((4, 9)), method=method)
    assert 0.0 < damping < np.inf


def test_auto_leaves_the_digits_that_products_need(rng):
    """Even of rows that predict one another without an error."""
    g = np.ones((6, 1)) * rng.standard_normal(50_000, dtype=np.float32)
    x = rng.standard_normal(50_000, dtype=np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse = mfac.InverseFisher(g, damping="auto")
        y = inverse @ x
    row, wide, damping = g[0].astype(float), x.astype(float), inverse.damping
    expected = (wide - row * (row @ wide) / (damping + row @ row)) / damping
    assert relative_error(y, expected) <= 1e-5


def test_what_it_refuses(rng):
    with pytest.raises(ValueError, match="must not all be zero"):
        mfac.choose_damping(np.zeros((3, 4)))
    with pytest.raises(ValueError, match="method must be one of"):
        mfac.choose_damping(np.ones((3, 4)), method="magic")
    with pytest.raises(ValueError, match="at index 1"):
        mfac.choose_damping(np.array([[1.0, 2.0], [np.nan, 1.0]]))
    with pytest.raises(ValueError, match="at least one"):
        mfac.damping_curve(np.ones((3, 4)), dampings=[])


def test_columns_over_ranks(rng):
    g = correlated(rng)
    ranks = Ranks(2)
    parts = [g[:, :11], g[:, 11:]]
    found = ranks.run(lambda rank: mfac.choose_damping(parts[rank], reduce=ranks.reduce))
    assert found == pytest.approx([mfac.choose_damping(g)] * 2, rel=1e-9)


def test_auto_is_what_choose_damping_says(rng):
    g, x = correlated(rng), rng.standard_normal(40)
    chosen = mfac.choose_damping(g)
    inverse = mfac.InverseFisher(g, damping="auto")
    assert inverse.damping == mfac.EmpiricalFisher(g, damping="auto").damping == chosen
    assert mfac.EmpiricalFisher(g, damping="auto").inverse().damping == chosen
    expected = mfac.ihvp(g, x, damping=chosen)
    np.testing.assert_array_equal(inverse @ x, expected)
    np.testing.assert_array_equal(mfac.ihvp(g, x, damping="auto"), expected)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_another_damping_is_as_if_made_anew(dtype, rng):
    g = correlated(rng).astype(dtype)
    x = rng.standard_normal(40).astype(dtype)
    inverse = mfac.InverseFisher(g, damping=1.0)
    for damping in (1e-7, 10.0, 0.1):  # float32 will not do for the first
        other = inverse.with_damping(damping)
        assert other.damping == damping
        dense = damping * np.eye(40) + g.astype(float).T @ g.astype(float) / len(g)
        bound = 1e-5 if dtype == "float32" else 2.0**-52 * np.linalg.cond(dense)
        expected = np.linalg.solve(dense, x.astype(float))
        assert np.linalg.norm(other @ x - expected) <= bound * np.linalg.norm(expected)
    assert inverse.damping == 1.0


def test_another_damping_reads_no_gradients_again(rng):
    class Counted:
        """A file that counts what is read of it."""

        def __init__(self, array):
            self._array, self.shape, self.dtype, self.reads = array, array.shape, array.dtype, 0

        def __getitem__(self, key):
            self.reads += 1
            return self._array[key]

    source = Counted(correlated(rng))
    inverse = mfac.InverseFisher(source, damping=1.0)
    reads = source.reads
    for damping in np.logspace(-6, 2, 9):
        inverse.with_damping(damping).logdet()
    assert source.reads == reads


# -- blocks and layers ---------------------------------------------------------------------


def dense_sum(g, lengths, damping):
    """The score of a block-diagonal F: that of independent blocks."""
    parts = np.split(g, np.cumsum(lengths)[:-1], axis=1)
    return sum(dense_score(part, damping) for part in parts)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("lengths", [[5] * 4, [3, 12, 1, 4], [20]])
@pytest.mark.parametrize("m", [4, 9, 30])
def test_the_curve_of_blocks_is_the_sum_of_dense_ones(backend, dtype, lengths, m, rng):
    g = backend.asarray(0.3 * rng.standard_normal((m, 20)), dtype)
    wide = numpy64(g)
    curve = mfac.damping_curve(g, block_size=lengths, dampings=DECADES)
    expected = np.array([dense_sum(wide, lengths, damping) for damping in DECADES])
    bound = 2.0**-45 * (1.0 + np.sum(wide**2) / DECADES) * (1.0 + np.abs(expected))
    assert np.all(np.abs(curve.scores - expected) <= bound)
    assert mfac.choose_damping(g, block_size=lengths, dampings=DECADES) == curve.best
    inverse = mfac.BlockInverseFisher(g, block_size=lengths, damping="auto")
    assert inverse.damping == mfac.choose_damping(g, block_size=lengths)


@given(data=st.data(), seed=st.integers(0, 5))
def test_any_cut_of_any_gradients(data, seed):
    g, damping = data.draw(problems(max_rows=7, max_params=15))
    block_size, lengths = data.draw(cuts(g.shape[1]))
    if not g.any():
        with pytest.raises(ValueError, match="must not all be zero"):
            mfac.damping_curve(g, block_size=block_size)
        return
    curve = mfac.damping_curve(g, block_size=block_size, dampings=[damping])
    expected = dense_sum(g, lengths, damping)
    bound = 2.0**-40 * (1.0 + np.sum(g**2) / damping) * (1.0 + abs(expected))
    assert abs(curve.scores[0] - expected) <= bound


def test_long_blocks_and_many_short_ones(rng, monkeypatch):
    """A long block goes by a Gram of its own; of very many short ones some stand for all."""
    g = correlated(rng, m=6, d=60)
    lengths = [40, 4, 4, 4, 4, 4]
    expected = mfac.damping_curve(g, block_size=lengths, dampings=DECADES).scores
    monkeypatch.setattr("mfac_core._operators.spectra.WIDE_BYTES", 8 * 6 * 30)
    found = mfac.damping_curve(g, block_size=lengths, dampings=DECADES).scores
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    monkeypatch.setattr("mfac_core._operators.spectra.MOST_BLOCKS", 10)
    alike = np.tile(g[:, :4], (1, 45))
    one = mfac.damping_curve(g[:, :4], block_size=4, dampings=DECADES).scores
    many = mfac.damping_curve(alike, block_size=4, dampings=DECADES).scores
    np.testing.assert_allclose(many, 45 * one, rtol=1e-12)
    source = File(g[:, :20])
    assert mfac.choose_damping(source, block_size=4) == mfac.choose_damping(g[:, :20], block_size=4)


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 10))
def test_scale_order_and_rotation_within_blocks(method, scale, seed):
    rng = np.random.default_rng(seed)
    g = correlated(rng)
    sizes = [8, 20, 12]
    damping = mfac.choose_damping(g, block_size=sizes, method=method)
    rotation = scipy.linalg.block_diag(
        *(np.linalg.qr(rng.standard_normal((n, n)))[0] for n in sizes)
    )
    swapped = np.concatenate([g[:, 28:], g[:, :28]], axis=1)
    for other, factor, lengths in [
        (scale * g, scale**2, sizes),
        (g[rng.permutation(15)], 1.0, sizes),
        (g @ rotation, 1.0, sizes),
        (swapped, 1.0, [12, 8, 20]),
    ]:
        found = mfac.choose_damping(other, block_size=lengths, method=method)
        assert found == pytest.approx(factor * damping, rel=1e-9)


def test_a_weak_block_does_not_choose_for_the_others(rng):
    """Of blocks shorter than the rows are many: no λ below the error of an element of GᵀG/m."""
    g = rng.standard_normal((50, 40)) * np.repeat([1.0, 1e-4], 20)
    least = np.mean(g**2) / np.sqrt(50)
    assert mfac.choose_damping(g, block_size=10) == pytest.approx(least, rel=0.3)
    dampings = np.logspace(-12, 0, 25)
    assert mfac.choose_damping(g, block_size=10, dampings=dampings) <= 1e-6


def test_duplicates_in_blocks_as_the_definition_says(rng):
    g = np.repeat(correlated(rng, m=6, d=12), 2, axis=0)
    curve = mfac.damping_curve(g, block_size=[5, 7], dampings=DECADES)
    expected = [dense_sum(g, [5, 7], damping) for damping in DECADES]
    np.testing.assert_allclose(curve.scores, expected, rtol=1e-7)


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
@pytest.mark.parametrize("shape", [(1, 9), (4, 9), (9, 4)])
def test_equal_rows_and_dead_blocks_give_a_number_without_a_warning(method, shape):
    g = np.zeros((shape[0], 12))
    g[:, : shape[1]] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        damping = mfac.choose_damping(g, block_size=3, method=method)
    assert 0.0 < damping < np.inf


def test_shrinkage_in_blocks_is_the_one_of_all_where_there_is_one(rng):
    g = correlated(rng)
    for method in ("leave-one-out", "ledoit-wolf", "oas"):
        whole = mfac.choose_damping(g, method=method)
        assert mfac.choose_damping(g, block_size=40, method=method) == pytest.approx(
            whole, rel=1e-9
        )


def test_ledoit_wolf_in_blocks_is_what_its_sums_say(rng):
    """ρ = Σ variances / Σ squared distances from the common μI, summed over blocks, row by row."""
    g, lengths = correlated(rng), [10, 25, 5]
    m, mean = len(g), np.mean(g**2)
    variance = distance = 0.0
    for part in np.split(g, np.cumsum(lengths)[:-1], axis=1):
        s = part.T @ part / m
        variance += sum(np.sum((np.outer(row, row) - s) ** 2) for row in part) / m**2
        distance += np.sum((s - mean * np.eye(len(s))) ** 2)
    share = variance / distance
    found = mfac.choose_damping(g, block_size=lengths, method="ledoit-wolf")
    assert found == pytest.approx(mean * share / (1.0 - share), rel=1e-9)


def test_a_damping_of_each_layer(rng):
    g = correlated(rng) * np.repeat([1.0, 10.0, 0.1], [10, 24, 6])
    parts = np.split(g, [10, 34], axis=1)
    for method in ("leave-one-out", "ledoit-wolf", "oas"):
        found = mfac.choose_damping(g, layers=[(2, 5), 24, 6], method=method)
        expected = [mfac.choose_damping(part, method=method) for part in parts]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    within = [mfac.choose_damping(part, block_size=4) for part in parts]
    assert list(mfac.choose_damping(g, layers=[10, 24, 6], block_size=4)) == within
    cut = [4, 4, 2, *[4] * 6, 4, 2]
    assert list(mfac.choose_damping(g, layers=[10, 24, 6], block_size=cut)) == within
    curves = mfac.damping_curve(g, layers=[10, 24, 6], block_size=4)
    assert [curve.best for curve in curves] == within


def test_what_layers_and_blocks_refuse(rng):
    g = correlated(rng)
    with pytest.raises(ValueError, match="layers must sum to the number of weights 40, got 30"):
        mfac.choose_damping(g, layers=[10, (4, 5)])
    with pytest.raises(ValueError, match="no block across two layers, got one across column 10"):
        mfac.choose_damping(g, layers=[10, 30], block_size=[8, 4, 28])
    with pytest.raises(ValueError, match="block_size must sum to the number of parameters 40"):
        mfac.choose_damping(g, block_size=[8, 4])
    g[:, 10:] = 0.0
    with pytest.raises(ValueError, match=r"layers\[1\]: gradients must not all be zero"):
        mfac.choose_damping(g, layers=[10, 30])
    g[3, 2] = np.nan
    for method in ("leave-one-out", "oas"):
        with pytest.raises(ValueError, match="at index 3"):
            mfac.choose_damping(g, block_size=5, method=method)


@pytest.mark.parametrize("method", ["leave-one-out", "ledoit-wolf", "oas"])
def test_blocks_and_layers_over_ranks(method, rng):
    g = correlated(rng)
    ranks = Ranks(2)
    parts, sizes = [g[:, :11], g[:, 11:]], [[5, 6], [9, 20]]

    def shared(rank):
        options = {"block_size": sizes[rank], "reduce": ranks.reduce}
        if method == "leave-one-out":
            auto = mfac.BlockInverseFisher(parts[rank], damping="auto", **options).damping
            assert auto == mfac.choose_damping(parts[rank], **options)
        return mfac.choose_damping(parts[rank], method=method, **options)

    whole = mfac.choose_damping(g, block_size=[5, 6, 9, 20], method=method)
    assert ranks.run(shared) == pytest.approx([whole] * 2, rel=1e-9)
    layers = ranks.run(
        lambda rank: list(
            mfac.choose_damping(parts[rank], layers=sizes[rank], method=method, reduce=ranks.reduce)
        )
    )
    expected = mfac.choose_damping(g, layers=[5, 6, 9, 20], method=method)
    np.testing.assert_allclose(layers[0] + layers[1], expected, rtol=1e-9)

    def with_a_nan(rank):
        bad = parts[rank].copy()
        bad[2, 3] = np.nan if rank else bad[2, 3]
        return mfac.choose_damping(bad, block_size=sizes[rank], method=method, reduce=ranks.reduce)

    assert all("at index 2" in str(error) for error in ranks.run(with_a_nan))


def test_fewer_parameters_than_rows_go_by_their_own_matrix(rng):
    g = rng.standard_normal((40, 6))
    inverse = mfac.InverseFisher(g, damping="auto")
    assert inverse.damping == mfac.choose_damping(g)
    fine = inverse.damping * np.logspace(-0.3, 0.3, 601)
    finest = fine[np.argmin([dense_score(g, damping) for damping in fine])]
    assert abs(np.log10(inverse.damping / finest)) <= 0.01


# -- a Gram that is known ------------------------------------------------------------------


@pytest.fixture
def formed(monkeypatch):
    """Count the Grams that are formed."""
    count, gram = [], Rows.gram

    def counted(self, **options):
        count.append(options)
        return gram(self, **options)

    monkeypatch.setattr(Rows, "gram", counted)
    return count


def of_many_lengths(rng, m=20, d=300):
    """float32 rows such as samples' gradients are: norms over three decades, and common parts."""
    g = correlated(rng, m, d, 8) * np.logspace(-3, 0, m)[:, None]
    return g.astype(np.float32)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "jax"], ids=lambda b: b.name)
def test_an_exact_gram_is_never_formed_anew(backend, rng, formed):
    g = of_many_lengths(rng)
    wide = g.astype(float)
    x = wide[-1] / np.linalg.norm(wide[-1]) + 1e-3 * rng.standard_normal(300)
    own, y = backend.asarray(g), backend.asarray(x.astype(np.float32))
    gram = backend.asarray(wide @ wide.T, "float64")
    rounded = mfac.InverseFisher.from_gram(own, gram, damping=1e-7)
    assert relative_error(rounded @ y, dense_inverse(g, damping=1e-7) @ numpy64(y)) <= 1e-5
    assert len(formed) == 1  # it cannot know better
    formed.clear()
    inverse = mfac.InverseFisher.from_gram(own, gram, damping=1e-7, exact=True)
    for damping in (1e-7, 1e-1, 1e-5, 1e-8):
        other = inverse.with_damping(damping)
        for asked in (inverse, other):
            dense = dense_inverse(g, damping=asked.damping)
            assert relative_error(asked @ y, dense @ numpy64(y)) <= 1e-5
            assert relative_error(asked.diagonal(), np.diagonal(dense)) <= 1e-5
    assert formed == []


def test_many_dampings_form_one_gram_and_one_of_float64(rng, formed):
    g = of_many_lengths(rng)
    x = g[-1] + 0.001 * rng.standard_normal(300, dtype=np.float32)
    inverse = mfac.InverseFisher(g, damping=10.0)
    for damping in np.logspace(0, -8, 9):
        dense = dense_inverse(g, damping=damping)
        other = inverse.with_damping(damping)
        assert relative_error(other @ x, dense @ x.astype(float)) <= 1e-5
        inverse = other
    assert len(formed) == 2


def test_from_gram_chooses_by_the_gram(rng):
    g = correlated(rng)
    inverse = mfac.InverseFisher.from_gram(g, g @ g.T, damping="auto")
    assert inverse.damping == pytest.approx(mfac.choose_damping(g), rel=1e-9)
