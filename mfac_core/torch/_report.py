"""What pruning a model did, as a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One parameter after a step.

    Attributes
    ----------
    name : str
        Its name in the model.
    shape : tuple of int
        Its shape.
    kept : int
        How many of its weights are kept.
    size : int
        How many there are.
    loss_increase : float
        The rise of the loss that the quadratic model predicts for this step's change of these
        weights alone.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    size: int
    loss_increase: float


@dataclass(frozen=True)
class StepReport:
    """One step of a :class:`Pruner`; prints as a table of its layers.

    Attributes
    ----------
    step : int
        Number of steps done.
    sparsity : float
        Share of the weights that are removed.
    loss_before : float
        Mean loss over the batches, before the step.
    loss_after : float
        After it.
    loss_increase : float
        The rise that the quadratic model predicts, 0.5 δᵀFδ over the batches.
    rows : int
        How many gradients were taken.
    damping : float
        λ.
    statistics : str
        Of batch normalisation: "none" where there are none, "kept" or "re-estimated".
    layers : tuple of LayerReport
        Parameter by parameter.
    """

    step: int
    sparsity: float
    loss_before: float
    loss_after: float
    loss_increase: float
    rows: int
    damping: float
    statistics: str
    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        lines = [
            f"step {self.step}: {self.sparsity:.1%} removed, loss {self.loss_before:.4g} -> "
            f"{self.loss_after:.4g}, predicted rise {self.loss_increase:.3g}",
            f"{self.rows} rows, damping {self.damping:.3g}"
            + ("" if self.statistics == "none" else f", statistics {self.statistics}"),
        ]
        rows = [
            (x.name, " × ".join(map(str, x.shape)), f"{x.kept}", f"{x.kept / x.size:.1%}",
             f"{x.loss_increase:.3g}")
            for x in self.layers
        ]  # fmt: skip
        kept, size = (sum(getattr(x, key) for x in self.layers) for key in ("kept", "size"))
        total = ("all", f"{size}", f"{kept}", f"{kept / size:.1%}", f"{self.loss_increase:.3g}")
        head = ("layer", "shape", "kept", "share", "predicted rise")
        return "\n".join([*lines, _table(head, [*rows, total])])


@dataclass(frozen=True)
class Report:
    """All steps of a :class:`Pruner`; prints as a table of steps and one of layers.

    Attributes
    ----------
    steps : tuple of StepReport
        Step by step.
    """

    steps: tuple[StepReport, ...]

    def __str__(self) -> str:
        if not self.steps:
            return "nothing pruned yet"
        rows = [
            (f"{x.step}", f"{x.sparsity:.1%}", f"{x.loss_before:.4g}", f"{x.loss_after:.4g}",
             f"{x.loss_increase:.3g}", x.statistics)
            for x in self.steps
        ]  # fmt: skip
        head = ("step", "removed", "loss before", "after", "predicted rise", "statistics")
        return f"{_table(head, rows)}\n\n{self.steps[-1]}"

    def _as_plain(self) -> list[dict[str, Any]]:
        """Return the steps as dicts, for a state."""
        return [asdict(step) for step in self.steps]

    @classmethod
    def _of_plain(cls, steps: Sequence[dict[str, Any]]) -> Report:
        """Return the report that :meth:`_as_plain` was of."""
        return cls(
            tuple(
                StepReport(**step | {"layers": tuple(map(_layer, step["layers"]))})
                for step in steps
            )
        )

    def plot(self) -> Any:
        """Draw what is kept and the predicted rise by layer, and the loss along the schedule.

        Returns
        -------
        matplotlib.figure.Figure
            Has ``savefig(path)``.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError
            If nothing has been pruned yet.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            msg = "plot() needs matplotlib: python -m pip install matplotlib"
            raise ImportError(msg) from error
        if not self.steps:
            msg = "report must have a step to plot, got none; call step() first"
            raise ValueError(msg)
        layers = self.steps[-1].layers
        places = range(len(layers))
        rises = [sum(step.layers[i].loss_increase for step in self.steps) for i in places]
        figure = Figure(figsize=(11, max(2.5, 1.2 + 0.22 * len(layers))), layout="constrained")
        kept, rise, loss = figure.subplots(1, 3)
        kept.barh(places, [x.kept / x.size for x in layers], color="#0072B2")
        kept.set(yticks=list(places), yticklabels=[x.name for x in layers], xlabel="share kept")
        rise.barh(places, rises, color="#E69F00")
        rise.set(yticks=[], xlabel="predicted rise of the loss, all steps")
        for axes in (kept, rise):
            axes.invert_yaxis()
        sparsities = [step.sparsity for step in self.steps]
        loss.plot(sparsities, [s.loss_before for s in self.steps], "o-", label="before the step")
        loss.plot(sparsities, [s.loss_after for s in self.steps], "s-", label="after it")
        loss.set(xlabel="share removed", ylabel="loss on the batches")
        loss.legend()
        return figure


def _layer(plain: dict[str, Any]) -> LayerReport:
    return LayerReport(**plain | {"shape": tuple(plain["shape"])})


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns, the first to the left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in rest)]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, rows)])
