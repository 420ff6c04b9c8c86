"""The hot loops, one function each, for whatever library the arrays come from.

``rows`` passes over the (m, d) gradients; ``dense`` factors and updates the m-sized float64
matrices. Dispatch is by plain branches on the kind of array.
"""
