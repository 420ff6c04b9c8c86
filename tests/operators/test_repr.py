"""What operators say of themselves."""

import numpy as np
import pytest

import mfac_core as mfac

G = np.ones((3, 4), np.float32)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (mfac.InverseFisher(G, damping=0.5), "InverseFisher of 3 gradients, damping 0.5,"),
        (mfac.EmpiricalFisher(G, damping=0.5), "EmpiricalFisher of 3 gradients, damping 0.5,"),
        (
            mfac.BlockInverseFisher(G, damping=0.5, block_size=2),
            "BlockInverseFisher of 2 blocks, damping 0.5,",
        ),
    ],
)
def test_the_size_and_what_it_is_of(operator, words):
    assert repr(operator) == f"<4x4 {words} with dtype float32>"


def test_how_full_a_window_is():
    window = mfac.SlidingInverseFisher(4, 64, damping=0.5)
    assert "of 0 of 64 gradients, damping 0.5," in repr(window)
    window.append(G[0])
    assert "of 1 of 64 gradients, damping 0.5," in repr(window)
