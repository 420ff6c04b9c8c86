"""The optimiser: SGD preconditioned by the inverse Fisher matrix of a window of its gradients."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from mfac_core import _validate as check
from mfac_core._operators.sliding import SlidingInverseFisher
from mfac_core._rows.base import Reduce
from mfac_core._scale_free import RIDGE
from mfac_core._validate import NonFiniteError
from mfac_core._warn import warn
from mfac_core.torch import _scale_free, _state
from mfac_core.torch._gradients import dtype_argument
from mfac_core.torch._loading import Closed, closed
from mfac_core.torch._memory import Flat, Memory
from mfac_core.torch._sharding import as_pairs, is_dtensor, local, local_gradient

_ATTRIBUTES = (
    *("window_size", "density", "window_dtype", "window_device", "reduce", "skipped_steps"),
)


Loss = TypeVar("Loss")


class MFAC(torch.optim.Optimizer):  # type: ignore[misc]
    """SGD preconditioned by the inverse Fisher matrix of a window of its own gradients.

    Parameters
    ----------
    params : iterable
        Parameters, named ones, or groups of them with an ``lr``, ``momentum``, ``nesterov``,
        ``weight_decay``, ``decoupled_weight_decay`` and ``maximize`` of their own. One window holds
        the gradients of all.
    lr : float or 0-d torch.Tensor, default 0.0125
        η, the learning rate. Without ``damping`` it is how far the weights can move in a step: the
        root mean square over each parameter.
    window_size : int, default 64
        m, the most gradients held: m·d elements of memory for d weights.
    damping : float, optional
        λ > 0 for the step −η F⁻¹g with F = λI + (1/n) Σ gᵢgᵢᵀ over the n gradients held, the newest
        gradient g among them. By default the step is scale-free, see Notes.
    momentum : float, default 0.9
        β in [0, 1): the step is −ηv with v ← βv + (1 − β) F⁻¹g, as in the authors' code. It
        averages what torch.optim.SGD sums; η is then larger by 1/(1 − β).
    nesterov : bool, optional
        Step along βv + (1 − β) F⁻¹g, with the new v, instead; by default in the scale-free form.
    weight_decay : float, default 0.0
        ω: a step also subtracts ηω times the weights.
    decoupled_weight_decay : bool, default True
        With False ω times the weights is added to the gradient instead, before it enters the
        window, as in the authors' code.
    maximize : bool, default False
        Take −g for the gradient, to ascend.
    density : float, optional
        Share of each gradient that the window keeps, by
        :class:`~mfac_core.SparseSlidingInverseFisher`: at 0.01 about a fiftieth of the memory.
        F is then that of what is kept, g still the whole gradient. By default all is kept.
    window_dtype, window_device : optional
        Of the window; by default the dtype the parameters promote to, or that of a state that is
        loaded, and the first one's device.
    reduce : callable, optional
        Where every rank holds other parameters and these do not say so: sums a small float64 NumPy
        array over ranks, see Notes.

    Attributes
    ----------
    window_size, density, window_dtype, window_device, reduce : optional
        As given.
    skipped_steps : int
        Steps not taken because the gradient held a NaN or an infinity. Nothing changes in one; the
        first raises a ``RuntimeWarning``.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Notes
    -----
    **The scale-free step.** The best λ and η of −ηF⁻¹g are tied, and tied to the scale of the
    gradients, which falls by orders in training: where the window has no gradients the step is
    −ηg/λ. So without ``damping``

    1. F is unit-wise: a block for each unit, a slice along a parameter's first dimension, such as a
       neuron or a filter; a vector is one unit. Gradients enter a block at length 1, and nλ is 0.6.
       64 gradients say little of all weights together, and much of those of one neuron.
    2. Of F⁻¹g only the direction is kept: each parameter's part is brought to a root mean square of
       1 over its elements that are not zero. Where directions agree from step to step, their mean v
       keeps this length, and where they are noise it is shorter.
    3. Parameters of two and more dimensions, as matrices of a row a unit, step along the matrix of
       v's length whose singular values are about equal: by five Newton–Schulz iterations, as in
       K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. Elements
       that are exactly zero stay so.

    The step does not change when the loss is multiplied by a constant, and η is of the size it is
    in Adam. As steps do not shrink with the gradients, let a scheduler take η to zero.
    ``MFAC(params)`` is where to start; in runs of a few hundred steps twice the rate may do more.
    A sparse window has no blocks: 1. is then F of what it keeps.

    **Noise is not amplified.** A gradient of zeros changes nothing: neither weights nor momentum
    nor window. In the scale-free step, let r be the root mean square of a parameter's gradient
    beside that of the whole gradient. Where r is below ``FAINT`` = 2⁻¹², so that float32 would
    round the parameter's mean square off beside the whole's, its part of the step has the size
    r/2⁻¹² instead of 1: a closed gate, or a bias before a normalisation, whose gradient is nothing
    but rounding, does not walk. A parameter whose gradient is zero, as that of a branch the batch
    did not use, is one without a gradient. Lengths are taken in float64: gradients may have any
    that float32 has.

    **Parameters without a gradient** keep their values and their momentum, and count as zeros in
    the window. So do weights whose gradients a mask has zeroed since the start: F⁻¹g is exactly
    zero there, and a pruned network stays pruned. What does not require a gradient takes no memory
    until it has one; parameters that come later, by :meth:`add_param_group` or by unfreezing, have
    zeros in the window's past.

    **State** is where torch looks for it. ``state[p]`` has the parameter's rows of the window as
    "window", of shape (m, ...), a view of the one flat window; its "velocity"; and the number of
    gradients so far, "step". In the scale-free form it also has the inverses of its units'
    blocks as "unit_inverse", (units, k, k), k the smaller of m and a unit's length: no more numbers
    than the rows are. In the plain one the first parameter has what is m-sized: the Gram GGᵀ and
    the inverse of the dual, and their counters. What copies, moves, shards or saves a state so
    finds all of it; what follows from the rows is computed anew where it lacks, in O(d·m²). A run
    that is resumed equals the uninterrupted one bit for bit. A state is by reference, as in all of
    torch; what is loaded is copied, in the state's own dtype and not the parameters', unless
    ``window_dtype`` was given.

    **Complex parameters** count as pairs of real ones, as in torch's own optimisers: the step is
    that of their ``torch.view_as_real``, whose shape, with a last dimension of 2, the state has.

    **Number formats.** The step is computed in at least float32, also for 16-bit parameters and
    windows; the m × m work of the plain form in float64.

    **Several devices, several ranks.** Gradients are gathered on the window's device, steps sent
    back. Under data parallelism every rank holds the averaged gradient already, and all ranks take
    the same step. Of DTensors (``fully_shard``, tensor parallelism) each rank's window holds what
    the rank has of them, and the state is of DTensors. In the plain form sums of 3P + m + 1
    numbers, P parameters, travel over their mesh; in the scale-free one 3P + 1, up to 2m + 1 for
    each unit that is cut over ranks, which those of a matrix cut by its first dimension are not,
    and each matrix's direction, which every rank gathers. Under ``FullyShardedDataParallel`` the
    sums are over the default group, unless ``reduce`` is given, and its flat parameters count as
    vectors. Give ``reduce`` where parameters are spread over ranks and do not say so, as under
    ``torch.distributed.optim.ZeroRedundancyOptimizer``.

    **Compiling.** ``step`` stays out of the graphs of ``torch.compile``.

    **Cost.** Two passes over the window, O(dm), and a few over d elements. In the plain form O(m²)
    besides; in the scale-free one two passes over the units' inverses, and for a matrix r × c,
    r ≤ c, some 30 r²c operations for its singular values.

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
    >>> optimizer.state[model.weight]["window"].shape
    torch.Size([16, 1, 3])
    """

    _memory: Memory | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0125,
        *,
        window_size: int = 64,
        damping: float | None = None,
        momentum: float = 0.9,
        nesterov: bool | None = None,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        density: float | None = None,
        window_dtype: torch.dtype | None = None,
        window_device: torch.device | str | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        numbers = {"lr": lr, "window_size": window_size, "momentum": momentum}
        _check_numbers(numbers | {"weight_decay": weight_decay})
        _check_numbers({"damping": damping, "density": density}, or_none=True)
        dtype_argument(window_dtype, "window_dtype")
        check.reduce_argument(reduce)
        try:
            torch.device("cpu" if window_device is None else window_device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"window_device must be a device of PyTorch: {error}") from None
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
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if nesterov is None:
            nesterov = damping is None
        self.window_size, self.density = window_size, density
        self.window_dtype, self.window_device = window_dtype, window_device
        self.reduce = reduce
        self.skipped_steps = 0
        defaults = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; their gradients count as zeros in the steps so far.

        Parameters
        ----------
        param_group : dict
            ``params``, and what differs from the defaults.

        Raises
        ------
        ValueError
            If a parameter that requires a gradient is not floating or complex, or is a complex
            DTensor, if the group asks for another ``damping`` than the others, or if the window is
            sparse and has been made: its rows are compressed together.
        """
        if self.density is not None and self.state:
            raise ValueError(
                "cannot add a parameter group after the first step where the window is sparse; "
                "add it before, or make a new optimizer"
            )
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        bad = {
            p.dtype
            for p in group["params"]
            if (p.is_complex() and is_dtensor(p))
            or (p.requires_grad and not (p.is_floating_point() or p.is_complex()))
        }
        if bad:
            self.param_groups.pop()
            raise ValueError(
                "MFAC needs floating parameters, or complex ones that are no DTensors, got dtype "
                f"{bad.pop()}"
            )
        if group["damping"] != self.damping:
            self.param_groups.pop()
            raise ValueError(
                f"all groups share one window and its damping, {self.damping}, got "
                f"{group['damping']}; leave it out of the group"
            )

    @property
    def damping(self) -> float | None:
        """λ, or None for the scale-free step; kept in the parameter groups, as ``lr`` is."""
        damping: float | None = self.param_groups[0]["damping"]
        return damping

    @damping.setter
    def damping(self, value: float | None) -> None:
        for group in self.param_groups:
            group["damping"] = value

    @property
    def window(self) -> SlidingInverseFisher[Tensor] | None:
        """The gradients and their inverse Fisher; None before the first step.

        In the scale-free form its Gram, that of all weights together, is computed at the first look
        after a step, in O(d·m²).
        """
        return _state.up_to_date(self._arranged()) if self.state else None

    def __repr__(self) -> str:
        own = f"    window_size: {self.window_size}\n"
        if self.density is not None:
            own += f"    density: {self.density}\n"
        text: str = super().__repr__()
        return text.replace("(\n", "(\n" + own, 1)

    @property
    def _velocity(self) -> Flat | None:
        return self._arranged().velocity if self.state else None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...
    @torch.compiler.disable  # type: ignore[untyped-decorator]
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

        Warns
        -----
        RuntimeWarning
            At the first step that is skipped because the gradient is not finite.
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
        memory = self._arranged()
        given = self._gather(memory)
        squares, total = memory.squares()
        if not float(total):
            return
        if self._decay_gradients(memory, given):
            squares, total = memory.squares()
        try:
            if not math.isfinite(total):
                raise NonFiniteError
            if memory.scale_free:
                _scale_free.normalise(memory.work.vector, math.sqrt(total))
                if memory.units is None:
                    self._precondition(memory)
                else:
                    _scale_free.precondition(memory, int(memory.step) % self.window_size)
                prominence = _scale_free.prominence(memory, squares, float(total))
                _scale_free.bring_to_size(memory, prominence)
                given = _without(given, [i for i, x in enumerate(prominence.tolist()) if not x])
            else:
                self._precondition(memory)
        except NonFiniteError:
            self._skip()
            return
        memory.step.add_(1)
        self._move(memory, given)

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"]]

    # -- a step ----------------------------------------------------------------------------

    def _gather(self, memory: Memory) -> list[tuple[dict[str, Any], list[Any], list[int]]]:
        """Gather the gradients; return each group, its parameters with one, and their numbers."""
        if any(p.grad is None for p in memory.params):
            memory.work.vector.zero_()
        given = []
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            numbers = [memory.numbers[p] for p in parameters]
            if parameters:
                given.append((group, parameters, numbers))
        for group, parameters, numbers in given:
            gradients = [local_gradient(p) for p in parameters]
            if any(g.layout is not torch.strided for g in gradients):
                raise RuntimeError("MFAC does not support sparse gradients")
            gradients = [as_pairs(g.resolve_conj()) for g in gradients]
            parts = [memory.work.parts[i] for i in numbers]
            torch._foreach_copy_(parts, gradients)
            if group["maximize"]:
                torch._foreach_neg_(parts)
        return given

    def _decay_gradients(self, memory: Memory, given: Any) -> bool:
        """Add the weight decay that is part of the gradient; whether there is any."""
        decayed = False
        for group, parameters, numbers in given:
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                parts = [memory.work.parts[i] for i in numbers]
                weights = [as_pairs(local(p)).to(memory.window.device) for p in parameters]
                torch._foreach_add_(parts, weights, alpha=group["weight_decay"])
                decayed = True
        return decayed

    def _precondition(self, memory: Memory) -> None:
        """Put the gradient g into the window, and F⁻¹g in its place."""
        window, vector = memory.window, memory.work.vector
        damping = self.damping
        if damping is not None and window.damping != damping:
            window.damping = damping
        if self.density is None:
            vector.copy_(window.append_matvec(vector))
        else:  # append_matvec is F⁻¹ of what the window keeps of g: most of g would wait
            window.append(vector)
            vector.copy_(window.matvec(vector))

    def _skip(self) -> None:
        if self.skipped_steps == 0:
            message = (
                "MFAC skipped a step: the gradient holds a NaN or an infinity, or leaves the "
                "window's dtype; further ones are counted in skipped_steps, without a warning"
            )
            warn(message, RuntimeWarning)
        self.skipped_steps += 1

    def _move(self, memory: Memory, given: Any) -> None:
        """Take a step along the direction, or along its running mean.

        In the scale-free form matrices step as far in each of their singular directions.
        """
        device = memory.work.vector.device
        for group, parameters, numbers in given:
            parts = [memory.work.parts[i] for i in numbers]
            if momentum := group["momentum"]:
                if memory.velocity is None:
                    memory.velocity = memory.vector(memory.work.vector.dtype)
                    _state.publish_velocity(memory, self.state)
                directions, parts = parts, [memory.velocity.parts[i] for i in numbers]
                torch._foreach_lerp_(parts, directions, 1.0 - momentum)
                if group["nesterov"]:
                    torch._foreach_lerp_(directions, parts, momentum)
                    parts = directions
            if memory.scale_free:
                parts = _scale_free.even_matrices(parts, parameters)
            lr = float(group["lr"])
            weights = [as_pairs(local(p)) for p in parameters]
            if group["weight_decay"] and group["decoupled_weight_decay"]:
                torch._foreach_mul_(weights, 1.0 - lr * group["weight_decay"])
            steps = [
                x if p.device == device else x.to(p.device)
                for p, x in zip(weights, parts, strict=True)
            ]
            torch._foreach_add_(weights, steps, alpha=-lr)

    # -- memory and state ------------------------------------------------------------------

    def _arranged(self) -> Memory:
        """Return the memory that the state is a view of, made anew where it is not."""
        params = [
            p
            for p in dict.fromkeys(self._parameters())
            if p.requires_grad or p.grad is not None or "step" in self.state.get(p, ())
        ]
        old = self._memory
        if old is not None and _state.is_published(old, self.state):
            same = len(params) == len(old.params) and all(map(operator.is_, params, old.params))
            if same and old.scale_free == (self.damping is None):
                return old
            _state.refresh(old, self.state, self.skipped_steps)
        states = {p: self.state[p] for p in params if "step" in self.state.get(p, ())}
        self._memory = None
        memory = self._new_memory(params, states)
        skipped = _state.fill(memory, states)
        if skipped is not None:
            self.skipped_steps = skipped
        if memory.velocity is None and any(group["momentum"] for group in self.param_groups):
            memory.velocity = memory.vector(memory.work.vector.dtype)
        _state.publish(memory, self.state)
        _state.refresh(memory, self.state, self.skipped_steps)
        self._memory = memory
        return memory

    def _new_memory(self, params: list[Any], states: dict[Any, Any]) -> Memory:
        dtypes = [as_pairs(local(p)).dtype for p in params] or [torch.float32]
        promoted = functools.reduce(torch.promote_types, dtypes)
        saved = next(filter(None, map(_state.dtype_of, states.values())), None)
        device = local(params[0]).device if params else torch.device("cpu")
        return Memory(
            params,
            window_size=self.window_size,
            damping=self.damping,
            density=self.density,
            dtype=self.window_dtype or saved or promoted,
            device=torch.device(self.window_device or device),
            wide=torch.promote_types(promoted, torch.float32),
            ridge=RIDGE,
            reduce=self.reduce,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as any optimizer of torch does: by reference.

        Returns
        -------
        dict
            Of tensors, numbers and strings: it goes through ``torch.save`` and
            ``torch.load(..., weights_only=True)``.
        """
        if self._memory is not None and _state.is_published(self._memory, self.state):
            _state.refresh(self._memory, self.state, self.skipped_steps)
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a copy of a state, of an optimizer for the same parameters and window size.

        Parameters
        ----------
        state_dict : dict
            What :meth:`state_dict` returned, of this version or of 0.1.0. The options of the
            groups, ``damping`` among them, are taken from it. Parameters are matched by their
            order, and by name where both sides have names.

        Raises
        ------
        ValueError
            If it is not the state of such an optimizer. Nothing has then changed.
        """

        def check(_: Any, given: dict[str, Any]) -> dict[str, Any]:
            return closed(
                given,
                self.param_groups,
                window_size=self.window_size,
                density=self.density,
                dtype=self.window_dtype,
            )

        handle = self.register_load_state_dict_pre_hook(check)  # after those of the user
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:  # torch's own leaves out what is not its
        if self._memory is not None and _state.is_published(self._memory, self.state):
            _state.refresh(self._memory, self.state, self.skipped_steps)
        state: dict[str, Any] = super().__getstate__()
        return state | {name: getattr(self, name) for name in _ATTRIBUTES}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._memory = None
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        loaded = {p: x for p, x in self.state.items() if isinstance(x, Closed)}
        for p, x in loaded.items():
            self.state[p] = x.entry
        if loaded:
            with torch.no_grad():
                self._arranged()


def _check_numbers(arguments: dict[str, Any], *, or_none: bool = False) -> None:
    """Refuse what is neither a number nor a tensor of one."""
    for name, value in arguments.items():
        one = isinstance(value, torch.Tensor) and value.numel() == 1
        if not (one or isinstance(value, Real) or (or_none and value is None)):
            raise TypeError(f"{name} must be a number{' or None' * or_none}, got {value!r}")


def _without(given: Any, still: list[int]) -> Any:
    """Return the groups without the parameters of these numbers."""
    if not still:
        return given
    kept = []
    for group, parameters, numbers in given:
        pairs = [(p, i) for p, i in zip(parameters, numbers, strict=True) if i not in still]
        if pairs:
            kept.append((group, [p for p, _ in pairs], [i for _, i in pairs]))
    return kept
