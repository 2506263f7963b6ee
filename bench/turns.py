"""Timing in turns: A B A B..., so that what else the machine does falls on all alike. Not a program.

A work returns its figures by name; what comes back has them by work, by name and by round. Ratios are taken within a
round, and their median is what counts on a shared machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from tqdm import tqdm

Figures = Mapping[str, float]
Rounds = dict[str, dict[str, list[float]]]  # work -> figure -> a value for each round


def take_turns(works: Mapping[str, Callable[[], Figures]], n_rounds: int, *, progress: bool = False) -> Rounds:
    """The figures of every work, each called once a round, in their order."""
    found: Rounds = {name: {} for name in works}
    for _ in tqdm(range(n_rounds), desc="rounds", disable=not progress):
        for name, work in works.items():
            for what, value in work().items():
                found[name].setdefault(what, []).append(value)
    return found


def medians(found: Rounds) -> dict[str, dict[str, float]]:
    """The median of every figure: work -> figure -> value."""
    return {name: {what: statistics.median(v) for what, v in row.items()} for name, row in found.items()}


def ratios(found: Rounds, what: str, one: str, other: str) -> list[float]:
    """A figure of one work over that of the other, for each round."""
    return [a / b for a, b in zip(found[one][what], found[other][what], strict=True)]


def seconds(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """What a call takes by that clock, in seconds."""
    start = clock()
    work()
    return clock() - start
