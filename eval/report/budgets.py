"""What training cost each method: at equal steps, and at equal seconds, from one and the same run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eval.report.figures import Table

REFERENCE = "plug"  # its seconds are what the others are held to
BUDGET_NOTE = (
    "Trained methods had the same samples, steps, batch size and grid of learning rates (chosen by validation loss). "
    "Seconds are those of the optimiser steps, as if each method had been trained alone; an answer head is fitted "
    "before them. The last two columns hold every method to the seconds of {name}: the steps it makes in them, and "
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
    rows, seen = [], []
    for method, row in methods.items():
        curve = [list(point) for point in row.get("curve") or ()]  # tuples when fresh, lists when read back
        if not curve or curve in seen:  # controls ask a plug that another row has trained
            continue
        seen.append(curve)
        step, seconds, _ = curve[-1]
        within = min(step, int(step * limit / seconds)) if seconds else step
        losses = [(at, loss) for _, at, loss in curve]
        by_then = [loss for at, loss in losses if at <= limit]
        cells = [f"{min(loss for _, loss in losses):.3f}", str(within), f"{min(by_then):.3f}" if by_then else "–"]
        rows.append([method, f"{row['lr']:g}", str(step), f"{seconds:.1f}", *cells])
    head = ("method", "learning rate", "steps", "seconds", "validation loss", "steps in equal seconds", "loss by then")
    return Table(head, rows or [["nothing was trained", *["–"] * 6]])


def _reference(results: Mapping[str, Any]) -> str | None:
    trained = [name for name, row in results["methods"].items() if row.get("curve")]
    return REFERENCE if REFERENCE in trained else next(iter(trained), None)
