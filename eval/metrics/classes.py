"""Metrics as `evaluate.Metric` classes that need no network, calibration, and comparisons over users.

`evaluate.load` fetches a script for every metric; these classes are constructed instead. What they compute stands in
`eval.metrics.lamp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from eval.metrics.lamp import compute
from eval.report.significance import direction
from persona_plug.errors import ConfigError, DataError
from persona_plug.measure.stats import Interval, user_bootstrap

FIVE = ("1", "2", "3", "4", "5")


class LocalMetric(evaluate.Metric):
    """Base that leaves nothing on disk: texts are a person's, and the default writes them to a cache."""

    def __init__(self, keep_in_memory: bool = True, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(keep_in_memory=keep_in_memory, **settings)


class TextMetric(LocalMetric):
    """Base of the metrics that compare texts with texts.

    `compute(predictions=[...], references=[...])` takes (N,) strings each and returns {KEY: float}; what `OPTIONS`
    names may be given to it as well.
    """

    KEY: ClassVar[str]
    OPTIONS: ClassVar[dict[str, Any]] = {}

    def _info(self) -> evaluate.MetricInfo:
        options = "".join(f" {name}: default {value!r}." for name, value in self.OPTIONS.items())
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="arXiv 2304.11406",
            inputs_description=f"predictions, references: texts.{options}",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:  # noqa: ANN401
        if unknown := sorted(set(options) - set(self.OPTIONS)):
            known = ", ".join(self.OPTIONS) or "none"
            raise ConfigError(f"{self.KEY}: unknown option {unknown[0]!r}; known are {known}")
        return {self.KEY: compute(self.KEY, predictions, references, **{**self.OPTIONS, **options})}


class Accuracy(TextMetric):
    """Share of predictions that are the reference letter by letter, both stripped."""

    KEY = "accuracy"


class MacroF1(TextMetric):
    """Mean F1 over all `answers`, also those that never occur."""

    KEY = "f1"
    OPTIONS: ClassVar[dict[str, Any]] = {"answers": ()}

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:  # noqa: ANN401
        if not options.get("answers"):
            raise ConfigError("f1: answers=[...] is missing: the mean goes over all of a task's answers")
        return super()._compute(predictions, references, **options)


class MeanAbsoluteError(TextMetric):
    """Mean absolute error of ratings; what is no number counts as the end of the scale farthest from the truth."""

    KEY = "mae"
    OPTIONS: ClassVar[dict[str, Any]] = {"answers": FIVE}


class RootMeanSquaredError(TextMetric):
    """Root of the mean squared error of ratings; what is no number counts as in `MeanAbsoluteError`."""

    KEY = "rmse"
    OPTIONS: ClassVar[dict[str, Any]] = {"answers": FIVE}


class Rouge1(TextMetric):
    """Mean F-measure of ROUGE-1 without stemming; with `seed` the middle of a bootstrap, as LaMP reports it."""

    KEY = "rouge-1"
    OPTIONS: ClassVar[dict[str, Any]] = {"seed": None}


class RougeL(TextMetric):
    """Mean F-measure of ROUGE-L without stemming; with `seed` the middle of a bootstrap, as LaMP reports it."""

    KEY = "rouge-L"
    OPTIONS: ClassVar[dict[str, Any]] = {"seed": None}


class Meteor(TextMetric):
    """Mean METEOR by equal words and Porter stems; synonyms are left out, since they need WordNet."""

    KEY = "meteor"


class Bleu(TextMetric):
    """Corpus BLEU by sacreBLEU, from 0 to 100."""

    KEY = "bleu"


class CalibrationError(LocalMetric):
    """Expected calibration error of probabilities; see `expected_calibration_error`.

    `compute(predictions=..., references=..., bins=15)` takes (N, C) probabilities and (N,) places of the true answers
    and returns {"ece": float}.
    """

    KEY: ClassVar[str] = "ece"

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="arXiv 1706.04599, section 3",
            inputs_description="predictions: probabilities; references: places of the true answers; bins: default 15.",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int], bins: int = 15) -> dict[str, float]:
        return {self.KEY: expected_calibration_error(np.array(predictions), np.array(references), bins)}


METRICS: dict[str, type[evaluate.Metric]] = {
    m.KEY: m
    for m in (
        Accuracy,
        MacroF1,
        MeanAbsoluteError,
        RootMeanSquaredError,
        Rouge1,
        RougeL,
        Meteor,
        Bleu,
        CalibrationError,
    )
}


def expected_calibration_error(
    probabilities: np.ndarray | Sequence[Sequence[float]], gold: np.ndarray | Sequence[int], bins: int = 15
) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their size.

    The confidence of a row is its highest probability (Guo et al. 2017, arXiv 1706.04599, section 3).

    Args:
        probabilities: (N, C), rows summing to 1.
        gold: (N,) places of the true answers, 0 to C-1.
        bins: Number of bins between 0 and 1; a bin holds its upper edge.

    Raises:
        DataError: Shapes do not fit, a row is no distribution, or a place does not exist.
    """
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(gold)
    if table.ndim != 2 or truth.shape != (len(table),) or not table.size:
        raise DataError(
            f"ece: probabilities {table.shape} and gold {truth.shape} must be (N, C) and (N,), N at least 1"
        )
    if (table < 0).any() or not np.allclose(table.sum(1), 1, atol=1e-4):  # float32 softmax sums to 1 within 1e-6
        raise DataError("ece: a row of probabilities does not sum to 1; give probabilities, not scores")
    if truth.min() < 0 or truth.max() >= table.shape[1]:
        raise DataError(f"ece: gold must be places from 0 to {table.shape[1] - 1}")
    if bins < 1:
        raise ConfigError(f"ece: bins={bins} must be at least 1")
    confidence, right = table.max(1), table.argmax(1) == truth
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # |sum of accuracy - sum of confidence| over N is the bin's distance times its share.
    return float(np.abs(np.bincount(place, right - confidence, bins)).sum() / len(table))


def user_win_rate(metric: str, values: Sequence[float], minus: Sequence[float], users: Sequence[str]) -> float:
    """Return the share of users on whose questions the first method is better on average; a tie is half a win.

    Args:
        metric: Name of the metric, which tells whether lower is better.
        values: (N,) the first method's value of each question.
        minus: (N,) the other method's on the same questions.
        users: (N,) the owner of each question.
    """
    difference = _difference(metric, values, minus, users)
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    sums = np.bincount(owner, difference, len(names))  # of the sign of the mean
    sums[np.abs(sums) < 1e-12] = 0.0  # 0.1 + 0.2 - 0.3 is a tie
    return float((np.sign(sums) / 2 + 0.5).mean())


def paired_gain(
    metric: str, values: Sequence[float], minus: Sequence[float], users: Sequence[str], seed: int = 0
) -> Interval:
    """Return by how much the first method is better, with a bootstrap over users; positive means better.

    Args:
        metric: Name of the metric; for "rmse" the values are squared errors and the gain is one of roots.
        values: (N,) the first method's value of each question.
        minus: (N,) the other method's on the same questions.
        users: (N,) the owner of each question.
        seed: Of the draws.
    """
    _difference(metric, values, minus, users)
    lower, transform = direction(metric)
    better, worse = (minus, values) if lower else (values, minus)
    return user_bootstrap(better, users, worse, transform, seed)


def personal_lift(
    metric: str, plug: Sequence[float], plug_shuffled: Sequence[float], users: Sequence[str], seed: int = 0
) -> Interval:
    """Return what the user's own history adds over another user's: `plug` against `plug_shuffled`, as `paired_gain`.

    Args:
        metric: Name of the metric.
        plug: (N,) values with the user's own history.
        plug_shuffled: (N,) values with another user's.
        users: (N,) the owner of each question.
        seed: Of the draws.
    """
    return paired_gain(metric, plug, plug_shuffled, users, seed)


def task_gain(
    metric: str, task_prompt: Sequence[float], none: Sequence[float], users: Sequence[str], seed: int = 0
) -> Interval:
    """Return what training without any user adds: `task_prompt` against the plain LLM, as `paired_gain`.

    Args:
        metric: Name of the metric.
        task_prompt: (N,) values of a trained prompt that knows no user.
        none: (N,) values of the plain LLM.
        users: (N,) the owner of each question.
        seed: Of the draws.
    """
    return paired_gain(metric, task_prompt, none, users, seed)


def _difference(metric: str, values: Sequence[float], minus: Sequence[float], users: Sequence[str]) -> np.ndarray:
    """Return (N,) differences that are positive where the first is better."""
    if not len(values) == len(minus) == len(users) or not len(users):
        raise DataError(f"{metric}: {len(values)} and {len(minus)} values for {len(users)} users; give one each")
    difference = np.asarray(values, dtype=np.float64) - np.asarray(minus, dtype=np.float64)
    if np.isnan(difference).any():
        raise DataError(f"{metric}: {int(np.isnan(difference).sum())} questions lack a value; leave them out of both")
    return -difference if direction(metric)[0] else difference
