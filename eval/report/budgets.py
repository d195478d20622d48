"""What training cost each method: at equal steps, and at equal seconds, from one and the same run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from persona_plug.measure.tables import UNKNOWN, Table, number_text

REFERENCE = "plug"  # its seconds are what the others are held to
BUDGET_NOTE = (
    "Trained methods had the same samples, steps, batch size and grid of learning rates (chosen by validation loss). "
    "Seconds are those of the optimiser steps and of an answers head's fit, as if each method had been trained alone. "
    "The last two columns hold every method to the seconds of {name}: the steps it makes in them, and "
    "the validation loss of its last look by then. Losses compare only between methods that answer the same way."
)


def budget_note(results: Mapping[str, Any]) -> str:
    """Return what the table shows."""
    return BUDGET_NOTE.format(name=_reference(results) or "no method")


def budget_table(results: Mapping[str, Any]) -> Table:
    """Return learning rate, steps, seconds and validation loss of each training, and what equal seconds give.

    Args:
        results: What `results.json` holds; `curve` of a method is [(step, seconds, validation loss), ...].
    """
    methods: Mapping[str, Any] = results["methods"]
    name = _reference(results)
    limit = methods[name]["curve"][-1][1] if name else 0.0
    rows: list[list[str]] = []
    curves: list[list[list[float]]] = []
    for method, row in methods.items():
        curve = [list(look) for look in row.get("curve") or ()]
        if curve and curve not in curves:  # controls ask a plug that another row has trained
            curves.append(curve)
            rows.append([method, f"{row['lr']:g}", *_budget_cells(curve, limit)])
    head = ("method", "learning rate", "steps", "seconds", "validation loss", "steps in equal seconds", "loss by then")
    return Table(head, rows or [["nothing was trained", *[UNKNOWN] * 6]])


def _budget_cells(curve: Sequence[Sequence[float]], limit: float) -> list[str]:
    step, seconds, _ = curve[-1]
    within = min(step, int(step * limit / seconds)) if seconds else step
    by_then = [loss for _, at, loss in curve if at <= limit]
    best = [min(loss for *_, loss in curve), min(by_then, default=None)]
    return [f"{step:g}", f"{seconds:.1f}", number_text(best[0]), f"{within:g}", number_text(best[1])]


def _reference(results: Mapping[str, Any]) -> str | None:
    names = [name for name, row in results["methods"].items() if row.get("curve")]
    return REFERENCE if REFERENCE in names else next(iter(names), None)
