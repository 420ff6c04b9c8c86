"""The examples run, in a short form, and print what they promise."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from mfac_core.testing import dense_inverse

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart(tmp_path, capsys):
    load("quickstart.py").main(["--quick", "--output", str(tmp_path / "picture.png")])
    printed = capsys.readouterr().out
    assert all(f"\n{part}. " in printed for part in (1, 2, 3))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["cpu.py"])
def test_benchmarks(name, capsys):
    load(f"benchmarks/{name}").main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| what | against | measured |"
    assert len(lines) > 5


def test_the_benchmark_of_a_card_says_what_it_needs():
    import cupy

    if cupy.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        load("benchmarks/gpu.py").main(["--quick"])


def test_the_benchmarks_block_recursion_is_the_inverse(rng):
    g = rng.standard_normal((6, 12))
    v, q = load("benchmarks/cpu.py").block_recursion(g, 4, 0.1)
    for block in range(3):
        dense = dense_inverse(g[:, 4 * block : 4 * block + 4], damping=0.1)
        recursion = np.eye(4) / 0.1 - (v[block].T / q[block]) @ v[block]
        assert np.abs(recursion - dense).max() <= 1e-12
