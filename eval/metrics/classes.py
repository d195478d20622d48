"""Metrics as `evaluate.Metric` without network, and the calibration error.

`evaluate.load` fetches a script for every metric; these are constructed instead: `TextMetric("rouge-L")`. What they
compute stands in `eval.metrics.lamp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from eval.metrics.lamp import QUESTION_RULES, SET_RULES, compute
from persona_plug.errors import ConfigError, DataError
from persona_plug.measure.metrics import METRICS

FIVE = ("1", "2", "3", "4", "5")
# Metric -> what may be given beside the texts, with its default.
OPTIONS: dict[str, dict[str, Any]] = {
    "f1": {"answers": ()},
    "mae": {"answers": FIVE},
    "rmse": {"answers": FIVE},
    "lamp-rouge-1": {"seed": None},  # with a seed the middle of a bootstrap, as LaMP reports it
    "lamp-rouge-L": {"seed": None},
}


class LocalMetric(evaluate.Metric):
    """Base that leaves nothing on disk: texts are a person's, and the default writes them to a cache."""

    def __init__(self, name: str, keep_in_memory: bool = True, **settings: Any) -> None:  # noqa: ANN401
        super().__init__(config_name=name, keep_in_memory=keep_in_memory, **settings)


class TextMetric(LocalMetric):
    """A metric that compares texts with texts.

    `compute(predictions=[...], references=[...])` takes (N,) strings each and returns {name: float}; what `OPTIONS`
    names may be given to it as well.
    """

    def __init__(self, name: str, **settings: Any) -> None:  # noqa: ANN401
        """Choose the metric.

        Args:
            name: One of `eval.metrics.lamp.QUESTION_RULES` or `SET_RULES`.
            settings: Those of `evaluate.Metric`.

        Raises:
            ConfigError: There is no such metric.
        """
        names = [*QUESTION_RULES, *SET_RULES]
        if name not in names:
            raise ConfigError(f"no metric {name!r} of texts; known are {', '.join(names)}")
        super().__init__(name, **settings)

    def _info(self) -> evaluate.MetricInfo:
        options = "".join(f" {key}: default {value!r}." for key, value in OPTIONS.get(self.config_name, {}).items())
        return evaluate.MetricInfo(
            description=METRICS[self.config_name].description,
            citation="arXiv 2304.11406",
            inputs_description=f"predictions, references: texts.{options}",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions: list[str], references: list[str], **options: Any) -> dict[str, float]:  # noqa: ANN401
        name: str = self.config_name
        defaults = OPTIONS.get(name, {})
        if unknown := sorted(set(options) - set(defaults)):
            raise ConfigError(f"{name}: unknown option {unknown[0]!r}; known are {', '.join(defaults) or 'none'}")
        if name == "f1" and not options.get("answers"):
            raise ConfigError("f1: answers=[...] is missing: the mean goes over all of a task's answers")
        return {name: compute(name, predictions, references, **{**defaults, **options})}


class CalibrationError(LocalMetric):
    """Expected calibration error of probabilities; see `expected_calibration_error`.

    `compute(predictions=..., references=..., bins=15)` takes (N, C) probabilities and (N,) places of the true answers
    and returns {"ece": float}.
    """

    def __init__(self, **settings: Any) -> None:  # noqa: ANN401
        """Take the settings of `evaluate.Metric`."""
        super().__init__("ece", **settings)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=METRICS["ece"].description,
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
        return {"ece": expected_calibration_error(np.array(predictions), np.array(references), bins)}


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
