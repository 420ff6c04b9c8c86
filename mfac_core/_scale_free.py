"""Constants of the scale-free step, in every framework."""

RIDGE = 0.6
"""mλ of the scale-free step, in which gradients have length 1: the best on trials of the tasks in
examples/experiments/train_*.py, which prefer it little to a third or three times of it.
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
