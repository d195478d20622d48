"""A comparison as Markdown and as one self-contained HTML page.

Both are pure functions of what a run recorded. Everything in a run is data that others wrote (questions, answers,
method names, settings): it is escaped where it is rendered, and the page forbids any script and any other resource.
What was not recorded is said, never left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from eval.report.budgets import budget_note, budget_table
from eval.report.drawings import against_cost, by_length, examples, lifts
from eval.report.figures import STYLE, fold, missing, paragraph, section
from eval.report.results import Results, contrasts_of, intervals, metrics_of
from persona_plug.fit.verdict import judge
from persona_plug.measure.contrasts import GAIN, LIFT
from persona_plug.measure.metrics import describe
from persona_plug.measure.significance import FLIPS, smallest_p
from persona_plug.measure.tables import (
    UNKNOWN,
    Table,
    cell,
    contrast_cells,
    contrast_table,
    escaped,
    metric_table,
    number_text,
)

EXPLAINED = (
    "Personal lift is plug − plug_shuffled: the same trained plug with the user's own history instead of another "
    "user's, so what is left is what knowing this user adds. Task gain is task_prompt − none: as many soft tokens, "
    "trained on the same data, that know no user, so what training on the task adds by itself. "
    "plug − none mixes the two."
)
VALUES = "Mean over seeds, 95% intervals from a bootstrap over users."
# Cost in a row of results.json -> its heading and its form.
COSTS = {
    "prompt_tokens_mean": ("prompt tokens", ".4g"),
    "generated_tokens_mean": ("generated tokens", ".4g"),
    "trainable_params": ("trained parameters", ",.0f"),
    "fit_seconds": ("fit, s", ".4g"),
    "seconds_per_query": ("s per query", ".4g"),
    "flops_per_query": ("FLOPs per query", ".4g"),
    "outside_llm": ("share outside the LLM", ".4g"),
}


def markdown(results: Results) -> str:
    """Return the report as Markdown: the two controls, values, costs, contrasts, and how to repeat them.

    Args:
        results: What `results.json` holds.
    """
    settings = json.dumps(results["settings"], ensure_ascii=False, default=str) if "settings" in results else ""
    facts = _facts(results)
    facts = Table(facts.head, [*facts.rows, ["settings", settings or "not recorded"]])
    blocks = [[f"# {cell(title(results))}", "", f"**{cell(headline(results))}**", "", cell(summary(results))]]
    for name, note, table in _sections(results):
        blocks.append([f"## {name}", "", *([cell(note), ""] if note else []), *table.markdown()])
    blocks.append(["## How to repeat it", "", code(command_of(results)), "", *facts.markdown()])
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def html(results: Results, details: Mapping[str, Any] | None = None) -> str:
    """Return the report as one HTML page without scripts or anything outside the page.

    Args:
        results: What `results.json` holds.
        details: What is drawn beside them, see `eval.report.drawings`.
    """
    details = details or {}
    metrics, command = metrics_of(results), command_of(results)
    shown = [section(n, paragraph(note) if note else "", table.html()) for n, note, table in _sections(results)]
    parts = [
        f"<h1>{escaped(title(results))}</h1><p><strong>{escaped(headline(results))}</strong></p>"
        f"<p>{escaped(summary(results))}</p>",
        *shown[:2],
        section("Examples", examples(results, details)),
        *shown[2:],
        section("Lifts", *fold([(m, lifts(results, details, m)) for m in metrics])),
        section("Lift by history length", *fold([(m, by_length(details, m)) for m in metrics])),
        section("Quality against cost", *fold([(m, against_cost(results, m)) for m in metrics])),
        section("How to repeat it", f"<pre>{escaped(command)}</pre>", _facts(results).html(), _settings(results)),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escaped(title(results))}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(parts)
        + "</body></html>\n"
    )


def _sections(results: Results) -> list[tuple[str, str, Table]]:
    """Return what both forms of the report show: titles, notes (some empty) and tables."""
    return [
        ("Lift and gain", EXPLAINED, control_table(results)),
        ("Methods", _values_note(results), _values(results)),
        ("Cost", "", cost_table(results)),
        ("What was cut or left out", "", _left_out(results)),
        ("Training budgets", budget_note(results), budget_table(results)),
        ("Contrasts", p_note(results), _contrasts(results)),
    ]


# Tables


def control_table(results: Results, metrics: Sequence[str] | None = None) -> Table:
    """Return personal lift and task gain, in all metrics or in some."""
    rows = []
    for name, (a, b) in (("personal lift", LIFT), ("task gain", GAIN)):
        label = f"{name} ({a} − {b})"
        pairs = [c for c in contrasts_of(results) if c.pair == (a, b) and (metrics is None or c.metric in metrics)]
        rows += [[label, *contrast_cells(c)] for c in pairs] or [[label, "not recorded", *[UNKNOWN] * 3]]
    return Table(("", "metric", "difference [95% interval]", "p", "p, Holm"), rows)


def cost_table(results: Results) -> Table:
    """Return what each method cost."""
    rows = [
        [method, *(number_text(row.get(key), form) for key, (_, form) in COSTS.items())]
        for method, row in results["methods"].items()
    ]
    return Table(("method", *(name for name, _ in COSTS.values())), rows)


def _values(results: Results) -> Table:
    metrics = metrics_of(results)
    first = metrics[0] if metrics else ""
    table = metric_table(intervals(results), metrics)
    rows = []
    for cells, method in zip(table.rows, results["methods"].values(), strict=True):
        seeds = "; ".join(number_text(seed.get(first)) for seed in method.get("per_seed", []))
        rows.append([*cells, seeds or UNKNOWN])
    return Table((*table.head, f"{first} by seed".strip()), rows, table.best)


def _values_note(results: Results) -> str:
    return " ".join([VALUES, *(f"{line}." for line in describe(metrics_of(results)))])


def _left_out(results: Results) -> Table:
    rows = [["samples", note, UNKNOWN] for note in results.get("data_notes", [])]
    for method, row in results["methods"].items():
        counts = dict(results.get("notes", {}).get(method, {}))
        if row.get("prompts_cut"):
            counts["questions that were cut to fit the prompt (mean over seeds)"] = row["prompts_cut"]
        rows += [[method, what, f"{count:g}"] for what, count in counts.items()]
    return Table(("where", "what", "how many"), rows or [["nothing", UNKNOWN, UNKNOWN]])


def _contrasts(results: Results) -> Table:
    rows = contrasts_of(results)
    return contrast_table(rows) if rows else Table(("contrast",), [["not recorded"]])


def _facts(results: Results) -> Table:
    versions = ", ".join(f"{k} {v}" for k, v in results.get("versions", {}).items())
    names = ("task", "split", "n", "n_users", "llm", "encoder", "seeds", "git", "date", "machine")
    facts = [[k, str(results[k]) if k in results else "not recorded"] for k in names]
    return Table(("what", "value"), [*facts, ["versions", versions or "not recorded"]])


def p_note(results: Results) -> str:
    """Say what p is, and the least p that so few users can give."""
    count, users = len(results.get("contrasts", [])), results.get("n_users")
    note = (
        "p is two-sided, from swapping the two methods for whole users "
        f"(every swap for few users, else {FLIPS:,} drawn ones); Holm corrects it over all {count} contrasts here."
    )
    if not users:
        return note
    least = smallest_p(users)
    after = min(1.0, max(1, count) * least)
    note += f" The smallest p that {users} users can give is {least:.4f}, {after:.4f} after the correction"
    return note + (": too few users to show any difference at 0.05." if after > 0.05 else ".")


def code(text: str) -> str:
    """Return a text as a Markdown span of code that no backtick in it can end."""
    quote = "`" * (max([len(run) for run in re.findall(r"`+", text)], default=0) + 1)
    return f"{quote} {' '.join(text.split())} {quote}"


def command_of(results: Results) -> str:
    """Return the command that made the results."""
    return str(results.get("command", "not recorded"))


def _settings(results: Results) -> str:
    if "settings" not in results:
        return missing("settings")
    text = json.dumps(results["settings"], indent=1, ensure_ascii=False, default=str)
    return f"<h3>Settings</h3><pre>{escaped(text)}</pre>"


def title(results: Results) -> str:
    """Return the task and the split."""
    return f"{results.get('task', 'unnamed task')}, {results.get('split', 'unnamed split')}"


def headline(results: Results) -> str:
    """Return in a sentence or two whether the plug knows its users, and is better than what needs no LLM."""
    return " ".join(judge(intervals(results), contrasts_of(results), None, {})[:2])


def summary(results: Results) -> str:
    """Return in one line what was asked, of what, when and where."""
    get = results.get
    return (
        f"{get('n', '?')} questions of {get('n_users', '?')} users; seeds {get('seeds', '?')}; LLM {get('llm', '?')}; "
        f"encoder {get('encoder', '?')}; {get('date', 'no date')}; {get('machine', 'no machine')}; "
        f"git {get('git', 'unknown')}."
    )
