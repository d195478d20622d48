"""Paired contrasts of methods over users: a permutation test, a bootstrap interval, and Holm's correction.

Two methods answered the same questions of the same users. If they were equally good, swapping them for any user would
give an equally likely outcome; the test compares the observed difference with those of swapped users (Fisher 1935; with
drawn swaps counted as in Phipson and Smyth 2010). Users are swapped as a whole: one user's questions are not
independent. Holm (1979) then holds the chance of any false finding among all of a report's contrasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from persona_plug.errors import ConfigError, DataError
from persona_plug.measure.metrics import METRICS, Transform
from persona_plug.measure.stats import Interval, identity, user_bootstrap

Values = Sequence[float | None] | np.ndarray

FLIPS = 10_000
EXACT_USERS = 12  # up to here all 2**n swaps are tried
CHUNK = 1_000  # swaps at a time: 1,000 rows of 10,000 users are 80 MB
LIFT, GAIN = ("plug", "plug_shuffled"), ("task_prompt", "none")


def direction(metric: str, metrics: Mapping[str, tuple[bool, Transform]] = METRICS) -> tuple[bool, Transform]:
    """Return (lower is better, transform) of a metric.

    Raises:
        ConfigError: The metric is unknown.
    """
    if metric not in metrics:
        raise ConfigError(f"metric {metric!r} has no direction; known are {', '.join(metrics)}; add it to METRICS")
    return metrics[metric]


def smallest_p(n_users: int) -> float:
    """Return the least p that so many users can give: of 2**n equally likely swaps two are as far out as possible."""
    exact = 2.0 ** (1 - n_users)
    return exact if n_users <= EXACT_USERS else max(exact, 1 / (FLIPS + 1))


def contrast(
    a: Values,
    b: Values,
    users: Sequence[str],
    metric: str,
    lower_is_better: bool,
    transform: Transform = identity,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare two methods on the questions that both answered.

    Args:
        a: (N,) one value a question; None or NaN where it was not measured.
        b: (N,) the other method's values on the same questions.
        users: (N,) the owner of each question.
        metric: Name, copied into the row.
        lower_is_better: Whether smaller values are better.
        transform: From a mean over questions to the metric, `np.sqrt` for a root mean square error.
        seed: Seed of the draws.

    Returns:
        {"metric", "delta", "ci95": [low, high], "p"}: delta is positive where a is better; p is two-sided and not yet
        corrected.

    Raises:
        DataError: Lengths differ, or no question has both values.
    """
    first, second, owners = _paired(a, b, users, metric)
    found = _interval(first, second, owners, lower_is_better, transform, seed)
    p = sign_flip(first, second, owners, transform, seed)
    return {"metric": metric, "delta": found.value, "ci95": [found.low, found.high], "p": p}


def difference(
    a: Values, b: Values, users: Sequence[str], lower_is_better: bool, transform: Transform = identity, seed: int = 0
) -> Interval:
    """Return only the paired difference with its interval, positive where a is better; see `contrast`."""
    return _interval(*_paired(a, b, users, "the values"), lower_is_better, transform, seed)


def sign_flip(
    a: np.ndarray, b: np.ndarray, users: Sequence[str], transform: Transform = identity, seed: int = 0
) -> float:
    """Return the two-sided p of transform(mean a) - transform(mean b) under swaps of a and b for whole users.

    Args:
        a: (N,) float64 without NaN.
        b: (N,) float64 without NaN.
        users: (N,) the owner of each question.
        transform: From a mean to the metric; with a transform sums are swapped, not differences.
        seed: Seed of the draws; all swaps are tried for `EXACT_USERS` users or fewer, and none is drawn.
    """
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    sums_a, sums_b = (np.bincount(owner, weights=x, minlength=len(names)) for x in (a, b))
    exact = len(names) <= EXACT_USERS
    total = 2 ** len(names) if exact else FLIPS
    rng = np.random.default_rng(seed)
    observed = abs(float(transform(a.mean()) - transform(b.mean())))
    # Sums in another order differ in their last bits; what is equal but for them counts as equal.
    bound = observed - 1e-10 * max(1.0, abs(float(transform(a.mean()))), abs(float(transform(b.mean()))))
    extreme = 0
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        if exact:
            swaps = (np.arange(start, start + count)[:, None] >> np.arange(len(names))) & 1
        else:
            swaps = rng.integers(0, 2, (count, len(names)), dtype=np.int8)
        moved = swaps.astype(np.float64) @ (sums_b - sums_a)
        mean_a, mean_b = (sums_a.sum() + moved) / len(a), (sums_b.sum() - moved) / len(a)
        # A mean of squares may come out as -1e-17.
        low = min(0.0, float(np.min(a)), float(np.min(b)))
        statistic = transform(np.maximum(mean_a, low)) - transform(np.maximum(mean_b, low))
        extreme += int(np.count_nonzero(np.abs(statistic) >= bound))
    # The outcome as it was is one of the exact swaps; among drawn ones it is counted once more, so that p is never 0.
    return extreme / total if exact else (extreme + 1) / (total + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's corrected p values, in the order given (Holm 1979, step-down; never below the p before them)."""
    corrected = [0.0] * len(p)
    reached = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        reached = max(reached, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = reached
    return corrected


def usual_pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return the contrasts of a comparison: personal lift, task gain, others' lifts, then the plug against all."""
    names = list(methods)
    lifts = [(n, f"{n}_shuffled") for n in names if n != LIFT[0]]
    pairs = [pair for pair in (LIFT, GAIN, *lifts) if set(pair) <= set(names)]
    return pairs + [("plug", n) for n in names if "plug" in names and n != "plug" and ("plug", n) not in pairs]


def contrasts(
    values: Mapping[str, Mapping[str, Values]],
    users: Sequence[str],
    pairs: Iterable[tuple[str, str]] | None = None,
    metrics: Mapping[str, tuple[bool, Transform]] = METRICS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare pairs of methods in every metric that both have per question, corrected over all of them together.

    Args:
        values: Method -> metric -> (N,) values, None or NaN where a question was not measured.
        users: (N,) the owner of each question.
        pairs: (a, b) names; default `usual_pairs`.
        metrics: Metric -> (lower is better, transform).
        seed: Seed of the draws.

    Returns:
        Rows {"a", "b", "metric", "delta", "ci95": [low, high], "p", "p_holm"}.

    Raises:
        ConfigError: A method or metric is unknown.
        DataError: Values and users differ in number.
    """
    rows = []
    for a, b in usual_pairs(values) if pairs is None else pairs:
        for name in (a, b):
            if name not in values:
                raise ConfigError(f"no method {name!r} to compare; there are {', '.join(values)}")
        for metric in values[a]:
            if metric in values[b] and _both(values[a][metric], values[b][metric], users, metric).any():
                lower, transform = direction(metric, metrics)
                row = contrast(values[a][metric], values[b][metric], users, metric, lower, transform, seed)
                rows.append({"a": a, "b": b, **row})
    for row, p in zip(rows, holm([r["p"] for r in rows]), strict=True):
        row["p_holm"] = p
    return rows


def as_array(values: Values) -> np.ndarray:
    """Return values as float64 (N,), None as NaN."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _both(a: Values, b: Values, users: Sequence[str], metric: str) -> np.ndarray:
    first, second = as_array(a), as_array(b)
    if not len(first) == len(second) == len(users):
        raise DataError(
            f"{metric}: {len(first)} and {len(second)} values for {len(users)} questions; give one value a question, "
            "None where it was not measured"
        )
    return ~np.isnan(first) & ~np.isnan(second)


def _paired(a: Values, b: Values, users: Sequence[str], metric: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    some = _both(a, b, users, metric)
    if not some.any():
        raise DataError(f"{metric}: no question was answered by both methods; run both on the same questions")
    return as_array(a)[some], as_array(b)[some], [u for u, s in zip(users, some, strict=True) if s]


def _interval(
    a: np.ndarray, b: np.ndarray, users: Sequence[str], lower: bool, transform: Transform, seed: int
) -> Interval:
    better, worse = (b, a) if lower else (a, b)
    return user_bootstrap(better, users, worse, transform, seed)
