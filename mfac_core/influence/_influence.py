"""Influence of training samples: the public class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, overload

import numpy as np
import scipy.linalg
import scipy.sparse

from mfac_core import _validate as check
from mfac_core._arrays import (
    array_namespace,
    has_float64,
    is_array_api_obj,
    promote,
    send,
    to_numpy,
)
from mfac_core._operators.samples import SampleInverse
from mfac_core._rows.base import Reduce, Rows
from mfac_core._rows.protocol import Gradients
from mfac_core._typing import ArrayT, Damping, GivenT, NDArray, Sliceable, Stored
from mfac_core.influence._queries import products_of


class Selection(NamedTuple, Generic[ArrayT]):
    """The training samples that were selected for each query, first the one that matters most."""

    indices: ArrayT
    """(q, k), int64, or int32 where the library has no 64 bits."""

    scores: ArrayT
    """(q, k)."""


class Influence(Generic[ArrayT]):
    """Influence of training samples on losses, and of leaving groups of them out.

    The training has minimised (1/m) Σ ℓᵢ(w) + λ‖w‖²/2, of which the quadratic model
    ½ δᵀFδ around the solution is taken, with F = λI + (1/m) Σ gᵢgᵢᵀ.

    Parameters
    ----------
    gradients : array of shape (m, d), sequence of arrays of shape (m, dₖ), sliceable, or rows
        The gradients of the training samples' losses at the solution, without the penalty, in any
        storage that :class:`mfac_core.InverseFisher` takes; :class:`mfac_core.GradientRows`
        such as :class:`mfac_core.torch.ModelGradients`, too.
    damping : float or "auto"
        λ > 0, the weight of the penalty; or that of :func:`mfac_core.choose_damping`.
    reduce : callable, optional
        Sum over ranks, for gradients whose columns are spread over them, see
        :class:`mfac_core.InverseFisher`. Queries are then the rank's own columns, results are the
        same on all ranks.
    progress : bool, default False
        Show a bar during passes over the gradients, where tqdm is installed.

    Attributes
    ----------
    damping : float
        λ.

    Raises
    ------
    TypeError, ValueError
        See :class:`mfac_core.InverseFisher`.

    Notes
    -----
    **Sign and scale.** A score is the change of the query's loss when the sample is *left out*, in
    the units of that loss: positive for a sample that helps. It has the 1/m of the sample's weight
    in the mean loss. :meth:`leave_out` has the same sign. Others' scores differ by constants, see
    the page on influence.

    Set-up costs d·m² multiplications for GGᵀ, and O(m³). To first order by Koh and Liang,
    "Understanding Black-box Predictions via Influence Functions" (ICML 2017).

    Examples
    --------
    >>> import numpy as np
    >>> from mfac_core.influence import Influence
    >>> G = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    >>> influence = Influence(G, damping=1.0)
    >>> influence.scores(np.array([[1.0, 1.0]]))
    array([[ 0.2       ,  0.28571429, -0.2       ]])
    >>> influence.leave_out([[0], [1]], np.array([[1.0, 1.0]]))
    array([[0.25      ],
           [0.66666667]])
    """

    @overload
    def __init__(
        self: Influence[NDArray],
        gradients: Stored,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: Influence[GivenT],
        gradients: Gradients[GivenT],
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    @overload
    def __init__(
        self: Influence[NDArray],
        gradients: Sliceable,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None: ...
    def __init__(
        self,
        gradients: Any,
        *,
        damping: Damping,
        reduce: Reduce | None = None,
        progress: bool = False,
    ) -> None:
        self._inverse = SampleInverse.of(
            gradients, damping=damping, reduce=reduce, progress=progress
        )

    def __repr__(self) -> str:
        m, d = self._rows.shape
        return f"<Influence of {m} samples on {d} parameters, damping {self.damping:g}>"

    def with_damping(self, damping: float) -> Influence[ArrayT]:
        """Return the influence by the same gradients under another λ.

        Parameters
        ----------
        damping : float
            λ > 0.

        Returns
        -------
        Influence
            It shares the Gram matrix with this one.

        Raises
        ------
        TypeError, ValueError
            If ``damping`` is not finite and positive.

        Notes
        -----
        O(m³), and no pass over the gradients, see :meth:`mfac_core.InverseFisher.with_damping`.

        Examples
        --------
        >>> import numpy as np
        >>> from mfac_core.influence import Influence
        >>> influence = Influence(np.array([[1.0, 0.0], [0.0, 2.0]]), damping=1.0)
        >>> [influence.with_damping(λ).self_influence().tolist() for λ in (0.5, 2.0)]
        [[0.5, 0.8], [0.2, 0.5]]
        """
        other = type(self).__new__(type(self))
        other._inverse = self._inverse.with_damping(damping)
        return other

    @property
    def damping(self) -> float:
        """λ."""
        return self._inverse.damping

    @property
    def _rows(self) -> Rows:
        return self._inverse.rows

    @property
    def _m(self) -> int:
        return self._rows.shape[0]

    def scores(self, queries: Any) -> ArrayT:
        """Return the influence of every training sample on every query, g_qᵀF⁻¹gᵢ/m.

        Parameters
        ----------
        queries : array of shape (q, d), sequence of arrays (q, dₖ), sliceable, rows, or iterator
            Gradients of the losses, or of whatever else, that are asked about: of the gradients'
            library and device, in parts where the gradients are in parts, or NumPy arrays beside a
            file; a file is read in slices of rows. An iterator, such as a generator, gives them
            array by array. A single vector (d,) is one query.

        Returns
        -------
        array, shape (q, m)
            To first order the change of query q's loss if training sample i were left out. In the
            gradients' library, and dtype but at least float32.

        Raises
        ------
        TypeError, ValueError
            If ``queries`` are not such, or hold a NaN or an infinity.

        Notes
        -----
        d·m·q multiplications in float64, O(q·m²), and nothing of size d × m but the gradients.
        """
        return self._sent(np.concatenate([np.zeros((0, self._m)), *self._scores(queries)]))

    def self_influence(self) -> ArrayT:
        """Return the influence of every training sample on its own loss, gᵢᵀF⁻¹gᵢ/m.

        Returns
        -------
        array, shape (m,)
            Within [0, 1): the leverage of the sample. Samples that are alone in what they say,
            such as those with a wrong label, have a large one. Their sum is the effective number
            of parameters. Without sample i its own loss would change by hᵢ/(1 − hᵢ) exactly.
        """
        gram, kernel = self._inverse.matrices()
        return self._sent(np.clip(np.einsum("ij,ij->i", gram, kernel), 0.0, 1.0))

    def leave_out(self, groups: Iterable[Any], queries: Any = None) -> ArrayT:
        """Return what leaving out each group changes, exactly under the quadratic model.

        Without a group S the loss is (1/m) Σ_{i∉S} ℓᵢ(w) + λ‖w‖²/2, the weights of all that stays
        being what they were, and its quadratic model has its minimum at δ_S = F_S⁻¹ Σ_{i∈S} gᵢ/m
        from the solution, F_S = F − (1/m) Σ_{i∈S} gᵢgᵢᵀ.

        Parameters
        ----------
        groups : iterable
            Of groups, each the indices of its samples, such as a list, a set or an integer array of
            any library; one index; or a mask of length m. ``range(m)`` leaves out one after the
            other. A sample counts once in a group.
        queries : optional
            See :meth:`scores`.

        Returns
        -------
        array, shape (groups,) or (groups, q)
            The increase ½ δ_SᵀFδ_S ≥ 0 of the training loss of *all* samples, penalty included,
            at the solution without the group. With ``queries``, the change g_qᵀδ_S of each of
            their losses. In the gradients' library, and dtype but at least float32.

        Raises
        ------
        TypeError, ValueError, IndexError
            If a group is not of integers below m, or a mask of another length.

        Notes
        -----
        Exact for groups of any size: with P = [A⁻¹]_SS and H = [GGᵀA⁻¹]_SS,
        v = P⁻¹1/(mλ) = (I − H)⁻¹1, δ_S = Gᵀ[A⁻¹]_:S v and ½ δ_SᵀFδ_S = ½ vᵀHv/m.
        O(s²·m + s³) for a group of s samples, once A⁻¹ is known, O(m³); no pass over the
        gradients but that for the queries.
        """
        check.iterable_argument(groups, "groups", "indices, groups of them, or masks")
        weights = [self._weights(group, f"groups[{i}]") for i, group in enumerate(groups)]
        if queries is None:
            return self._sent(np.array([increase for _, _, increase in weights]))
        spread = scipy.sparse.csc_array(
            (
                np.concatenate([np.zeros(0), *(v for _, v, _ in weights)]),
                np.concatenate([np.zeros(0, np.int64), *(some for some, _, _ in weights)]),
                np.cumsum([0, *(len(some) for some, _, _ in weights)]),
            ),
            shape=(self._m, len(weights)),
        )
        changes = [spread.T @ scores.T for scores in self._scores(queries)]
        return self._sent(np.concatenate([np.zeros((len(weights), 0)), *changes], axis=1))

    def most_helpful(self, queries: Any, k: int) -> Selection[ArrayT]:
        """Return the k training samples without which the loss of a query would rise most.

        Parameters
        ----------
        queries : array of shape (q, d), sequence of arrays (q, dₖ), sliceable, rows, or iterator
            See :meth:`scores`.
        k : int
            How many, for each query; at most m.

        Returns
        -------
        Selection
            ``indices`` and ``scores``, shape (q, k), by decreasing score. Nothing of size q × m is
            kept.
        """
        return self._selected(queries, k, lambda scores: -scores)

    def most_harmful(self, queries: Any, k: int) -> Selection[ArrayT]:
        """Return the k training samples without which the loss of a query would fall most.

        Parameters
        ----------
        queries : array of shape (q, d), sequence of arrays (q, dₖ), sliceable, rows, or iterator
            See :meth:`scores`.
        k : int
            How many, for each query; at most m.

        Returns
        -------
        Selection
            ``indices`` and ``scores``, shape (q, k), by increasing score.
        """
        return self._selected(queries, k, lambda scores: scores)

    # -- m-sized ---------------------------------------------------------------------------

    def _weights(self, group: Any, name: str) -> tuple[NDArray, NDArray, float]:
        """Return the samples S of a group, v = (I − H_SS)⁻¹1, and ½ vᵀH_SSv/m."""
        some = self._members(group, name)
        if not len(some):
            return some, np.zeros(0), 0.0
        gram, kernel = self._inverse.matrices()
        share = np.full(len(some), 1.0 / (self._m * self.damping))
        v = scipy.linalg.solve(kernel[np.ix_(some, some)], share, assume_a="pos")
        # Not v − 1, which would leave nothing of a small H.
        products = gram[some] @ (kernel[:, some] @ v)
        return some, v, max(0.5 * float(v @ products) / self._m, 0.0)

    def _members(self, group: Any, name: str) -> NDArray:
        if is_array_api_obj(group):
            values = to_numpy(group)
        else:
            is_some = isinstance(group, Iterable) and not isinstance(group, (Sequence, np.ndarray))
            values = np.asarray([*group] if is_some else group)
        if values.dtype == np.bool_:
            if values.shape != (self._m,):
                hint = "" if values.ndim else "; one mask m is one group, [m]"
                msg = f"{name} must be a mask of shape {(self._m,)}, got shape {values.shape}{hint}"
                raise ValueError(msg)
            return np.flatnonzero(values)
        if values.size == 0:
            return np.zeros(0, np.int64)
        if values.dtype.kind not in "iu" or values.ndim > 1:
            msg = (
                f"{name} must be the indices of its samples, or a mask, got dtype {values.dtype}, "
                f"shape {values.shape}"
            )
            raise TypeError(msg)
        outside = (values < -self._m) | (values >= self._m)
        if np.any(outside):
            wrong = int(np.atleast_1d(values)[np.atleast_1d(outside)][0])
            msg = f"{name} holds {wrong}, which is out of range for {self._m} training samples"
            raise IndexError(msg)
        return np.unique(np.where(values < 0, values + self._m, values))

    # -- queries ---------------------------------------------------------------------------

    def _scores(self, queries: Any) -> Iterator[NDArray]:
        """Yield the scores (k, m) of some queries after the other, float64."""
        xp = self._rows.home.xp
        for products in products_of(queries, self._rows):
            if not bool(xp.all(xp.isfinite(products))):
                msg = (
                    "queries must be finite, got a NaN or an infinity, or a product beyond float64"
                )
                raise ValueError(msg)
            yield self._inverse.solve(products).T

    def _selected(
        self, queries: Any, k: int, order: Callable[[NDArray], NDArray]
    ) -> Selection[ArrayT]:
        k = check.integer(k, "k", minimum=1)
        if k > self._m:
            msg = f"k must be at most the number of training samples, {self._m}, got {k}"
            raise ValueError(msg)
        indices, values = [np.zeros((0, k), np.int64)], [np.zeros((0, k))]
        for scores in self._scores(queries):
            some = np.argpartition(order(scores), k - 1, axis=1)[:, :k]
            best = np.take_along_axis(scores, some, axis=1)
            # By index where scores are equal, so that the order is that of no library.
            by = np.lexsort((some, order(best)), axis=1)
            indices.append(np.take_along_axis(some, by, axis=1))
            values.append(np.take_along_axis(best, by, axis=1))
        like = self._rows.like
        xp = array_namespace(like)
        found = send(np.concatenate(indices), like, xp.int64 if has_float64(like) else xp.int32)
        return Selection(found, self._sent(np.concatenate(values)))

    def _sent(self, values: NDArray) -> ArrayT:
        like = self._rows.like
        sent: ArrayT = send(values, like, promote(like, array_namespace(like).float32))
        return sent
