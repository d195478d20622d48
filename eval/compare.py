"""`python -m eval.compare A B`: two finished runs side by side, as a Markdown table.

A and B are folders that `eval.run` wrote, or their `results.json`. The difference is B − A of the two values and has no
interval: the runs may have answered different questions, and each one's own intervals stand beside it. What the runs do
not share is said in one line above the table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.figures import Table, cell
from eval.report.significance import METRICS
from persona_plug.errors import CorruptFileError, DataError
from training.config import run_command

SHARED = ("task", "split", "n", "n_users", "llm", "encoder")


def main(arguments: Sequence[str]) -> None:
    """Print the comparison of two run folders."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description="Two finished runs side by side.")
    parser.add_argument("a", metavar="A", help="folder of a run, or its results.json")
    parser.add_argument("b", metavar="B", help="folder of the other run")
    chosen = parser.parse_args(arguments)
    sys.stdout.write(compare(read_results(Path(chosen.a)), read_results(Path(chosen.b)), chosen.a, chosen.b))


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
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise DataError(f"{file}: cannot be read ({exc.strerror}); check its permissions") from exc
    except (ValueError, RecursionError) as exc:
        raise CorruptFileError(f"{file}: not JSON ({' '.join(str(exc).split())}); run eval.run again") from exc
    if problem := _problem(found):
        raise CorruptFileError(f"{file}: {problem}; it is not the results.json of an eval.run")
    return dict(found)


def compare(a: Mapping[str, Any], b: Mapping[str, Any], name_a: str = "A", name_b: str = "B") -> str:
    """Return the Markdown text: what the runs do not share, and a row for each method and metric of either.

    Args:
        a: Results of one run.
        b: Results of the other.
        name_a: What to call the first.
        name_b: What to call the second.
    """
    lines = [f"A: {cell(name_a)}", f"B: {cell(name_b)}", ""]
    if apart := differences(a, b):
        lines += [f"Warning: the runs differ in {cell('; '.join(apart))}", ""]
    rows = []
    for method in dict.fromkeys([*a["methods"], *b["methods"]]):
        sides = [run["methods"].get(method, {}).get("metrics", {}) for run in (a, b)]
        for metric in dict.fromkeys([*sides[0], *sides[1]]):
            first, second = sides[0].get(metric), sides[1].get(metric)
            rows.append([method, _headed(metric), _shown(first), _shown(second), *_change(metric, first, second)])
    head = ("method", "metric", "A [95% interval]", "B [95% interval]", "B − A", "better")
    return "\n".join([*lines, *Table(head, rows).markdown()]) + "\n"


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return what the runs do not share: task, split, sizes, models, package versions; "?" where not recorded."""
    apart = [f"{k} ({a.get(k, '?')} and {b.get(k, '?')})" for k in SHARED if a.get(k) != b.get(k)]
    versions = [dict(run.get("versions") or {}) for run in (a, b)]
    for package in sorted({*versions[0], *versions[1]}):
        old, new = (v.get(package, "?") for v in versions)
        if old != new:
            apart.append(f"{package} ({old} and {new})")
    return apart


def _problem(found: object) -> str:
    """Say what is wrong with the shape of results, or nothing."""
    if not isinstance(found, dict):
        return "holds no object"
    methods = found.get("methods")
    if not isinstance(methods, dict):
        return "has no methods"
    if not isinstance(found.get("versions") or {}, dict):
        return "its versions are no object"
    for name, row in methods.items():
        if not isinstance(row, dict) or not isinstance(row.get("metrics"), dict):
            return f"method {name!r:.60} has no metrics"
        for metric, value in row["metrics"].items():
            ends = value.get("ci95") if isinstance(value, dict) else None
            numbers = [value.get("value"), *ends] if isinstance(value, dict) and isinstance(ends, list) else [""]
            if len(numbers) != 3 or any(isinstance(n, str | bool | list | dict) for n in numbers):
                return f"metric {metric!r:.60} of method {name!r:.60} has no value with ci95"
    return ""


def _headed(metric: str) -> str:
    return metric if metric not in METRICS else f"{metric} {'↓' if METRICS[metric][0] else '↑'}"


def _shown(found: Mapping[str, Any] | None) -> str:
    if found is None or not _known(found["value"]):
        return "–"
    low, high = (f"{v:.3f}" if _known(v) else "–" for v in found["ci95"])
    return f"{found['value']:.3f} [{low}, {high}]"


def _change(metric: str, a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return B − A and which run is better; equal values, and metrics of unknown direction, have no better one."""
    if a is None or b is None or not _known(a["value"]) or not _known(b["value"]):
        return "–", "–"
    change = b["value"] - a["value"]
    if metric not in METRICS or change == 0:
        return f"{change:+.3f}", "–"
    return f"{change:+.3f}", "B" if (change > 0) != METRICS[metric][0] else "A"


def _known(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


if __name__ == "__main__":
    run_command(main, failure=2)
