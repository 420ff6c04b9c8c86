"""What a script measured, as files: JSON, Markdown tables and pictures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
STYLE = ROOT / "examples" / "figures.mplstyle"

Row = Mapping[str, Any]


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse what every such script takes: quick, output and seed."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder to write to; docs/results, or build/results for --quick",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.output is None:
        options.output = ROOT / ("build" if options.quick else "docs") / "results"
    return options


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Return when and where this runs, and on which versions of what is installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def panels(rows: int, columns: int) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its panels, row by row."""
    figure = Figure(figsize=(1.0 + 3.6 * columns, 0.4 + 3.0 * rows))
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


class Report:
    """The results of one script: NAME.json, and NAME-PART.md and NAME-PART.svg of its parts.

    Parameters
    ----------
    name : str
        The script's name.
    output : pathlib.Path
        Folder to write to; made if it is not there.
    seed : int
        Of the random numbers.
    packages : sequence of str
        Distributions whose versions belong beside the figures.
    """

    def __init__(
        self, name: str, output: Path, *, seed: int, packages: Sequence[str] = ("numpy", "scipy")
    ) -> None:
        self.name, self.output = name, output
        self.about = {"script": name, "seed": seed, **machine(packages)}
        self.parts: dict[str, Sequence[Row]] = {}
        output.mkdir(parents=True, exist_ok=True)

    def keep(self, part: str, rows: Sequence[Row]) -> None:
        """Keep rows for the JSON file alone."""
        self.parts[part] = rows

    def table(self, part: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
        """Keep rows, and write and print them as a Markdown table.

        Parameters
        ----------
        part : str
            Name of the table.
        rows : sequence of mappings
            What was measured, in plain numbers; None for what could not be.
        columns : mapping of str to str
            For each heading the format of its cells, such as ``"{seconds:.2f} s"``.
        """
        self.keep(part, rows)
        lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
        lines += [f"| {' | '.join(_cell(c, row) for c in columns.values())} |" for row in rows]
        text = "\n".join([*lines, "", self.footer(), ""])
        (self.output / f"{self.name}-{part}.md").write_text(text, encoding="utf-8")
        print(f"\n{part}\n\n{text}")

    def footer(self) -> str:
        """Return one line on when and where."""
        about = self.about
        packages = ", ".join(f"{name} {of}" for name, of in about["packages"].items())
        where = f"{about['cores']} cores of {about['processor']}"
        return f"*{about['date']}; {where}; Python {about['python']}, {packages}*"

    def figure(self, part: str, draw: Callable[[], Figure]) -> None:
        """Draw a picture, for pages light or dark, and save it."""
        with matplotlib.rc_context(fname=STYLE):
            draw().savefig(self.output / f"{self.name}-{part}.svg", metadata={"Date": None})

    def write(self) -> None:
        """Write all rows as JSON."""
        about = json.dumps(self.about, ensure_ascii=False)
        parts = []
        for part, rows in self.parts.items():
            lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            parts.append(f"{json.dumps(part)}: [\n{lines}\n]")
        text = f'{about[:-1]},\n"parts": {{{", ".join(parts)}}}}}\n'
        (self.output / f"{self.name}.json").write_text(text, encoding="utf-8")


def _cell(template: str, row: Row) -> str:
    """Format a cell; empty where a number is missing."""
    known = {key: value for key, value in row.items() if value is not None}
    try:
        return template.format(**known)
    except KeyError:
        return ""
