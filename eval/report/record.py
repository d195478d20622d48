"""A recorded result: a page of one screen and its plot, rendered from the JSON beside them.

A person writes the claim and its limits; what stands between `BEGIN` and `END` is rendered. Rendering again leaves the
rest of the page as it is.
"""

from __future__ import annotations

import math
from pathlib import Path

from eval.methods import PRIOR
from eval.report.figures import Bar, forest, standalone
from eval.report.page import code, command_of, control_table, cost_table, p_note, summary, title
from eval.report.results import Results, contrasts_of, intervals, metrics_of, read_results
from persona_plug.errors import DataError
from persona_plug.files import write_atomically
from persona_plug.measure.contrasts import GAIN, LIFT
from persona_plug.measure.metrics import METRICS, describe, heading
from persona_plug.measure.tables import Methods, Table, cell, metric_table

BEGIN = "<!-- Rendered by `python -m eval.report`: write above or below. -->"
END = "<!-- End of what is rendered. -->"
ROWS = 12  # methods in the table, and contrasts in the plot
FIRST = (*GAIN[::-1], "plug_empty", *LIFT[::-1])  # what a claim on a plug is never without
PAGE_COSTS = ("prompt tokens", "s per query")


def record(path: Path) -> list[Path]:
    """Render the page and the plot of a `results.json` beside it, and return what was written.

    Args:
        path: The JSON file; NAME.json gives NAME.md and NAME.svg.

    Raises:
        DataError: There is no such file, or the page that is there lacks the two marks.
        CorruptFileError: The file is not what `eval.run` writes.
    """
    results = read_results(path)
    page, plot = path.with_suffix(".md"), path.with_suffix(".svg")
    drawing = plot_of(results)
    block = rendered_block(results, path.name, plot.name if drawing else None)
    text = updated_page(page, block) if page.is_file() else new_page(results, block)
    write_atomically(page, text.encode())
    if drawing:
        write_atomically(plot, drawing.encode())
    return [page, plot] if drawing else [page]


def new_page(results: Results, block: str) -> str:
    """Return a page whose claim and limits are still to be written."""
    return (
        f"# {cell(title(results))}: CLAIM\n\nCLAIM: the one sentence that the tables support, and what was expected "
        f"beforehand.\n\n{block}\nLIMITS: what these figures do not show, and what did not work.\n"
    )


def updated_page(page: Path, block: str) -> str:
    """Return a page's text with the part between the marks rendered anew.

    Raises:
        DataError: The page lacks a mark.
    """
    text = page.read_text(encoding="utf-8")
    above, begin, rest = text.partition(BEGIN)
    _, end, below = rest.partition(END + "\n")
    if not (begin and end):
        raise DataError(f"{page}: lacks the marks of what is rendered; move the page away, or add {BEGIN} and {END}")
    return above + block + below


def rendered_block(results: Results, source: str, plot: str | None) -> str:
    """Return the part of the page that stands between the marks.

    Args:
        results: What `results.json` holds.
        source: Name of the JSON file.
        plot: Name of the plot's file, if there is one.
    """
    metrics = metrics_of(results)
    names = page_methods(results)
    left_out = len(results["methods"]) - len(names)
    seeds = results.get("seeds", [])
    limits = [
        f"{left_out} further methods, every contrast, cost and setting: [{source}]({source})."
        if left_out
        else f"Every contrast, cost and setting: [{source}]({source}).",
        cell(p_note(results)),
        *(["One seed: the spread over trainings is not shown."] if len(seeds) == 1 else []),
        *([f"Data: {cell('; '.join(results['data_notes']))}."] if results.get("data_notes") else []),
        *([f"Metrics: {'; '.join(describe(metrics))}."] if metrics else []),
    ]
    lines = [BEGIN, "", *control_table(results, metrics[:1]).markdown(), ""]
    if plot:
        lines += [f"![Contrasts in {cell(metrics[0])} with 95% intervals]({plot})", ""]
    lines += [*_method_table(results, names).markdown(), "", code(command_of(results)), "", cell(summary(results)), ""]
    return "\n".join([*lines, *(f"- {line}" for line in limits), "", END]) + "\n"


def page_methods(results: Results) -> list[str]:
    """Return at most `ROWS` methods in the run's order.

    They are those of lift and gain, the best LLM-free prior in each metric, then the best others by the first metric.
    """
    values, metrics = intervals(results), [m for m in metrics_of(results) if m in METRICS]
    ranks = {metric: _ranking(values, metric) for metric in metrics}
    priors = [next((n for n in ranks[m] if n.startswith(PRIOR)), None) for m in metrics]
    others = ranks[metrics[0]] if metrics else []
    order = [name for name in (*FIRST, *priors, *others, *values) if name in values]
    best = list(dict.fromkeys(order))[:ROWS]
    return [name for name in values if name in best]


def _ranking(values: Methods, metric: str) -> list[str]:
    """Return the methods that a metric was measured of, the best first."""
    names = [name for name, row in values.items() if metric in row and math.isfinite(row[metric].value)]
    return sorted(names, key=lambda name: METRICS[metric].gain(values[name][metric].value, 0.0), reverse=True)


def plot_of(results: Results) -> str:
    """Return an SVG file of the page's contrasts in the first metric, or nothing where none was recorded."""
    metrics, names = metrics_of(results), set(page_methods(results))
    rows = [c for c in contrasts_of(results) if metrics and c.metric == metrics[0] and set(c.pair) <= names]
    if not rows:
        return ""
    axis = f"difference in {heading(metrics[0])}, to the right the first is better"
    drawing = forest([Bar.of_contrast(row) for row in rows[:ROWS]], f"{title(results)}: {metrics[0]}", axis)
    return standalone(drawing)


def _method_table(results: Results, names: list[str]) -> Table:
    values, costs = intervals(results), cost_table(results)
    columns = [costs.head.index(name) for name in PAGE_COSTS]
    cost_cells = {row[0]: [row[i] for i in columns] for row in costs.rows}
    table = metric_table({name: values[name] for name in names}, metrics_of(results))
    return Table((*table.head, *PAGE_COSTS), [[*row, *cost_cells[row[0]]] for row in table.rows], table.best)
