"""Runs over seeds: their arguments, mean and range, and records as JSON and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def options(description: str) -> argparse.ArgumentParser:
    """Return a parser of what every script takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs")
    parser.add_argument("--quick", action="store_true", help="one short run")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    return parser


def seeds_of(args: argparse.Namespace) -> range:
    """Return the seeds to run with: one where the run is short."""
    return range(args.seed, args.seed + (1 if args.quick else args.seeds))


def select(records: Sequence[dict], value: str, **where: object) -> list[float]:
    """Return one value of the records that agree with ``where``, seed by seed."""
    return [r[value] for r in records if all(r[key] == wanted for key, wanted in where.items())]


def spread(values: Sequence[float]) -> str:
    """Write the mean over seeds, with the range in brackets."""
    mean = number(float(np.mean(values)))
    return mean if len(values) == 1 else f"{mean} ({number(min(values))}–{number(max(values))})"


def number(x: float) -> str:
    """Write a number to three places, or to one digit where these would be zeros."""
    return f"{x:.3f}" if abs(x) >= 0.0005 or not x else f"{x:.0e}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def unique(records: Sequence[dict], key: str) -> list:
    """Return the values of a key in the order of their first record."""
    return list(dict.fromkeys(record[key] for record in records))


def save(folder: Path, name: str, settings: dict, records: list, tables: dict[str, str]) -> None:
    """Write name.json, and name-key.md for each table, and print the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    about = json.dumps(settings, ensure_ascii=False)
    text = f'{{"settings": {about},\n"records": [\n{lines}\n]}}\n'
    (folder / f"{name}.json").write_text(text, encoding="utf-8")
    for key, text in tables.items():
        path = folder / f"{name}-{key}.md"
        path.write_text(text)
        print(f"\n{path}\n\n{text}")
