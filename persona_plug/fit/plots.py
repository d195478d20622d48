"""The report's two plots: loss by step, and lift by history length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_plug.data.history import Example
from persona_plug.measure.stats import user_bootstrap

ABOVE = "Training loss is above validation loss: training hides parts of the histories."


def plot_loss(log: Sequence[dict[str, float]], path: Path) -> None:
    """Draw training and validation loss by step, with a note where the last training loss is the higher one."""
    figure, axes = _figure()
    last = {}
    for key, label in (("loss", "training"), ("eval_loss", "validation users")):
        points = [(r["step"], r[key]) for r in log if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
            last[key] = points[-1][1]
    axes.set(xlabel="step", ylabel="loss (lower is better)", title="Training")
    if len(last) == 2 and last["loss"] > last["eval_loss"]:
        figure.supxlabel(ABOVE, fontsize=8)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_lift(lift: np.ndarray, questions: Sequence[Example], path: Path, groups: int = 4) -> None:
    """Draw the personal lift of each question, (N,) NLL of plug_shuffled minus plug, by history length."""
    lengths = np.array([len(e.history) for e in questions])
    labels, points = [], []
    for inside in length_bins(lengths, groups):
        low, high = lengths[inside].min(), lengths[inside].max()
        labels.append(f"{low if low == high else f'{low}–{high}'}\n(n={int(inside.sum())})")
        owners = [e.user_id for e, s in zip(questions, inside, strict=True) if s]
        points.append(user_bootstrap(lift[inside], owners))
    figure, axes = _figure()
    values = np.array([p.value for p in points])
    bars = np.array([[p.value - p.low for p in points], [p.high - p.value for p in points]])
    axes.errorbar(range(len(points)), values, yerr=bars, fmt="o", capsize=4)
    axes.axhline(0, linewidth=0.8, color="grey")
    axes.set_xticks(range(len(points)), labels)
    axes.set(xlabel="items in the user's history", ylabel="lift in NLL (nats)")
    figure.suptitle("Personal lift")
    axes.set_title("Above 0: the user's own history predicts the answers better than another user's", fontsize=8)
    figure.savefig(path, dpi=120)


def length_bins(lengths: np.ndarray, groups: int) -> list[np.ndarray]:
    """Return masks of at most `groups` bins of like size; no length stands in two of them."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, groups + 1)[1:], method="inverted_cdf"))
    bins = np.searchsorted(edges, lengths)
    return [bins == b for b in range(len(edges)) if (bins == b).any()]


def _figure() -> tuple[Any, Any]:
    # The object interface draws without a display and leaves the caller's matplotlib state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
