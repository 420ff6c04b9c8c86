"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STYLE = Path(__file__).parents[1] / "figures.mplstyle"


@contextmanager
def drawing(path: Path, width: float, height: float) -> Iterator:
    """Make a figure of that many inches for pages light or dark, and save it when it is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=STYLE):
        figure = Figure(figsize=(width, height))
        yield figure
        figure.savefig(path, metadata={"Date": None})
