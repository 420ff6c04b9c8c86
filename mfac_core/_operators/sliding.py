"""The dynamic algorithm: a window of gradients that slides, in O(d·m + m²) per step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, cast

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array, Home, array_namespace, device, is_traced
from mfac_core._dual import Dual
from mfac_core._operators import state as window_state
from mfac_core._operators.base import Answer
from mfac_core._operators.digits import LARGEST_WINDOW_ROUNDING, Digits, finite_gram
from mfac_core._operators.fewer import PrimalOrDual
from mfac_core._operators.guard import Lock, uninterrupted
from mfac_core._operators.pending import Pending
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.ring import ArrayRing, Ring
from mfac_core._typing import ArrayT, Normalization

NORMALIZATIONS = ("count", "window")

PRIMAL_SHARE = 4
"""Times that the parameters go into the window for F itself to be formed at each step.

That takes d²·m + d³ operations, where updating the dual takes some passes over m² numbers.
"""


class Incoming(NamedTuple):
    """A gradient that may enter the window."""

    row: Any
    """What the ring stores of it."""

    norm2: float | None
    """‖g‖²; None where a device is to find it as it exchanges rows."""


class Step(NamedTuple):
    """A row that has been exchanged, which only a device may know to be finite."""

    norm2: Array | None
    """‖g‖², (1,), where the device has found it. Where it is not finite nothing was exchanged."""

    before: list[int]
    """The slots held before."""


class SlidingInverseFisher(PrimalOrDual[ArrayT]):
    """The inverse of F = λI + (1/n) Σ gᵢgᵢᵀ over a window of gradients, as an operator.

    Parameters
    ----------
    num_params : int
        d, the length of a gradient.
    window_size : int
        m, the most gradients held.
    damping : float
        λ > 0; can be set later.
    dtype, xp, device : optional
        Dtype, array namespace and device of the window. What is not given is taken from the
        first gradient.
    normalization : {"count", "window"}, default "count"
        What n is: the number of gradients held, or ``window_size`` from the first step on, which
        is what the authors' code does and makes the first steps up to m times longer.
    reduce : callable, optional
        For a window whose columns are spread over ranks, ``num_params`` of them on this one:
        takes a small float64 NumPy array and returns its sum over ranks. All ranks then make the
        same calls; what is refused on one is refused on all.

    Attributes
    ----------
    num_params, window_size : int
        As given.
    normalization : str
        As given.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form.

    See Also
    --------
    InverseFisher : All gradients at once.

    Notes
    -----
    For type checkers ``SlidingInverseFisher[torch.Tensor](d, m, damping=λ)`` says of which arrays a
    window is; it cannot be told from the arguments.

    Several threads may use one window: calls wait for one another. A KeyboardInterrupt leaves it as
    it was before a change, or as it is after.

    The window takes m·d numbers of memory, and 3m² of float64. A step (``append`` and a product)
    costs one pass over the window for the new row of the Gram GGᵀ, one or two for the product,
    and O(m²) for the dual A = nλI + GGᵀ, whose inverse is updated by two rank-one corrections,
    refined in every solution, and computed afresh at least every m steps. While the window fills
    under "count", n changes with each gradient, and the next product factors A in O(m³).

    With four times as many rows as parameters, or more, the d × d matrix F itself is formed and
    inverted by the next query instead: O(d²·m + d³) a step, and O(m·d + d²) memory. Not over ranks
    or by the CUDA kernels; and where F is all but singular, the dual is formed and answers.

    Answers the dynamic algorithm of Frantar, Kurtic and Alistarh (NeurIPS 2021,
    arXiv 2107.03356), whose matrices D and B need O(m³) per exchanged gradient.

    Examples
    --------
    >>> import numpy as np
    >>> import mfac_core as mfac
    >>> window = mfac.SlidingInverseFisher(2, window_size=2, damping=0.5)
    >>> window.append(np.array([1.0, 0.0]))
    >>> window.append(np.array([0.0, 2.0]))
    >>> window @ np.array([1.0, 5.0])
    array([1., 2.])
    >>> window.append_matvec(np.array([0.0, 3.0]))  # the first gradient leaves
    array([0.        , 0.42857143])
    """

    _rows: Ring

    _was_inverted: bool
    """Whether F was, or could not be, inverted as it is now; where parameters are few."""

    _pending: Pending | None
    """What a device has found of the last step, until it is acted on."""

    def __init__(
        self,
        num_params: int,
        window_size: int,
        *,
        damping: float,
        dtype: Any = None,
        xp: Any = None,
        device: Any = None,
        normalization: Normalization = "count",
        reduce: Reduce | None = None,
    ) -> None:
        self._lock = Lock()
        self.num_params = check.integer(num_params, "num_params", minimum=1)
        self.window_size = check.integer(window_size, "window_size", minimum=1)
        self._damping = check.damping(damping)
        if normalization not in NORMALIZATIONS:
            msg = f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}"
            raise ValueError(msg)
        self.normalization = normalization
        check.reduce_argument(reduce)
        self._reduce = reduce
        if device is not None and xp is None:
            msg = "device needs xp, the array namespace it belongs to; give both or neither"
            raise ValueError(msg)
        self._given = None if xp is None else Home(xp, device)
        self._given_dtype = dtype
        # Until library and dtype are known the ring has no rows.
        space = np if xp is None else xp
        if not hasattr(space, "zeros"):
            msg = f"xp must be an array namespace, such as numpy or torch, got {xp!r}"
            raise TypeError(msg)
        try:
            like = space.zeros((0, self.num_params), dtype=dtype, **_on(device))
        except (TypeError, ValueError) as error:
            of = getattr(space, "__name__", space)
            msg = f"dtype must be one of {of}, and device one of its devices: {error}"
            raise TypeError(msg) from None
        self._hold(self._ring(like, 0))
        if xp is not None and dtype is not None:
            self._allocate(like)

    # -- the window ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._rows.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self.num_params,) * 2

    @property
    def dtype(self) -> Any:
        """The dtype of the window; None until the first gradient, if it was not given."""
        return self._rows.dtype if self._allocated else self._given_dtype

    @property
    def device(self) -> Any:
        """The device of the window; None until the first gradient, if it was not given."""
        return self._rows.device if self._allocated else getattr(self._given, "device", None)

    @property
    def damping(self) -> float:
        """λ; setting it lets the next product factor the dual anew, in O(m³)."""
        return self._damping

    @damping.setter
    def damping(self, value: float) -> None:
        self._do(self._set_damping, check.damping(value))

    def _set_damping(self, value: float) -> None:
        with uninterrupted():
            self._damping = value
            self._rescale()

    @property
    def gram(self) -> Array:
        """G Gᵀ of the gradients held, oldest first, shape (len, len), float64: a copy."""
        return self._do(self._gram)

    @property
    def dual(self) -> Array:
        """A = nλI + GGᵀ of the gradients held, oldest first, float64: a copy."""
        return self._do(lambda: self._gram() + self._shift * self._rows.home.eye(len(self)))

    def _of_what(self) -> str:
        return f" of {len(self)} of {self.window_size} gradients, damping {self._damping:g},"

    def _gram(self) -> Array:
        self._by_dual()
        xp, home = self._rows.home.xp, self._rows.home
        slots = xp.asarray(np.asarray(self._rows.slots, dtype=np.int64), device=home.device)
        return xp.take(xp.take(self._dual.gram, slots, axis=0), slots, axis=1)

    @property
    def gradients(self) -> ArrayT:
        """The gradients held, oldest first, shape (len, d): a copy."""
        held: ArrayT = self._do(self._rows.held)
        return held

    def append(self, g: ArrayT) -> None:
        """Add a gradient; a full window drops its oldest.

        Parameters
        ----------
        g : array, shape (d,)
            A gradient, copied into the window in the window's dtype.

        Raises
        ------
        TypeError
            If ``g`` is not a real floating array of the window's library.
        ValueError
            If its shape or device is another, or it holds a NaN or an infinity. The window is
            then as it was.

        Notes
        -----
        One pass over the window and O(m²).
        """
        self._do(self._append, g)

    def replace(self, i: int, g: ArrayT) -> None:
        """Exchange a gradient that is held; it keeps its age.

        Parameters
        ----------
        i : int
            Position in the window: 0 is the oldest, -1 the newest.
        g : array, shape (d,)
            See :meth:`append`.

        Raises
        ------
        IndexError
            If no such gradient is held.
        TypeError, ValueError
            See :meth:`append`.
        """
        self._do(self._replace, i, g)

    def remove(self, i: int) -> None:
        """Remove a gradient that is held.

        Parameters
        ----------
        i : int
            Position in the window: 0 is the oldest, -1 the newest.

        Raises
        ------
        IndexError
            If no such gradient is held.
        """
        self._do(self._remove, i)

    def append_matvec(self, g: ArrayT, *, check_finite: bool = True) -> ArrayT:
        """Add a gradient and return F⁻¹g = n Gᵀ A⁻¹ eⱼ, j its row, with it in the window.

        Parameters
        ----------
        g : array, shape (d,)
            See :meth:`append`.
        check_finite : bool, default True
            Wait, on a device, for whether ``g`` was finite. With False the caller vouches for it,
            and a full window queues the step and returns without waiting; see the notes.

        Returns
        -------
        array, shape (d,)
            In the dtype of ``g``.

        Raises
        ------
        TypeError, ValueError
            See :meth:`append`.

        Warns
        -----
        scipy.linalg.LinAlgWarning
            If λ is so small beside the gradients' squared norms that F is singular in float64
            for this ``g``. Not looked for by the CUDA kernels, where that would mean to wait.

        Notes
        -----
        One pass over the window less than ``append`` and ``matvec``, and accurate for gradients
        that are nearly collinear or for tiny λ, since nothing is subtracted.

        With the CUDA kernels a full window waits for the device once a step, when the last pass is
        already under way: for whether ``g`` was finite and the dual's inverse still accurate, which
        else is factored anew for this result. Steps while the window fills wait too, and so does
        the refactoring, twice in about m steps.

        With ``check_finite=False`` these two answers are left to the next call on the window that
        asks for its gradients or its dual. It begins with them, and waits only where the device
        has not come to the last pass of the step before, so that the host is at most a step ahead.
        What is one step late, and no more than that:

        - A gradient that is not finite never enters the window, and gives a result of NaN. The next
          call raises the ValueError in its place, does nothing else, and can be repeated.
        - Where rounding has spoilt the dual's inverse, that one result has been refined twice with
          the spoilt inverse, and may be wrong. The next call issues a RuntimeWarning, and factors
          anew before it computes.

        Elsewhere, and while the window fills, the keyword changes nothing: the squared norm of
        ``g`` is needed on the host, and to look at it costs nothing.
        """
        product: ArrayT = self._do(self._append_matvec, g, check_finite)
        return product

    def clear(self) -> None:
        """Remove all gradients; library, dtype and device stay."""
        with self._lock:
            self._hold(self._rows.emptied())

    # -- state -----------------------------------------------------------------------------

    @property
    def _sizes(self) -> dict[str, Any]:
        """The arguments in which windows that exchange states must agree."""
        return {"num_params": self.num_params, "window_size": self.window_size}

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as plain arrays, numbers and strings.

        Returns
        -------
        dict
            Copies: ``gradients`` (rows of the ring) in the window's library, the m-sized float64
            matrices as NumPy arrays. It fits ``numpy.savez(file, **state)``.

        See Also
        --------
        load_state_dict : Takes it up; later results are then the same bit for bit.
        """
        return self._do(window_state.save, self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state, from a window of the same ``num_params`` and ``window_size``.

        Parameters
        ----------
        state : mapping
            What :meth:`state_dict` returned, or what ``numpy.load`` made of it. Damping and
            normalization are taken from it.

        Raises
        ------
        ValueError
            If it is not a state of this version and these sizes, complete and consistent. The
            window is then as it was.
        """
        with self._lock:
            self._adopt(window_state.load(self, state))

    def _adopt(self, loaded: Self) -> None:
        """Become another window of the same sizes, but for the lock that is held meanwhile."""
        with uninterrupted():
            self.__dict__.update({**loaded.__dict__, "_lock": self._lock})

    def __copy__(self) -> Self:
        return copy.deepcopy(self)  # a shallow copy would write into this window's memory

    # -- behind the door -------------------------------------------------------------------

    def _do(self, act: Callable[..., Answer], *arguments: Any) -> Answer:
        """Change or show the window: one thread at a time, after what is pending of a step."""
        with self._lock:
            self._accept()
            return act(*arguments)

    def _settle(self) -> None:
        self._accept()
        if self._has_few_parameters and len(self) and not self._was_inverted:
            self._was_inverted = True
            if not self._invert(self._rows):
                self._by_dual()
        super()._settle()

    @property
    def _has_few_parameters(self) -> bool:
        """Whether F is so much smaller than the dual that there is no dual to be kept."""
        here = self._reduce is None and not self._rows.always_float64  # as kernels on a card are
        short = PRIMAL_SHARE * self.num_params <= self.window_size
        return short and here and isinstance(self._rows, ArrayRing)

    def _by_dual(self) -> None:
        if len(self._dual) != self._rows.used:
            self._dual.set_gram(finite_gram(self._rows))

    def _accept(self) -> bool:
        """Act on what a device found of the last step; whether the dual's inverse is given up."""
        if self._pending is None:
            return False
        pending, self._pending = self._pending, None
        return pending.accept(self._rows, self._dual)

    def _append(self, g: Array) -> None:
        self._send(self._step(g))
        self._accept()

    def _append_matvec(self, g: Array, check_finite: bool) -> Array:
        dtype = getattr(g, "dtype", None)
        step = self._step(g)
        self._settle()
        slot = self._rows.slots[-1]
        if self._primal is not None:
            return self._primal._apply(cast("ArrayRing", self._rows).row(slot, dtype))
        c = self._dual.column(slot) * self._divisor
        if step.norm2 is not None:
            c = c + 0.0 * step.norm2  # NaN where it is not finite: what stayed is another gradient
        self._send(step, given_out=not check_finite)
        y = self._digits.held(c, dtype)
        if check_finite and self._accept():
            y = self._digits.held(self._dual.column(slot) * self._divisor, dtype)
        return y

    def _replace(self, i: int, g: Array) -> None:
        i = check.index(i, "i", len(self))
        incoming = self._incoming(g, unseen=True)
        self._send(self._exchange(self._rows.slots[i], incoming, self._rows.slots))
        self._accept()

    def _remove(self, i: int) -> None:
        i = check.index(i, "i", len(self))
        slot = self._rows.slots[i]
        slots = [other for other in self._rows.slots if other != slot]
        self._exchange(slot, Incoming(self._rows.blank(slot), 0.0), slots)

    # -- a step ----------------------------------------------------------------------------

    def _step(self, g: Array) -> Step:
        """Let a gradient in, and the oldest out of a full window."""
        full = len(self) == self.window_size
        incoming = self._incoming(g, unseen=full)
        if full:
            oldest, *others = self._rows.slots
            return self._exchange(oldest, incoming, [*others, oldest])
        if not self._allocated:
            self._allocate(self._values(incoming.row))
        slot = self._rows.free_slot()
        return self._exchange(slot, incoming, [*self._rows.slots, slot])

    def _incoming(self, g: Array, *, unseen: bool) -> Incoming:
        """Check a gradient; with ``unseen``, where a device will, leave its norm to that."""
        g = check.vector_argument(g, "g", self.num_params)
        if is_traced(g):
            msg = "g must hold values, got a JAX tracer; keep the window out of jit, vmap and grad"
            raise TypeError(msg)
        if self._allocated or self._given is not None:
            check.beside(g, "g", self._rows.like)
        return self._row_of(g, self.dtype if self.dtype is not None else g.dtype, unseen)

    def _row_of(self, g: Array, dtype: Any, unseen: bool) -> Incoming:
        """Return what the ring stores of a gradient as ``dtype``."""
        if g.dtype != dtype:
            with np.errstate(over="ignore"):  # an overflow is refused below, by name
                g = array_namespace(g).astype(g, dtype)
        if unseen and self._rows.exchanges(g):
            return Incoming(g, None)
        norm2 = float(self._rows.square_norms(g))
        check.finite_norm(norm2, dtype)
        return Incoming(g, norm2)

    def _values(self, row: Any) -> Array:
        """Return an array of the library, dtype and device that the window's rows have."""
        return row

    def _exchange(self, slot: int, incoming: Incoming, slots: list[int]) -> Step:
        """Write a row into a slot of the ring, and let ``slots`` be the rows held from now on."""
        rows, (row, norm2) = self._rows, incoming
        before, there = rows.slots, None
        if self._has_few_parameters:
            with uninterrupted():
                rows.write(slot, row)
                rows.slots = slots
                self._rescale()
                self._dual.set_gram(rows.home.zeros((0, 0)))
                self._digits.stepped()
            return Step(None, before)
        grows = slot == rows.used
        on_device = rows.exchanges(row)
        if not on_device:
            products = self._digits.products(rows.vector(row))
            products = rows.row_of_gram(slot, products, cast("float", norm2))
        with uninterrupted():
            if on_device:
                products, found = rows.exchange_unseen(slot, row)
                there = found if norm2 is None else None
            else:
                rows.write(slot, row)
            if grows:
                self._dual.grow()
            rows.slots = slots
            self._rescale()
            self._dual.replace(slot, products)
            self._digits.stepped()
        return Step(there, before)

    def _send(self, step: Step, *, given_out: bool = False) -> None:
        """Let what a device has found of a step set out for the host, for :meth:`_accept`."""
        if step.norm2 is not None or self._dual.doubt is not None:
            self._pending = Pending(step.norm2, step.before, self._dual, given_out)

    # -- queries ---------------------------------------------------------------------------

    def _checked(self, x: Any, name: str, ndim: tuple[int, ...]) -> Any:
        if not self._allocated and self._given is None:  # I/λ, of any library
            return check.vector_argument(x, name, self.num_params, ndim=ndim)
        return super()._checked(x, name, ndim)

    def _apply(self, x: Array) -> Array:
        return super()._apply(x) if len(self) else x / self._damping

    def _refined(self, x: Array, steps: int) -> Array:
        return super()._refined(x, steps) if len(self) else x / self._damping

    def _quadratic(self, x: Array) -> Array:
        if not len(self):
            return self._rows.square_norms(x) / self._damping
        return super()._quadratic(x)

    def _diagonal(self) -> Array:
        if not len(self):
            return np.full(self.num_params, 1.0 / self._damping)
        return super()._diagonal()

    def _frozen(self) -> tuple[Rows, Array]:
        self._by_dual()
        return self._rows.copy(), self._dual.gram

    def _version(self) -> Any:
        return self._digits, self._digits.steps, self._damping

    @property
    def _divisor(self) -> int:
        return self.window_size if self.normalization == "window" else max(len(self), 1)

    # -- memory ----------------------------------------------------------------------------

    @property
    def _allocated(self) -> bool:
        return self._rows.capacity == self.window_size

    def _allocate(self, like: Array) -> None:
        """Make the ring, in the library, dtype and device of ``like``."""
        self._hold(self._ring(like, self.window_size))

    def _ring(self, like: Array, capacity: int) -> Ring:
        """Return an empty ring in the library, dtype and device of ``like``."""
        shape = (capacity, self.num_params)
        array = array_namespace(like).zeros(shape, dtype=like.dtype, **_on(device(like)))
        return ArrayRing(array, self._reduce)

    def _work_in(self, ring: Ring) -> None:
        """Start in a ring of no gradients that was made elsewhere, of this window's sizes."""
        self._given, self._given_dtype = Home(ring.xp, ring.device), ring.dtype
        self._hold(ring)

    def _hold(self, ring: Ring) -> None:
        """Start with a ring of no gradients."""
        with uninterrupted():
            self._rows = ring
            self._primal, self._was_inverted = None, False
            self._dual = Dual(ring.home.zeros((0, 0)), self._shift, ring.home)
            self._digits = Digits(
                ring,
                self._dual,
                self._damping,
                LARGEST_WINDOW_ROUNDING,
                checked=True,
                patience=self.window_size,
            )
            self._pending = None

    @property
    def _shift(self) -> float:
        return self._divisor * self._damping

    def _rescale(self) -> None:
        """Take up a change of λ, of n or of the rows."""
        self._primal, self._was_inverted = None, False
        self._dual.set_shift(self._shift)
        self._digits.damping = self._damping
        self._digits.checked = False


def _on(device: Any) -> dict[str, Any]:
    return {} if device is None else {"device": device}
