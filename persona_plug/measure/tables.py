"""Tables of a report, as Markdown and as HTML from the same rows.

Cells come from a run, so others wrote them: they are escaped here, where they are rendered.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.metrics import METRICS, heading
from persona_plug.measure.stats import Interval

UNKNOWN = "–"
Methods = Mapping[str, Mapping[str, Interval]]  # method -> metric -> its value


@dataclass(frozen=True, slots=True)
class Table:
    """Plain cells, escaped only when they are rendered; the first cell of a row names it.

    Attributes:
        head: The columns.
        rows: The rows.
        best: (row, column) of cells that stand out in bold.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: Collection[tuple[int, int]] = frozenset()

    def markdown(self) -> list[str]:
        """Return the lines of a Markdown table."""
        rows = [
            [f"**{cell(c)}**" if (i, j) in self.best else cell(c) for j, c in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [[cell(c) for c in self.head], ["---"] * len(self.head), *rows]
        return ["| " + " | ".join(line) + " |" for line in lines]

    def html(self, label: str = "") -> str:
        """Return a table that scrolls sideways by itself where the screen is narrow.

        Args:
            label: What a screen reader calls the region that scrolls.
        """
        head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in self.head)
        body = "".join(f"<tr>{self._html_row(i)}</tr>" for i in range(len(self.rows)))
        region = f' role="region" aria-label="{escaped(label)}"' if label else ""
        return (
            f'<div class="wide" tabindex="0"{region}><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def _html_row(self, at: int) -> str:
        cells = [
            f"<strong>{escaped(c)}</strong>" if (at, j) in self.best else escaped(c)
            for j, c in enumerate(self.rows[at])
        ]
        return f'<th scope="row">{cells[0]}</th>' + "".join(f"<td>{c}</td>" for c in cells[1:])


def metric_table(methods: Methods, names: Iterable[str] | None = None) -> Table:
    """Return a row per method and a column per metric, the best value of each in bold.

    Args:
        methods: See `Methods`.
        names: The metrics to show; default those that occur, in the order of `METRICS`.
    """
    columns = [m for m in METRICS if any(m in row for row in methods.values())] if names is None else list(names)
    rows = [[method, *(interval_text(row.get(m)) for m in columns)] for method, row in methods.items()]
    best = {(i, j) for j, m in enumerate(columns, 1) for i in _best_rows([row.get(m) for row in methods.values()], m)}
    return Table(("method", *map(heading, columns)), rows, best)


def _best_rows(values: Sequence[Interval | None], metric: str) -> list[int]:
    """Return which of several values are the best; one alone is compared with nothing."""
    known = {i: v.value for i, v in enumerate(values) if v is not None and math.isfinite(v.value)}
    if len(known) < 2 or metric not in METRICS:
        return []
    best = (min if METRICS[metric].lower_is_better else max)(known.values())
    return [i for i, value in known.items() if value == best]


def contrast_table(rows: Sequence[Contrast]) -> Table:
    """Return a row per contrast, with p where a test was made."""
    tested = any(row.p is not None for row in rows)
    head = ("contrast (positive: the first is better)", "metric", "difference [95% interval]", "p", "p, Holm")
    cells = [[f"{row.a} − {row.b}", *contrast_cells(row)] for row in rows]
    width = 5 if tested else 3
    return Table(head[:width], [line[:width] for line in cells])


def contrast_cells(row: Contrast) -> list[str]:
    """Return the metric, the difference with its interval, p, and p after Holm's correction."""
    mark = "" if row.low > 0 or row.high < 0 else " (includes 0)"
    delta = interval_text(Interval(row.delta, row.low, row.high), "+.3f")
    return [row.metric, delta + mark, number_text(row.p, ".4f"), number_text(row.p_holm, ".4f")]


def interval_text(interval: Interval | None, form: str = ".3f") -> str:
    """Return a value with its interval, or a dash where it is not known."""
    if interval is None or not math.isfinite(interval.value):
        return UNKNOWN
    low, high = number_text(interval.low, form), number_text(interval.high, form)
    return f"{interval.value:{form}} [{low}, {high}]"


def number_text(value: float | None, form: str = ".3f") -> str:
    """Return a number, or a dash where it is not known."""
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:{form}}"


def cell(text: str) -> str:
    """Return a text as one Markdown table cell: no markup, no HTML, no line break of its own.

    An underscore between letters and a bracket without a link are no markup and stay: names can be searched for.
    """
    flat = escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*|~]|\](?=[(\[])|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def escaped(value: object) -> str:
    """Return a value as text that is safe inside an element and inside a quoted attribute."""
    return escape(str(value))


def one_line(text: str, width: int) -> str:
    """Return a text on one line of at most `width` characters."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
