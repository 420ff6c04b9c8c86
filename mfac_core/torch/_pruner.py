"""Pruning a PyTorch model in place: step by step, under masks, and for good."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mfac_core import _validate as check
from mfac_core._typing import Update
from mfac_core.torch import _batches, _groups, _storage
from mfac_core.torch._calibration import Calibration, evaluating, fetched
from mfac_core.torch._gradients import Loss, dtype_argument, refuse_sharded
from mfac_core.torch._masks import Masked, Masks, semi_structured
from mfac_core.torch._parameters import Choice, bare, chosen, prunable
from mfac_core.torch._ranks import group_of, same
from mfac_core.torch._report import LayerReport, Report, StepReport
from mfac_core.torch._solve import BlockSizeChoice, DampingChoice, LayersChoice, Settings, solve

LAYERS = ("global", "uniform")
UPDATES = ("joint", "independent")
DAMPINGS = ("auto", "leave-one-out")


class Pruner:
    """Prune a model in place, by as many steps as you like, with training in between.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model, on any device.
    loss_fn : callable
        ``loss_fn(model, batch)`` returns the loss of a batch, a scalar, its mean over the samples.
    batches : iterable
        A DataLoader or a list of batches, of any structure; tensors are moved to the model's
        device. 16 to 32 samples a batch serve well: each batch becomes one row of the Fisher
        matrix.
    parameters : optional
        What to prune: parameters, names, patterns such as ``"encoder.*"`` or a function of (name,
        parameter), see :func:`gradient_rows`. By default the weights of linear, convolutional,
        embedding, recurrent and attention layers that are not frozen, without biases. One that
        several modules share is pruned once.
    exclude : optional
        What of these to leave alone, in the same form.
    pattern : str, optional
        "N:M" keeps N of every M weights along the input channels, as the hardware for 2:4 reads
        them; by default, embeddings and layers whose channels M does not divide are left alone.
        "filter" or "row" removes whatever makes one output channel together, "channel" or
        "column" whatever takes one input channel, "head" the rows of an attention head's
        projections. By default single weights go.
    layers : {"global", "uniform"}, default "global"
        Whether a sparsity is that of all weights together, or of each parameter.
    rows : int, optional
        Batches to take for a step, by default all of ``batches`` and at most 256.
    damping : float, "auto" or "leave-one-out", default "auto"
        λ. By default a tenth of the mean square of the gradients' entries, taken anew at every
        step: it then follows the scale of the loss and the size of the batches. "leave-one-out"
        has the rows of each step choose it, as :func:`mfac_core.choose_damping` does.
    block_size : int, None or "auto", default "auto"
        Diagonal blocks of the Fisher matrix, of this many weights and within a parameter; None
        for the whole matrix. By default four for each row, and at most 1,024: few rows can be told
        apart only in short blocks.
    update : {"joint", "independent"}, default "joint"
        See :func:`mfac_core.pruning.prune`.
    storage : str or path, optional
        Where a step keeps its rows: "device", "host" (pinned for a GPU), "file", or a folder for
        that file. By default the model's device where they take at most half of its free
        memory, else the host where that holds for it, else a temporary file.
    dtype : torch.dtype, optional
        Of the rows; by default the parameters'. ``torch.bfloat16`` halves them.
    progress : bool, default False
        Show a bar over the rows, where tqdm is installed.

    Raises
    ------
    TypeError, ValueError
        If an argument is not of its form, or a parameter has a mask of somebody else's.

    Notes
    -----
    A step takes one forward and one backward pass over the batches, in evaluation mode, one or two
    further forward passes for the loss, and what :func:`mfac_core.pruning.prune` takes. The
    batches of a step are held in memory while it lasts, as they come.

    After a step, each pruned ``weight`` is the product of the parameter ``weight_orig``, which is
    the object that ``weight`` was, and the buffer ``weight_mask``, in the manner of
    ``torch.nn.utils.prune``. So the masks hold under any optimiser, and one that exists already
    goes on with the same parameters. A step that fails leaves the model as it was.

    Inside ``DistributedDataParallel`` every rank calls the same methods, with batches of its own;
    the rows are those of all ranks, gathered on each, and so are the losses.

    A step re-estimates the stored statistics of batch normalisation on every other batch, and
    keeps the new ones only if the loss on the batches in between falls by more than 1 %.

    Examples
    --------
    >>> import torch
    >>> from mfac_core.torch import Pruner
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(8, 2)
    >>> batches = [torch.randn(16, 8) for _ in range(10)]
    >>> pruner = Pruner(model, lambda model, x: model(x).square().mean(), batches)
    >>> report = pruner.step(0.5)
    >>> int((model.weight == 0).sum())
    8
    >>> pruner.finalize() is model
    True
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Loss,
        batches: Iterable[Any],
        *,
        parameters: Choice | None = None,
        exclude: Choice | None = None,
        pattern: str | None = None,
        layers: LayersChoice = "global",
        rows: int | None = None,
        damping: DampingChoice = "auto",
        block_size: BlockSizeChoice = "auto",
        update: Update = "joint",
        storage: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        progress: bool = False,
    ) -> None:
        for name, value, known in (("layers", layers, LAYERS), ("update", update, UPDATES)):
            if value not in known:
                msg = f"{name} must be {known[0]!r} or {known[1]!r}, got {value!r}"
                raise ValueError(msg)
        if not isinstance(damping, str):
            damping = check.damping(damping)
        elif damping not in DAMPINGS:
            msg = f"damping must be a number, 'auto' or 'leave-one-out', got {damping!r}"
            raise ValueError(msg)
        if block_size not in ("auto", None):
            block_size = check.integer(block_size, "block_size", minimum=1)
        check.function_argument(loss_fn, "loss_fn", "(model, batch)")
        dtype_argument(dtype)
        _groups.check_pattern(pattern)
        _storage.check_storage(storage)
        _batches.rows_argument(rows, batches)
        self.model, self.loss_fn, self.batches = model, loss_fn, batches
        self._settings = Settings(pattern, layers, damping, block_size, update)
        self._number, self._rows = rows, (storage, dtype, progress)
        self._inner, self._group = bare(model), group_of(model)
        columns = self._choose(parameters, exclude)
        refuse_sharded(columns)
        self._masks = Masks(self._inner, columns)
        self._labels = (
            None
            if pattern is None or _groups.period(pattern)
            else _groups.labels(pattern, self._inner, self._masks.parameters)
        )
        self._steps: list[StepReport] = []
        self._seed = torch.initial_seed()
        self._final: dict[str, Tensor] | None = None

    def step(self, sparsity: float | None = None) -> StepReport:
        """Prune to a sparsity, by fresh gradients at the weights as they are.

        Parameters
        ----------
        sparsity : float, optional
            Share of the weights removed afterwards, in [0, 1), at least what it is now. May be
            left out for an "N:M" pattern, which has its own.

        Returns
        -------
        StepReport
            What became of every parameter; prints as a table.

        Raises
        ------
        TypeError, ValueError
            If the sparsity cannot be reached, there are fewer batches than rows, or the loss is
            not a scalar. The model is then as it was, and after any other error too.
        NonFiniteError
            If a gradient holds a NaN or an infinity; a ``ValueError``.
        OSError
            If the rows could not be written.
        RuntimeError
            After :meth:`finalize`.
        """
        self._refuse_finalized()
        if sparsity is None and _groups.period(self._settings.pattern) is None:
            msg = "sparsity must be given, unless pattern is 'N:M'"
            raise ValueError(msg)
        goal: Any = sparsity
        if sparsity is not None:
            share = check.finite_number(sparsity, "sparsity")
            if not 0.0 <= share < 1.0:
                msg = f"sparsity must be in [0, 1), got {share!r}"
                raise ValueError(msg)
            if self._settings.layers == "uniform":
                goal = [max(share, _removed(each)) for each in self._masks.parameters]
        self._masks.refuse_others()
        parameters = self._masks.parameters
        seed = self._seed + len(self._steps)
        with evaluating(self._inner, seed):
            data = Calibration(
                self._inner,
                self.loss_fn,
                fetched(self.batches, self._number),
                parameters[0].parameter.device,
                self._group,
            )
            rows, before = data.rows(parameters, self._settings.pattern, *self._rows)
            new = solve(rows, parameters, self._labels, goal, self._settings, data.samples)
            same([*new.weights, *new.kept], self._group)
            m = rows.shape[0]
            _storage.let_go(rows)
        with self._masks.whole_or_not_at_all():
            self._masks.install()
            for each, weights, kept in zip(parameters, new.weights, new.kept, strict=True):
                each.write(weights, kept)
            with evaluating(self._inner, seed):
                statistics, after = data.settle()
            layers = tuple(
                LayerReport(each.name, tuple(kept.shape), int(kept.sum()), kept.numel(), rise)
                for each, kept, rise in zip(parameters, new.kept, new.rises, strict=True)
            )
            report = StepReport(
                step=len(self._steps) + 1,
                sparsity=self._masks.removed(),
                loss_before=before,
                loss_after=after,
                loss_increase=new.rise,
                rows=m,
                damping=new.damping,
                statistics=statistics,
                layers=layers,
            )
        self._steps.append(report)
        return report

    def __repr__(self) -> str:
        masks = self.masks.values()
        size, kept = sum(m.numel() for m in masks), sum(int(m.sum()) for m in masks)
        state = f"after {len(self._steps)} steps" if self._final is None else "finalized"
        return f"<Pruner of {size} weights in {len(masks)} parameters, {kept} kept, {state}>"

    @property
    def masks(self) -> dict[str, Tensor]:
        """Masks by the parameters' names, bool, True where a weight is kept; copies."""
        if self._final is not None:
            return {name: kept.clone() for name, kept in self._final.items()}
        return {each.name: each.kept for each in self._masks.parameters}

    def report(self) -> Report:
        """Return what all steps did; prints as a table, and has ``plot()``.

        Returns
        -------
        Report
            Its ``steps`` are those that :meth:`step` returned.
        """
        return Report(tuple(self._steps))

    def finalize(self, *, semi_structured: bool = False) -> torch.nn.Module:
        """Make the masks permanent: plain parameters with zeros, and no hooks.

        Parameters
        ----------
        semi_structured : bool, default False
            Convert the weights of linear layers that are 2:4 by
            ``torch.sparse.to_sparse_semi_structured``, for faster products on hardware that has
            them; not for training.

        Returns
        -------
        torch.nn.Module
            The model.

        Raises
        ------
        RuntimeError
            If this was done before, or PyTorch cannot convert a layer, because of its device,
            dtype or shape; the model is then as it was.
        """
        self._refuse_finalized()
        converted = self._converted() if semi_structured else []
        self._final = self.masks
        self._masks.remove()
        for module, weight in converted:
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return masks and reports, to go on after a restart.

        Returns
        -------
        dict
            Plain values and tensors, for ``torch.save``. The weights are the model's own state.
        """
        return {
            "masks": self.masks,
            "steps": self.report()._as_plain(),
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of a pruner of the same parameters.

        Call it before ``model.load_state_dict``, whose names of pruned parameters are those of the
        masked model. What follows is then the same to the last bit as without the restart.

        Parameters
        ----------
        state : mapping
            What :meth:`state_dict` returned.

        Raises
        ------
        ValueError
            If it is of other parameters; nothing has changed then.
        RuntimeError
            After :meth:`finalize`.
        """
        self._refuse_finalized()
        masks = state["masks"]
        own = {each.name: tuple(each.parameter.shape) for each in self._masks.parameters}
        given = {name: tuple(mask.shape) for name, mask in masks.items()}
        if own != given:
            other = sorted(set(own.items()) ^ set(given.items()))[0]
            msg = f"state must be of the parameters that this Pruner has, differs at {other}"
            raise ValueError(msg)
        steps = list(Report._of_plain(state["steps"]).steps)
        self._masks.refuse_others()
        with self._masks.whole_or_not_at_all():
            if steps:
                self._masks.install()
                for each in self._masks.parameters:
                    each.write(each.parameter.detach(), masks[each.name])
        self._steps, self._seed = steps, int(state["seed"])

    def _choose(self, parameters: Choice | None, exclude: Choice | None) -> dict[str, Tensor]:
        """Return what to prune, by name."""
        pattern = self._settings.pattern
        if parameters is None:
            columns = prunable(self._inner, embeddings=_groups.period(pattern) is None)
        else:
            columns = chosen(self._inner, parameters, "parameters")
        if exclude is not None:
            left_out = {id(p) for p in chosen(self._inner, exclude, "exclude").values()}
            columns = {name: p for name, p in columns.items() if id(p) not in left_out}
        if not columns:
            msg = "model must have a weight to prune, got none; name some with parameters="
            raise ValueError(msg)
        return _groups.fitting(pattern, columns, chosen=parameters is not None)

    def _converted(self) -> list[tuple[torch.nn.Module, Tensor]]:
        """Return linear layers with their weights in the 2:4 form."""
        if self._settings.pattern != "2:4" or not self._steps:
            msg = "semi_structured needs a model that is pruned with pattern='2:4'"
            raise ValueError(msg)
        return [
            (module, semi_structured(each))
            for each in self._masks.parameters
            for module, attribute in each.places
            if isinstance(module, torch.nn.Linear) and attribute == "weight"
        ]

    def _refuse_finalized(self) -> None:
        if self._final is not None:
            msg = "this Pruner was finalized; make a new one to prune further"
            raise RuntimeError(msg)


def _removed(each: Masked) -> float:
    """Return the share of a parameter's weights that are removed."""
    size: int = each.parameter.numel()
    return 1.0 - int(each.kept.sum()) / size
