"""From a user's file to training, validation and held-out samples."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from persona_plug.data.history import (
    Event,
    Example,
    HistoryItem,
    ReadResult,
    by_user,
    collect_events,
    is_halved,
    leave_one_out,
    read_events,
    scalar,
    time_ordered,
    written,
)
from persona_plug.data.labels import ALIKE, detect_answers, label_of, plain
from persona_plug.data.lamp import leave_one_out_profiles, read_lamp
from persona_plug.data.messages import SYSTEM
from persona_plug.data.rows import is_splits, local_path, table_rows, unfold
from persona_plug.errors import ConfigError, DataError, nearest

SAMPLES = ("auto", "leave_one_out", "time")


@dataclass(frozen=True, slots=True)
class FitData:
    """Samples of three disjoint sets of users.

    Attributes:
        train: What the plug learns from.
        valid: For early stopping and calibration.
        held_out: For the report; never looked at in training.
        template: The LLM's instruction with `{input}`.
        answers: The answer space of a labelling task, or None.
        notes: What was skipped, capped or inferred, one line each.
    """

    train: list[Example]
    valid: list[Example]
    held_out: list[Example]
    template: str
    answers: tuple[str, ...] | None
    notes: list[str] = field(default_factory=list)


def prepare(
    data: Any,  # noqa: ANN401 - a table of any library
    *,
    samples: str = "auto",
    valid: float | Collection[str] | None = None,
    held_out: float | Collection[str] | None = None,
    targets_per_user: int = 32,
    template: str | None = None,
    answers: Sequence[str] | str | None = "auto",
    skip_bad: bool = False,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> FitData:
    """Read data and split it by users.

    Args:
        data: A file of events (`rows.read_rows` says which kinds); a LaMP-shaped folder (`train_questions.json`,
            `train_outputs.json`); a list of `Example`; a list of `Event` or records; a table of pandas, `datasets`,
            polars or pyarrow; or a dictionary of splits of these, whose records count together.
        samples: `leave_one_out` (every item is a target once, the user's others are its history), `time` (only earlier
            items are), or `auto`: by time if every item has a timestamp.
        valid: Share of users for early stopping and calibration, or their names. Default the users of the split
            `validation` alone, else a share of 0.1.
        held_out: Share of users for the report, 0 for none; or their names. Default those that the file's
            `.meta.json` names, the users of the split `test` alone, else a share of 0.2.
        targets_per_user: At most so many targets of one user, drawn at random, so that no user dominates.
        template: The LLM's instruction; default what the data brings, else the bare input.
        answers: Answer space, `auto` to infer it, None for free text.
        skip_bad: Skip bad records and count them instead of stopping at the first.
        columns: Field -> the data's own name of it, as `{"user_id": "agent"}`.
        seed: Seed of the split and of the draws.

    Raises:
        DataError: The data cannot be read, there are too few users to split, or no output is among the answers.
    """
    if samples not in SAMPLES:
        raise ConfigError(f"samples={samples!r} is not one of {', '.join(SAMPLES)}{nearest(samples, SAMPLES)}")
    valid, held_out = _share(valid, "valid"), _share(held_out, "held_out")
    for name, share in (("valid", valid), ("held_out", held_out)):
        if isinstance(share, int | float) and not 0 <= share < 1:
            raise ConfigError(f"{name}={share:g} is a share of the users: give a number from 0 to 1, such as 0.2")
    if not isinstance(targets_per_user, int) or targets_per_user < 1:
        raise ConfigError(f"targets_per_user={targets_per_user!r} must be a whole number from 1 up")
    notes: list[str] = []
    per_user, sidecar = _samples(data, samples, skip_bad, columns, notes)
    rng = np.random.default_rng(seed)
    capped = 0
    for user, targets in per_user.items():
        if len(targets) > targets_per_user:
            chosen = sorted(rng.choice(len(targets), targets_per_user, replace=False))
            capped += len(targets) - targets_per_user
            per_user[user] = [targets[i] for i in chosen]
    if capped:
        notes.append(f"{capped} targets left out: at most {targets_per_user} a user are used (targets_per_user)")
    if held_out is None and sidecar.held_out:
        notes.append(
            f"held out: the {len(sidecar.held_out)} users that {sidecar.name} names (set held_out to override)"
        )
    if held_out is None:
        held_out = sidecar.held_out or 0.2
    if valid is None:
        valid = sidecar.valid or 0.1
    parts = _split(sorted(per_user), valid, held_out, rng)
    train, validation, rest = ([e for u in part for e in per_user[u]] for part in parts)
    if answers == "auto":
        answers = detect_answers([e.output for e in train])
        kind = f"labels {', '.join(answers)}" if answers else "free text"
        notes.append(f"answers were inferred from the training outputs: {kind} (set answers to override)")
    known = _answers(answers)
    if known:
        train, validation, rest = (
            _known(part, known, name, notes)
            for part, name in ((train, "training"), (validation, "validation"), (rest, "held-out"))
        )
    return FitData(train, validation, rest, template or sidecar.template or "{input}", known, notes)


def _share(given: Any, name: str) -> Any:  # noqa: ANN401
    """Return a share as it is, and users by the names that their records have: 7 is "7".

    Raises:
        ConfigError: One text stands in place of a list of names.
    """
    if given is None or isinstance(given, int | float):
        return given
    if isinstance(given, str):
        raise ConfigError(f"{name}={given!r:.60} must be a share of the users or a list of their names")
    return [written(scalar(user)) or user for user in given]


def _answers(answers: Any) -> tuple[str, ...] | None:  # noqa: ANN401
    """Return the answer space as texts, None for free text; numbers are written out.

    Raises:
        ConfigError: It is no list of two or more labels that differ.
    """
    if answers is None:
        return None
    texts = [] if isinstance(answers, str) else [written(scalar(answer)) for answer in answers]
    known = [text for text in texts if text is not None]
    if isinstance(answers, str) or len(known) < len(texts):
        raise ConfigError(f"answers={answers!r:.80} must be a list of texts, 'auto' or None")
    labels = {label_of(text): text for text in known}
    if len(labels) < max(2, len(known)) or "" in labels:
        raise ConfigError(f"answers must be two or more different, non-empty texts, got {known!r:.80}")
    return tuple(known)


def _split(
    users: list[str], valid: float | Collection[str], held_out: float | Collection[str], rng: np.random.Generator
) -> tuple[list[str], list[str], list[str]]:
    """Return users to train on, for validation, and held out; the latter two are drawn, or those that are named."""
    order = [users[i] for i in rng.permutation(len(users))]

    def chosen(share: float | Collection[str], candidates: list[str], least: int, what: str) -> set[str]:
        if isinstance(share, int | float):
            return set(candidates[: max(least, round(share * len(users)))])
        if unknown := sorted(set(share) - set(users)):
            raise DataError(
                f"{what} user {unknown[0]!r:.60} has no record ({len(unknown)} in all); name users of the data"
            )
        return set(share)

    some = isinstance(held_out, int | float) and held_out > 0
    outside = chosen(held_out, order, int(some), "held-out")
    inside = chosen(valid, [user for user in order if user not in outside], 1, "validation") - outside
    train = [user for user in order if user not in outside | inside]
    if not train or not inside:
        needed = max(1, len(inside)) + len(outside) + 1
        raise DataError(
            f"{len(users)} users are too few to hold some out ({len(outside)} for the report, {max(1, len(inside))} to "
            f"validate with): at least {needed} are needed"
        )
    return train, [user for user in order if user in inside], [user for user in order if user in outside]


def _known(part: list[Example], answers: tuple[str, ...], name: str, notes: list[str]) -> list[Example]:
    """Return the samples whose output is an answer; outputs and histories get the answers' spelling (5.0 is 5)."""
    spelling = {label_of(answer): answer for answer in answers}
    items: dict[HistoryItem, HistoryItem] = {}

    def with_spelling(item: HistoryItem) -> HistoryItem:
        if item not in items:
            output = spelling.get(label_of(item.output), item.output)
            items[item] = item if output == item.output else dataclasses.replace(item, output=output)
        return items[item]

    outside = [e.output for e in part if label_of(e.output) not in spelling]
    if outside:
        alike = {plain(answer) for answer in answers}
        case = [o for o in outside if plain(o) in alike]
        text = f"{len(outside)} {name} samples left out: their output is not among the answers"
        if case:
            text += f" ({len(case)} differ from one {ALIKE}, first {case[0]!r:.48})"
        if len(outside) == len(part):
            raise DataError(
                f"{text}; none is left, the first output is {outside[0]!r:.48}: name the answers as written"
            )
        notes.append(text)
    return [
        dataclasses.replace(e, output=spelling[label_of(e.output)], history=tuple(map(with_spelling, e.history)))
        for e in part
        if label_of(e.output) in spelling
    ]


@dataclass(frozen=True, slots=True)
class Sidecar:
    """What comes with the data: where it stands, the prompt template, users to hold out and to validate with."""

    name: str = ""
    template: str | None = None
    held_out: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()


def _samples(
    data: Any,  # noqa: ANN401
    samples: str,
    skip_bad: bool,
    columns: Mapping[str, str] | None,
    notes: list[str],
) -> tuple[dict[str, list[Example]], Sidecar]:
    """Return each user's samples and what the data brings beside them."""
    sidecar = Sidecar()
    if isinstance(data, str | os.PathLike):
        path = local_path(data)
        if path.is_dir():
            lamp = read_lamp(path / "train_questions.json", path / "train_outputs.json")
            notes.extend(lamp.repairs)
            answered = [example for example in lamp.examples if example.output.strip()]
            if len(answered) < len(lamp.examples):
                notes.append(f"{len(lamp.examples) - len(answered)} questions left out: their gold output is empty")
            examples = [*answered, *leave_one_out_profiles(lamp.examples)]
            return _group(examples), Sidecar(path.name, lamp.template)
        result, sidecar = read_events(path, skip_bad, columns=columns), read_sidecar(path)
    elif is_splits(data):
        result, sidecar = _join_splits(data, skip_bad, columns, notes)
    else:
        rows = data if hasattr(data, "__len__") else list(unfold(data))
        if not len(rows):
            raise DataError("no data given")
        if isinstance(rows, list | tuple):
            if all(isinstance(r, Example) for r in rows):
                return _group(_usable(rows)), sidecar
            rows = [_record(r) if isinstance(r, Event) else r for r in rows]
        result = collect_events(table_rows(rows, columns), "data", skip_bad)
    if result.skipped:
        notes.append(f"{len(result.skipped)} bad records skipped; `persona-plug data check --skip-bad` lists them")
    events, template = _without_system(result.events, notes)
    if template and sidecar.template is None:
        sidecar = dataclasses.replace(sidecar, template=template)
    return _from_events(events, samples, notes), sidecar


def _usable(examples: Sequence[Example]) -> Sequence[Example]:
    """Return examples that have an output and whole characters.

    Raises:
        DataError: One has not; its place is named.
    """
    for number, example in enumerate(examples):
        if not example.output.strip():
            raise DataError(f"example {number}: field 'output' is empty; remove the example or fill it")
        for name in ("user_id", "input", "output"):
            if is_halved(getattr(example, name)):
                raise DataError(f"example {number}: field {name!r} holds half a character; repair the text")
    return examples


def _join_splits(
    splits: Mapping[str, Any], skip_bad: bool, columns: Mapping[str, str] | None, notes: list[str]
) -> tuple[ReadResult, Sidecar]:
    """Return the records of all splits, and the users that only a test or validation split has."""
    results = {}
    for name, part in splits.items():
        rows = ((f"split {name}, {where}", row) for where, row in table_rows(part, columns))
        results[str(name)] = collect_events(rows, f"split {name}", skip_bad)
    users = {name: {event.user_id for event in result.events} for name, result in results.items()}

    def alone(*names: str) -> tuple[str, ...]:
        own = set().union(*(users[name] for name in users if name.lower() in names))
        return tuple(sorted(own.difference(*(users[name] for name in users if name.lower() not in names))))

    test, validation = alone("test", "held_out"), alone("validation", "valid", "val", "dev")
    notes.append(
        f"the splits {', '.join(results)} count together; users of a test or validation split alone "
        f"({len(test)} and {len(validation)}) stay there"
    )
    events = [event for result in results.values() for event in result.events]
    skipped = [line for result in results.values() for line in result.skipped]
    return ReadResult(events, skipped), Sidecar("the test split", None, test, validation)


def _record(event: Event) -> dict[str, Any]:
    item = event.item
    fields = {"user_id": event.user_id, "input": item.input, "output": item.output}
    return {**event.metadata, **fields, "timestamp": item.timestamp, "id": item.id}


def _without_system(events: list[Event], notes: list[str]) -> tuple[list[Event], str | None]:
    """Return events, and as template the system prompt that all chats share; others stand in front of their inputs."""
    prompts = [event.metadata.get(SYSTEM) for event in events]
    if not any(prompts):
        return events, None
    if len(set(prompts)) == 1:
        notes.append("the system prompt that all chats share is the template's beginning")
        return events, str(prompts[0]).replace("{", "(").replace("}", ")") + "\n\n{input}"
    notes.append(f"chats have {len(set(prompts))} system prompts; each stands in front of its requests")
    return [
        dataclasses.replace(e, item=dataclasses.replace(e.item, input=f"{p}\n\n{e.item.input}")) if p else e
        for e, p in zip(events, prompts, strict=True)
    ], None


def _from_events(events: list[Event], samples: str, notes: list[str]) -> dict[str, list[Example]]:
    users: dict[str, list[HistoryItem]] = by_user(events)
    timed = sum(event.item.timestamp is not None for event in events)
    if samples == "auto":
        samples = "time" if timed == len(events) else "leave_one_out"
        notes.append(f"samples: {samples} ({'every' if timed == len(events) else 'not every'} item has a timestamp)")
        if 0 < timed < len(events):
            notes.append(f"{len(events) - timed} items have no timestamp; each counts as just after the one before it")
    make = time_ordered if samples == "time" else leave_one_out
    targets = {user: make(user, items) for user, items in users.items()}
    without = [user for user, of_user in targets.items() if all(not t.history for t in of_user)]
    single = sum(len(users[user]) == 1 for user in without)
    alike = len(without) - single
    if single:
        notes.append(f"{single} of {len(users)} users have no second item; they train the no-history case only")
    if alike:
        notes.append(
            f"{alike} of {len(users)} users answer the same request in all their items, which may not be each other's "
            "history; they train the no-history case only"
        )
    return targets


def _group(examples: Sequence[Example]) -> dict[str, list[Example]]:
    users: dict[str, list[Example]] = {}
    for example in examples:
        users.setdefault(example.user_id, []).append(example)
    return users


def held_out_users(path: Path) -> tuple[str, ...]:
    """Return the users that the file beside these events holds out of training, if it names any."""
    return read_sidecar(path).held_out


def read_sidecar(path: Path) -> Sidecar:
    """Read the template and the held-out users that `persona-plug data` writes beside its files."""
    import json

    file = path.with_suffix(".meta.json")
    if not file.is_file():
        return Sidecar()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as exc:
        raise DataError(f"{file}: not JSON; delete it or pass a template") from exc
    content = content if isinstance(content, dict) else {}
    template, meta = content.get("template"), content.get("meta")
    held_out = meta.get("held_out", ()) if isinstance(meta, dict) else ()
    return Sidecar(file.name, template if isinstance(template, str) else None, tuple(map(str, held_out)))
