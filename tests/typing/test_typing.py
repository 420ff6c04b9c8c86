"""Type checkers as users run them, on scripts that say what they must find.

A line that ends in ``# wrong`` must be reported, and no other; ``assert_type`` says what a call
gives.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def wrong(script):
    lines = (HERE / script).read_text().splitlines()
    return {i for i, line in enumerate(lines, 1) if line.endswith("# wrong")}


def output_of(*command):
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout


def test_mypy_finds_what_is_wrong_and_nothing_else():
    """With PyTorch skipped, as in pyproject.toml: reading it takes half a minute."""
    pytest.importorskip("mypy", reason="mypy is in the extra lint")
    found = output_of("mypy", "--no-pretty", "--output=json", str(HERE / "arrays.py"))
    errors = [json.loads(line) for line in found.splitlines()]
    assert {e["line"] for e in errors if e["severity"] == "error"} == wrong("arrays.py"), found


def test_pyright_finds_what_is_wrong_and_nothing_else():
    pytest.importorskip("basedpyright", reason="basedpyright is in the extra lint")
    scripts = ("arrays.py", "tensors.py")
    found = output_of(
        *("basedpyright", "--outputjson", "--pythonpath", sys.executable),
        *(str(HERE / script) for script in scripts),
    )
    errors = json.loads(found)["generalDiagnostics"]
    for script in scripts:
        lines = {
            e["range"]["start"]["line"] + 1
            for e in errors
            if e["severity"] == "error" and Path(e["file"]).name == script
        }
        assert lines == wrong(script), found
