"""Contenders that take turns, and ratios of what they take in the same round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import NamedTuple

Times = dict[str, list[float]]


class Spread(NamedTuple):
    """The median of some figures, the smallest and the largest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, figures: list[float]) -> Spread:
        """That of `figures`."""
        return cls(median(figures), min(figures), max(figures))


def seconds(call: Callable[[], object]) -> float:
    """What one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Times:
    """What each contender gives, round after round, after one round that does not count."""
    times: Times = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, contender in contenders.items():
            figure = contender()
            if i:
                times[name].append(figure)
    return times


def ratios(times: Times, over: str, under: str) -> list[float]:
    """Each round's ratio; empty where one of the two is missing."""
    if not times.get(over) or not times.get(under):
        return []
    return [a / b for a, b in zip(times[over], times[under], strict=True)]
