"""The examples run, in a short form, and print what they promise."""

import importlib.util
from pathlib import Path

import pytest

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
