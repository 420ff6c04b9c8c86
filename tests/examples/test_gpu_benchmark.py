"""The benchmark of a card, as far as it goes without one."""

import json
import sys
import types

import numpy as np
import pytest
import scipy.linalg
from scripts import load

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


def test_what_is_done_by_hand_is_the_product_with_the_inverse(gpu, rng, monkeypatch):
    cupyx = types.SimpleNamespace(scipy=types.SimpleNamespace(linalg=scipy.linalg))
    for name, module in (("", cupyx), (".scipy", cupyx.scipy), (".scipy.linalg", scipy.linalg)):
        monkeypatch.setitem(sys.modules, f"cupyx{name}", module)
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
