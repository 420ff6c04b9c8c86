"""What the batches of a step are asked for: gradients, losses, statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch

from mfac_core.torch import _batches, _groups, _statistics, _storage
from mfac_core.torch._gradients import Loss, bar, common_dtype, rows_of_batches, scalar
from mfac_core.torch._masks import Masked
from mfac_core.torch._ranks import all_rows, mean, same
from mfac_core.torch._store import put, store_for, width
from mfac_core.torch._unchanged import unchanged

MOST_ROWS = 256
"""Batches for a step, unless somebody says how many."""

GAIN = 0.01
"""Part of the loss by which new statistics must lower it to be kept."""


class Calibration:
    """The batches of one step.

    Parameters
    ----------
    model : torch.nn.Module
        As :func:`bare` returns it; in evaluation mode while it is asked.
    loss_fn : callable
        From the model and a batch to a scalar.
    batches : list
        As they come from the loader.
    device : torch.device
        Where the model wants them.
    group : process group or None
        Of the ranks that have batches of their own.
    """

    def __init__(
        self, model: torch.nn.Module, loss_fn: Loss, batches: list[Any], device: Any, group: Any
    ) -> None:
        self._model, self._loss_fn, self._device = model, loss_fn, device
        self._group = group
        self.batches = batches
        self._sizes = [_batches.size_of(batch) for batch in batches]

    @property
    def samples(self) -> float:
        """Return the mean number of samples in a batch."""
        return float(np.mean(self._sizes))

    def rows(
        self, parameters: Sequence[Masked], pattern: Any, storage: Any, dtype: Any, progress: bool
    ) -> tuple[Any, float]:
        """Return the gradients, one a row in the order of the pattern, and the mean loss."""
        columns = {each.name: each.parameter for each in parameters}
        dtype = dtype or common_dtype(columns.values())
        m, d = len(self.batches), width(columns)
        out = _storage.out_for(storage, (m, d), dtype, self._device)
        store, _, dtype = store_for(out, m, d, columns, dtype)
        found = rows_of_batches(
            self._model,
            self._loss_fn,
            self.batches,
            columns,
            m,
            arrange=lambda x: _groups.flat(pattern, x),
        )
        losses = []
        try:
            for i, (row, loss) in bar(enumerate(found), m, progress):
                put(store, i, row.to(dtype)[None, :], m)
                losses.append(loss)
        finally:
            found.close()
        return all_rows(store.finish(), self._group), self._mean(losses)

    def settle(self) -> tuple[str, float]:
        """Re-estimate the statistics where that helps; return what was done, and the loss.

        On every other batch, judged by those in between: on the same ones nearly any statistics
        would look better than those of other batches.
        """
        before = self._losses()
        if not _statistics.buffers(self._model):
            return "none", self._mean(before)
        copies = _statistics.saved(self._model)
        try:
            _statistics.re_estimate(self._model, self.batches[::2], self._loss)
        except ValueError:  # a batch of one sample has no variance
            _statistics.put_back(copies)
            return "kept", self._mean(before)
        same(_statistics.buffers(self._model), self._group)
        after = self._losses()
        judges = slice(1, None, 2) if len(before) > 1 else slice(None)
        old, new = self._mean(before, judges), self._mean(after, judges)
        if new < (1.0 - GAIN) * old:
            return "re-estimated", self._mean(after)
        _statistics.put_back(copies)
        return "kept", self._mean(before)

    def _losses(self) -> list[float]:
        with torch.no_grad():
            return [self._loss(self._model, batch) for batch in self.batches]

    def _loss(self, model: torch.nn.Module, batch: Any) -> float:
        return float(scalar(self._loss_fn(model, _batches.moved(batch, self._device))))

    def _mean(self, losses: list[float], part: slice = slice(None)) -> float:
        """Return the mean over the samples of all batches, or of a part of them."""
        sizes = self._sizes[part]
        return mean(float(np.average(losses[part], weights=sizes)), sum(sizes), self._group)


def fetched(batches: Iterable[Any], rows: int | None) -> list[Any]:
    """Return the batches of a step: ``rows``, or all there are up to ``MOST_ROWS``."""
    if rows is not None:
        return list(_batches.first(batches, rows))
    return list(islice(_batches.first(batches, None), MOST_ROWS))


@contextmanager
def evaluating(model: torch.nn.Module, seed: int) -> Iterator[None]:
    """Run the model without dropout, with random numbers of one's own, and leave it as it was.

    Except for the statistics of batch normalisation, which may be set meanwhile.
    """
    with unchanged(model, except_for=_statistics.buffers(model)):
        torch.default_generator.manual_seed(seed)
        model.eval()
        yield
