"""A comparison as Markdown and as one self-contained HTML page.

Both are pure functions of what a run recorded. Everything in a run is data that others wrote (questions, answers,
method names, settings): it is escaped where it is rendered, by eval.report.figures, and the page forbids any script and
any other resource. What was not recorded is said, never left out in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from eval.report import figures
from eval.report.budgets import budget_note, budget_table
from eval.report.figures import STYLE, Bar, Point, Table, cell, escaped, figure, folded, missing, paragraph, section
from eval.report.significance import FLIPS, GAIN, LIFT, METRICS, as_array, difference, smallest_p

EXPLAINED = (
    "Personal lift is plug − plug_shuffled: the same trained plug with the user's own history instead of another "
    "user's, so what is left is what knowing this user adds. Task gain is task_prompt − none: as many soft tokens, "
    "trained on the same data, that know no user, so what training on the task adds by itself. "
    "plug − none mixes the two."
)
AVERAGED = (
    "Mean over seeds, 95% intervals from a bootstrap over users. The calibration error (ece) rises where questions "
    "repeat, as they do in the draws: its interval may lie above its value."
)
COSTS = (
    ("prompt_tokens_mean", "prompt tokens"),
    ("generated_tokens_mean", "generated tokens"),
    ("trainable_params", "trained numbers"),
    ("fit_seconds", "fit, s"),
    ("seconds_per_query", "s per query"),
    ("flops_per_query", "FLOPs per query"),
    ("outside_llm", "share outside the LLM"),
)
CONTROLS = ("plug_shuffled", "task_prompt", "plug_empty", "none")
SHOWN = 5  # examples won, and as many lost


def markdown(results: Mapping[str, Any], command: str) -> str:
    """Return the report as Markdown: the two controls, values, costs, contrasts, and how to repeat them.

    Args:
        results: What `results.json` holds.
        command: The command that made it.
    """
    facts = _facts(results)
    settings = json.dumps(results["settings"], ensure_ascii=False, default=str) if "settings" in results else ""
    facts = Table(facts.head, [*facts.rows, ["settings", settings or "not recorded"]])
    longest = max([len(m) for m in re.findall(r"`+", command)], default=0)
    quote = "`" * (longest + 1)  # a command with backticks stays code
    blocks = [
        [f"# {cell(_title(results))}", "", cell(_summary(results))],
        ["## Lift and gain", "", cell(EXPLAINED), "", *_controls(results).markdown()],
        ["## Methods", "", AVERAGED, "", *_values(results).markdown()],
        ["## Cost", "", *_costs(results).markdown()],
        ["## What was cut or left out", "", *_left_out(results).markdown()],
        ["## Training budgets", "", cell(budget_note(results)), "", *budget_table(results).markdown()],
        ["## Contrasts", "", cell(_test_note(results)), "", *_contrasts(results).markdown()],
        ["## How to repeat it", "", f"{quote} {' '.join(command.split())} {quote}", "", *facts.markdown()],
    ]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def html(results: Mapping[str, Any], command: str, details: Mapping[str, Any] | None = None) -> str:
    """Return the report as one HTML page without scripts or anything outside the page.

    Args:
        results: What `results.json` holds.
        command: The command that made it.
        details: {"users": (N,) user of each question, "history_lengths": (N,) items, "values": {method: {metric: (N,)
            value or None}}, "examples": [{"input", "reference", "answers": {method: text}, "index" (optional): its
            question}]}; any may be missing, and its section then says so.
    """
    details = details or {}
    metrics = _metrics(results)
    parts = [
        f"<h1>{escaped(_title(results))}</h1><p>{escaped(_summary(results))}</p>",
        section("Lift and gain", paragraph(EXPLAINED), _controls(results).html()),
        section("Methods", paragraph(AVERAGED), _values(results).html()),
        section("Cost", _costs(results).html()),
        section("What was cut or left out", _left_out(results).html()),
        section("Training budgets", paragraph(budget_note(results)), budget_table(results).html()),
        section("Contrasts", paragraph(_test_note(results)), _contrasts(results).html()),
        section("Lifts", *folded([(m, _lifts(results, details, m)) for m in metrics])),
        section("Lift by history length", *folded([(m, _by_length(details, m)) for m in metrics])),
        section("Quality against cost", *folded([(m, _against_cost(results, m)) for m in metrics])),
        section("Examples", _examples(results, details)),
        section("How to repeat it", f"<pre>{escaped(command)}</pre>", _facts(results).html(), _settings(results)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(_title(results))}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


# Tables


def _controls(results: Mapping[str, Any]) -> Table:
    rows = []
    for name, (a, b) in (("personal lift", LIFT), ("task gain", GAIN)):
        found = [c for c in results.get("contrasts", []) if (c["a"], c["b"]) == (a, b)]
        rows += [[f"{name} ({a} − {b})", *_contrast_cells(c)] for c in found]
        if not found:
            rows.append([f"{name} ({a} − {b})", "not recorded", "–", "–", "–"])
    return Table(("", "metric", "difference [95% interval]", "p", "p, Holm"), rows)


def _values(results: Mapping[str, Any]) -> Table:
    metrics = _metrics(results)
    rows = []
    for method, row in results["methods"].items():
        cells = [_interval(row["metrics"].get(m)) for m in metrics]
        seeds = [_number(s.get(metrics[0])) for s in row.get("per_seed", [])] if metrics else []
        rows.append([method, *cells, "; ".join(seeds) or "–"])
    head = [f"{m} {_arrow(m)}".strip() for m in metrics]
    return Table(("method", *head, f"{metrics[0]} by seed" if metrics else "by seed"), rows)


def _costs(results: Mapping[str, Any]) -> Table:
    rows = [[m, *(_cost(k, row.get(k)) for k, _ in COSTS)] for m, row in results["methods"].items()]
    return Table(("method", *(name for _, name in COSTS)), rows)


def _left_out(results: Mapping[str, Any]) -> Table:
    rows = [["samples", note, "–"] for note in results.get("data_notes", [])]
    for method, row in results["methods"].items():
        found = dict(results.get("notes", {}).get(method, {}))
        if row.get("prompts_cut"):
            found["questions that were cut to fit the prompt (mean over seeds)"] = row["prompts_cut"]
        rows += [[method, what, f"{count:g}"] for what, count in found.items()]
    return Table(("where", "what", "how many"), rows or [["nothing", "–", "–"]])


def _contrasts(results: Mapping[str, Any]) -> Table:
    rows = [[f"{c['a']} − {c['b']}", *_contrast_cells(c)] for c in results.get("contrasts", [])]
    head = ("difference (positive: the first is better)", "metric", "difference [95% interval]", "p", "p, Holm")
    return Table(head, rows or [["not recorded", "–", "–", "–", "–"]])


def _facts(results: Mapping[str, Any]) -> Table:
    versions = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
    names = ("task", "split", "n", "n_users", "llm", "encoder", "seeds", "git", "date", "machine")
    facts = [[k, str(results[k]) if k in results else "not recorded"] for k in names]
    return Table(("what", "value"), [*facts, ["versions", versions or "not recorded"]])


def _contrast_cells(row: Mapping[str, Any]) -> list[str]:
    low, high = row["ci95"]
    inside = "" if low > 0 or high < 0 else " includes 0"
    interval = f"{row['delta']:+.3f} [{low:+.3f}, {high:+.3f}]{inside}"
    return [row["metric"], interval, _p(row.get("p")), _p(row.get("p_holm"))]


def _test_note(results: Mapping[str, Any]) -> str:
    count, users = len(results.get("contrasts", [])), results.get("n_users")
    note = (
        "p is two-sided, from swapping the two methods for whole users "
        f"(every swap for few users, else {FLIPS:,} drawn ones); Holm corrects it over all {count} contrasts here."
    )
    if not users:
        return note
    least = smallest_p(users)
    after = min(1.0, max(1, count) * least)
    note += f" The smallest p that {users} users can give is {_p(least)}, {_p(after)} after the correction"
    return note + (": too few users to show any difference at 0.05." if after > 0.05 else ".")


# Plots


def _lifts(results: Mapping[str, Any], details: Mapping[str, Any], metric: str) -> str:
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
        rows = [[b.label, f"{b.value:+.3f} [{b.low:+.3f}, {b.high:+.3f}]"] for b in bars]
        parts.append(figure(title, figures.forest(bars, f"{title}, {metric}", axis), Table(("", metric), rows)))
        if absent := len(pairs) - len(bars):
            parts.append(paragraph(f"{absent} of {len(pairs)} differences were not recorded.", "missing"))
    return "".join(parts)


def _lift(results: Mapping[str, Any], details: Mapping[str, Any], a: str, b: str, metric: str) -> Bar | None:
    """Return a difference as the run recorded it, or from its values per question, or None."""
    label = f"{a} − {b}"
    for c in results.get("contrasts", []):
        if c["metric"] == metric and (c["a"], c["b"]) == (a, b):
            return Bar(label, c["delta"], *c["ci95"])
        if c["metric"] == metric and (c["a"], c["b"]) == (b, a):
            return Bar(label, -c["delta"], -c["ci95"][1], -c["ci95"][0])
    pair = _pair(details, a, b, metric)
    if pair is None:
        return None
    found = difference(*pair[:3], *METRICS[metric])
    return Bar(label, found.value, found.low, found.high)


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


def _by_length(details: Mapping[str, Any], metric: str) -> str:
    pair, lengths = _pair(details, *LIFT, metric), details.get("history_lengths")
    if pair is None or lengths is None or len(lengths) != len(details["users"]):
        return missing(f"{metric} of plug and plug_shuffled by question, with users and history lengths")
    a, b, users, some = pair
    items = np.asarray(lengths, dtype=np.float64)[some]
    lower, transform = METRICS[metric]
    first, second = np.quantile(items, [1 / 3, 2 / 3], method="inverted_cdf")
    rows, bars = [], []
    for inside in (items <= first, (items > first) & (items <= second), items > second):
        if not inside.any():
            continue
        owners = [u for u, s in zip(users, inside, strict=True) if s]
        found = difference(a[inside], b[inside], owners, lower, transform)
        low, high = int(items[inside].min()), int(items[inside].max())
        label = f"{low} items" if low == high else f"{low}–{high} items"
        bars.append(Bar(label, found.value, found.low, found.high))
        interval = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        rows.append([label, str(int(inside.sum())), str(len(set(owners))), interval])
    names, owner = np.unique(users, return_inverse=True)
    points = []
    for i in range(len(names)):
        mine = owner == i
        gain = float(transform(a[mine].mean()) - transform(b[mine].mean())) * (-1 if lower else 1)
        points.append(Point(f"{items[mine].mean():.0f} items, {gain:+.3f}", float(items[mine].mean()), gain))
    signs = Counter(int(np.sign(p.y)) for p in points)
    told = f"Of {len(points)} users the lift is above 0 for {signs[1]}, below for {signs[-1]}, 0 for {signs[0]}."
    axis = f"lift in {metric}, to the right the own history helps"
    cloud = figures.scatter(
        points, "Lift by user", "items in the user's history", f"lift in {metric}", zero=True, described=told
    )
    table = Table(("history", "questions", "users", f"lift in {metric}"), rows)
    return figure("By terciles", figures.forest(bars, "Lift by history length", axis), table) + figure(
        "By user", cloud, None, told
    )


def _against_cost(results: Mapping[str, Any], metric: str) -> str:
    if metric not in METRICS:
        return paragraph(f"{metric}: its direction is not known, so there is no frontier.", "missing")
    lower = METRICS[metric][0]
    parts = []
    for key, name in (("prompt_tokens_mean", "prompt tokens"), ("seconds_per_query", "seconds per query")):
        found = [
            (i, method, float(row[key]), float(row["metrics"][metric]["value"]))
            for i, (method, row) in enumerate(results["methods"].items(), 1)
            if _known(row.get(key)) and _known(row["metrics"].get(metric, {}).get("value"))
        ]
        if not found:
            parts.append(missing(f"{name} together with {metric}"))
            continue
        on = figures.pareto([f[2] for f in found], [f[3] for f in found], lower)
        points = [Point(f"{m}", x, y, str(i), edge) for (i, m, x, y), edge in zip(found, on, strict=True)]
        rows = [[p.mark, p.label, f"{p.x:.4g}", f"{p.y:.3f}", "yes" if p.frontier else ""] for p in points]
        title = f"{metric} {_arrow(metric)} against {name}"
        plot = figures.scatter(points, title, f"{name}, fewer is better", f"{metric} {_arrow(metric)}")
        parts.append(figure(title, plot, Table(("", "method", name, metric, "on the frontier"), rows)))
    return "".join(parts)


# Examples and the rest


def _examples(results: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    every = details.get("examples") or []
    aligned = len(every) == len(details.get("users") or [])
    usable = [
        (e.get("index", i if aligned else None), e)
        for i, e in enumerate(every)
        if set(LIFT) <= set(e.get("answers") or {})
    ]
    if not usable:
        return missing("answers of plug and plug_shuffled")
    metric = next((m for m in _metrics(results) if _pair(details, *LIFT, m)), None)
    pair = _pair(details, *LIFT, metric) if metric else None
    gains = {}
    if pair is not None and metric is not None:
        sign = -1 if METRICS[metric][0] else 1
        gains = {int(i): sign * float(x - y) for x, y, i in zip(pair[0], pair[1], pair[3], strict=True)}
    found = [e for _, e in usable]
    if gains and all(at in gains for at, _ in usable):
        judged, how = [gains[at] for at, _ in usable], f"by {metric} of each question"
    else:
        judged, how = [_overlap_gain(e) for e in found], "by the words shared with the reference (F1)"
    order = sorted(range(len(found)), key=lambda i: -judged[i])
    won, lost = [i for i in order if judged[i] > 0], [i for i in reversed(order) if judged[i] < 0]
    even = len(found) - len(won) - len(lost)
    count = f"Against plug_shuffled, judged {how}: {len(won)} won, {len(lost)} lost, {even} even."
    parts = [paragraph(f"{count} The clearest {SHOWN} of each are shown.")]
    for title, chosen in (("Won", won[:SHOWN]), ("Lost", lost[:SHOWN])):
        parts.append(f"<h3>{title}</h3>" if chosen else paragraph(f"{title}: none."))
        parts += [_example(found[i]) for i in chosen]
    return "".join(parts)


def _example(example: Mapping[str, Any]) -> str:
    answers = example["answers"]
    rows = [("really", example.get("reference", "not recorded")), *((m, answers[m]) for m in LIFT)]
    rows += [(m, a) for m, a in answers.items() if m not in LIFT]
    body = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in rows)
    return f"<blockquote>{escaped(example.get('input', 'not recorded'))}</blockquote><dl>{body}</dl>"


def _overlap_gain(example: Mapping[str, Any]) -> float:
    """Return the F1 of words shared with the reference, plug minus plug_shuffled."""
    wanted = Counter(re.findall(r"\w+", str(example.get("reference", "")).lower()))
    scores = []
    for method in LIFT:
        words = Counter(re.findall(r"\w+", str(example["answers"][method]).lower()))
        both = (words & wanted).total()
        scores.append(2 * both / max(1, words.total() + wanted.total()))
    return scores[0] - scores[1]


def _settings(results: Mapping[str, Any]) -> str:
    if "settings" not in results:
        return missing("settings")
    text = json.dumps(results["settings"], indent=1, ensure_ascii=False, default=str)
    return f"<h3>Settings</h3><pre>{escaped(text)}</pre>"


def _title(results: Mapping[str, Any]) -> str:
    return f"{results.get('task', 'unnamed task')}, {results.get('split', 'unnamed split')}"


def _summary(results: Mapping[str, Any]) -> str:
    get = results.get
    return (
        f"{get('n', '?')} questions of {get('n_users', '?')} users; seeds {get('seeds', '?')}; LLM {get('llm', '?')}; "
        f"encoder {get('encoder', '?')}; {get('date', 'no date')}; {get('machine', 'no machine')}; "
        f"git {get('git', 'unknown')}."
    )


def _metrics(results: Mapping[str, Any]) -> list[str]:
    """Return the metrics in the order in which the methods recorded them; the first is shown unfolded."""
    return list(dict.fromkeys(m for row in results["methods"].values() for m in row["metrics"]))


def _arrow(metric: str) -> str:
    return "" if metric not in METRICS else "↓" if METRICS[metric][0] else "↑"


def _known(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> str:  # noqa: ANN401
    return f"{value:.3f}" if _known(value) else "–"


def _interval(found: Mapping[str, Any] | None) -> str:
    if not found or not _known(found.get("value")):
        return "–"
    low, high = found["ci95"]
    return f"{found['value']:.3f} [{_number(low)}, {_number(high)}]"


def _cost(key: str, value: Any) -> str:  # noqa: ANN401
    if not _known(value):
        return "–"
    return f"{value:,.0f}" if key == "trainable_params" else f"{value:.4g}"


def _p(value: Any) -> str:  # noqa: ANN401
    return f"{value:.4f}" if _known(value) else "–"
