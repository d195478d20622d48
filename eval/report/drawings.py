"""What the page draws: lifts, lift by history length, quality against cost, and examples.

`details` is what a run hands over beside its results: {"users": (N,) user of each question, "history_lengths": (N,)
items, "values": {method: {metric: (N,) value, None or NaN}}, "examples": [{"input", "reference", "answers": {method:
text}, "index" (optional): its question}]}. Any may be missing, and its section then says so.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from eval.report import figures
from eval.report.figures import Bar, Point, figure, missing, paragraph
from eval.report.results import Results, contrasts_of, intervals, metrics_of
from persona_plug.measure.contrasts import LIFT, as_array, difference
from persona_plug.measure.metrics import METRICS, heading
from persona_plug.measure.tables import Table, escaped

CONTROLS = ("plug_shuffled", "task_prompt", "plug_empty", "none")
EXAMPLES = 5  # won, and as many lost


def lifts(results: Results, details: Mapping[str, Any], metric: str) -> str:
    """Return intervals of every method against none, and of the plug against every control."""
    names = list(results["methods"])
    priors = [n for n in names if n.startswith("user_prior")]
    groups = {
        "Every method against none": [(n, "none") for n in names if n != "none"] if "none" in names else [],
        "The plug against every control": [("plug", n) for n in (*CONTROLS, *priors) if n in names and "plug" in names],
    }
    parts = []
    for title, pairs in groups.items():
        bars = [bar for a, b in pairs if (bar := _lift(results, details, a, b, metric))]
        if not bars:
            parts.append(missing(f"{title}, {metric}"))
            continue
        axis = f"difference in {metric}, to the right the first is better"
        rows = [[b.label, b.text] for b in bars]
        parts.append(figure(title, figures.forest(bars, f"{title}, {metric}", axis), Table(("", metric), rows)))
        if absent := len(pairs) - len(bars):
            parts.append(paragraph(f"{absent} of {len(pairs)} differences were not recorded.", "missing"))
    return "".join(parts)


def _lift(results: Results, details: Mapping[str, Any], a: str, b: str, metric: str) -> Bar | None:
    """Return a difference as the run recorded it, or from its values per question, or None."""
    for c in contrasts_of(results):
        if c.metric == metric and c.pair == (a, b):
            return Bar.of_contrast(c)
        if c.metric == metric and c.pair == (b, a):
            return Bar(f"{a} − {b}", -c.delta, -c.high, -c.low)
    pair = _pair(details, a, b, metric)
    if pair is None:
        return None
    delta = difference(*pair[:3], metric)
    return Bar(f"{a} − {b}", delta.value, delta.low, delta.high)


def _pair(
    details: Mapping[str, Any], a: str, b: str, metric: str
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray] | None:
    """Return both methods' values (M,), users and indices of the M questions that both have, or None."""
    values, users = details.get("values") or {}, details.get("users")
    if users is None or metric not in METRICS or any(metric not in values.get(n, {}) for n in (a, b)):
        return None
    first, second = as_array(values[a][metric]), as_array(values[b][metric])
    if not len(first) == len(second) == len(users):
        return None
    some = np.flatnonzero(~np.isnan(first) & ~np.isnan(second))
    return (first[some], second[some], [users[i] for i in some], some) if some.size else None


def by_length(details: Mapping[str, Any], metric: str) -> str:
    """Return the personal lift by terciles of history length, and user by user."""
    pair, lengths = _pair(details, *LIFT, metric), details.get("history_lengths")
    if pair is None or lengths is None or len(lengths) != len(details["users"]):
        return missing(f"{metric} of plug and plug_shuffled by question, with users and history lengths")
    own, other, users, some = pair
    items = np.asarray(lengths, dtype=np.float64)[some]
    terciles = _terciles(own, other, users, items, metric)
    axis = f"lift in {metric}, to the right the own history helps"
    forest = figures.forest([bar for bar, _ in terciles], "Lift by history length", axis)
    table = Table(("history", "questions", "users", f"lift in {metric}"), [row for _, row in terciles])
    points = _user_points(own, other, users, items, metric)
    signs = Counter(int(np.sign(p.y)) for p in points)
    words = f"Of {len(points)} users the lift is above 0 for {signs[1]}, below for {signs[-1]}, 0 for {signs[0]}."
    cloud = figures.scatter(
        points, "Lift by user", "items in the user's history", f"lift in {metric}", zero=True, words=words
    )
    return figure("By terciles", forest, table) + figure("By user", cloud, None, words)


def _terciles(
    own: np.ndarray, other: np.ndarray, users: Sequence[str], items: np.ndarray, metric: str
) -> list[tuple[Bar, list[str]]]:
    """Return the lift in each third of the questions by history length, as a bar and as a table's row."""
    first, second = np.quantile(items, [1 / 3, 2 / 3], method="inverted_cdf")
    terciles = []
    for inside in (items <= first, (items > first) & (items <= second), items > second):
        if inside.any():
            owners = [u for u, s in zip(users, inside, strict=True) if s]
            delta = difference(own[inside], other[inside], owners, metric)
            low, high = int(items[inside].min()), int(items[inside].max())
            label = f"{low} items" if low == high else f"{low}–{high} items"
            bar = Bar(label, delta.value, delta.low, delta.high)
            terciles.append((bar, [label, str(int(inside.sum())), str(len(set(owners))), bar.text]))
    return terciles


def _user_points(
    own: np.ndarray, other: np.ndarray, users: Sequence[str], items: np.ndarray, metric: str
) -> list[Point]:
    rule = METRICS[metric]
    names, owner = np.unique(users, return_inverse=True)
    points = []
    for i in range(len(names)):
        rows = owner == i
        lift = rule.gain(*(float(rule.transform(values[rows].mean())) for values in (own, other)))
        length = float(items[rows].mean())
        points.append(Point(f"{length:.0f} items, {lift:+.3f}", length, lift))
    return points


def against_cost(results: Results, metric: str) -> str:
    """Return a metric against prompt tokens and against seconds, with the methods that nothing beats in both."""
    if metric not in METRICS:
        return paragraph(f"{metric}: its direction is not known, so there is no frontier.", "missing")
    values = intervals(results)
    parts = []
    for key, name in (("prompt_tokens_mean", "prompt tokens"), ("seconds_per_query", "seconds per query")):
        points = [
            Point(method, float(row[key]), values[method][metric].value, str(number))
            for number, (method, row) in enumerate(results["methods"].items(), 1)
            if row.get(key) is not None and metric in values[method] and math.isfinite(values[method][metric].value)
        ]
        if not points:
            parts.append(missing(f"{name} together with {metric}"))
            continue
        best = figures.pareto([p.x for p in points], [p.y for p in points], METRICS[metric].lower_is_better)
        points = [replace(p, frontier=edge) for p, edge in zip(points, best, strict=True)]
        rows = [[p.mark, p.label, f"{p.x:.4g}", f"{p.y:.3f}", "yes" if p.frontier else ""] for p in points]
        title = f"{heading(metric)} against {name}"
        plot = figures.scatter(points, title, f"{name}, fewer is better", heading(metric))
        parts.append(figure(title, plot, Table(("", "method", name, metric, "on the frontier"), rows)))
    return "".join(parts)


def examples(results: Results, details: Mapping[str, Any]) -> str:
    """Return the answers in which the plug wins and loses most clearly against another user's history."""
    every = details.get("examples") or []
    in_order = len(every) == len(details.get("users") or [])
    usable = [
        (e.get("index", i if in_order else None), e)
        for i, e in enumerate(every)
        if set(LIFT) <= set(e.get("answers") or {})
    ]
    if not usable:
        return missing("answers of plug and plug_shuffled")
    gains, how = _gains(results, details, usable)
    order = sorted(range(len(usable)), key=lambda i: -gains[i])
    wins, losses = [i for i in order if gains[i] > 0], [i for i in reversed(order) if gains[i] < 0]
    even = len(usable) - len(wins) - len(losses)
    count = f"Against plug_shuffled, judged {how}: {len(wins)} won, {len(losses)} lost, {even} even."
    parts = [paragraph(f"{count} The clearest {EXAMPLES} of each are shown.")]
    for title, clearest in (("Won", wins[:EXAMPLES]), ("Lost", losses[:EXAMPLES])):
        parts.append(f"<h3>{title}</h3>" if clearest else paragraph(f"{title}: none."))
        parts += [_example(usable[i][1]) for i in clearest]
    return "".join(parts)


def _gains(
    results: Results, details: Mapping[str, Any], usable: Sequence[tuple[int | None, Mapping[str, Any]]]
) -> tuple[list[float], str]:
    """Return by how much the plug is better in each example, and what says so."""
    metric = next((m for m in metrics_of(results) if _pair(details, *LIFT, m)), "")
    if pair := _pair(details, *LIFT, metric):
        own, other, _, some = pair
        gains = {int(i): METRICS[metric].gain(x, y) for x, y, i in zip(own, other, some, strict=True)}
        scores = [gains[at] for at, _ in usable if at in gains]
        if len(scores) == len(usable):
            return scores, f"by {metric} of each question"
    return [_overlap_gain(e) for _, e in usable], "by the words shared with the reference (F1)"


def _example(example: Mapping[str, Any]) -> str:
    answers = example["answers"]
    rows = [("really", example.get("reference", "not recorded")), *((m, answers[m]) for m in LIFT)]
    rows += [(m, a) for m, a in answers.items() if m not in LIFT]
    body = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in rows)
    return f"<blockquote>{escaped(example.get('input', 'not recorded'))}</blockquote><dl>{body}</dl>"


def _overlap_gain(example: Mapping[str, Any]) -> float:
    """Return the F1 of words shared with the reference, plug minus plug_shuffled."""
    reference = Counter(re.findall(r"\w+", str(example.get("reference", "")).lower()))
    scores = []
    for method in LIFT:
        words = Counter(re.findall(r"\w+", str(example["answers"][method]).lower()))
        both = (words & reference).total()
        scores.append(2 * both / max(1, words.total() + reference.total()))
    return scores[0] - scores[1]
