"""The gradients of a model as rows that are never stored: computed anew by every product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from mfac_core import _validate as check
from mfac_core._warn import warn
from mfac_core.torch._batches import rows_argument
from mfac_core.torch._directions import Directions
from mfac_core.torch._gradients import Loss, columns_of, common_dtype
from mfac_core.torch._layer_grams import LayerGrams
from mfac_core.torch._losses import Losses, backward
from mfac_core.torch._parameters import Choice, bare
from mfac_core.torch._store import width

MEMORY = 1 << 28
"""Bytes that gradients may take, by default."""

DISAGREEMENT = (
    "the model's gradients must be the same in every pass, and project(combine(c)) is not "
    "gram() @ c; look at its own autograd functions, and for what is not deterministic. Where all "
    "losses are next to 0, their gradients have no digits left but in float64: model.double()"
)


class ModelGradients:
    """Gradients of a model's losses, a row each, of which none is ever stored.

    They go wherever an array of gradients goes, as :class:`mfac_core.GradientRows`. What is held of
    them is the Gram matrix; a product Gx runs the model forward over all batches, one Gᵀc forward
    and backward.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode that you want: as a rule after ``model.eval()``, since dropout has no place
        here. It comes back as it was from every pass; do not train it meanwhile.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the losses of a batch: a vector, a row for each of them,
        such as ``lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="none")``;
        or a scalar, one row for the batch, as in :func:`gradient_rows`.
    batches : iterable
        Gives the same batches every time that it is gone through: a list, or a DataLoader with
        ``shuffle=False``. Tensors are moved to the model's device.
    parameters : optional
        The columns, see :func:`gradient_rows`; by default all that require a gradient, in the order
        of ``model.parameters()``, each flattened.
    memory : int, default 2**28
        Bytes that gradients, or what stands for them, may take while the Gram matrix is formed; at
        least those of two batches. Less means that the data are gone through more often.
    progress : bool, default False
        Show a bar over the batches, where tqdm is installed.

    Attributes
    ----------
    shape : tuple of int
        (m, d).
    dtype : torch.dtype
        The parameters', where they differ the one that holds all.
    device : torch.device
        Of the first parameter.
    losses : torch.Tensor, shape (m,)
        The losses, float64 on the host, that every later pass is compared with.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or a loss is not finite.
    RuntimeError
        By a later pass, if its losses are not those of the first: says whether the model has been
        changed, dropout is in training mode, the model is not deterministic, the batches come in
        another order or differ.

    Warns
    -----
    UserWarning
        If what the layers see does not explain the gradients, such as under batch statistics: the
        rows are then computed one by one, which takes longer.

    See Also
    --------
    gradient_rows : The same gradients as an array.
    mfac_core.influence.Influence : Takes it for the training samples and for the queries.

    Notes
    -----
    ``project`` goes by ``torch.func.jvp``; where an operation has no derivative in that mode, or
    another one than backward, as an embedding with ``padding_idx``, by the derivative of Gᵀc with
    respect to c, twice backward; and where it cannot be differentiated twice, by a backward pass
    for each row.

    ``gram`` records what goes into each layer (a) and what comes back to it (b). For linear
    layers, 2-d convolutions and embeddings ⟨gᵢ, gⱼ⟩ = Σₜₜ' ⟨aᵢₜ, aⱼₜ'⟩⟨bᵢₜ, bⱼₜ'⟩ over the places t
    of a row, or the products of the layer's gradients, whichever is smaller; other layers, such as
    norms, by their gradients. Parameters that are used in other ways, such as those of attention
    and of recurrent layers, by a backward pass for each row. Which is which is found out on the
    first batch, by comparison with plain autograd, and the Gram matrix is compared with
    ``project(combine(c))`` for a random c in the end.

    Rows carry the rounding of the model's own passes, a few units of its dtype; no more is added to
    the Gram matrix: products of factors are float64, and those of gradients sums of 4,096 in
    float32, added up in float64, an error below 2⁻²¹‖gᵢ‖‖gⱼ‖. ``in_float64()`` runs the model in
    float64; the operators ask for it where the damping is too small for less.

    Examples
    --------
    >>> import torch
    >>> import mfac_core as mfac
    >>> from mfac_core.torch import ModelGradients
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> batches = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
    >>> rows = ModelGradients(model, lambda model, x: model(x)[:, 0].square(), batches)
    >>> rows.gram()  # of the rows [2, 0] and [0, 8]
    tensor([[ 4.,  0.],
            [ 0., 64.]], dtype=torch.float64)
    >>> mfac.InverseFisher(rows, damping=1.0) @ torch.tensor([3.0, 33.0])
    tensor([1., 1.])
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        parameters: Choice | None = None,
        *,
        memory: int = MEMORY,
        progress: bool = False,
    ) -> None:
        check.function_argument(loss_fn, "loss_fn", "(model, batch)")
        rows_argument(None, batches)
        if isinstance(batches, Iterator):
            msg = (
                "batches must give the same batches every time, such as a list or a DataLoader, "
                f"got {type(batches).__name__}, which is gone through once; pass list(batches)"
            )
            raise TypeError(msg)
        self._arguments = (bare(model), loss_fn, batches)
        self._columns = columns_of(model, parameters)
        self._memory = check.integer(memory, "memory", minimum=1)
        self._progress = progress
        self._start(wide=False)

    def _start(self, *, wide: bool) -> None:
        self._losses = Losses(*self._arguments, self._columns, wide=wide, progress=self._progress)
        self.dtype = torch.float64 if wide else common_dtype(self._columns.values())
        self._grams = LayerGrams(self._losses, self._columns, self._memory, self.dtype)
        self._directions = Directions(
            self._losses, has_forward_mode=not self._grams.stops_gradients
        )
        self.device = next(iter(self._columns.values())).device
        self.losses = self._losses.recorded
        self.shape = len(self.losses), width(self._columns)

    def __repr__(self) -> str:
        m, d = self.shape
        return f"<ModelGradients of {m} rows of {d} parameters with dtype {self.dtype}>"

    def in_float64(self) -> ModelGradients:
        """Return the same rows by passes in float64, of the model and of the batches.

        Returns
        -------
        ModelGradients
            Of dtype float64; it holds a copy of the parameters in float64 during a pass.
        """
        wide = type(self).__new__(type(self))
        wide._arguments, wide._columns = self._arguments, self._columns
        wide._memory, wide._progress = self._memory, self._progress
        wide._start(wide=True)
        # The first pass of the one is a later pass of the other.
        for at in self._losses.slices:
            self._losses.check(at, wide.losses[at], None)
        return wide

    # -- products --------------------------------------------------------------------------

    def project(self, x: Tensor) -> Tensor:
        """Return G x, by the model's derivative in the direction x.

        Parameters
        ----------
        x : torch.Tensor, shape (d,) or (d, k)
            A vector, or columns of vectors: a forward pass each.

        Returns
        -------
        torch.Tensor, shape (m,) or (m, k)
            In float64.
        """
        x = check.vector_argument(x, "x", self.shape[1], ndim=(1, 2))
        directions = [self._split(column) for column in x.reshape(len(x), -1).T]
        out = torch.zeros(self.shape[0], len(directions), dtype=torch.float64, device=self.device)
        values = self._losses.values()
        with closing(self._losses.each()) as batches:
            for _, at, batch in batches:
                for j, direction in enumerate(directions):
                    losses, along = self._directions.along(values, direction, batch)
                    self._losses.check(at, losses, batch)
                    out[at, j] = along.double()
        return out.reshape(self.shape[0], *x.shape[1:])

    def combine(self, c: Tensor) -> Tensor:
        """Return Gᵀc, by a backward pass of the losses weighted by c.

        Parameters
        ----------
        c : torch.Tensor, shape (m,) or (m, k)
            A vector, or columns of vectors: a backward pass each.

        Returns
        -------
        torch.Tensor, shape (d,) or (d, k)
            Summed over batches in float64.
        """
        c = check.vector_argument(c, "c", self.shape[0], ndim=(1, 2))
        columns = c.reshape(len(c), -1)
        k = columns.shape[1]
        out = torch.zeros(self.shape[1], k, dtype=torch.float64, device=self.device)
        with closing(self._losses.each()) as batches:
            for _, at, batch in batches:
                leaves = self._losses.leaves()
                with torch.enable_grad():
                    losses = self._losses.rows(leaves, batch)
                self._losses.check(at, losses, batch)
                used = [j for j in range(k) if bool(columns[at, j].any())]
                for j in used:
                    weights = columns[at, j].to(losses.dtype)
                    parts = backward(losses, leaves, weights, keep=j != used[-1])
                    for some, part in zip(self._cut(out[:, j]), parts, strict=True):
                        if part is not None:
                            some += part.reshape(-1).to(self.device)
        return out.reshape(self.shape[1], *c.shape[1:])

    def _cut(self, flat: Tensor) -> list[Tensor]:
        return list(flat.split([p.numel() for p in self._columns.values()]))

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        """Return a flat vector as values beside the parameters."""
        values = self._losses.values().items()
        return {
            name: part.reshape(v.shape).to(v.device, v.dtype)
            for (name, v), part in zip(values, self._cut(x), strict=True)
        }

    # -- the Gram matrix -------------------------------------------------------------------

    def gram(self) -> Tensor:
        """Return G Gᵀ, layer by layer.

        Returns
        -------
        torch.Tensor, shape (m, m)
            In float64, on the model's device.

        Raises
        ------
        RuntimeError
            If it is not that of ``project`` and ``combine``.
        """
        gram = self._grams.gram()
        if self._agrees(gram) or self._agrees_backward(gram):
            return gram
        if not self._grams.explain_nothing():
            raise RuntimeError(DISAGREEMENT)
        warn(
            "what the layers of the model see does not explain its gradients, as where the samples "
            "of a batch are mixed; they are computed one by one",
            UserWarning,
        )
        gram = self._grams.gram()
        if self._agrees(gram) or self._agrees_backward(gram):
            return gram
        raise RuntimeError(DISAGREEMENT)

    def cross(self, other: ModelGradients) -> Tensor:
        """Return G Hᵀ for the rows H of other losses of the same parameters, as queries are.

        Parameters
        ----------
        other : ModelGradients
            Of as many columns.

        Returns
        -------
        torch.Tensor, shape (m, q)
            In float64, on the model's device.

        Raises
        ------
        ValueError
            If the parameters have other names or shapes.
        RuntimeError
            See the class.

        Notes
        -----
        Layer by layer, as :meth:`gram`, with the factors of ``other`` within the budget of memory:
        one pass over the batches of this for each part of the others, where :meth:`project` has a
        pass for each column.
        """
        shapes = [[(n, p.shape) for n, p in rows._columns.items()] for rows in (self, other)]
        if shapes[0] != shapes[1]:
            msg = "other must be of parameters with the same names and shapes"
            raise ValueError(msg)
        products = self._grams.cross(other._grams)
        if not self._agrees(products, other):
            self._grams.explain_nothing()
            products = self._grams.cross(other._grams)
            if not self._agrees(products, other):
                raise RuntimeError(DISAGREEMENT)
        return products

    def _agrees(self, gram: Tensor, other: ModelGradients | None = None) -> bool:
        """Whether (GHᵀ)c is G(Hᵀc) for a random c.

        Errors are relative to ‖gᵢ‖‖Hᵀc‖; or to that of a typical row, for those of samples that are
        fitted to the last digit: 1 − p has none left there.
        """
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(gram.shape[1], dtype=torch.float64, generator=generator).to(self.device)
        y = (other or self).combine(c)
        expected = self.project(y)
        if other is None:
            squares = gram.diagonal().clamp(min=0.0)
            sizes = (squares.sqrt() + squares.mean().sqrt()) * y.norm()
        else:
            sizes = expected.norm()
        error = (gram @ c - expected).abs()
        allowed = 8.0 * self._losses.tolerance() * sizes
        return bool((error <= allowed + torch.finfo(torch.float64).tiny).all())

    def _agrees_backward(self, gram: Tensor) -> bool:
        """Whether it is forward mode that differs: the rows are what goes backward."""
        if not self._directions.has_forward_mode:
            return False
        self._directions.has_forward_mode = False
        agrees = self._agrees(gram)
        self._directions.has_forward_mode = not agrees
        return agrees
