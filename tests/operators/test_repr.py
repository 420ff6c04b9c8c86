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


def test_what_else_people_hold():
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    from mfac_core.influence import Influence
    from mfac_core.torch import MFAC, ModelGradients, Pruner

    def loss(model, x):
        return model(x).square().mean()

    model = torch.nn.Linear(8, 4)
    batches = list(torch.randn(3, 16, 8))
    pruner = Pruner(model, loss, batches)
    pruner.step(0.5)
    shards = mfac.RowShards([G[:1], G[1:]])
    said = {
        pruner: "<Pruner of 32 weights in 1 parameters, 16 kept, after 1 steps>",
        ModelGradients(model, loss, batches): "<ModelGradients of 3 rows of 36 parameters with "
        "dtype torch.float32>",
        Influence(G, damping=0.5): "<Influence of 3 samples on 4 parameters, damping 0.5>",
        shards: "<RowShards of 2 shards, 3 rows of 4 parameters with dtype float32>",
        mfac.SparseSlidingInverseFisher(4, 8, damping=0.5, density=0.25): "<4x4 Sparse"
        "SlidingInverseFisher of 0 of 8 gradients, damping 0.5, density 0.25, with dtype None>",
    }
    for what, words in said.items():
        assert repr(what) == words
    optimizer = MFAC(model.parameters(), density=0.1)
    assert "MFAC (\n    window_size: 64\n    density: 0.1\nParameter Group 0" in repr(optimizer)
