"""The report's two plots: loss by step, and lift by history length."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_plug.data.history import Example
from persona_plug.measure.stats import user_bootstrap


def plot_loss(log: Sequence[dict[str, float]], path: Path) -> None:
    """Draw training and validation loss by step."""
    figure, axes = _figure()
    for key, label in (("loss", "training"), ("eval_loss", "validation users")):
        points = [(r["step"], r[key]) for r in log if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss", title="Training")
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_lift(lift: np.ndarray, questions: Sequence[Example], path: Path) -> None:
    """Draw the personal lift of each question, (N,) NLL of plug_shuffled minus plug, by quarters of history length."""
    lengths = np.array([len(e.history) for e in questions])
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 5)))
    labels, points = [], []
    for low, high in itertools.pairwise(edges) if len(edges) > 1 else [(edges[0], edges[0])]:
        inside = (lengths >= low) & ((lengths < high) | (high == edges[-1]))
        if inside.any():
            labels.append(f"{int(low)}–{int(high)}\n(n={int(inside.sum())})")
            owners = [e.user_id for e, s in zip(questions, inside, strict=True) if s]
            points.append(user_bootstrap(lift[inside], owners))
    figure, axes = _figure()
    values = np.array([p.value for p in points])
    bars = np.array([[p.value - p.low for p in points], [p.high - p.value for p in points]])
    axes.errorbar(range(len(points)), values, yerr=bars, fmt="o", capsize=4)
    axes.axhline(0, linewidth=0.8, color="grey")
    axes.set_xticks(range(len(points)), labels)
    axes.set(xlabel="items in the user's history", ylabel="NLL lift over another user's history", title="Personal lift")
    figure.savefig(path, dpi=120)


def _figure() -> tuple[Any, Any]:
    # The object interface draws without a display and leaves the caller's matplotlib state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
