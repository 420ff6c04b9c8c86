"""What the scale-free step is made of in every framework."""

import math
from collections.abc import Sequence

RIDGE = 0.6
"""mλ of the scale-free step, in which gradients have length 1: of trials on the tasks in
examples/experiments/train_*.py, which prefer it little to three times of it.
"""

FAINT = 2.0**-12
"""Root mean square of a parameter's gradient, beside that of the whole, below which it is noise.

Its mean square is then below 2⁻²⁴ of the whole's, which is where float32 rounds it off: a gradient
that in exact arithmetic is zero, such as that of a bias before a normalisation, is of this size.
"""

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Coefficients of aX + bXXᵀX + c(XXᵀ)²X, which bring singular values to 0.7 to 1.2: those of
K. Jordan's Muon (2024).
"""


def shape_of_units(shape: Sequence[int]) -> tuple[int, int]:
    """Return how many units a parameter of this shape has, and their length."""
    units, *rest = shape if len(shape) > 1 else (1, *shape)
    return units, math.prod(rest)
