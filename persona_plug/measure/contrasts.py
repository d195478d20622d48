"""Values of methods and their paired contrasts, with intervals over users: one way for every report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from persona_plug.errors import ConfigError, DataError
from persona_plug.measure.metrics import find_metric
from persona_plug.measure.significance import holm, sign_flip
from persona_plug.measure.stats import Interval, user_bootstrap

# (N,) one value per question; None or NaN where a question was not measured.
Values = Sequence[float | None] | np.ndarray
# Method -> metric -> its values.
MethodValues = Mapping[str, Mapping[str, Values]]

LIFT, GAIN = ("plug", "plug_shuffled"), ("task_prompt", "none")  # personal lift and task gain


@dataclass(frozen=True, slots=True)
class Contrast:
    """The paired difference of two methods in one metric.

    Attributes:
        a: The first method.
        b: The second method.
        metric: Name of the metric.
        delta: The difference, positive where `a` is better.
        low: Lower end of its 95% interval.
        high: Upper end.
        p: Two-sided p of the permutation test over users; None where it was not made.
        p_holm: The same after Holm's correction over all contrasts of a report.
    """

    a: str
    b: str
    metric: str
    delta: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None

    @property
    def pair(self) -> tuple[str, str]:
        """The two methods."""
        return self.a, self.b


def estimate(values: Values, users: Sequence[str], metric: str) -> Interval:
    """Return a metric with its interval over the questions that were measured.

    Args:
        values: (N,) see `Values`.
        users: (N,) the owner of each question.
        metric: Name of the metric.

    Raises:
        ConfigError: The metric is unknown.
        DataError: Lengths differ, or no question was measured.
    """
    (array,), owners = _measured([values], users, metric)
    return user_bootstrap(array, owners, transform=find_metric(metric).transform)


def difference(a: Values, b: Values, users: Sequence[str], metric: str) -> Interval:
    """Return the paired difference of two methods on the questions that both answered, positive where `a` is better.

    Args:
        a: (N,) see `Values`; for "rmse" squared errors, and the difference is one of roots.
        b: (N,) the other method's values of the same questions.
        users: (N,) the owner of each question.
        metric: Name of the metric.

    Raises:
        ConfigError: The metric is unknown.
        DataError: Lengths differ, or no question has both values.
    """
    (first, second), owners = _measured([a, b], users, metric)
    rule = find_metric(metric)
    better, worse = (second, first) if rule.lower_is_better else (first, second)
    return user_bootstrap(better, owners, worse, rule.transform)


def usual_pairs(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Return the contrasts of a report: personal lift, task gain, others' lifts, then the plug against all."""
    names = list(methods)
    lifts = [(n, f"{n}_shuffled") for n in names if n != LIFT[0]]
    pairs = [pair for pair in (LIFT, GAIN, *lifts) if set(pair) <= set(names)]
    return pairs + [("plug", n) for n in names if "plug" in names and n != "plug" and ("plug", n) not in pairs]


def contrasts(
    values: MethodValues,
    users: Sequence[str],
    pairs: Iterable[tuple[str, str]] | None = None,
    *,
    test: bool = True,
) -> list[Contrast]:
    """Compare pairs of methods in every metric that both have per question.

    Args:
        values: See `MethodValues`.
        users: (N,) the owner of each question.
        pairs: Names of the first and the second method; default `usual_pairs`.
        test: Whether to test each contrast, and to correct p over all of them together.

    Raises:
        ConfigError: A method or metric is unknown.
        DataError: Values and users differ in number.
    """
    rows = []
    for a, b in usual_pairs(values) if pairs is None else pairs:
        for name in (a, b):
            if name not in values:
                raise ConfigError(f"no method {name!r} to compare; there are {', '.join(values)}")
        shared = [m for m in values[a] if m in values[b] and _both(values[a][m], values[b][m], users, m)]
        rows += [_contrast(values, users, a, b, metric, test) for metric in shared]
    if not test:
        return rows
    corrected = holm([row.p for row in rows if row.p is not None])
    return [replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]


def as_array(values: Values) -> np.ndarray:
    """Return values as float64 (N,), None as NaN."""
    return np.array([np.nan if v is None else v for v in values], dtype=np.float64)


def _contrast(values: MethodValues, users: Sequence[str], a: str, b: str, metric: str, test: bool) -> Contrast:
    first, second = values[a][metric], values[b][metric]
    delta = difference(first, second, users, metric)
    p = None
    if test:
        (array_a, array_b), owners = _measured([first, second], users, metric)
        p = sign_flip(array_a, array_b, owners, find_metric(metric).transform)
    return Contrast(a, b, metric, delta.value, delta.low, delta.high, p)


def _both(a: Values, b: Values, users: Sequence[str], metric: str) -> bool:
    return bool(_mask([a, b], users, metric).any())


def _measured(columns: Sequence[Values], users: Sequence[str], metric: str) -> tuple[list[np.ndarray], list[str]]:
    """Return each column's values and the owners of the questions that all columns have."""
    mask = _mask(columns, users, metric)
    if not mask.any():
        every = "was measured" if len(columns) == 1 else "was answered by both methods"
        raise DataError(f"{metric}: no question {every}; run the methods on the same questions")
    return [as_array(column)[mask] for column in columns], [u for u, m in zip(users, mask, strict=True) if m]


def _mask(columns: Sequence[Values], users: Sequence[str], metric: str) -> np.ndarray:
    if any(len(column) != len(users) for column in columns):
        lengths = " and ".join(str(len(column)) for column in columns)
        raise DataError(
            f"{metric}: {lengths} values for {len(users)} questions; give one value per question, "
            "None where it was not measured"
        )
    return ~np.isnan(np.stack([as_array(column) for column in columns])).any(axis=0)
