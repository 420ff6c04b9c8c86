# pyright: standard
"""As a user's editor reads it: what each call gives, and which ones are wrong. Never run."""

from pathlib import Path
from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import mfac_core as mfac
from mfac_core.influence import Influence
from mfac_core.pruning import prune, saliency

Array = np.ndarray[Any, Any]
Double = NDArray[np.float64]

G, x = np.ones((3, 4), dtype=np.float32), np.ones(4)
inverse = mfac.InverseFisher(G, damping=1e-3)
assert_type(inverse, mfac.InverseFisher[Array])
assert_type(inverse @ x, Array)
assert_type(x @ inverse, Array)
assert_type(inverse.matvec([x, x], refine=1), list[Array])
assert_type(inverse.diagonal(), Array)
assert_type(inverse.entries(0, [1, 2]), Array)
assert_type(inverse.power(0.5).column(3), Array)
assert_type(mfac.ihvp(G, x, damping="auto"), Array)
assert_type(mfac.InverseFisher([G, G], damping=1), mfac.InverseFisher[Array])
assert_type(mfac.InverseFisher(Path("g.npy"), damping=1), mfac.InverseFisher[Array])
assert_type(mfac.InverseFisher(mfac.RowShards([G]), damping=1), mfac.InverseFisher[Array])
assert_type(mfac.EmpiricalFisher(G, damping=1).inverse(), mfac.InverseFisher[Array])
assert_type(mfac.EmpiricalFisher(G, damping=1).inverse(2), mfac.BlockInverseFisher[Array])
assert_type(mfac.SlidingInverseFisher[Double](4, 2, damping=1).append_matvec(x), Double)
assert_type(Influence(G, damping=1).most_helpful(G, 2).scores, Array)
assert_type(mfac.choose_damping(G, method="oas"), float)
assert_type(saliency(x, inverse), np.ndarray[tuple[int], np.dtype[np.float64]])


class Layer:
    """Rows that are only functions."""

    shape = (3, 4)
    dtype = np.dtype("float64")

    def gram(self) -> Double:
        return np.eye(3)

    def project(self, x: Double) -> Double:
        return x[:3]

    def combine(self, c: Double) -> Double:
        return c


def reduce(total: Double) -> Double:
    return total


assert_type(mfac.InverseFisher(Layer(), damping=1, reduce=reduce), mfac.InverseFisher[Double])

mfac.InverseFisher("wrong", damping=1)  # wrong
mfac.InverseFisher(3, damping=1)  # wrong
mfac.InverseFisher(G)  # wrong
mfac.InverseFisher(G, damping="exact")  # wrong
mfac.BlockInverseFisher(G, damping=1, block_size="auto")  # wrong
mfac.SlidingInverseFisher(4, 2, damping=1, normalization="mean")  # wrong
mfac.ihvp(G, "x", damping=1)  # wrong
prune(x, G, sparsity=0.5, damping=1, update="exakt")  # wrong
_ = inverse @ "x"  # wrong
inverse.column("x")  # wrong
