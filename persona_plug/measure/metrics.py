"""The metrics by name, with their direction: one table for every report. It loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from persona_plug.measure.stats import identity

Transform = Callable[[Any], Any]

# Whether lower is better, and what turns a mean over questions into the metric.
METRICS: dict[str, tuple[bool, Transform]] = {
    "nll": (True, identity),
    "accuracy": (False, identity),
    "mae": (True, identity),
    "rmse": (True, np.sqrt),
    "rouge-1": (False, identity),
    "rouge-L": (False, identity),
    "f1": (False, identity),
    "meteor": (False, identity),
    "bleu": (False, identity),
    "ece": (True, identity),
}
