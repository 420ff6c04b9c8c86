"""Products between all batches of rows of which only some can be held at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any, TypeVar

T = TypeVar("T")

Passes = Callable[[int], Generator[tuple[int, slice, T]]]
"""From the number of a batch to a pass over it and those that follow: number, rows, what of them
is held."""


def pairs(
    passes: Passes[T], batches: int, nbytes: Callable[[T], int], memory: int
) -> Generator[tuple[slice, T, slice, T]]:
    """Yield every two batches once: what was held of the one, and the other that passes by.

    Half of ``memory`` is for what is held; one batch is, in any case. A batch also meets itself.
    """
    start = 0
    while start < batches:
        held: list[tuple[slice, T]] = []
        size, start_next = 0, batches
        with closing(passes(start)) as each:
            for i, at, rows in each:
                more = nbytes(rows)
                if start_next == batches and (not held or size + more <= memory // 2):
                    held.append((at, rows))
                    size += more
                else:
                    start_next = min(start_next, i)
                for there, others in held:
                    yield there, others, at, rows
        start = start_next


def crossings(
    mine: Passes[T], others: Passes[T], nbytes: Callable[[T], int], memory: int
) -> Generator[tuple[slice, T, slice, T]]:
    """Yield every batch of mine with every one of the others', of which some are held."""
    held: list[tuple[slice, Any]] = []
    size = 0
    with closing(others(0)) as each:
        for _, there, rows in each:
            more = nbytes(rows)
            if held and size + more > memory // 2:
                yield from _met(mine, held)
                held, size = [], 0
            held.append((there, rows))
            size += more
    yield from _met(mine, held)


def _met(mine: Passes[T], held: list[tuple[slice, T]]) -> Generator[tuple[slice, T, slice, T]]:
    with closing(mine(0)) as each:
        for _, at, rows in each:
            for there, others in held:
                yield at, rows, there, others
