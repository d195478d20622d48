"""One page over many sets: what each decides, what a reader should use, and quality against tokens.

Everything comes from the recorded `results.json` files. p is corrected over the contrasts of all sets together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.methods import PRIOR
from eval.report.figures import Point, scatter, standalone
from eval.report.record import BEGIN, END, updated_page
from eval.report.results import DECIDING, Results, contrasts_of, intervals, read_results
from persona_plug.errors import DataError
from persona_plug.files import write_atomically
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.metrics import describe, heading
from persona_plug.measure.significance import holm
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import UNKNOWN, Table, cell, interval_text, number_text

CONTRASTS = ("lift", "gain")
CONTROLS = ("_shuffled", "_empty")
TEXTS = ("rouge-1", "length", "foreign", "copied")
POWER = 1.96 + 0.84  # standard errors of the least difference that is shown four times out of five, at 5%
WIDTH = 2 * 1.96  # of a 95% interval, in standard errors
BASELINE = "none"
_DATED = re.compile(r"^\d{4}-\d\d-\d\d-(decide_)?")  # how recorded results are named


def record_decisions(paths: Sequence[Path], page: Path) -> list[Path]:
    """Render the page over several sets, and its plot beside it; return what was written.

    Args:
        paths: The `results.json` of each set.
        page: The page; what stands outside its marks stays.

    Raises:
        DataError: A result has no decision, or two are of one set.
        CorruptFileError: A file is not what `eval.run` writes.
    """
    sets: dict[str, Results] = {}
    for path in paths:
        results = read_results(path)
        if not results.get("decision"):
            raise DataError(f"{path}: decides nothing; run eval.run with subject=METHOD and METHOD_shuffled compared")
        name = _DATED.sub("", path.stem if path.stem != "results" else path.parent.name)
        if name in sets:
            raise DataError(f"{path}: a second result named {name}; rename one")
        sets[name] = results
    plot = page.with_suffix(".svg")
    text = _block(sets, plot.name)
    written = updated_page(page, text) if page.is_file() else f"# What decides\n\n{text}"
    write_atomically(page, written.encode())
    write_atomically(plot, picture(sets).encode())
    return [page, plot]


def _block(sets: Mapping[str, Results], plot: str) -> str:
    tables = (decision_table(sets), loss_table(sets), text_table(sets), cost_table(sets))
    titles = ("Lift and gain", "Loss of each method", "Texts", "Cost")
    lines = [BEGIN, "", *(f"- {sentence(name, results)}" for name, results in sets.items()), ""]
    for title, table in zip(titles, tables, strict=True):
        if table.rows:
            lines += [f"## {title}", "", *table.markdown(), ""]
    lines += [f"![Loss saved against tokens added, a point per method and set]({plot})", ""]
    lines += [*(f"- {line}" for line in describe([DECIDING, *TEXTS])), "", END]
    return "\n".join(lines) + "\n"


def sentence(name: str, results: Results) -> str:
    """Return what a reader should use on a set, and what its lift says."""
    decision, values = results["decision"], intervals(results)
    advice, best = decision["advice"], decision["best"]
    loss = number_text(values[advice][DECIDING].value)
    tokens = "no LLM" if advice.startswith(PRIOR) else f"{_added(results, advice):+.0f} tokens"
    text = f"**{cell(name)}**: use {cell(advice)} ({heading(DECIDING)} {loss}, {tokens})."
    if best != advice:
        text += f" {cell(best)} ({number_text(values[best][DECIDING].value)}) is not better beyond chance."
    lift = _contrast(decision["lift"])
    subject = cell(decision["subject"])
    if lift.low > 0:
        return f"{text} Another user's history costs {subject} {lift.delta:.3f} nats."
    return f"{text} No lift of {subject} is shown; one of {_least(lift):.3f} nats would have been."


def decision_table(sets: Mapping[str, Results]) -> Table:
    """Return a row per set: what was asked, both contrasts with their corrected p, and the least lift to be seen."""
    decisions = {name: results["decision"] for name, results in sets.items()}
    rows = {(name, kind): of_set[kind] for name, of_set in decisions.items() for kind in CONTRASTS if kind in of_set}
    corrected = dict(zip(rows, holm([row["p"] for row in rows.values()]), strict=True))
    lines = []
    for name, results in sets.items():
        decision = decisions[name]
        asked = f"{results['n']}, {results['n_users']}"
        cells = [name, asked, str(len(results["seeds"])), _work(results), decision["subject"]]
        for kind in CONTRASTS:
            if kind not in decision:
                cells += [UNKNOWN, UNKNOWN]
                continue
            contrast = _contrast(decision[kind])
            rival = f" over {contrast.b}" if kind == "gain" else ""
            cells += [_text(contrast) + rival, f"{corrected[name, kind]:.2g}"]
        lines.append([*cells, f"{_least(_contrast(decision['lift'])):.3f}"])
    head = (
        "set",
        "questions, users",
        "seeds",
        "training at most",
        "subject",
        "lift",
        "p",
        "gain",
        "p",
        "least lift to be shown",
    )
    return Table(head, lines)


def loss_table(sets: Mapping[str, Results]) -> Table:
    """Return the loss of each main method on each set, the best LLM-free prior's in one row."""
    values = {name: {m: row[DECIDING] for m, row in _main(results).items()} for name, results in sets.items()}
    methods = list(dict.fromkeys(m for row in values.values() for m in row))
    rows = [[m, *(interval_text(row.get(m)) for row in values.values())] for m in methods]
    best = set()
    for column, row in enumerate(values.values(), 1):
        least = min(row, key=lambda m: row[m].value)
        best.add((methods.index(least), column))
    return Table(("method", *sets), rows, best)


def text_table(sets: Mapping[str, Results]) -> Table:
    """Return what the texts of each main method are like, on the sets that have texts."""
    rows = []
    for name, results in sets.items():
        for method, row in intervals(results).items():
            if "foreign" in row and not method.endswith(CONTROLS):
                rows.append([name, method, *(interval_text(row.get(m)) for m in TEXTS)])
    return Table(("set", "method", *map(heading, TEXTS)), rows)


def cost_table(sets: Mapping[str, Results]) -> Table:
    """Return tokens, seconds of a question and seconds of training of each main method."""
    rows = []
    for name, results in sets.items():
        for method in _main(results):
            row = results["methods"].get(method)
            if row is None or method.startswith(PRIOR):
                continue
            costs = [f"{_added(results, method):+.0f}", f"{row['seconds_per_query']:.2f}", f"{row['fit_seconds']:.0f}"]
            rows.append([name, method, *costs])
    return Table(("set", "method", "tokens added", "s per question", "s of training"), rows)


def picture(sets: Mapping[str, Results]) -> str:
    """Return an SVG: the loss that each method saves against the plain LLM, over the tokens that it adds."""
    points = []
    for name, results in sets.items():
        values = _main(results)
        if BASELINE not in values:
            continue
        for method, row in values.items():
            if method != BASELINE and not method.startswith(PRIOR):
                saved = values[BASELINE][DECIDING].value - row[DECIDING].value
                points.append(Point(f"{name}, {method}: {saved:+.3f}", _added(results, method), saved, method))
    return standalone(scatter(points, "Loss saved", "tokens added to a prompt", f"{DECIDING} saved against {BASELINE}"))


def _main(results: Results) -> dict[str, dict[str, Interval]]:
    """Return the values of main methods that have the metric: no controls, and of the priors the best."""
    values = {m: dict(row) for m, row in intervals(results).items() if DECIDING in row and not m.endswith(CONTROLS)}
    priors = [m for m in values if m.startswith(PRIOR)]
    best = min(priors, key=lambda m: values[m][DECIDING].value, default=None)
    kept = {m: row for m, row in values.items() if m not in priors}
    return kept if best is None else {**kept, PRIOR: values[best]}


def _added(results: Results, method: str) -> float:
    methods = results["methods"]
    plain = methods.get(BASELINE, {}).get("prompt_tokens_mean") or 0.0
    return float((methods.get(method, {}).get("prompt_tokens_mean") or plain) - plain)


def _work(results: Results) -> str:
    fit = results["settings"].get("fit", {})
    limits = [f"{float(fit['flops']) / 1e12:.0f} TFLOP"] if fit.get("flops") else []
    return ", ".join([*limits, *([f"{fit['steps']} steps"] if "steps" in fit else [])]) or UNKNOWN


def _contrast(row: Mapping[str, Any]) -> Contrast:
    return contrasts_of({"contrasts": [row]})[0]


def _text(contrast: Contrast) -> str:
    return interval_text(Interval(contrast.delta, contrast.low, contrast.high), "+.3f")


def _least(contrast: Contrast) -> float:
    """Return the least difference that so many users would have shown, with a power of 80%."""
    width = contrast.high - contrast.low
    return POWER * width / WIDTH if math.isfinite(width) else math.nan
