"""FitReport: whether personalization helps on this data, on users the training never saw."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_plug.clock import phase
from persona_plug.config import TURNS_ALONE
from persona_plug.data.history import Example
from persona_plug.errors import first_line
from persona_plug.fit.examples import one_request, side_by_side
from persona_plug.fit.loop import calibrate
from persona_plug.fit.plots import plot_lift, plot_loss
from persona_plug.fit.verdict import PRIOR, TURNS, WORDLESS, judge, token_costs
from persona_plug.measure.answers import Answers, evaluate, prior_answers, with_other_history
from persona_plug.measure.contrasts import Contrast, contrasts, estimate
from persona_plug.measure.metrics import METRICS, describe
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import Table, contrast_table, metric_table, one_line
from persona_plug.measure.truncation import truncation_notes

if TYPE_CHECKING:
    from persona_plug.data.splits import FitData
    from persona_plug.fit.config import FitConfig
    from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)

NO_USERS = "No users were held out: nothing can be said about the lift."
CONTRAST_FIELDS = ("a", "b", "metric", "delta", "low", "high")  # of a row in fit_report.json
TEXTS = ("examples", "request")  # fields that hold users' texts


@dataclass(frozen=True, slots=True, repr=False)
class FitReport:
    """The comparison on held-out users.

    Its files hold no text of a user; what does is shown by `str`, and written by `save_texts` alone.

    Attributes:
        metrics: Method -> metric -> its value with a 95% interval from a bootstrap over users.
        contrasts: Paired differences, positive where the first method is better.
        n: Held-out questions.
        n_users: Held-out users.
        notes: What was skipped, capped, cut or inferred.
        examples: Held-out answers side by side.
        details: Settings, steps, identities.
        request: Of free text one request as three held-out users' plug answers it, or None.
        changed: Share of the plug's answers that are others with another user's history, None where none were written.
        tokens: Method -> tokens that it adds to a request in the mean, for what may be used.
    """

    metrics: dict[str, dict[str, Interval]]
    contrasts: list[Contrast]
    n: int
    n_users: int
    notes: list[str] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] | None = None
    changed: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return everything but users' texts as JSON text."""
        rows = [{name: getattr(row, name) for name in CONTRAST_FIELDS} for row in self.contrasts]
        content = {name: value for name, value in asdict(self).items() if name not in TEXTS}
        return json.dumps({**content, "contrasts": rows}, indent=2, ensure_ascii=False) + "\n"

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
        return "\n".join([self.to_markdown(), "", *self.sentences(), *self._examples_text()])

    def sentences(self) -> list[str]:
        """Say whether the plug knows its users, is worth its LLM, and changes texts; and recommend a method."""
        return judge(self.metrics, self.contrasts, self.changed, self.tokens)

    def __repr__(self) -> str:
        """Return one line: how many were asked, and the verdict; `print` shows the table."""
        return f"<FitReport: {self.n} questions of {self.n_users} held-out users. {self.verdict()}>"

    def verdict(self) -> str:
        """Return the sentences in one line."""
        return " ".join(self.sentences())

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
        """Write `fit_report.json` and `fit_report.md`, which hold no text of a user."""
        from persona_plug.files import write_atomically
        from persona_plug.persistence import REPORT_NAME

        write_atomically(folder / REPORT_NAME, self.to_json().encode())
        write_atomically(folder / "fit_report.md", "\n".join([self.to_markdown(), "", *self.sentences(), ""]).encode())

    def save_texts(self, folder: Path) -> None:
        """Write the answers side by side, which are texts of users, as `fit_examples.md`."""
        from persona_plug.files import write_atomically

        write_atomically(folder / "fit_examples.md", "\n".join([*self._examples_text(), ""]).encode())


@contextmanager
def noted(notes: list[str], what: str) -> Iterator[None]:
    """Go on where a part of a report fails: a note says what is missing, and why."""
    try:
        yield
    except Exception as exc:  # models, tokenizers, plots and disks each raise their own
        notes.append(f"{what} could not be made: {first_line(exc)}")
        logger.warning("%s", notes[-1])


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
        task_prompt: Its twin whose soft tokens know no user, trained alike; None where nothing was trained.
        data: Its data; `held_out` is what counts, and without it nothing is compared.
        config: Its training settings.
        log: The plug's training log.
        folder: Where report and plots go.
        generated: Free text: at most so many answers are generated for ROUGE; likelihoods use all.
        examples: Answers shown side by side.
    """
    details = {"fit": asdict(config), "steps_done": max([int(r["step"]) for r in log if "step" in r], default=0)}
    details["score_temperature"] = float(plug.embedder.score_temperature)
    notes = list(data.notes)
    with noted(notes, "the count of what was cut"):
        notes += truncation_notes(plug, data) if data.held_out else []
    if task_prompt is plug:
        notes.append("task_prompt is the plug without its words memory: its soft tokens know no user")
    if not data.held_out:
        result = FitReport({}, [], 0, 0, notes, details=details)
        with noted(notes, "the files of the report"):
            result.save(folder)
        return result
    answers = run_methods(plug, task_prompt, data, config.seed, generated, notes)
    users = [e.user_id for e in data.held_out]
    values = {name: a.values for name, a in answers.items()}
    shown: dict[str, Any] = {}
    with phase("writing examples and plots"):
        with noted(notes, "answers side by side"):
            shown["examples"] = side_by_side(plug, data.held_out, answers, examples)
        with noted(notes, "one request as several users' plug answers it"):
            shown["request"] = one_request(plug, data.held_out, examples)
        if log:
            with noted(notes, "loss.png"):
                plot_loss(log, folder / "loss.png")
        with noted(notes, "lift.png"):
            lift = values["plug_shuffled"]["nll"] - values["plug"]["nll"]
            plot_lift(lift, data.held_out, folder / "lift.png")
    own, other = answers["plug"].texts, answers["plug_shuffled"].texts
    changed = None if not own or not other else float(np.mean([a != b for a, b in zip(own, other, strict=True)]))
    result = FitReport(
        {name: {m: estimate(v, users, m) for m, v in row.items()} for name, row in values.items()},
        contrasts(values, users, test=False),
        len(users),
        len(set(users)),
        notes,
        details=details,
        changed=changed,
        tokens=token_costs(plug, task_prompt, data.held_out),
        **shown,
    )
    with noted(notes, "the files of the report"):
        result.save(folder)
    return result


def run_methods(
    plug: PlugModel,
    task_prompt: PlugModel | None,
    data: FitData,
    seed: int,
    generated: int,
    notes: list[str] | None = None,
) -> dict[str, Answers]:
    """Return per-question values of the controls, the plug and the LLM-free baselines on the held-out users.

    Args:
        plug: A trained plug.
        task_prompt: See `make_report`; None leaves this control out, the plug itself is asked without its words.
        data: `held_out` is asked, the baselines learn from the rest.
        seed: Of the draw of other users' histories.
        generated: See `make_report`.
        notes: Gets a line where answers cannot be written, which leaves likelihoods; None raises the error.
    """
    questions = data.held_out

    def ask(asked: PlugModel, questions: Sequence[Example], **options: bool | list[str]) -> Callable[[], Answers]:
        return lambda: _evaluate(asked, questions, generated, notes, options)

    def wordless() -> Answers:
        assert plug.recollection is not None  # noqa: S101 - it is asked for only then
        with plug.recollection.paused():
            return ask(plug, questions)()

    methods = {"none": ask(plug, questions, personal=False)}
    if task_prompt is not None and task_prompt is not plug:
        methods["task_prompt"] = ask(task_prompt, questions)
    if plug.recollection is not None:
        methods["task_prompt" if task_prompt is plug else WORDLESS] = wordless
    if plug.config.retrieve and (plug.config.soft_tokens or plug.config.lora):
        methods[TURNS] = ask(_turns_alone(plug, data), questions)
    methods["plug_empty"] = ask(plug, [replace(e, history=()) for e in questions])
    methods["plug_shuffled"] = ask(plug, with_other_history(questions, seed))
    methods["plug"] = ask(plug, questions)
    if plug.answers is not None:
        methods["plug: LLM alone"] = ask(plug, questions, parts=["soft"])
        methods["plug: answers head alone"] = ask(plug, questions, parts=["answers"])
    result = {}
    with phase("asking the held-out users", len(methods) + 1, "method") as advance:
        for done, (name, method) in enumerate(methods.items(), 1):
            result[name] = method()
            advance(done, name)
        for name, answer in prior_answers(plug, data, generated).items():
            result[PRIOR + name] = answer
    return result


def _turns_alone(plug: PlugModel, data: FitData) -> PlugModel:
    """Return what the user's items in the prompt do by themselves, with nothing trained."""
    twin = plug.twin(plug.config.replace(**TURNS_ALONE))
    if data.answers and data.valid:
        calibrate(twin, data.valid)
    return twin


def _evaluate(
    plug: PlugModel,
    questions: Sequence[Example],
    generated: int,
    notes: list[str] | None,
    options: dict[str, Any],
) -> Answers:
    try:
        return evaluate(plug, questions, generated, **options)
    except Exception as exc:
        if notes is None or plug.config.answers or not generated:
            raise
        note = f"answers could not be written, so ROUGE, chrF and examples are missing: {first_line(exc)}"
        if note not in notes:
            notes.append(note)
            logger.warning("%s", note)
        return evaluate(plug, questions, 0, **options)
