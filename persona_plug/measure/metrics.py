"""The metrics by name, with their direction and meaning: one table for every report. It loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from persona_plug.errors import ConfigError
from persona_plug.measure.stats import identity

Transform = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes:
        description: What it is, in words that finish the sentence "The metric is the ...".
        lower_is_better: Its direction.
        transform: Turns the mean of the questions' values into the metric.
    """

    description: str
    lower_is_better: bool = False
    transform: Transform = identity

    def gain(self, a: float, b: float) -> float:
        """Return by how much the value `a` is better than `b`."""
        return b - a if self.lower_is_better else a - b


# A new metric is a line here, and its rule: in `measure.answers`, or of texts in `measure.overlap` (both in `fit`)
# or `measure.facts`, or in `eval.metrics.lamp` (LaMP's official ones). Tables show the metrics in this order.
METRICS: dict[str, Metric] = {
    "nll": Metric("negative log-likelihood, in nats: of the right label, or per token of the user's text", True),
    "accuracy": Metric("share of answers that are exactly the user's"),
    "mae": Metric("mean absolute error of a rating, in points of the scale", True),
    "rmse": Metric("root mean square error of a rating, in points of the scale", True, np.sqrt),
    "rouge-1": Metric("F-measure of the words shared with the user's text, without stemming"),
    "rouge-L": Metric("F-measure of the longest sequence of words shared with the user's text, without stemming"),
    "chrf": Metric("chrF score, the F-measure of shared character sequences, a mean over texts from 0 to 100"),
    "length": Metric("mean squared error of the logarithm of an answer's length in words", True),
    "foreign": Metric("share of an answer's numbers and names that neither request nor user gives", True),
    "copied": Metric("share of answers that repeat the request", True),
    "lamp-rouge-1": Metric("rouge-1 as LaMP's official script has it: words of the letters a to z and digits alone"),
    "lamp-rouge-L": Metric("rouge-L as LaMP's official script has it: words of the letters a to z and digits alone"),
    "f1": Metric("mean F1 over all answers of the task, also those that never occur"),
    "meteor": Metric("METEOR score by equal words and Porter stems, without synonyms"),
    "bleu": Metric("BLEU score of the whole set, from 0 to 100"),
    "ece": Metric("expected calibration error; repeated questions raise it, so its interval may lie above it", True),
}


def find_metric(name: str) -> Metric:
    """Return a metric by name.

    Raises:
        ConfigError: The metric is unknown.
    """
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} has no direction; known are {', '.join(METRICS)}; add it to METRICS")
    return METRICS[name]


def heading(name: str) -> str:
    """Return a metric's name with an arrow towards better values; an unknown one keeps its name alone."""
    return name if name not in METRICS else f"{name} {'↓' if METRICS[name].lower_is_better else '↑'}"


def describe(names: Iterable[str]) -> list[str]:
    """Return a line on each of the metrics that are known."""
    return [f"{name}: {METRICS[name].description}" for name in names if name in METRICS]
