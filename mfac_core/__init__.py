"""Inverse empirical Fisher matrices, without the matrix.

Given m gradients of dimension d (the rows of G, an array of any library that follows the Python
array API standard), products with and elements of the inverse of F = λI + GᵀG/m.
"""

from mfac_core._operators.blocked import BlockInverseFisher as BlockInverseFisher
from mfac_core._operators.damping import DampingCurve as DampingCurve
from mfac_core._operators.damping import choose_damping as choose_damping
from mfac_core._operators.damping import damping_curve as damping_curve
from mfac_core._operators.fisher import EmpiricalFisher as EmpiricalFisher
from mfac_core._operators.online import BlockFisher as BlockFisher
from mfac_core._operators.sliding import SlidingInverseFisher as SlidingInverseFisher
from mfac_core._operators.sparse import SparseSlidingInverseFisher as SparseSlidingInverseFisher
from mfac_core._operators.static import InverseFisher as InverseFisher
from mfac_core._operators.static import ihvp as ihvp
from mfac_core._rows.protocol import GradientRows as GradientRows
from mfac_core._rows.shards import RowShards as RowShards
from mfac_core._typing import Reduce as Reduce

__version__ = "0.1.0"

__all__ = [
    "BlockFisher",
    "BlockInverseFisher",
    "DampingCurve",
    "EmpiricalFisher",
    "GradientRows",
    "InverseFisher",
    "Reduce",
    "RowShards",
    "SlidingInverseFisher",
    "SparseSlidingInverseFisher",
    "choose_damping",
    "damping_curve",
    "ihvp",
]
