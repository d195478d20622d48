"""A page's parts, and plots as inline SVG: intervals along a line, points in a plane.

Labels and texts come from a run, so others wrote them: whatever is rendered here is escaped here. The plots are drawn
by hand rather than by matplotlib. An SVG in the page takes its colours from the page's style sheet, so that one drawing
serves dark and light, its text is text, and it needs no other file. Widths are chosen for a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import Table, escaped, interval_text, one_line

WIDTH = 420
LEFT, RIGHT = 46, 14  # room for the scale's numbers
ROW = 34  # height of a forest plot's row: the label stands above its interval
HEIGHT = 300  # of a scatter plot
LABEL = 58  # letters that fit the width

COLOURS = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #5c6670; --line: #d9dee3; --accent: #2f6fb7;
  --good: #1a7f4b; --bad: #b5352c; --box: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --text: #e4e8ec; --soft: #9aa5b0; --line: #333a41;
  --accent: #6faae8; --good: #56c288; --bad: #ef7a70; --box: #1d2226; } }
"""
PAGE_STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 60rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; overflow-wrap: normal; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tbody th { font-weight: normal; } td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.missing, .note { color: var(--soft); } figure { margin: 1rem 0; }
pre, blockquote { background: var(--box); padding: 0.7rem; margin: 0.5rem 0; white-space: pre-wrap;
  font-size: 0.85rem; }
dt { font-weight: 600; } dd { margin: 0 0 0.4rem 0; white-space: pre-wrap; }
"""
PLOT_STYLE = """
svg { width: 100%; max-width: 44rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); stroke: var(--page); stroke-width: 4px; paint-order: stroke; }
svg .soft { fill: var(--soft); }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .zero { stroke: var(--soft); stroke-width: 1.2; }
svg .bar { stroke: var(--text); stroke-width: 2; } svg .dot { fill: var(--text); }
svg .good { stroke: var(--good); } svg circle.good { fill: var(--good); }
svg .bad { stroke: var(--bad); } svg circle.bad { fill: var(--bad); }
svg .point { fill: var(--accent); fill-opacity: 0.55; stroke: var(--accent); }
svg .edge { fill: none; stroke: var(--good); stroke-width: 2; stroke-dasharray: 5 3; }
"""
STYLE = COLOURS + PAGE_STYLE + PLOT_STYLE


def section(title: str, *parts: str) -> str:
    """Return a section of ready HTML parts under its title."""
    return f"<section><h2>{escaped(title)}</h2>{''.join(parts)}</section>"


def fold(blocks: Sequence[tuple[str, str]]) -> list[str]:
    """Return the first block in view and the others behind their names."""
    rest = [f"<details><summary>{escaped(name)}</summary>{block}</details>" for name, block in blocks[1:]]
    return [f"<h3>{escaped(name)}</h3>{block}" for name, block in blocks[:1]] + rest


def figure(title: str, svg: str, table: Table | None, note: str = "") -> str:
    """Return a drawing with its caption and, below it, the same as a table or a sentence."""
    below = (table.html() if table else "") + (paragraph(note) if note else "")
    return f"<figure><figcaption>{escaped(title)}</figcaption>{svg}{below}</figure>"


def paragraph(text: str, kind: str = "note") -> str:
    """Return a paragraph of plain text."""
    return f'<p class="{kind}">{escaped(text)}</p>'


def missing(what: str) -> str:
    """Return the sentence that stands where something was not recorded."""
    return paragraph(f"Not recorded: {what}.", "missing")


@dataclass(frozen=True, slots=True)
class Bar:
    """A value with its interval, None where it is not known."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of_contrast(cls, row: Contrast) -> Bar:
        """Return a contrast as a bar."""
        return cls(f"{row.a} − {row.b}", row.delta, row.low, row.high)

    @property
    def text(self) -> str:
        """The value with its interval in words."""
        low, high = (math.nan if end is None else end for end in (self.low, self.high))
        return interval_text(Interval(self.value, low, high), "+.3f")


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the plane; `mark` is written next to it, `label` is shown on hovering."""

    label: str
    x: float
    y: float
    mark: str = ""
    frontier: bool = False


def forest(bars: Sequence[Bar], title: str, axis: str) -> str:
    """Return an SVG of intervals, one a row, beside a line at 0 that leaves the labels free.

    Args:
        bars: Rows from the top; green where the interval lies above 0, red where below.
        title: What the plot shows; read out by a screen reader together with every row.
        axis: Label of the scale.
    """
    if not bars:
        return ""
    ends = [0.0, *(v for b in bars for v in (b.value, b.low, b.high) if v is not None)]
    scale = Scale(min(ends), max(ends), RIGHT, WIDTH - RIGHT)
    bottom = ROW * len(bars) + 6
    parts = [_vertical(scale, bottom)]
    zero = scale.at(0.0)
    for i, b in enumerate(bars):
        y = ROW * i + 26
        parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{y - 7}" y2="{y + 8}"/>')
        side = "good" if (b.low or 0) > 0 else "bad" if (b.high or 0) < 0 else ""
        parts.append(f'<text x="{RIGHT}" y="{y - 10}">{escaped(one_line(b.label, LABEL))}</text>')
        if b.low is not None and b.high is not None:
            low, high = scale.at(b.low), scale.at(b.high)
            parts.append(f'<line class="bar {side}" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot {side}" cx="{scale.at(b.value):.1f}" cy="{y}" r="4"/>')
    parts.append(f'<text class="soft" x="{WIDTH / 2}" y="{bottom + 34}" text-anchor="middle">{escaped(axis)}</text>')
    words = "; ".join(f"{b.label}: {b.value:+.3g}{_range(b)}" for b in bars)
    return _svg(parts, bottom + 42, f"{title}. {words}")


def standalone(svg: str) -> str:
    """Return a drawing as the text of an SVG file, with the colours and the background that a page would give it."""
    style = f"<style>{COLOURS}{PLOT_STYLE}svg {{ background: var(--page); }}</style>"
    head, inside = svg.removeprefix("<svg").split(">", 1)
    return f'<svg xmlns="http://www.w3.org/2000/svg"{head}>{style}{inside}\n'


def scatter(
    points: Sequence[Point], title: str, x_label: str, y_label: str, *, zero: bool = False, words: str = ""
) -> str:
    """Return an SVG of points, with a stepped line through those on the frontier.

    Args:
        points: The points; the horizontal scale is logarithmic where all are above 0 and spread over a factor of 20.
        title: What the plot shows.
        x_label: Label of the horizontal scale.
        y_label: Label of the vertical scale, written above it.
        zero: Whether to draw a line at y = 0.
        words: What a screen reader says of the points; default each by its label.
    """
    if not points:
        return ""
    xs, ys = [p.x for p in points], [p.y for p in points]
    log = min(xs) > 0 and max(xs) / min(xs) > 20
    across = Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, log)
    up = Scale(min([*ys, 0.0] if zero else ys), max([*ys, 0.0] if zero else ys), HEIGHT, 26)
    parts = [_vertical(across, HEIGHT, 26)]
    for tick in up.ticks():
        y = up.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    if zero:
        y = up.at(0.0)
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    edge = sorted((p for p in points if p.frontier), key=lambda p: p.x)
    if len(edge) > 1:
        steps = [f"M{across.at(edge[0].x):.1f},{up.at(edge[0].y):.1f}"]
        steps += [f"H{across.at(p.x):.1f}V{up.at(p.y):.1f}" for p in edge[1:]]
        parts.append(f'<path class="edge" d="{"".join(steps)}"/>')
    for p in points:
        x, y = across.at(p.x), up.at(p.y)
        kind = "good" if p.frontier else "point"
        parts.append(
            f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escaped(p.label)}</title></circle>'
        )
        if p.mark:
            left = x > WIDTH - 40
            parts.append(
                f'<text x="{x + (-7 if left else 7):.1f}" y="{y - 5:.1f}" text-anchor="{"end" if left else "start"}">'
                f"{escaped(p.mark)}</text>"
            )
    parts.append(f'<text class="soft" x="{RIGHT}" y="14">{escaped(y_label)}</text>')
    parts.append(f'<text class="soft" x="{WIDTH / 2}" y="{HEIGHT + 34}" text-anchor="middle">{escaped(x_label)}</text>')
    words = words or "; ".join(f"{p.label}: {p.x:.3g}, {p.y:.3g}" for p in points)
    return _svg(parts, HEIGHT + 42, f"{title}. {words}")


def pareto(costs: Sequence[float], qualities: Sequence[float], lower_is_better: bool) -> list[bool]:
    """Return for each point whether no other is at least as good in cost and quality and better in one.

    Args:
        costs: (N,) smaller is better.
        qualities: (N,) the metric.
        lower_is_better: The metric's direction.
    """
    points = list(zip(costs, [q if lower_is_better else -q for q in qualities], strict=True))
    return [not any(x <= p[0] and y <= p[1] and (x, y) != p for x, y in points) for p in points]


class Scale:
    """From values to a drawing's coordinates, with a margin and round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False) -> None:
        """Map [low, high] into [start, end]; `log` needs values above 0."""
        self.log, self.start, self.end = log, start, end
        low, high = (math.log10(low), math.log10(high)) if log else (low, high)
        if high - low < 1e-12:  # a single value stands in the middle
            low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
        margin = (high - low) * 0.06
        self.low, self.high = low - margin, high + margin

    def at(self, value: float) -> float:
        """Return the coordinate of a value."""
        place = math.log10(value) if self.log else value
        return self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about `count` round values inside the scale; powers of ten, with 2 and 5 between them, for a log."""
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            fine = self.high - self.low < 3
            values = [m * 10.0**e for e in powers for m in ((1, 2, 5) if fine else (1,))]
            return [v for v in values if self.low <= math.log10(v) <= self.high]
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [i * step for i in range(first, last + 1)]


def _vertical(scale: Scale, bottom: float, top: float = 0) -> str:
    """Return the vertical grid with its numbers."""
    parts = []
    for tick in scale.ticks():
        x = scale.at(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{_number(tick)}</text>')
    return "".join(parts)


def _range(bar: Bar) -> str:
    return "" if bar.low is None or bar.high is None else f" (95% {bar.low:+.3g} to {bar.high:+.3g})"


def _number(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:.6g}".replace("-", "−")


def _svg(parts: Sequence[str], height: float, words: str) -> str:
    inside = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escaped(words)}">{inside}</svg>'
