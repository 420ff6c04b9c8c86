"""Columns spread over ranks: threads for properties, real engines for the examples."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import BACKENDS, numpy64, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Ranks, problems
from scripts import EXAMPLES

import mfac_core as mfac
from mfac_core.testing import dense_inverse, error_bound


def columns(d, size, rank):
    return slice(rank * d // size, (rank + 1) * d // size)


@settings(max_examples=25)
@given(problem=problems(), size=st.integers(1, 3))
@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[1], BACKENDS[3]], ids=lambda b: b.name)
def test_the_static_inverse(backend, problem, size):
    gradients, damping = problem
    gradients = np.concatenate([gradients, gradients[:, ::-1], gradients], axis=1)
    d = gradients.shape[1]
    x = np.linspace(-1.0, 1.0, d)
    ranks = Ranks(size)

    def body(rank):
        mine = columns(d, size, rank)
        g = backend.asarray(gradients[:, mine], "float64")
        inverse = mfac.InverseFisher(g, damping=damping, reduce=ranks.reduce)
        part = backend.asarray(x[mine], "float64")
        return (
            numpy64(inverse @ part),
            numpy64(inverse.matvec(part, refine=1)),
            numpy64(inverse.diagonal()),
            inverse.logdet(),
            inverse.quadratic(part),
            numpy64(inverse.power(0.5) @ part),
            numpy64(inverse.dual).tobytes(),
        )

    products, refined, diagonals, logdets, quadratics, roots, duals = zip(
        *ranks.run(body), strict=True
    )
    dense = dense_inverse(gradients, damping=damping)
    bound = error_bound(gradients, damping=damping)
    values, vectors = np.linalg.eigh(dense)
    assert relative_error(np.concatenate(products), dense @ x) <= bound
    assert relative_error(np.concatenate(refined), dense @ x) <= bound
    assert relative_error(np.concatenate(diagonals), np.diagonal(dense)) <= bound
    root = (vectors * np.sqrt(values)) @ (vectors.T @ x)
    assert relative_error(np.concatenate(roots), root) <= bound
    assert abs(logdets[0] - np.log(values).sum()) <= bound * np.sum(1 + np.abs(np.log(values)))
    assert abs(quadratics[0] / (x @ dense @ x) - 1) <= bound
    assert len(set(duals)) == len(set(logdets)) == len(set(quadratics)) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sliding_window(rng, dtype):
    rows = rng.standard_normal((20, 31)).astype(dtype)
    ranks = Ranks(3)

    def body(rank):
        mine = columns(31, 3, rank)
        window = mfac.SlidingInverseFisher(
            mine.stop - mine.start, 6, damping=1e-3, reduce=ranks.reduce
        )
        for row in rows:
            step = window.append_matvec(row[mine])
        return step, window.dual.tobytes(), window.logdet()

    steps, duals, logdets = zip(*ranks.run(body), strict=True)
    alone = mfac.SlidingInverseFisher(31, 6, damping=1e-3)
    for row in rows:
        expected = alone.append_matvec(row)
    bound = 2 * error_bound(rows[-6:], damping=1e-3)
    assert relative_error(np.concatenate(steps), expected) <= bound
    assert len(set(duals)) == len(set(logdets)) == 1


def test_the_block_form(rng):
    g, x = rng.standard_normal((6, 20)), rng.standard_normal(20)
    ranks = Ranks(2)

    def body(rank):
        mine = columns(20, 2, rank)
        blocks = mfac.BlockInverseFisher(g[:, mine], damping=0.1, block_size=5, reduce=ranks.reduce)
        return blocks.logdet(), blocks.quadratic(x[mine])

    alone = mfac.BlockInverseFisher(g, damping=0.1, block_size=5)
    for logdet, quadratic in ranks.run(body):
        assert logdet == pytest.approx(alone.logdet(), rel=1e-9)
        assert quadratic == pytest.approx(alone.quadratic(x), rel=1e-9)


def test_draws_over_ranks_share_what_they_must(rng):
    g = rng.standard_normal((4, 6))
    ranks = Ranks(2)

    def body(rank):
        inverse = mfac.InverseFisher(g[:, columns(6, 2, rank)], damping=0.3, reduce=ranks.reduce)
        return inverse.sample(20_000, rank)

    draws = np.concatenate(ranks.run(body), axis=1)
    dense = dense_inverse(g, damping=0.3)
    assert relative_error(draws.T @ draws / len(draws), dense) <= 0.15

    def same_seed(rank):
        inverse = mfac.InverseFisher(g[:, columns(6, 2, rank)], damping=0.3, reduce=ranks.reduce)
        return inverse.sample(10, 0)

    assert all("rng must differ" in str(result) for result in ranks.run(same_seed))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_a_gradient_refused_on_one_rank_is_refused_on_all(rng, value):
    g = rng.standard_normal((4, 6))
    g[2, 5] = value
    ranks = Ranks(2)

    def static(rank):
        mfac.InverseFisher(g[:, columns(6, 2, rank)], damping=0.3, reduce=ranks.reduce)

    def sliding(rank):
        mine = columns(6, 2, rank)
        window = mfac.SlidingInverseFisher(3, 4, damping=0.3, reduce=ranks.reduce)
        window.append(g[0, mine])
        try:
            window.append(g[2, mine])
        except ValueError as error:
            assert len(window) == 1
            window.append(g[1, mine])  # and all of them go on together
            return error

    for body in (static, sliding):
        for result in ranks.run(body):
            assert isinstance(result, ValueError)
            assert "finite" in str(result) or "overflow" in str(result)


def test_ranks_must_have_the_same_rows(rng):
    ranks = Ranks(2)

    def body(rank):
        g = rng.standard_normal((4 + rank, 6))
        mfac.InverseFisher(g, damping=0.3, reduce=ranks.reduce)

    for result in ranks.run(body):
        assert isinstance(result, ValueError)
        assert "same number of rows on every rank" in str(result)


def test_a_reduce_that_returns_something_else_is_refused(rng):
    with pytest.raises(ValueError, match="reduce must return the sum over ranks"):
        mfac.InverseFisher(
            rng.standard_normal((4, 6)),
            damping=0.3,
            reduce=lambda x: x if x.ndim == 1 else x.sum(),
        )


def run(*command):
    environment = {
        "PATH": str(Path(sys.executable).parent) + ":/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def errors(printed):
    return [float(number) for number in re.findall(r"\d\.\de[+-]\d\d", printed)]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_mpi(size):
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    printed = run(mpiexec, "-n", str(size), sys.executable, str(EXAMPLES / "ranks" / "mpi.py"))
    assert f"{size} ranks" in printed
    assert len(errors(printed)) == 5
    assert max(errors(printed)) <= 1e-9
    assert "the same bit for bit: True" in printed
    assert f"refused by {size} of {size}" in printed


@pytest.mark.parametrize("name", ["torch_gloo.py", "torch_zero.py"])
def test_torch(name):
    script = str(EXAMPLES / "ranks" / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", script]
    found = errors(run(*command))
    assert len(found) == 2
    assert max(found) <= 1e-5


def test_jax_sharding():
    printed = run(sys.executable, str(EXAMPLES / "ranks" / "jax_sharding.py"))
    assert "2 devices, the product lives on 2" in printed
    assert max(errors(printed)) <= 1e-5
