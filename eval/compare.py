"""`python -m eval.compare A B`: two finished runs side by side, as a Markdown table.

A and B are folders that `eval.run` wrote, or their `results.json`. The difference is B − A of the two values and has no
interval: the runs may have answered different questions, and each one's own intervals stand beside it. What the runs do
not share is said in one line above the table. Where other questions were asked, neither run is better.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.report.results import intervals, read_results
from persona_plug.measure.metrics import METRICS, heading
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import UNKNOWN, Table, cell, interval_text, number_text
from training.config import run_command

ASKED = ("task", "split", "n", "n_users")  # what was asked, and of whom
SHARED = (*ASKED, "llm", "encoder")


def main(arguments: Sequence[str]) -> None:
    """Print the comparison of two run folders."""
    parser = argparse.ArgumentParser(prog="python -m eval.compare", description="Two finished runs side by side.")
    parser.add_argument("a", metavar="A", help="folder of a run, or its results.json")
    parser.add_argument("b", metavar="B", help="folder of the other run")
    paths = parser.parse_args(arguments)
    sys.stdout.write(compare(read_results(Path(paths.a)), read_results(Path(paths.b)), paths.a, paths.b))


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
    comparable = all(a.get(k) == b.get(k) for k in ASKED)
    rows = []
    values_a, values_b = intervals(a), intervals(b)
    for method in dict.fromkeys([*values_a, *values_b]):
        row_a, row_b = values_a.get(method, {}), values_b.get(method, {})
        for metric in dict.fromkeys([*row_a, *row_b]):
            sides = row_a.get(metric), row_b.get(metric)
            change = _change(metric, *sides) if comparable else (UNKNOWN, UNKNOWN)
            rows.append([method, heading(metric), *map(interval_text, sides), *change])
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


def _change(metric: str, a: Interval | None, b: Interval | None) -> tuple[str, str]:
    """Return B − A and which run is better; equal values, and metrics of unknown direction, have no better one."""
    if a is None or b is None or not (math.isfinite(a.value) and math.isfinite(b.value)):
        return UNKNOWN, UNKNOWN
    change = number_text(b.value - a.value, "+.3f")
    if metric not in METRICS or a.value == b.value:
        return change, UNKNOWN
    return change, "B" if METRICS[metric].gain(b.value, a.value) > 0 else "A"


if __name__ == "__main__":
    run_command(main, failure=2)
