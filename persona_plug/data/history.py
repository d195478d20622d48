"""Events, history items and examples: reading them, and making training samples from them."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_plug.errors import DataError

logger = logging.getLogger(__name__)

LATEST = 1e300  # a timestamp beyond this is no time; NaN and infinity fail the comparison too


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One thing a user reacted to (`input`) and what they wrote or chose (`output`)."""

    input: str
    output: str
    timestamp: float | None = None
    id: str | None = None

    @classmethod
    def of(cls, item: HistoryItem | Mapping[str, Any] | str) -> HistoryItem:
        """Accept an item, a mapping with `input`/`output`, or the user's own plain text (an output)."""
        if isinstance(item, HistoryItem):
            return item
        if isinstance(item, str):
            return cls("", item)
        if isinstance(item, Mapping):
            record = {"user_id": "-", "input": "", **item}
            return parse_event(record, "history item").item
        raise DataError(f"a history item must be a HistoryItem, a mapping or a text, not {type(item).__name__}")


@dataclass(frozen=True, slots=True)
class Event:
    """A history item with its owner; unknown fields are kept in `metadata` and never used silently."""

    user_id: str
    item: HistoryItem
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """A request of a user with what they answered and the history that may be used for it.

    `prompt` is what the LLM reads where that is not the template filled with the input (retrieval puts items into it);
    the request's vector is the input's all the same.
    """

    user_id: str
    input: str
    output: str
    history: tuple[HistoryItem, ...] = ()
    id: str = ""
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Events of a file and what could not be read (`skipped`: one line each, naming file, line and field)."""

    events: list[Event]
    skipped: list[str]


def parse_event(record: Mapping[str, Any], where: str) -> Event:
    """Check one record `{user_id, input, output, timestamp?, id?}`.

    Raises:
        DataError: A field is missing or has the wrong type; the message names `where` and the field.
    """
    user = record.get("user_id")
    if isinstance(user, int) and not isinstance(user, bool):
        user = str(user)
    if not isinstance(user, str) or not user.strip():
        raise DataError(f"{where}: field 'user_id' must be a non-empty text, got {_shown(record, 'user_id')}")
    for name in ("input", "output"):
        if not isinstance(record.get(name), str):
            raise DataError(f"{where}: field {name!r} must be a text, got {_shown(record, name)}")
        try:
            record[name].encode()
        except UnicodeEncodeError as exc:
            raise DataError(
                f"{where}: field {name!r} holds half a character (a lone surrogate); repair the text"
            ) from exc
    if not record["output"].strip():
        raise DataError(f"{where}: field 'output' is empty; remove the record or fill it")
    ident = record.get("id")
    if ident is not None and not isinstance(ident, str | int):
        raise DataError(f"{where}: field 'id' must be a text or a whole number, got {_shown(record, 'id')}")
    item = HistoryItem(
        record["input"],
        record["output"],
        _timestamp(record.get("timestamp"), where),
        None if ident is None else str(ident),
    )
    extra = {k: v for k, v in record.items() if k not in {"user_id", "input", "output", "timestamp", "id"}}
    return Event(user, item, extra)


def _timestamp(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LATEST:
        return float(value)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            pass
        else:
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    raise DataError(f"{where}: field 'timestamp' must be ISO-8601 or a finite number, got {value!r:.60}")


def _shown(record: Mapping[str, Any], name: str) -> str:
    return f"{record[name]!r:.60}" if name in record else "nothing (field missing)"


def read_events(path: str | os.PathLike[str], skip_bad: bool = False, owner: str | None = None) -> ReadResult:
    """Read events from a JSONL (`.jsonl`, `.json`, `.ndjson`) or Parquet file.

    The file is streamed through `datasets`, so no second copy of personal data is left in a cache.

    Args:
        path: The file.
        skip_bad: Leave bad records out and list them in `skipped` instead of raising at the first.
        owner: Whose the records without a `user_id` are; by default these are bad.

    Raises:
        DataError: The file is missing or empty, or a record is bad; file, line and field are named.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    events: list[Event] = []
    skipped: list[str] = []
    seen: dict[tuple[str, str], str] = {}
    for where, record in _records(file):
        try:
            if isinstance(record, DataError):
                raise record
            event = parse_event(record if owner is None else {"user_id": owner, **record}, where)
            if event.item.id is not None:
                key = (event.user_id, event.item.id)
                if key in seen:
                    raise DataError(f"{where}: field 'id' {key[1]!r:.60} of this user was already used at {seen[key]}")
                seen[key] = where
        except DataError as exc:
            if not skip_bad:
                raise
            skipped.append(str(exc))
        else:
            events.append(event)
    if skipped:
        logger.warning("%s: %d bad records skipped, first: %s", file, len(skipped), skipped[0])
    if not events:
        raise DataError(f"{file}: holds no usable record" + (f" ({len(skipped)} skipped)" if skipped else ""))
    return ReadResult(events, skipped)


def _records(file: Path) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    from datasets import config, load_dataset

    config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else a server is told of each file that is read
    pattern = glob.escape(str(file))  # datasets expands * and [ in names
    if file.suffix == ".parquet":
        try:
            rows = load_dataset("parquet", data_files=pattern, split="train", streaming=True)
            for number, row in enumerate(rows, 1):
                yield f"{file}:row {number}", {k: v for k, v in row.items() if v is not None}
        except DataError:
            raise
        except Exception as exc:  # pyarrow's and datasets' own errors have no common base
            if "BatchSize must be greater than 0" in str(exc):  # how pyarrow meets a file without rows
                return
            raise DataError(f"{file}: not a readable Parquet file ({str(exc).splitlines()[0]:.120})") from exc
        return
    if file.suffix not in {".jsonl", ".json", ".ndjson"}:
        raise DataError(f"{file}: unknown ending {file.suffix!r}; use .jsonl or .parquet")
    try:
        lines = load_dataset("text", data_files=pattern, split="train", streaming=True)
        for number, row in enumerate(lines, 1):
            if row["text"].strip():
                yield f"{file}:{number}", _json_object(row["text"], f"{file}:{number}")
    except UnicodeDecodeError as exc:
        raise DataError(f"{file}: not UTF-8 text ({exc.reason} at byte {exc.start}); convert it first") from exc


def _json_object(line: str, where: str) -> Mapping[str, Any] | DataError:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as exc:
        return DataError(f"{where}: not JSON ({exc.msg} at column {exc.colno}); one JSON object a line is expected")
    except (ValueError, RecursionError) as exc:
        return DataError(f"{where}: not JSON that can be read ({exc!s:.60}); one JSON object a line is expected")
    if not isinstance(record, dict):
        return DataError(f"{where}: holds a JSON {type(record).__name__}, not an object with user_id, input, output")
    return record


def by_user(events: Iterable[Event]) -> dict[str, list[HistoryItem]]:
    """Group events by user, in order of appearance."""
    users: dict[str, list[HistoryItem]] = {}
    for event in events:
        users.setdefault(event.user_id, []).append(event.item)
    return users


def longest_by_user(examples: Iterable[Example]) -> dict[str, tuple[HistoryItem, ...]]:
    """Return each user's longest history, the first of equally long ones; users without any are left out."""
    longest: dict[str, tuple[HistoryItem, ...]] = {}
    for example in examples:
        if len(example.history) > len(longest.get(example.user_id, ())):
            longest[example.user_id] = example.history
    return longest


def is_twin(item: HistoryItem, input: str, output: str) -> bool:
    """Whether an item would give the target away: the same request, or, where items have none, the same text."""
    if item.input.strip() or input.strip():
        return item.input.split() == input.split()
    return item.output.split() == output.split()


def leave_one_out(user_id: str, items: Sequence[HistoryItem]) -> list[Example]:
    """Make every item the target once, with the user's other items (twins of the target excluded) as history."""
    return [
        Example(
            user_id,
            target.input,
            target.output,
            tuple(o for j, o in enumerate(items) if j != i and not is_twin(o, target.input, target.output)),
            target.id or f"{user_id}-{i}",
        )
        for i, target in enumerate(items)
    ]


def time_ordered(user_id: str, items: Sequence[HistoryItem]) -> list[Example]:
    """Make every item the target once, with only strictly earlier items (twins excluded) as history.

    Raises:
        DataError: An item has no timestamp.
    """
    for i, item in enumerate(items):
        if item.timestamp is None:
            raise DataError(
                f"user {user_id!r}: item {item.id or i} has no timestamp; add it or use leave-one-out samples"
            )
    order = sorted(items, key=lambda item: item.timestamp or 0.0)
    return [
        Example(
            user_id,
            target.input,
            target.output,
            tuple(
                o
                for o in order
                if (o.timestamp or 0.0) < (target.timestamp or 0.0) and not is_twin(o, target.input, target.output)
            ),
            target.id or f"{user_id}-{i}",
        )
        for i, target in enumerate(order)
    ]


def detect_answers(outputs: Sequence[str], limit: int = 32) -> tuple[str, ...] | None:
    """Return the sorted answer space if the outputs look like labels (few, short, repeated), else None."""
    counts = Counter(o.strip() for o in outputs)
    if 2 <= len(counts) <= min(limit, len(outputs) // 5) and max(len(c) for c in counts) <= 48:
        return tuple(sorted(counts))
    return None
