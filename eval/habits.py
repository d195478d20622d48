"""`python -m eval.habits [CONFIG] [key=value ...]`: whether a plug writes generated replies as their users would.

Users and requests are generated anew, with greetings, sign-offs, names and emoji that no training user has. Every
method answers the same requests, and `persona_plug.data.replies.check` says of each answer which habits it keeps.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from persona_plug.data import replies
from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.fit.examples import few_shot
from persona_plug.measure.stats import Interval, user_bootstrap
from persona_plug.measure.tables import Table, interval_text
from persona_plug.plug import PersonaPlug
from training.config import Settings, load, run_command

logger = logging.getLogger(__name__)

RUN_ON = "run_on"  # share of answers that end only where the limit of tokens is

Writer = Callable[[PersonaPlug, Sequence[Example]], Sequence[str]]


def _plain(plug: PersonaPlug, examples: Sequence[Example]) -> Sequence[str]:
    return plug.generate(examples, personal=False)


def _turns(plug: PersonaPlug, examples: Sequence[Example]) -> Sequence[str]:
    texts = few_shot(plug, examples)
    if any(text is None for text in texts):
        raise ConfigError("methods: turns needs an LLM with a chat template; leave it out")
    return [str(text) for text in texts]


def _plug(plug: PersonaPlug, examples: Sequence[Example]) -> Sequence[str]:
    return plug.generate(examples)


def _shuffled(plug: PersonaPlug, examples: Sequence[Example]) -> Sequence[str]:
    """Answer with the history of the next user."""
    users = list(dict.fromkeys(e.user_id for e in examples))
    histories = {e.user_id: e.history for e in examples}
    other = dict(zip(users, [*users[1:], users[0]], strict=True))
    return plug.generate([Example(e.user_id, e.input, e.output, histories[other[e.user_id]]) for e in examples])


METHODS: Mapping[str, Writer] = {"none": _plain, "turns": _turns, "plug": _plug, "plug_shuffled": _shuffled}


@dataclass(frozen=True, kw_only=True)
class HabitSettings(Settings):
    """Settings of `python -m eval.habits [CONFIG] [key=value ...]`.

    Attributes:
        plug: Folder of a plug that was fitted on generated replies. Needed.
        methods: Whose answers are checked: `none` (the plain LLM), `turns` (four items as chat turns), `plug`, and
            `plug_shuffled` (with the next user's history).
        users: Users who are asked.
        requests: Requests of each.
        items: Lengths of history, one table each.
        seed: Of the users and requests; the training's must be another one.
        dtype: Dtype of the LLM; `auto` takes what is faster here.
        batch: Answers written at a time.
        out: JSON file of all answers and shares; an empty text writes none.
    """

    plug: str = ""
    methods: tuple[str, ...] = tuple(METHODS)
    users: int = 40
    requests: int = 5
    items: tuple[int, ...] = (8, 1)
    seed: int = 7
    dtype: str = "auto"
    batch: int = 20
    out: str = ""

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        if not self.plug:
            raise ConfigError("plug=DIR is missing: the folder of a plug that was fitted on generated replies")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ConfigError(f"methods: {unknown[0]!r} is not one of {', '.join(METHODS)}")
        self.require_at_least(2, "users")
        self.require_at_least(1, "requests", "batch")
        if not self.items or min(self.items) < 0:
            raise ConfigError(f"items={list(self.items)} must be one or more numbers from 0 up")


def questions(settings: HabitSettings, items: int) -> tuple[list[Example], dict[str, replies.Habits]]:
    """Return the requests with the users' latest `items` replies as history, and the users' habits."""
    longest = max(settings.items)
    # Held-out users alone have forms of their own: half of all are, and as many as needed are asked.
    made = replies.build(2 * settings.users, longest + settings.requests, settings.seed, held_out=0.5)
    by_user: dict[str, list[dict[str, Any]]] = {user: [] for user in made.meta["held_out"]}
    for record in made.records:
        if record["user_id"] in by_user:
            by_user[record["user_id"]].append(record)
    examples = []
    for user, rows in by_user.items():
        history = tuple(HistoryItem(r["input"], r["output"]) for r in rows[longest - items : longest])
        examples += [Example(user, r["input"], r["output"], history) for r in rows[longest:]]
    return examples, made.habits


def shares(
    plug: PersonaPlug, examples: Sequence[Example], texts: Sequence[str], habits: Mapping[str, replies.Habits]
) -> dict[str, Interval]:
    """Return the share of answers that keep each habit, and of those that run on, with intervals over users."""
    users = [e.user_id for e in examples]
    checks = [replies.check(t, e.input, habits[e.user_id]) for t, e in zip(texts, examples, strict=True)]
    rows = {name: [float(check[name]) for check in checks] for name in replies.CHECKS}
    limit = plug.config.max_answer_tokens
    rows[RUN_ON] = [float(len(plug.prompter.ids(text)) >= limit - 1) for text in texts]
    return {name: user_bootstrap(values, users) for name, values in rows.items()}


def table(rows: Mapping[str, Mapping[str, Interval]]) -> Table:
    """Return a row per check and a column per method."""
    names = [*replies.CHECKS, RUN_ON]
    cells = [[name.replace("_", " "), *(interval_text(row[name], ".2f") for row in rows.values())] for name in names]
    return Table(["share of answers", *rows], cells)


def main(arguments: Sequence[str]) -> None:
    """Answer, check and print."""
    settings = load(arguments, HabitSettings)
    plug = PersonaPlug.from_pretrained(settings.plug, dtype=settings.dtype)
    result: dict[str, Any] = {"settings": asdict(settings), "date": str(datetime.datetime.now(datetime.UTC).date())}
    result["dtype"], result["threads"] = str(plug.llm.dtype), torch.get_num_threads()
    for items in settings.items:
        examples, habits = questions(settings, items)
        rows, answers = {}, {}
        for name in settings.methods:
            parts = [examples[i : i + settings.batch] for i in range(0, len(examples), settings.batch)]
            write = METHODS[name]
            if name == "plug_shuffled":  # needs all users at once
                texts = list(write(plug, examples))
            else:
                texts = [text for part in parts for text in write(plug, part)]
            rows[name], answers[name] = shares(plug, examples, texts, habits), texts
        result[f"{items} items"] = {
            "shares": {name: {check: list(value) for check, value in row.items()} for name, row in rows.items()},
            "answers": answers,
        }
        said = f"{len(examples)} requests of {settings.users} users with {items} items of history"
        sys.stdout.write("\n".join([f"{said}; 95% intervals over users.", "", *table(rows).markdown(), "", ""]))
        if settings.out:
            write_atomically(Path(settings.out), (json.dumps(result, ensure_ascii=False, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_command(main, HabitSettings)
