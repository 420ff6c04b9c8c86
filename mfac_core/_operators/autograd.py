"""PyTorch's graph through products with a symmetric operator.

The operator is its own derivative, and its own transpose: what comes back to Mx is multiplied by M.
JAX has the same from its ``custom_linear_solve``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from mfac_core._arrays import Array, is_torch_array


def is_recorded(*arrays: Any) -> bool:
    """Whether PyTorch records what is done with any of these, or carries a tangent of it along."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.is_grad_enabled():
        return False
    tangent = torch.autograd.forward_ad.unpack_dual
    return any(
        is_torch_array(x) and (x.requires_grad or tangent(x).tangent is not None) for x in arrays
    )


def refuse(what: str, arrays: Any) -> None:
    """Refuse parts that PyTorch records: their graph would end here unseen."""
    if isinstance(arrays, (list, tuple)) and is_recorded(*arrays):
        msg = f"{what} in several parts cannot be differentiated; detach them, or pass one tensor"
        raise TypeError(msg)


def multiplied(product: Callable[[Array], Array], x: Array) -> Array:
    """Return product(x), a symmetric linear function of x, as a part of PyTorch's graph."""
    return _symmetric().apply(x, product)


def solved(solve: Callable[[Array, Array], Array], gradients: Array, x: Array) -> Array:
    """Return y = solve(G, x) = F⁻¹x as a part of PyTorch's graph, for F = λI + GᵀG/m.

    With u = F⁻¹ȳ for what comes back to y, x̄ = u and Ḡ = −(G y uᵀ + G u yᵀ)/m.
    """
    return _inverse().apply(gradients, x, solve)


@functools.cache
def _symmetric() -> Any:
    torch = sys.modules["torch"]

    class Symmetric(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Array, product: Any) -> Array:
            ctx.product = product
            return product(x.detach())

        @staticmethod
        def backward(ctx: Any, back: Array) -> Any:
            return multiplied(ctx.product, back), None

        @staticmethod
        def jvp(ctx: Any, along: Array, _: Any) -> Array:
            return ctx.product(along)

    return Symmetric


@functools.cache
def _inverse() -> Any:
    torch = sys.modules["torch"]

    class Inverse(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, gradients: Array, x: Array, solve: Any) -> Array:
            y = solve(gradients.detach(), x.detach())
            ctx.solve = solve
            ctx.save_for_backward(gradients, y)
            ctx.save_for_forward(gradients, y)
            return y

        @staticmethod
        def backward(ctx: Any, back: Array) -> Any:
            gradients, y = ctx.saved_tensors
            u = solved(ctx.solve, gradients, back)
            if not ctx.needs_input_grad[0]:
                return None, u, None
            m = gradients.shape[0]
            g, y, u = (t.to(u.dtype).reshape(t.shape[0], -1) for t in (gradients, y, u))
            of_gradients = -((g @ y) @ u.T + (g @ u) @ y.T) / m
            return of_gradients, u.reshape(back.shape), None

        @staticmethod
        def jvp(ctx: Any, gradients_along: Any, x_along: Any, _: Any) -> Array:
            gradients, y = ctx.saved_tensors
            along = torch.zeros_like(y) if x_along is None else x_along
            if gradients_along is not None:
                change = gradients_along.T @ (gradients @ y) + gradients.T @ (gradients_along @ y)
                along = along - change / gradients.shape[0]
            return ctx.solve(gradients, along)

    return Inverse
