"""The optimiser: SGD preconditioned by the inverse Fisher matrix of a window of its gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from mfac_core._arrays import array_namespace
from mfac_core._operators.sliding import SlidingInverseFisher
from mfac_core._operators.sparse import SparseSlidingInverseFisher
from mfac_core._rows.base import Reduce
from mfac_core._validate import NonFiniteError
from mfac_core._warn import warn

Tensor = Any

RIDGE = 0.6
"""mλ of the scale-free step, in which gradients have length 1: the best on trials of the tasks in
examples/experiments/train_*.py, which prefer it little to a third or three times of it.
"""

_ATTRIBUTES = (
    *("window", "window_size", "damping", "density", "window_dtype", "window_device", "reduce"),
    *("skipped_steps", "_velocity"),
)


class _Flat:
    """A vector with an element for each weight, and its parts in the parameters' shapes.

    The parts are views made once: making them in each step takes as long as what is done to them.
    """

    def __init__(self, vector: Tensor, shapes: list[Any]) -> None:
        self.vector, self.shapes = vector, shapes
        self.sizes = [shape.numel() for shape in shapes]
        pieces = vector.split(self.sizes)
        self.parts = [x.view(shape) for x, shape in zip(pieces, shapes, strict=True)]

    def __reduce__(self) -> tuple[Any, ...]:  # the copy's parts are views of the copy
        return _Flat, (self.vector, self.shapes)


class MFAC(torch.optim.Optimizer):  # type: ignore[misc]
    """SGD preconditioned by the inverse Fisher matrix of a window of its own gradients.

    Parameters
    ----------
    params : iterable
        Parameters, or groups of them with an ``lr``, ``momentum``, ``weight_decay`` and
        ``decoupled_weight_decay`` of their own. One window holds the gradients of all.
    lr : float or 0-d torch.Tensor, default 1e-2
        η, the learning rate. Without ``damping`` it is how far the weights move in a step: the
        root mean square over each parameter.
    window_size : int
        m, the most gradients held: m·d elements of memory for d weights.
    damping : float, optional
        λ > 0 for the step −η F⁻¹g with F = λI + (1/n) Σ gᵢgᵢᵀ over the n gradients held, the newest
        gradient g among them. By default the step is scale-free, see Notes.
    momentum : float, default 0.0
        β in [0, 1): the step is −ηv with v ← βv + (1 − β) F⁻¹g, as in the authors' code. It
        averages what torch.optim.SGD sums; η is then larger by 1/(1 − β).
    weight_decay : float, default 0.0
        ω: a step also subtracts ηω times the weights.
    decoupled_weight_decay : bool, default True
        With False ω times the weights is added to the gradient instead, before it enters the
        window, as in the authors' code.
    density : float, optional
        Share of each gradient that the window keeps, by
        :class:`~mfac_core.SparseSlidingInverseFisher`: at 0.01 about a fiftieth of the memory.
        F is then that of what is kept, g still the whole gradient. By default all is kept.
    window_dtype, window_device : optional
        Of the window; by default the dtype the parameters promote to, and the first one's device.
    reduce : callable, optional
        Where every rank holds other parameters: sums a small float64 NumPy array over ranks, see
        Notes.

    Attributes
    ----------
    window_size, damping, density, window_dtype, window_device, reduce : optional
        As given.
    window : SlidingInverseFisher or None
        The gradients and their inverse Fisher; None before the first step.
    skipped_steps : int
        Steps not taken because the gradient held a NaN or an infinity. Nothing changes in one; the
        first raises a ``RuntimeWarning``.

    Raises
    ------
    ValueError
        If an argument is out of its range, or a group is added after the first step.

    Notes
    -----
    **The scale-free step.** The best λ and η of −ηF⁻¹g are tied, and tied to the scale of the
    gradients, which falls by orders in training: where the window has no gradients the step is
    −ηg/λ. So without ``damping`` the gradients enter the window at length 1, λ is fixed relative to
    that, and of F⁻¹g only the direction is kept: each parameter's part is brought to a root mean
    square of 1 over its elements that are not zero. The step does not change when the loss is
    multiplied by a constant, and η is of the size it is in Adam. As steps do not shrink with the
    gradients, let a scheduler take η to zero.
    ``MFAC(params, lr=1e-2, window_size=64, momentum=0.9)`` is where to start.

    **Parameters without a gradient** keep their values and their momentum, and count as zeros in
    the window. So do weights whose gradients a mask has zeroed since the start: F⁻¹g is exactly
    zero there, and a pruned network stays pruned.

    **Number formats.** The step is computed in at least float32, also for 16-bit parameters and
    windows, and the m × m work in float64. A state keeps the formats; it is not cast to the
    parameters' when loaded. A run that is resumed equals the uninterrupted one bit for bit.

    **Several devices, several ranks.** Gradients are gathered on the window's device, steps sent
    back. Under data parallelism every rank holds the averaged gradient already: leave ``reduce``
    out, and all ranks take the same step. Give it where each rank holds some of the parameters, as
    under ``torch.distributed.optim.ZeroRedundancyOptimizer``: the window is then split over
    ranks, and only sums of m numbers travel.

    **Cost.** That of the window, O(dm + m²), and a few passes over d elements.

    The method is that of E. Frantar, E. Kurtic, D. Alistarh, "M-FAC: Efficient Matrix-Free
    Approximations of Second-Order Information", NeurIPS 2021, arXiv 2107.03356.

    Examples
    --------
    >>> import torch
    >>> from mfac_core.torch import MFAC
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = MFAC(model.parameters(), lr=1e-2, window_size=16, momentum=0.9)
    >>> x, y = torch.eye(3), torch.ones(3, 1)
    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.mse_loss(model(x), y).backward()
    ...     optimizer.step()
    >>> len(optimizer.window)
    5
    """

    _work: _Flat | None = None
    """The gradient, then the direction of a step: memory kept, and holding nothing between them."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        window_size: int,
        damping: float | None = None,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        density: float | None = None,
        window_dtype: Any = None,
        window_device: Any = None,
        reduce: Reduce | None = None,
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        for name, value, valid in (
            ("learning rate", lr, 0.0 <= lr < math.inf),
            ("window_size value", window_size, window_size >= 1 and window_size % 1 == 0),
            ("damping value", damping, damping is None or 0.0 < damping < math.inf),
            ("momentum value", momentum, 0.0 <= momentum < 1.0),
            ("weight_decay value", weight_decay, 0.0 <= weight_decay < math.inf),
            ("density value", density, density is None or 0.0 < density <= 1.0),
        ):
            if not valid:
                raise ValueError(f"Invalid {name}: {value}")
        self.window: SlidingInverseFisher | None = None
        self.window_size, self.damping, self.density = window_size, damping, density
        self.window_dtype, self.window_device = window_dtype, window_device
        self.reduce = reduce
        self.skipped_steps = 0
        self._velocity: _Flat | None = None
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; only before the first step.

        Parameters
        ----------
        param_group : dict
            ``params``, and what differs from the defaults.

        Raises
        ------
        ValueError
            If the window has been made: its gradients have no elements for more parameters.
        """
        if self.window is not None:
            raise ValueError(
                "cannot add a parameter group after the first step, when the window holds "
                "gradients of the parameters so far; add it before, or make a new optimizer"
            )
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                self.param_groups.pop()
                raise ValueError(f"MFAC needs real floating parameters, got dtype {p.dtype}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters by one step.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients anew and returns the loss.

        Returns
        -------
        Any
            What ``closure`` returned, or None.

        Raises
        ------
        RuntimeError
            If a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            if self.reduce is not None or any(p.grad is not None for p in self._parameters()):
                self._step()
        return loss

    def _step(self) -> None:
        if self.window is None:
            self.window = self._new_window()
        if self._work is None:
            self._work = self._zeros(self.window)
        self._gather(self._work)
        try:
            if self.damping is None:
                self._scale_free(self.window, self._work)
            else:
                self._precondition(self.window, self._work)
        except NonFiniteError:
            if self.skipped_steps == 0:
                message = (
                    "MFAC skipped a step: the gradient holds a NaN or an infinity; further ones "
                    "are counted in skipped_steps, without a warning"
                )
                warn(message, RuntimeWarning)
            self.skipped_steps += 1
            return
        self._move(self._work)

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    def _dtype(self) -> Any:
        """Return the dtype that the parameters promote to."""
        return functools.reduce(torch.promote_types, (p.dtype for p in self._parameters()))

    def _new_window(self) -> SlidingInverseFisher:
        """Make a window for the parameters as they are."""
        parameters = self._parameters()
        num_params = sum(p.numel() for p in parameters)
        options: dict[str, Any] = {
            "dtype": self.window_dtype or self._dtype(),
            "xp": array_namespace(parameters[0]),
            "device": torch.device(self.window_device or parameters[0].device),
            "reduce": self.reduce,
        }
        if self.damping is not None:
            options["damping"] = self.damping
        else:  # the divisor changes only F's scale, and one that grew would cost O(m³) a step
            options |= {"damping": RIDGE / self.window_size, "normalization": "window"}
        if self.density is None:
            return SlidingInverseFisher(num_params, self.window_size, **options)
        options["density"] = self.density
        return SparseSlidingInverseFisher(num_params, self.window_size, **options)

    def _zeros(self, window: SlidingInverseFisher) -> _Flat:
        """Return zeros beside the window, in at least float32."""
        dtype = torch.promote_types(self._dtype(), torch.float32)
        zeros = torch.zeros(window.num_params, dtype=dtype, device=window.device)
        return _Flat(zeros, [p.shape for p in self._parameters()])

    def _given(self) -> Iterator[tuple[dict[str, Any], list[Any], list[int]]]:
        """Yield each group, its parameters that have a gradient, and their numbers among all."""
        start = 0
        for group in self.param_groups:
            numbered = enumerate(group["params"], start)
            given = [(p, i) for i, p in numbered if p.grad is not None]
            start += len(group["params"])
            if given:
                yield group, [p for p, _ in given], [i for _, i in given]

    def _gather(self, work: _Flat) -> None:
        """Gather the gradients in one vector."""
        if any(p.grad is None for p in self._parameters()):
            work.vector.zero_()
        for group, parameters, numbers in self._given():
            gradients = [p.grad for p in parameters]
            if any(g.layout is not torch.strided for g in gradients):
                raise RuntimeError("MFAC does not support sparse gradients")
            parts = [work.parts[i] for i in numbers]
            torch._foreach_copy_(parts, gradients)
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                weights = [p.to(work.vector.device) for p in parameters]
                torch._foreach_add_(parts, weights, alpha=group["weight_decay"])

    def _precondition(self, window: SlidingInverseFisher, work: _Flat) -> None:
        """Put the gradient g into the window, and F⁻¹g in its place."""
        if self.density is None:
            work.vector.copy_(window.append_matvec(work.vector))
        else:  # append_matvec is F⁻¹ of what the window keeps of g: most of g would wait
            window.append(work.vector)
            work.vector.copy_(window.matvec(work.vector))

    def _scale_free(self, window: SlidingInverseFisher, work: _Flat) -> None:
        """Put F⁻¹g in g's place: gradients of length 1, each parameter's part of mean square 1.

        Elements that are zero do not count: no gradient in the window reaches them.
        """
        g = work.vector
        tiny = torch.finfo(g.dtype).tiny
        length = torch.linalg.vector_norm(g)
        if self.reduce is not None:
            length = g.new_tensor(self.reduce(np.array([float(length) ** 2]))[0] ** 0.5)
        g.div_(length.clamp_min(tiny))
        self._precondition(window, work)
        lengths = torch.stack(torch._foreach_norm(work.parts))
        if g.is_cpu and int(torch.count_nonzero(g)) == len(g):
            counts = lengths.new_tensor(work.sizes)  # one look is cheap; a device would wait
        else:
            counts = torch.stack([torch.count_nonzero(part) for part in work.parts]).to(g.dtype)
        scales = counts.sqrt() / lengths.clamp_min(tiny)
        torch._foreach_mul_(work.parts, scales.unbind())

    def _move(self, work: _Flat) -> None:
        """Take a step along the direction, or along its running mean."""
        for group, parameters, numbers in self._given():
            parts = [work.parts[i] for i in numbers]
            if momentum := group["momentum"]:
                if self._velocity is None:
                    self._velocity = _Flat(torch.zeros_like(work.vector), work.shapes)
                directions, parts = parts, [self._velocity.parts[i] for i in numbers]
                torch._foreach_lerp_(parts, directions, 1.0 - momentum)
            lr = float(group["lr"])
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                torch._foreach_mul_(parameters, 1.0 - lr * group["weight_decay"])
            device = work.vector.device
            steps = [
                x if p.device == device else x.to(p.device)
                for p, x in zip(parameters, parts, strict=True)
            ]
            torch._foreach_add_(parameters, steps, alpha=-lr)

    # -- state -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state: torch's entries, and under ``"mfac"`` the whole window.

        Returns
        -------
        dict
            Of tensors, numbers and strings: it goes through ``torch.save`` and
            ``torch.load(..., weights_only=True)``.
        """
        state: dict[str, Any] = super().state_dict()
        window = None
        if self.window is not None:
            window = {
                name: torch.from_numpy(x) if isinstance(x, np.ndarray) else x
                for name, x in self.window.state_dict().items()
            }
        state["mfac"] = {
            "window": window,
            "velocity": None if self._velocity is None else self._velocity.vector,
            "damping": self.damping,
            "skipped_steps": self.skipped_steps,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state, of an optimizer for the same parameters and window size.

        Parameters
        ----------
        state_dict : dict
            What :meth:`state_dict` returned. Damping, learning rates and the other options of the
            groups are taken from it.

        Raises
        ------
        ValueError
            If it is not the state of such an optimizer. Nothing has then changed.
        """
        if "mfac" not in state_dict:
            raise ValueError("loaded state dict is not of MFAC: it has no entry 'mfac'")
        own, window, velocity = state_dict["mfac"], None, None
        if own["window"] is not None:
            window = self._new_window()
            window.load_state_dict(own["window"])
            if own["velocity"] is not None:
                velocity = self._zeros(window)
                velocity.vector.copy_(own["velocity"])
        super().load_state_dict(state_dict)
        self.window, self._velocity, self._work = window, velocity, None
        self.damping, self.skipped_steps = own["damping"], own["skipped_steps"]

    def __getstate__(self) -> dict[str, Any]:  # torch's own leaves out what is not its
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in _ATTRIBUTES}
