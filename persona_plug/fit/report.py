"""FitReport: whether personalization helps on this data, on users the training never saw."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_plug.fit.examples import one_request, side_by_side
from persona_plug.fit.plots import plot_lift, plot_loss
from persona_plug.measure.answers import Answers, evaluate, prior_answers, with_other_history
from persona_plug.measure.contrasts import LIFT, Contrast, contrasts, estimate
from persona_plug.measure.metrics import METRICS, describe
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import Table, contrast_table, interval_text, metric_table, one_line
from persona_plug.measure.truncation import truncation_notes

if TYPE_CHECKING:
    from persona_plug.data.splits import FitData
    from persona_plug.fit.config import FitConfig
    from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)

WORDLESS = "plug: without words"  # the row of the soft tokens alone

NO_USERS = "No users were held out: nothing can be said about the lift."
CONTRAST_FIELDS = ("a", "b", "metric", "delta", "low", "high")  # of a row in fit_report.json


@dataclass(frozen=True, slots=True)
class FitReport:
    """The comparison on held-out users.

    Attributes:
        metrics: Method -> metric -> its value with a 95% interval from a bootstrap over users.
        contrasts: Paired differences, positive where the first method is better.
        n: Held-out questions.
        n_users: Held-out users.
        notes: What was skipped, capped, cut or inferred.
        examples: Held-out answers side by side.
        details: Settings, steps, identities.
        request: Of free text one request as three held-out users' plug answers it, or None.
    """

    metrics: dict[str, dict[str, Interval]]
    contrasts: list[Contrast]
    n: int
    n_users: int
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return everything as JSON text."""
        rows = [{name: getattr(row, name) for name in CONTRAST_FIELDS} for row in self.contrasts]
        return json.dumps({**asdict(self), "contrasts": rows}, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> FitReport:
        """Return the report that `to_json` wrote.

        Raises:
            ValueError: The text is no JSON, or holds something else.
        """
        content = json.loads(text)
        try:
            rows = content.pop("metrics"), content.pop("contrasts")
            metrics = {method: {m: Interval(*i) for m, i in row.items()} for method, row in rows[0].items()}
            return cls(metrics, [Contrast(**row) for row in rows[1]], **content)
        except (AttributeError, KeyError, TypeError) as exc:
            raise ValueError(f"not the fields of a report: {exc}") from exc

    def table(self) -> Table:
        """Return the values of each method."""
        return metric_table(self.metrics)

    def summary(self) -> str:
        """Return in one line what was asked, and of whom."""
        return f"{self.n} questions of {self.n_users} held-out users; 95% intervals from a bootstrap over users."

    def to_markdown(self) -> str:
        """Return the table, the contrasts and the notes as Markdown."""
        if not self.metrics:
            return NO_USERS
        notes = describe(m for m in METRICS if any(m in row for row in self.metrics.values()))
        tables = [*self.table().markdown(), "", *contrast_table(self.contrasts).markdown()]
        return "\n".join([self.summary(), "", *tables, "", *(f"- {note}" for note in [*notes, *self.notes])])

    def __str__(self) -> str:
        """Return the report as text with the verdict and the examples."""
        return "\n".join([self.to_markdown(), "", self.verdict(), *self._examples_text()])

    def verdict(self) -> str:
        """Say in one line whether the user's own history helped."""
        lift = next((row for row in self.contrasts if row.pair == LIFT), None)
        if lift is None:
            return "Personal lift: not measured."
        delta = interval_text(Interval(lift.delta, lift.low, lift.high), "+.3f")
        what = f"{lift.metric} {delta} over another user's history"
        if lift.low > 0:
            return f"Personal lift: yes, {what}."
        if lift.high < 0:
            return f"Personal lift: harm, {what}; do not use this plug."
        return f"Personal lift: not shown, {what}; more users, longer histories or more steps may show it."

    def _examples_text(self) -> list[str]:
        lines: list[str] = []
        for number, e in enumerate(self.examples, 1):
            lines += ["", f"Example {number}: {one_line(e['input'], 160)}"]
            for label in ("no user", "another user", "this user", "really wrote"):
                lines.append(f"  {label:>12}: {one_line(e[label], 110)}")
            for item in e["weights"]:
                given, answer = (one_line(item[name], 60) for name in ("input", "output"))
                lines.append(f"  {item['weight']:>12.2f}  {given} -> {answer}")
        return lines + self._request_text()

    def _request_text(self) -> list[str]:
        if self.request is None:
            return []
        lines = [
            "",
            f"One request, {len(self.request['users'])} held-out users: {one_line(self.request['input'], 160)}",
        ]
        lines.append(f"  {'plain LLM':>12}: {one_line(self.request['plain'], 200)}")
        for number, user in enumerate(self.request["users"], 1):
            lines += ["", f"  user {number}, who wrote before: {one_line(user['wrote'], 160)}"]
            for label, name in (("few-shot", "turns"), ("plug", "plug")):
                if user[name] is not None:
                    lines.append(f"  {label:>12}: {one_line(user[name], 200)}")
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
    if task_prompt is plug:
        notes.append("task_prompt is the plug without its words memory: its soft tokens know no user")
    if task_prompt is None:
        result = FitReport({}, [], 0, 0, notes, [], details)
        result.save(folder)
        return result
    answers = run_methods(plug, task_prompt, data, config.seed, generated)
    users = [e.user_id for e in data.held_out]
    values = {name: a.values for name, a in answers.items()}
    result = FitReport(
        {name: {m: estimate(v, users, m) for m, v in row.items()} for name, row in values.items()},
        contrasts(values, users, test=False),
        len(users),
        len(set(users)),
        notes + truncation_notes(plug, data),
        side_by_side(plug, data.held_out, answers, examples),
        details,
        one_request(plug, data.held_out, examples),
    )
    result.save(folder)
    plot_loss(log, folder / "loss.png")
    lift = values["plug_shuffled"]["nll"] - values["plug"]["nll"]
    plot_lift(lift, data.held_out, folder / "lift.png")
    return result


def run_methods(
    plug: PlugModel, task_prompt: PlugModel | None, data: FitData, seed: int, generated: int
) -> dict[str, Answers]:
    """Return per-question values of the controls, the plug and the LLM-free baselines on the held-out users.

    Args:
        plug: A trained plug.
        task_prompt: See `make_report`; None leaves this control out, the plug itself is asked without its words.
        data: `held_out` is asked, the baselines learn from the rest.
        seed: Of the draw of other users' histories.
        generated: See `make_report`.
    """
    questions = data.held_out
    result = {"none": evaluate(plug, questions, generated, personal=False)}
    if task_prompt is not None and task_prompt is not plug:
        result["task_prompt"] = evaluate(task_prompt, questions, generated)
    if plug.recollection is not None:
        with plug.recollection.paused():
            result["task_prompt" if task_prompt is plug else WORDLESS] = evaluate(plug, questions, generated)
    result["plug_empty"] = evaluate(plug, [replace(e, history=()) for e in questions], generated)
    result["plug_shuffled"] = evaluate(plug, with_other_history(questions, seed), generated)
    result["plug"] = evaluate(plug, questions, generated)
    if plug.embedder.has_answer_head:
        result["plug: LLM alone"] = evaluate(plug, questions, generated, head=False)
    for name, answer in prior_answers(plug, data, generated).items():
        result[f"user_prior: {name}"] = answer
    return result
