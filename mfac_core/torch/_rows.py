"""Gradients of a model's loss, a row for each batch, by plain autograd."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mfac_core import _validate as check
from mfac_core._typing import Sliceable
from mfac_core.torch import _batches
from mfac_core.torch._gradients import (
    Loss,
    bar,
    columns_of,
    common_dtype,
    dtype_argument,
    refuse_sharded,
    rows_of_batches,
)
from mfac_core.torch._parameters import Choice
from mfac_core.torch._ranks import agreed, exchanged, share
from mfac_core.torch._store import put, store_for, width

OutT = TypeVar("OutT", bound=Sliceable)


@overload
def gradient_rows(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    parameters: Choice | None = None,
    rows: int | None = None,
    out: Tensor | None = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
    group: Any = None,
    progress: bool = False,
) -> Tensor: ...
@overload
def gradient_rows(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    parameters: Choice | None = None,
    rows: int | None = None,
    out: OutT,
    start: int = 0,
    dtype: torch.dtype | None = None,
    group: Any = None,
    progress: bool = False,
) -> OutT: ...
@overload
def gradient_rows(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    parameters: Choice | None = None,
    rows: int | None = None,
    out: str | Path,
    start: int = 0,
    dtype: torch.dtype | None = None,
    group: Any = None,
    progress: bool = False,
) -> np.memmap[Any, Any]: ...
def gradient_rows(
    model: torch.nn.Module,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    parameters: Choice | None = None,
    rows: int | None = None,
    out: Any = None,
    start: int = 0,
    dtype: torch.dtype | None = None,
    group: Any = None,
    progress: bool = False,
) -> Any:
    """Return the gradient of the loss of each batch, one a row.

    By plain autograd, one forward and one backward pass a batch: any model that can be trained
    can be used. For the gradients of single samples :func:`per_sample_gradients` is faster where
    the model allows it.

    Parameters
    ----------
    model : torch.nn.Module
        In the mode that you want: ``model.eval()`` for gradients without dropout, under the stored
        statistics of batch normalisation. It comes back as it was: modes, buffers, gradients,
        ``requires_grad`` and the random number generators of PyTorch. Every row starts from the
        same buffers. Inside ``DistributedDataParallel`` the rows are those of the rank's own
        batches. Under ``fully_shard`` every rank calls this with as many batches of its own: a row
        is the mean of the ranks' gradients, as a step of training has it, and each rank gets the
        columns of its own shards, parameter by parameter, which the operators take with
        ``reduce=``.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the loss of a batch, a scalar: as a rule its mean over
        the samples, such as ``lambda model, batch: cross_entropy(model(batch[0]), batch[1])``.
    batches : iterable
        A DataLoader, a list, a generator. A batch may be a tensor, or a tuple, list, dict or
        dataclass of what a batch may be; tensors are moved to the model's device. A short last
        batch is a row as any other.
    parameters : optional
        The columns: parameters, names, patterns such as ``"layer1.*"``, one or many of these, or
        a function of (name, parameter) that returns a bool. A pattern also fits all that is in
        the modules whose name it fits. Parameters that are frozen are taken when they are
        chosen. By default all that require a gradient. Always in the order of
        ``model.parameters()``, each flattened; one that is used in several places counts once.
    rows : int, optional
        How many batches to take; by default all, or as many as ``out`` has rows.
    out : tensor, array or path, optional
        Where to write: a tensor or NumPy array of shape (rows, d), a memmap, a dataset of h5py or
        zarr, or a path that ends in .npy. Rows are written one by one, and no two of them are in
        memory at a time. A file that a run has left unfinished is gone on with, after the
        batches whose rows it has, if the weights are still the same; a finished one is
        overwritten.
    start : int, default 0
        Number of rows that ``out`` has already, an array that an earlier run has begun to fill:
        as many batches are skipped. A file knows it by itself.
    dtype : torch.dtype, optional
        Of the rows; by default the parameters', where they differ the one that holds all.
        With an array for ``out`` it is that of ``out``.
    group : process group of torch.distributed, optional
        Every rank calls this with as many batches of its own, and gets its share of the columns,
        the part of ``torch.tensor_split``, of the rows of all ranks: what the operators take with
        ``reduce=``.
    progress : bool, default False
        Show a bar over the rows, where tqdm is installed.

    Returns
    -------
    torch.Tensor of shape (rows, d), or ``out``
        On the device of the first parameter. For a path a read-only ``numpy.memmap`` of the file.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, there are fewer batches than rows, the loss is not a
        scalar or does not depend on the parameters.
    NonFiniteError
        If a gradient holds a NaN or an infinity; a ``ValueError``.
    OSError
        If a row could not be written, as where the disk is full.

    Notes
    -----
    A row that is the mean over b samples has 1/b of the covariance of single gradients, so that
    λ should be 1/b of theirs.

    Examples
    --------
    >>> import torch
    >>> from mfac_core.torch import gradient_rows
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> batches = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])]
    >>> gradient_rows(model, lambda model, x: model(x).square().mean(), batches)
    tensor([[2., 0.],
            [0., 8.]])
    """
    wanted = _batches.rows_argument(rows, batches)
    columns = columns_of(model, parameters)
    check.function_argument(loss_fn, "loss_fn", "(model, batch)")
    dtype_argument(dtype)
    dtype = common_dtype(columns.values()) if dtype is None else dtype
    if rows is None and hasattr(out, "shape"):
        wanted = _batches.rows_argument(int(out.shape[0]), batches)
    d, ranks = width(columns), 1
    if group is not None:
        refuse_sharded(columns)
        if wanted is None or out is not None:
            msg = "group needs batches with a length, or rows, and writes to no out"
            raise ValueError(msg)
        d, ranks = share(d, group), dist.get_world_size(group)
        agreed(wanted, group)
    many = None if wanted is None else wanted * ranks
    store, many, dtype = store_for(out, many, d, columns, dtype)
    done = store.start or check.integer(start, "start", minimum=0)
    found = rows_of_batches(model, loss_fn, batches, columns, wanted, skip=done)
    try:
        for i, (row, _) in bar(enumerate(found, done), wanted, progress):
            row = row.to(dtype)
            part = row[None, :] if group is None else exchanged(row, group)
            put(store, i * ranks, part, many)
    finally:
        found.close()  # the model is as it was before anybody sees an error
    return store.finish()
