"""Metrics as `evaluate.Metric` without network.

`evaluate.load` fetches a script for every metric; these are constructed instead: `TextMetric("rouge-L")`. What they
compute stands in `eval.metrics.lamp`.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from eval.metrics.lamp import QUESTION_RULES, SET_RULES, compute
from persona_plug.errors import ConfigError
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


class TextMetric(evaluate.Metric):
    """A metric that compares texts with texts; it leaves nothing on disk, since texts are a person's.

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
        super().__init__(config_name=name, **{"keep_in_memory": True, **settings})

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
