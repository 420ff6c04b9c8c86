"""What a device finds in a step of the window: sent to the host at once, looked at later."""

from __future__ import annotations

import numpy as np

from mfac_core import _validate as check
from mfac_core._arrays import Array
from mfac_core._dual import Dual
from mfac_core._ops import rows as ops
from mfac_core._rows.ring import Ring
from mfac_core._warn import warn

LATE_DOUBT = (
    "the result of the append_matvec before, with check_finite=False, may be wrong: rounding had "
    "spoilt the dual's inverse, which is now computed anew; with check_finite=True it would have "
    "been for that result"
)


class Pending:
    """The squared norm of a new gradient and the dual's doubt, on their way to the host.

    Parameters
    ----------
    norm2 : array, shape (1,), optional
        ‖g‖², where only the device knows it. Not finite, it has let the device keep the old row.
    before : list of int
        The slots held before the step.
    dual : Dual
        With or without a doubt.
    given_out : bool
        Whether the caller has the step's result before this is looked at.
    """

    def __init__(self, norm2: Array | None, before: list[int], dual: Dual, given_out: bool) -> None:
        home = dual.home
        found = [home.zeros(1) if x is None else home.receive(x) for x in (norm2, dual.doubt)]
        self._look = ops.later(home.xp.concat(found))
        self._before = before
        self._given_out = given_out

    def accept(self, ring: Ring, dual: Dual) -> bool:
        """Wait for it, refuse the gradient or give up the dual's inverse; say whether it went."""
        norm2, doubt = self._look()
        given_up = dual.discard_if_doubtful(doubt)
        if not np.isfinite(norm2):
            ring.slots = self._before
        check.finite_norm(norm2, ring.dtype, late=self._given_out)
        if given_up and self._given_out:
            warn(LATE_DOUBT, RuntimeWarning)
        return given_up
