"""Inverse empirical Fisher matrices, without the matrix.

Given m gradients of dimension d (the rows of G, an array of any library that follows the Python
array API standard), products with and elements of the inverse of F = λI + GᵀG/m.
"""

from mfac_core.blocked import BlockInverseFisher as BlockInverseFisher
from mfac_core.fisher import EmpiricalFisher as EmpiricalFisher
from mfac_core.sliding import SlidingInverseFisher as SlidingInverseFisher
from mfac_core.sparse import SparseSlidingInverseFisher as SparseSlidingInverseFisher
from mfac_core.static import InverseFisher as InverseFisher
from mfac_core.static import ihvp as ihvp

__version__ = "0.1.0"

__all__ = [
    "BlockInverseFisher",
    "EmpiricalFisher",
    "InverseFisher",
    "SlidingInverseFisher",
    "SparseSlidingInverseFisher",
    "ihvp",
]
