"""Confidence intervals by a bootstrap over users, paired where two methods answered the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000  # of a mean, where a draw costs one product
SET_RESAMPLES = 200  # of a value that is computed anew from all questions of each draw


class Interval(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


def identity(mean: np.ndarray) -> np.ndarray:
    """Leave a mean as it is."""
    return mean


def user_bootstrap(
    values: Sequence[float] | np.ndarray,
    users: Sequence[str],
    minus: Sequence[float] | np.ndarray | None = None,
    transform: Callable[[np.ndarray], np.ndarray] = identity,
    seed: int = 0,
) -> Interval:
    """Return transform(mean of `values`) [- transform(mean of `minus`)] with a percentile interval.

    Users are drawn with replacement, each with all their questions: questions of one user are not independent. The
    difference is paired: both means are taken over the same draw.

    Args:
        values: (N,) one value a question.
        users: (N,) the owner of each question.
        minus: (N,) the other method's values on the same questions.
        transform: Applied to each mean, e.g. `np.sqrt` for a root mean square error.
        seed: Seed of the draws.
    """
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    counts = np.bincount(owner, minlength=len(names))

    def means(x: Sequence[float] | np.ndarray) -> tuple[float, np.ndarray]:
        array = np.asarray(x, dtype=np.float64)
        sums = np.bincount(owner, weights=array, minlength=len(names))
        return float(transform(array.mean())), transform((draws @ sums) / (draws @ counts))

    value, resampled = means(values)
    if minus is not None:
        other, other_resampled = means(minus)
        value, resampled = value - other, resampled - other_resampled
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def set_bootstrap(measure: Callable[[np.ndarray], float], users: Sequence[str]) -> Interval:
    """Return a value that is no mean over questions, with the percentile interval of drawing users anew.

    Args:
        measure: Returns the value of the questions with the given indices, (M,) int64; a question may occur repeatedly.
        users: (N,) the owner of each question.
    """
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    groups = [np.flatnonzero(owner == u) for u in range(len(names))]
    rng = np.random.default_rng(0)
    draws = (np.concatenate([groups[u] for u in rng.integers(0, len(names), len(names))]) for _ in range(SET_RESAMPLES))
    low, high = np.percentile([measure(rows) for rows in draws], [2.5, 97.5])
    return Interval(float(measure(np.arange(len(users)))), float(low), float(high))


def derangement(users: Sequence[str], seed: int = 0) -> dict[str, str]:
    """Map every user to another one, drawn at random; a lone user maps to itself."""
    names = sorted(set(users))
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


def spread(total: int, limit: int) -> list[int]:
    """Return at most `limit` indices, evenly spread."""
    return sorted({i * total // limit for i in range(limit)}) if total > limit else list(range(total))
