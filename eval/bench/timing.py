"""Paired timing: machines drift, so two things are measured in turn and compared as a ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ratio:
    """Median, smallest and largest of the paired ratios a/b, and the median seconds of each."""

    median: float
    low: float
    high: float
    a_seconds: float
    b_seconds: float
    pairs: int

    def __str__(self) -> str:
        """Show the ratio as one table cell."""
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    pairs: int = 7,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> Ratio:
    """Run a and b in turn, ABBA, and return the ratio of their seconds, by default of the process's CPU time."""
    for _ in range(warmup):
        a(), b()
    first, second = list[float](), list[float]()
    for i in range(pairs):
        order = [(a, first), (b, second)]
        for call, seconds in order if i % 2 == 0 else reversed(order):
            start = clock()
            call()
            seconds.append(clock() - start)
    ratios = [x / y for x, y in zip(first, second, strict=True)]
    return Ratio(
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        statistics.median(first),
        statistics.median(second),
        pairs,
    )
