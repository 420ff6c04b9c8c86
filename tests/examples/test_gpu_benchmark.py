"""The benchmark of a card, as far as it goes without one."""

import json
import os
import re
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
import scipy.linalg
from scripts import EXAMPLES, load

from mfac_core.testing import dense_inverse


@pytest.fixture
def gpu():
    return load("benchmarks/gpu.py")


def test_each_section_is_written_and_a_failure_stops_no_other(gpu, tmp_path, capsys):
    output, cleaned = tmp_path / "gpu.json", []
    row = {"what": "it", "ms": 1.0, "host_ms": 0.5}

    def fails():
        assert json.loads(output.read_text())["results"] == [row]  # the first is on disk
        raise MemoryError("out of memory")

    chosen = [("one", lambda: [row]), ("two", fails), ("three", lambda: [row])]
    results = gpu.measure(chosen, {"device": "none"}, output, lambda: cleaned.append(None))
    assert len(results) == 2
    assert len(cleaned) == 3
    report = json.loads(output.read_text())
    assert report["device"] == "none"
    assert report["results"] == [row, row]
    assert list(report["failures"]) == ["two"]
    assert "MemoryError: out of memory" in report["failures"]["two"]
    assert "two failed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def scipy_as_cupyx(monkeypatch):
    cupyx = types.SimpleNamespace(scipy=types.SimpleNamespace(linalg=scipy.linalg))
    for name, module in (("", cupyx), (".scipy", cupyx.scipy), (".scipy.linalg", scipy.linalg)):
        monkeypatch.setitem(sys.modules, f"cupyx{name}", module)


def host_card(gpu, monkeypatch):
    """A card whose arrays are NumPy's; what only kernels do is checked for its arguments."""

    class HostCard(gpu.Card):
        def __init__(self):
            self.cupy = np
            self.bytes_per_ms = self.l2_bytes_per_ms = self.l2_bytes = 1.0
            self.gemm = {"float32": 2.0, "float64": 1.0}

        def time(self, act):
            act()
            return 1.0, 0.5

        def random(self, m, d, dtype):
            return np.random.default_rng(0).standard_normal((m, d)).astype(dtype)

        def free(self):
            return 10**10

    for module, name in (
        (gpu.rows, "exchange"),
        (gpu.dense, "replace"),
        (gpu.cuda_blocks, "inverses"),
    ):
        monkeypatch.setattr(module, name, mock.create_autospec(getattr(module, name)))
    monkeypatch.setattr(gpu, "torch_on_device", lambda: None)
    scipy_as_cupyx(monkeypatch)
    return HostCard()


SECTIONS = {
    "passes": (6, 50, "float32"),
    "window_step": (6, 50, "float32"),
    "dual_update": (6,),
    "small_blocks": (6, 4, 3),
    "elements": (6, 50, 7, "float32"),
    "sparse_passes": (3, 5000),
    "static_setup": (6, 50),
    "grams": (6, 600),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_asks_for_what_there_is(gpu, monkeypatch, section):
    """Every act runs, and so does every other way of doing the same."""
    measured = getattr(gpu, section)(host_card(gpu, monkeypatch), *SECTIONS[section])
    assert measured
    assert all(row["ms"] == 1.0 for row in measured)
    assert gpu.markdown(measured).count("\n") == len(measured) + 1


def test_each_section_is_measured(gpu, monkeypatch):
    """No section is left out of a run, quick or whole; and on tiny sizes each has its turn."""
    card = host_card(gpu, monkeypatch)
    seen = set()
    for section in SECTIONS:
        monkeypatch.setattr(gpu, section, lambda *_, name=section: seen.add(name) or [])
    for quick in (True, False):
        for _, act in gpu.sections(card, quick=quick):
            act()
        assert seen == set(SECTIONS)
        seen.clear()


def test_what_is_done_by_hand_is_the_product_with_the_inverse(gpu, rng, monkeypatch):
    scipy_as_cupyx(monkeypatch)
    g, x = rng.standard_normal((6, 20)), rng.standard_normal(20)
    acts = gpu.by_hand(types.SimpleNamespace(cupy=np), g, x)
    assert len(acts) == 2
    for act in acts.values():
        y = act()
        assert (g[3] == x).all()
        np.testing.assert_allclose(y, dense_inverse(g, damping=1e-3) @ x, rtol=1e-8, atol=1e-8)


def test_a_share_of_the_floor_is_of_a_hundred_per_cent(gpu):
    """As long as its floor: all of the card's rate."""
    card = types.SimpleNamespace(
        random=lambda *_: None,
        gemm={"float32": 2.0 * 8 * 4 * 4},
        compare=lambda what, act, floor, others: [{"ms": floor, "floor_ms": floor}],
    )
    assert gpu.static_setup(card, 4, 8)[0]["share_of_gemm_rate"] == 1.0
    card.gemm["float32"] *= 2
    assert gpu.static_setup(card, 4, 8)[0]["floor_ms"] == 0.5


def test_all_stages_of_a_first_card_run_within_ten_minutes(tmp_path):
    """Each has its limit, whatever the one before has said, and its log before the next begins."""
    log = tmp_path / "asked"
    for name, does in (("timeout", f'echo "$@" >>{log}; echo told; exit 3'), ("ncu", "exit 0")):
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    command = ["bash", str(EXAMPLES / "benchmarks/first_card.sh"), str(tmp_path / "out")]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert run.stderr == ""
    asked = log.read_text()
    limits = re.findall(r"^(?:--kill-after=(\d+) )?(\d+) ", asked, re.M)
    assert len(limits) == len(asked.splitlines()) == 7
    assert sum(int(more or 0) + int(limit) for more, limit in limits) <= 600
    stages = (tmp_path / "out/stages.txt").read_text()
    names = ["smoke", "tests", "sanitizer", "profile", "benchmark"]
    assert [line.split()[:3] for line in stages.splitlines()] == [[n, "exit", "3"] for n in names]
    for name in names:
        assert (tmp_path / f"out/{name}.log").read_text() == "told\n"
    assert "-m gpu" in asked
    assert "benchmarks/gpu.py --output" in asked
