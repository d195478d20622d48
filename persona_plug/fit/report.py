"""FitReport: whether personalization helps on this data, on users the training never saw."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_plug.data.history import Example
from persona_plug.fit.plots import plot_lift, plot_loss
from persona_plug.measure.answers import Answers, evaluate, prior_answers, spread, with_other_history
from persona_plug.measure.metrics import METRICS
from persona_plug.measure.stats import Interval, user_bootstrap
from persona_plug.measure.truncation import truncation_notes

if TYPE_CHECKING:
    from persona_plug.data.splits import FitData
    from persona_plug.fit.config import FitConfig
    from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitReport:
    """The comparison on held-out users.

    Attributes:
        metrics: Method -> metric -> (value, low, high), 95% bootstrap over users.
        contrasts: Rows of {a, b, metric, delta, low, high}, paired, positive where a is better.
        n: Held-out questions.
        n_users: Held-out users.
        notes: What was skipped, capped, cut or inferred.
        examples: Held-out answers side by side.
        details: Settings, steps, identities.
    """

    metrics: dict[str, dict[str, tuple[float, float, float]]]
    contrasts: list[dict[str, Any]]
    n: int
    n_users: int
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    def to_markdown(self) -> str:
        """Return the table, the contrasts and the notes as Markdown."""
        if not self.metrics:
            return "No users were held out: nothing can be said about the lift."
        names = [m for m in METRICS if any(m in row for row in self.metrics.values())]
        lines = [
            f"{self.n} questions of {self.n_users} held-out users; 95% intervals from a bootstrap over users.",
            "",
            "| method | " + " | ".join(f"{m} {'↓' if METRICS[m][0] else '↑'}" for m in names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for method, row in self.metrics.items():
            cells = [f"{row[m][0]:.3f} [{row[m][1]:.3f}, {row[m][2]:.3f}]" if m in row else "–" for m in names]
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        lines += ["", "| difference (positive: the first is better) | metric | delta |", "|---|---|---|"]
        for c in self.contrasts:
            mark = "" if c["low"] > 0 or c["high"] < 0 else " (includes 0)"
            delta = f"{c['delta']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]{mark}"
            lines.append(f"| {c['a']} − {c['b']} | {c['metric']} | {delta} |")
        lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def __str__(self) -> str:
        """Return the report as text with the verdict and the examples."""
        return "\n".join([self.to_markdown(), "", self.verdict(), *self._examples_text()])

    def verdict(self) -> str:
        """Say in one line whether the user's own history helped."""
        lifts = [c for c in self.contrasts if (c["a"], c["b"]) == ("plug", "plug_shuffled")]
        if not lifts:
            return "Personal lift: not measured."
        lift = lifts[0]
        interval = f"{lift['delta']:+.3f} [{lift['low']:+.3f}, {lift['high']:+.3f}]"
        what = f"{lift['metric']} {interval} over another user's history"
        if lift["low"] > 0:
            return f"Personal lift: yes, {what}."
        if lift["high"] < 0:
            return f"Personal lift: harm, {what}; do not use this plug."
        return f"Personal lift: not shown, {what}; more users, longer histories or more steps may show it."

    def _examples_text(self) -> list[str]:
        lines: list[str] = []
        for number, e in enumerate(self.examples, 1):
            lines += ["", f"Example {number}: {_short(e['input'], 160)}"]
            for label in ("no user", "another user", "this user", "really wrote"):
                lines.append(f"  {label:>12}: {_short(e[label], 110)}")
            for item in e["weights"]:
                lines.append(f"  {item['weight']:>12.2f}  {_short(item['input'], 60)} -> {_short(item['output'], 60)}")
        return lines

    def save(self, folder: Path) -> None:
        """Write `fit_report.json` and `fit_report.md`."""
        from persona_plug.files import write_atomically
        from persona_plug.persistence import REPORT_NAME

        write_atomically(folder / REPORT_NAME, self.to_json().encode())
        write_atomically(folder / "fit_report.md", (str(self) + "\n").encode())


def make_report(
    plug: PlugModel,
    task_prompt: PlugModel | None,
    data: FitData,
    config: FitConfig,
    log: list[dict[str, float]],
    folder: Path,
    *,
    generated: int = 48,
    examples: int = 3,
) -> FitReport:
    """Evaluate all methods on the held-out users, and write report and plots into `folder`.

    Args:
        plug: The trained plug.
        task_prompt: Its twin whose soft tokens know no user, trained alike; None for a report without any comparison.
        data: Its data; `held_out` is what counts.
        config: Its training settings.
        log: The plug's training log.
        folder: Where report and plots go.
        generated: Free text: at most so many answers are generated for ROUGE; likelihoods use all.
        examples: Answers shown side by side.
    """
    details = {"fit": asdict(config), "steps_done": max([int(r["step"]) for r in log if "step" in r], default=0)}
    details["score_temperature"] = float(plug.embedder.score_temperature)
    notes = list(data.notes)
    if task_prompt is None:
        result = FitReport({}, [], 0, 0, notes, [], details)
        result.save(folder)
        return result
    answers = run_methods(plug, task_prompt, data, config.seed, generated)
    users = [e.user_id for e in data.held_out]
    metrics = {name: {m: _interval(a, users, m) for m in a.values} for name, a in answers.items()}
    result = FitReport(
        metrics,
        contrasts(answers, users),
        len(users),
        len(set(users)),
        notes + truncation_notes(plug, data),
        side_by_side(plug, data.held_out, answers, examples),
        details,
    )
    result.save(folder)
    plot_loss(log, folder / "loss.png")
    lift = answers["plug_shuffled"].values["nll"] - answers["plug"].values["nll"]
    plot_lift(lift, data.held_out, folder / "lift.png")
    return result


def run_methods(
    plug: PlugModel, task_prompt: PlugModel | None, data: FitData, seed: int, generated: int
) -> dict[str, Answers]:
    """Return per-question values of the controls, the plug and the LLM-free baselines on the held-out users.

    Args:
        plug: A trained plug.
        task_prompt: See `make_report`; None leaves this control out.
        data: `held_out` is asked, the baselines learn from the rest.
        seed: Of the draw of other users' histories.
        generated: See `make_report`.
    """
    held = data.held_out
    result = {"none": evaluate(plug, held, generated, personal=False)}
    if task_prompt is not None:
        result["task_prompt"] = evaluate(task_prompt, held, generated)
    result["plug_empty"] = evaluate(plug, [replace(e, history=()) for e in held], generated)
    result["plug_shuffled"] = evaluate(plug, with_other_history(held, seed), generated)
    result["plug"] = evaluate(plug, held, generated)
    if plug.embedder.has_answer_head:
        result["plug: LLM alone"] = evaluate(plug, held, generated, head=False)
    for name, answer in prior_answers(plug, data, generated).items():
        result[f"user_prior: {name}"] = answer
    return result


def contrasts(answers: dict[str, Answers], users: Sequence[str]) -> list[dict[str, Any]]:
    """Return paired differences of the plug to every other method, positive where the plug is better."""
    rows = []
    others: list[str] = [n for n in ("plug_shuffled", "task_prompt", "plug_empty", "none") if n in answers]
    others += [n for n in answers if n.startswith("user_prior")]
    for other in others:
        for metric in METRICS:
            if metric in answers["plug"].values and metric in answers[other].values:
                a, b = answers["plug"].values[metric], answers[other].values[metric]
                some = ~np.isnan(a) & ~np.isnan(b)
                lower, transform = METRICS[metric]
                owners = [u for u, s in zip(users, some, strict=True) if s]
                difference = user_bootstrap(
                    *((b[some], owners, a[some]) if lower else (a[some], owners, b[some])), transform
                )
                rows.append(
                    {
                        "a": "plug",
                        "b": other,
                        "metric": metric,
                        "delta": difference.value,
                        "low": difference.low,
                        "high": difference.high,
                    }
                )
    if {"task_prompt", "none"} <= set(answers):
        a, b = answers["task_prompt"].values["nll"], answers["none"].values["nll"]
        gain = user_bootstrap(b, users, a)
        rows.append(
            {"a": "task_prompt", "b": "none", "metric": "nll", "delta": gain.value, "low": gain.low, "high": gain.high}
        )
    return rows


def side_by_side(
    plug: PlugModel, held: Sequence[Example], answers: dict[str, Answers], count: int
) -> list[dict[str, Any]]:
    """Return `count` held-out answers of the controls and the plug beside what the person wrote, with item weights."""
    texts = {name: a.texts for name, a in answers.items()}
    columns = {"no user": "plug_empty", "another user": "plug_shuffled", "this user": "plug"}
    if any(texts.get(m) is None for m in columns.values()):
        return []
    some = range(len(held)) if plug.config.answers else spread(len(held), len(texts["plug"] or ()))
    seen: set[str] = set()
    rows: list[dict[str, Any]] = []
    for at, i in enumerate(some):
        example = held[i]
        shown = {label: (texts[m] or [])[at] for label, m in columns.items()}
        if len(rows) == count or example.user_id in seen or len(example.history) < 3:
            continue
        seen.add(example.user_id)
        detail = plug.generate(example.input, example.history, return_details=True, max_new_tokens=1)
        weights = [{"input": i.input, "output": i.output, "weight": round(w, 4)} for i, w in detail.weights[:3]]
        rows.append({"input": example.input, **shown, "really wrote": example.output, "weights": weights})
    return rows


def _interval(answers: Answers, users: Sequence[str], metric: str) -> tuple[float, float, float]:
    values = answers.values[metric]
    some = ~np.isnan(values)
    found: Interval = user_bootstrap(
        values[some], [u for u, s in zip(users, some, strict=True) if s], transform=METRICS[metric][1]
    )
    return found.value, found.low, found.high


def _short(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
