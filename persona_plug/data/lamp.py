"""LaMP's own files: questions with profiles, and gold answers."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_plug.data import write_records
from persona_plug.data.history import Example, HistoryItem, is_halved, leave_one_out, longest_by_user, written
from persona_plug.data.moments import seconds
from persona_plug.data.rows import local_path
from persona_plug.errors import DataError

logger = logging.getLogger(__name__)

# Fields of a LaMP profile item -> (input, output); the first row whose fields are all present wins.
LAMP_FIELDS: tuple[tuple[str, str], ...] = (
    ("description", "tag"),  # LaMP-2 movies
    ("text", "category"),  # LaMP-2 news
    ("text", "score"),  # LaMP-3
    ("original", "text"),  # rewriting with both sides known
    ("abstract", "title"),  # LaMP-1, LaMP-5
    ("text", "title"),  # LaMP-4, LaMP-6
    ("", "text"),  # LaMP-7: the user's own text, nothing it answers to
)


@dataclass(frozen=True, slots=True)
class Defect:
    """A question of the official files that lacks its instruction: its input is `stray` and the request's text.

    Attributes:
        name: Where it stands, for the report.
        id: The question's id.
        stray: What the input begins with instead.
        mark: What the instruction ends with, and no input of the file should lack.
    """

    name: str
    id: str
    stray: str
    mark: str


DEFECTS = (Defect("LaMP-2 (movies, user split, dev)", "110", "x ", "description: "),)


@dataclass(frozen=True, slots=True)
class LampData:
    """Examples of a LaMP questions file.

    Attributes:
        examples: One a question.
        template: The instruction that all inputs begin with, and `{input}`.
        task: What the gold file says, or nothing without one.
        repairs: What was done about each of `DEFECTS` that the file has, and about items whose date cannot be read, one
            line each.
    """

    examples: list[Example]
    template: str
    task: str
    repairs: tuple[str, ...] = ()


def read_lamp(
    questions: str | os.PathLike[str],
    outputs: str | os.PathLike[str] | None = None,
    template: str | None = None,
    fields: tuple[str, str] | None = None,
) -> LampData:
    """Read LaMP's own question file and, if given, its gold file.

    The instruction that all inputs share becomes the template (or the given `template`, which all must begin with),
    what differs becomes `Example.input`. Profile items are mapped by `LAMP_FIELDS`, or by the given `fields`: the names
    of an item's input and output, several joined by "+" being joined by a space, an empty name giving an empty input.
    Without gold, outputs are empty. Where a profile's items have dates, these order it; an item
    whose date is missing or cannot be read is left out there, and counted in `repairs`. Known `DEFECTS` of the official
    files are repaired, or left out with their gold, and logged.

    Raises:
        DataError: A file is missing, not LaMP-shaped, or the ids of questions and gold differ.
    """
    rows = _load_json(Path(questions))
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{questions}: a LaMP question file is a non-empty JSON list")
    for number, row in enumerate(rows):
        for name, kind in (("id", str | int), ("input", str), ("profile", list)):
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                raise DataError(f"{questions}: question {number}: field {name!r} is missing or of the wrong type")
    task, gold = _read_gold(Path(outputs)) if outputs is not None else ("", {})
    repairs = _repair(rows, gold)
    if outputs is not None:
        ids = {str(row["id"]) for row in rows}
        if len(ids) < len(rows):
            double = next(i for i, n in Counter(str(row["id"]) for row in rows).items() if n > 1)
            raise DataError(f"{questions}: question id {double!r:.60} was used twice; remove one")
        if ids != set(gold):
            odd = sorted(ids ^ set(gold))
            raise DataError(f"{outputs}: ids differ from {questions} in {len(odd)} place(s), first {odd[0]!r}")
    if template is None:
        prefix = shared_instruction([row["input"] for row in rows])
        template = prefix.replace("{", "(").replace("}", ")") + "{input}"
    else:
        prefix = template.removesuffix("{input}")
    examples = []
    undated: list[str] = []
    for row in rows:
        if not row["input"].startswith(prefix):
            raise DataError(
                f"{questions}: question {row['id']}: input does not begin with the instruction {prefix!r:.80}"
            )
        items = _profile(row["profile"], f"{questions}: question {row['id']}", fields, undated)
        ident = str(row["id"])
        user = str(row.get("user_id", ident))
        examples.append(Example(user, row["input"][len(prefix) :], gold.get(ident, ""), tuple(items), ident))
    if undated:
        repairs.append(
            f"{len(undated)} profile items left out: others of their profile have a date; first {undated[0]}"
        )
    for line in repairs:
        logger.warning("%s: %s", questions, line)
    return LampData(examples, template, task, tuple(repairs))


def _profile(raws: Sequence[Any], where: str, fields: tuple[str, str] | None, undated: list[str]) -> list[HistoryItem]:
    """Return a profile's items; where some have a date, those without one are left out and added to `undated`."""
    items, problems = [], {}
    for number, raw in enumerate(raws):
        place = f"{where}: profile item {number}"
        item = _lamp_item(raw, place, fields)
        value = raw.get("date")
        try:
            at = None if value in (None, "") else seconds(_day(value), place)
        except DataError as exc:
            at, problems[number] = None, str(exc)
        items.append(dataclasses.replace(item, timestamp=at))
    if not problems and all(item.timestamp is None for item in items):
        return items
    missing = [n for n, item in enumerate(items) if item.timestamp is None]
    undated += [problems.get(n, f"{where}: profile item {n}: has no date") for n in missing]
    return [item for item in items if item.timestamp is not None]


def _day(value: object) -> object:
    """Return LaMP's date: a year alone is its first day."""
    text = str(value).strip()
    return f"{text}-01-01" if len(text) == 4 and text.isdigit() else value


def _repair(rows: list[dict[str, Any]], gold: dict[str, str]) -> list[str]:
    """Repair the defects that are there, in place, and tell what was done.

    The instruction is the one that the file's other questions share; where they share none, the right input cannot be
    derived from the file, and question and gold are left out.
    """
    done = []
    for known in DEFECTS:
        faulty = (r for r in rows if str(r["id"]) == known.id and r["input"].startswith(known.stray))
        row = next((r for r in faulty if known.mark not in r["input"]), None)
        if row is None:
            continue
        before, found, _ = shared_instruction([r["input"] for r in rows if r is not row]).rpartition(known.mark)
        where = f"{known.name}, question {known.id}: its input lacks the instruction"
        if found:
            row["input"] = before + found + row["input"].removeprefix(known.stray)
            done.append(f"{where}; repaired with the one that the other questions share")
        else:
            rows.remove(row)
            gold.pop(known.id, None)
            done.append(f"{where}, and the other questions share none; left out with its gold")
    return done


def _read_gold(path: Path) -> tuple[str, dict[str, str]]:
    raw = _load_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("golds"), list):
        raise DataError(f"{path}: a LaMP gold file is an object with 'task' and 'golds'")
    gold: dict[str, str] = {}
    for number, entry in enumerate(raw["golds"]):
        where = f"{path}: gold entry {number}"
        if not isinstance(entry, dict) or not {"id", "output"} <= entry.keys():
            raise DataError(f"{where}: lacks 'id' or 'output'")
        ident, output = str(entry["id"]), entry["output"]
        if (answer := written(output)) is None:
            raise DataError(f"{where}: field 'output' must be a text or a number, got {output!r:.60}")
        if ident in gold:
            raise DataError(f"{where}: field 'id' {ident!r:.60} was already used; remove one")
        gold[ident] = _whole(answer, where, "output")
    return str(raw.get("task", "")), gold


def _load_json(path: Path) -> Any:  # noqa: ANN401
    file = local_path(path)
    if not file.is_file():
        raise DataError(f"{file}: {'is a folder; name a file in it' if file.is_dir() else 'no such file'}")
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{file}: not JSON that can be read ({exc!s:.80}); repair it") from exc


def _lamp_item(raw: object, where: str, fields: tuple[str, str] | None) -> HistoryItem:
    if isinstance(raw, Mapping):
        for pair in LAMP_FIELDS if fields is None else (fields,):
            names = [[n for n in side.split("+") if n] for side in pair]
            if all(n in raw for side in names for n in side):
                source, target = (  # fields without a value leave no gap
                    " ".join(_field(raw, n, where) for n in side if raw[n] not in (None, "")) for side in names
                )
                ident = raw.get("id")
                return HistoryItem(source, target, None, None if ident is None else str(ident))
    if fields is None:
        raise DataError(f"{where}: has none of LaMP's field pairs")
    raise DataError(f"{where}: lacks one of the fields {fields[0]!r} and {fields[1]!r}")


def _field(raw: Mapping[str, Any], name: str, where: str) -> str:
    """Return a field's text, or its number as it stands there."""
    if written(raw[name]) is None:
        raise DataError(f"{where}: field {name!r} must be a text or a number, got {raw[name]!r:.60}")
    return _whole(str(raw[name]), where, name)


def _whole(text: str, where: str, name: str) -> str:
    """Return a text whose characters are whole."""
    if is_halved(text):
        raise DataError(f"{where}: field {name!r} holds half a character (a lone surrogate); repair the text")
    return text


def shared_instruction(inputs: Sequence[str]) -> str:
    """Return the longest common beginning of the inputs, cut back to a word border ('' for a single input)."""
    if len(set(inputs)) < 2:
        return ""
    first, last = min(inputs), max(inputs)  # what these two share, all between them share
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    common = first[:same]
    return common[: max(common.rfind(" "), common.rfind("\n"), common.rfind('"')) + 1]


def leave_one_out_profiles(examples: Sequence[Example]) -> list[Example]:
    """Make leave-one-out samples of the longest history each user of a LaMP file shows.

    The questions' own targets are no part of any history, so they stay what they are: targets.
    """
    histories = longest_by_user(examples)
    return [
        sample for user, items in histories.items() for sample in leave_one_out(user, items) if sample.output.strip()
    ]


def write_events(data: LampData, path: Path, overwrite: bool = True) -> int:
    """Write profiles and answered questions as JSONL events with their template beside them; returns how many."""
    items = [(user, item) for user, history in longest_by_user(data.examples).items() for item in history]
    items += [(e.user_id, HistoryItem(e.input, e.output, None, e.id)) for e in data.examples if e.output]
    records = [
        {"user_id": user, "input": i.input, "output": i.output, "timestamp": i.timestamp, "id": i.id}
        for user, i in items
    ]
    kept = [{k: v for k, v in r.items() if v is not None} for r in records if str(r["output"]).strip()]
    seen: Counter[tuple[object, object]] = Counter()
    for record in kept:  # a question and an item, or two items, may share an id in LaMP's files
        key = record["user_id"], record.get("id")
        if "id" in record and seen[key]:
            record["id"] = f"{record['id']}+{seen[key]}"
        seen[key] += 1
    write_records(path, kept, data.template, {"task": data.task}, overwrite)
    return len(kept)
