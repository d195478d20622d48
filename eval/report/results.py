"""What a run recorded, `results.json`: read, checked, and written small enough to be committed.

It holds values, intervals, costs, settings and counts; no user's id and no text of a user.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona_plug.errors import CorruptFileError, DataError, first_line
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval

DIGITS = 9  # that a number keeps: far more than any interval tells apart, half of what Python prints
DECIDING = "nll"  # the metric that a comparison decides by
Results = Mapping[str, Any]  # the JSON object


def read_results(path: Path) -> dict[str, Any]:
    """Return what a run recorded.

    Args:
        path: The run's folder, or its `results.json`.

    Raises:
        DataError: There is no such file.
        CorruptFileError: It is not what `eval.run` writes; the message names the part.
    """
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{file}: no such file; give the folder that `python -m eval.run` wrote (its out=)")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{file}: cannot be read ({exc.strerror}); check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise CorruptFileError(f"{file}: not JSON ({first_line(exc)}); run eval.run again") from exc
    if problem := _problem(content):
        raise CorruptFileError(f"{file}: {problem}; it is not the results.json of an eval.run")
    return dict(content)


def to_json(results: Results) -> str:
    """Return results as JSON text with a method or a contrast per line, so that two runs can be compared by `diff`."""
    blocks = []
    for key, value in results.items():
        if key == "methods":
            inside = ",\n".join(f"  {json.dumps(name)}: {_dumps(row)}" for name, row in value.items())
            text = f"{{\n{inside}\n }}"
        elif key == "contrasts" and value:
            text = "[\n" + ",\n".join(f"  {_dumps(row)}" for row in value) + "\n ]"
        else:
            text = _dumps(value)
        blocks.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def portable(value: Any) -> Any:  # noqa: ANN401
    """Return settings or `key=value` arguments with each absolute path cut to its last part.

    A committed file shows no folder of the machine that it comes from.
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str):
        return value
    key, equals, path = value.rpartition("=")
    return f"{key}{equals}{Path(path).name}" if path.startswith(("/", "~")) else value


def interval_row(interval: Interval) -> dict[str, Any]:
    """Return an interval as results hold it."""
    return {"value": interval.value, "ci95": [interval.low, interval.high]}


def contrast_row(contrast: Contrast) -> dict[str, Any]:
    """Return a contrast as results hold it."""
    ends = [contrast.low, contrast.high]
    names = {"a": contrast.a, "b": contrast.b, "metric": contrast.metric, "delta": contrast.delta}
    return {**names, "ci95": ends, "p": contrast.p, "p_holm": contrast.p_holm}


def intervals(results: Results) -> dict[str, dict[str, Interval]]:
    """Return method -> metric -> its value; NaN stands for what is not known."""
    return {
        method: {metric: _interval(value) for metric, value in row["metrics"].items()}
        for method, row in results["methods"].items()
    }


def contrasts_of(results: Results) -> list[Contrast]:
    """Return the contrasts that a run recorded."""
    rows = []
    for row in results.get("contrasts", []):
        low, high = row["ci95"]
        p, p_holm = row.get("p"), row.get("p_holm")
        rows.append(Contrast(row["a"], row["b"], row["metric"], row["delta"], low, high, p, p_holm))
    return rows


def metrics_of(results: Results) -> list[str]:
    """Return the metrics in the order in which the methods recorded them."""
    return list(dict.fromkeys(m for row in results["methods"].values() for m in row["metrics"]))


def _interval(value: Mapping[str, Any]) -> Interval:
    return Interval(*(math.nan if number is None else float(number) for number in (value["value"], *value["ci95"])))


def _dumps(value: object) -> str:
    return json.dumps(_rounded(value), default=str)


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _problem(content: object) -> str:
    """Say what is wrong with the shape of results, or nothing."""
    if not isinstance(content, dict):
        return "holds no object"
    methods = content.get("methods")
    if not isinstance(methods, dict):
        return "has no methods"
    if not isinstance(content.get("versions") or {}, dict):
        return "its versions are no object"
    for name, row in methods.items():
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict):
            return f"method {name!r:.60} has no metrics"
        for metric, value in row["metrics"].items():
            if not _is_interval(value):
                return f"metric {metric!r:.60} of method {name!r:.60} has no value with ci95"
    for number, row in enumerate(content.get("contrasts") or []):
        if not isinstance(row, dict) or not {"a", "b", "metric", "delta", "ci95"} <= set(row):
            return f"contrast {number} is not one of a, b, metric, delta and ci95"
    return ""


def _is_interval(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("ci95"), list):
        return False
    numbers = [value.get("value"), *value["ci95"]]
    return len(numbers) == 3 and not any(isinstance(n, str | bool | list | dict) for n in numbers)
