"""How the page reads: HTML and SVG from the session's answers. Everything users wrote is escaped here."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path

from persona_plug.data.history import HistoryItem
from persona_plug.data.style import Habit, Style
from persona_plug.fit.report import NO_USERS, FitReport
from persona_plug.measure.tables import one_line
from persona_plug.page.answers import COLUMNS, TURNS, Answer, Column

LONG = 160  # characters of an item's text in a table
ROWS = 8  # bars before the rest is summed up
SHOWN_ITEMS = 200

COMPARED = (
    "One request, answered four times: as this user, as another user, by the LLM with the user's nearest items as chat "
    "turns, and by the LLM alone. Marked words came from the user's own texts."
)
TITLES: dict[Column, tuple[str, str]] = {
    "own": ("This user", "the plug with this user's history"),
    "other": ("Another user", "the plug with the largest other history"),
    "turns": ("Few-shot", f"the LLM alone, shown the user's {TURNS} nearest items as chat turns"),
    "base": ("LLM alone", "without plug and history"),
}

CSS = """
.pp-cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .75rem; }
@media (max-width: 1000px) { .pp-cards { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
.pp-card { border: 1px solid var(--border-color-primary); border-radius: .5rem; padding: .75rem; min-width: 0;
  background: var(--block-background-fill); display: flex; flex-direction: column; }
.pp-card.own { border: 2px solid var(--color-accent); }
.pp-card h3, .pp h2, .pp h3 { margin: 0 0 .25rem; overflow-wrap: anywhere; }
.pp { overflow-wrap: anywhere; }
.pp .about, .pp .note, .pp caption { color: var(--body-text-color-subdued); font-size: .85rem; text-align: left; }
.pp .text { white-space: pre-wrap; margin: .5rem 0; }
.pp .numbers { font-size: .85rem; font-variant-numeric: tabular-nums; margin: auto 0 0; padding-top: .25rem; }
.pp table, .pp thead, .pp tbody, .pp tr { border: 0; }
.pp table { border-collapse: collapse; width: 100%; table-layout: fixed; margin: .5rem 0; }
.pp th, .pp td { text-align: left; padding: .3rem .5rem .3rem 0; vertical-align: top; font-size: .9rem;
  border: 0; border-bottom: 1px solid var(--border-color-primary); }
.pp .bar { width: 30%; }
.pp tbody th { width: 9rem; }
.pp .bar span { display: block; height: .6rem; min-width: 1px; background: var(--color-accent); border-radius: 2px; }
.pp .good, .pp .bad { margin: .25rem 0; padding: .4rem .75rem; border-left: 4px solid #15803d; }
.pp .bad { border-left-color: #b91c1c; font-weight: 600; }
.pp mark { background: #fde68a; color: #1c1917; border-radius: .2rem; padding: 0 .1rem; }
.pp .wide { overflow-x: auto; }
.pp .wide table { table-layout: auto; }
.pp .wide td, .pp .wide th { white-space: nowrap; }
.pp .plots { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.pp .plots img { max-width: min(100%, 30rem); height: auto; background: white; }
@media (max-width: 600px) { .pp-cards { grid-template-columns: minmax(0, 1fr); } }
@media (prefers-reduced-motion: no-preference) { .pp .busy { animation: pp-busy 1s ease-in-out infinite alternate; } }
@keyframes pp-busy { to { opacity: .35; } }
.gradio-container :focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 1px; }
footer { display: none !important; }
"""


def header(llm: str, encoder: str, kept: str) -> str:
    """Return the title, what the plug joins, and where histories are kept."""
    joined = f"LLM {escape(llm)}, encoder {escape(encoder)}."
    return _block(f'<h1>persona_plug</h1><p class="about">{joined} {escape(kept)}</p>')


def good(text: str) -> str:
    """Return a line that says what was done."""
    return _block(f'<p class="good" role="status">{escape(text)}</p>')


def bad(text: object) -> str:
    """Return a line that says what is wrong and what to do."""
    return _block(f'<p class="bad" role="alert">{escape(str(text))}</p>')


def note(text: str) -> str:
    """Return a line for what is empty."""
    return _block(f'<p class="note">{escape(text)}</p>')


def counted(number: int, what: str = "item") -> str:
    """Return a number with its noun."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def cards(answers: Mapping[Column, Answer], running: bool = False) -> str:
    """Return the four columns; those without an answer yet wait, the first of them at work."""
    left = [c for c in COLUMNS if c not in answers]
    parts = []
    for column in COLUMNS:
        title, about = TITLES[column]
        if column in answers:
            answer = answers[column]
            if answer.user is not None and column in ("other", "own"):
                title = f"{title}: {answer.user}"
            body = _answered(answer)
        elif running and column == left[0]:
            body = '<p class="text busy" role="status">Answering …</p>'
        else:
            body = f'<p class="text about">{"Waiting." if running else "No answer yet: ask something."}</p>'
        parts.append(
            f'<section class="pp-card {column}" aria-label="{escape(title)}"><h3>{escape(title)}</h3>'
            f'<p class="about">{escape(about)}</p>{body}</section>'
        )
    return _block(f'<div class="pp-cards" aria-busy="{str(running).lower()}">{"".join(parts)}</div>')


def _answered(answer: Answer) -> str:
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in answer.notes)
    if answer.text is None:
        return f'<p class="text about">No answer.</p>{notes}'
    text = _marked(answer.text, answer.marks) or '<span class="about">(nothing: the LLM ended at once)</span>'
    chances = answer.probabilities or {}
    rows = [((name,), p) for name, p in sorted(chances.items(), key=lambda row: -row[1])]
    table = _bars(("label",), rows, "Probabilities of the labels") if rows else ""
    tokens = f"{answer.prompt_tokens} tokens read"
    if not rows:  # a label is scored, not written
        tokens += f", {answer.answer_tokens} written"
    return f'<p class="text" dir="auto">{text}</p>{table}{notes}<p class="numbers">{tokens}, {answer.seconds:.2f} s</p>'


def _marked(text: str, marks: Sequence[tuple[int, int]]) -> str:
    """Return a text with what came from the user's own words marked."""
    parts, at = [], 0
    for start, end in marks:
        parts += [escape(text[at:start]), f"<mark>{escape(text[start:end])}</mark>"]
        at = end
    return "".join([*parts, escape(text[at:])])


def weights(answer: Answer) -> str:
    """Return which items of the user weighed how much, as bars with their figures; nothing where none are weighed."""
    if answer.weights is None:
        return ""
    if not answer.weights:
        return note("No items yet, and so no weights. Add items under History.")
    rows = [((_short(item.input) or "–", _short(item.output)), weight) for item, weight in answer.weights]
    rest = max(0.0, 1 - sum(weight for _, weight in rows))
    caption = f"How much each item of {answer.user} counts. {rest:.0%} is what the plug does for any user."
    return _block("<h3>Weights</h3>" + _bars(("input", "output"), rows, caption))


def _bars(names: Sequence[str], rows: Sequence[tuple[Sequence[str], float]], caption: str) -> str:
    """Return a table of texts and shares of 1, as figures and as bars; the longest bar fills its column."""
    shown = list(rows[:ROWS])
    if len(rows) > ROWS:
        others = [f"{len(rows) - ROWS} others", *[""] * (len(names) - 1)]
        shown.append((others, sum(weight for _, weight in rows[ROWS:])))
    head = "".join(f'<th scope="col">{escape(n)}</th>' for n in names)
    most = max(share for _, share in shown) or 1.0
    body = "".join(
        "<tr>"
        + "".join(f'<td dir="auto">{escape(text)}</td>' for text in texts)
        + f'<td class="bar">{share:.1%}<span style="width:{100 * share / most:.1f}%"></span></td></tr>'
        for texts, share in shown
    )
    top = f'<caption>{escape(caption)}</caption><thead><tr>{head}<th scope="col" class="bar">share</th></tr></thead>'
    return f"<table>{top}<tbody>{body}</tbody></table>"


def items(user: str, held: Sequence[HistoryItem]) -> str:
    """Return a user's items as a table, newest first."""
    if not held:
        return note(f"No items of {user} yet. Paste lines or choose a file below.")
    body = "".join(
        f'<tr><td dir="auto">{escape(_short(i.input)) or "–"}</td><td dir="auto">{escape(_short(i.output))}</td></tr>'
        for i in held[:SHOWN_ITEMS]
    )
    more = f", the newest {SHOWN_ITEMS} shown" if len(held) > SHOWN_ITEMS else ""
    head = '<thead><tr><th scope="col">input</th><th scope="col">output</th></tr></thead>'
    caption = f"<caption>{counted(len(held))} of {escape(user)}, newest first{more}</caption>"
    return _block(f"<table>{caption}{head}<tbody>{body}</tbody></table>")


def style(user: str, card: Style | None) -> str:
    """Return a user's manner as a table: what they do and others do not."""
    if card is None:
        return note(f"No items of {user} yet, and so no style." if user else "Choose a user to see their style.")
    low, middle, high = card.words
    others = "" if card.others_words is None else f"; others {card.others_words}"
    rows = [("length", f"{middle} words, mostly {low} to {high}{others}"), ("letter case", _habit(card.case))]
    kinds = (card.openings, card.closings, card.phrases, card.emoji, card.labels)
    names = ("openings", "closings", "phrases", "emoji", "labels")
    rows += [(name, _habit(habit)) for name, habits in zip(names, kinds, strict=True) for habit in habits]
    body = "".join(f'<tr><th scope="row">{name}</th><td dir="auto">{escape(text)}</td></tr>' for name, text in rows)
    caption = f"Style of {user}: {counted(card.texts, 'text')} beside {card.others} of other users"
    return _block(f"<table><caption>{escape(caption)}</caption><tbody>{body}</tbody></table>")


def _habit(habit: Habit) -> str:
    return f"{one_line(habit.text, LONG)} – {habit.share:.0%} of texts, others {habit.others:.0%}"


def report(result: FitReport, plots: Sequence[Path]) -> str:
    """Return the verdict on held-out users, the table of methods, and the plots."""
    images = "".join(
        f'<img alt="{escape(plot.stem)} of the training" src="data:image/png;base64,{_base64(plot)}">' for plot in plots
    )
    notes = "".join(f'<li class="note">{escape(line)}</li>' for line in result.notes)
    rest = f'<div class="plots">{images}</div><ul>{notes}</ul>'
    if not result.metrics:
        return note(NO_USERS) + _block(rest)
    verdict = "".join(f"<p><strong>{escape(sentence)}</strong></p>" for sentence in result.sentences())
    return _block(f'{verdict}<p class="note">{escape(result.summary())}</p>{result.table().html("Methods")}{rest}')


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


_short = partial(one_line, width=LONG)


def _block(inner: str) -> str:
    return f'<div class="pp">{inner}</div>'
