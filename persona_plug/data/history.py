"""Events, history items and examples: reading them, and making training samples from them."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, TypeGuard

from persona_plug.data.labels import detect_answers
from persona_plug.data.messages import is_chat, split_chat
from persona_plug.data.moments import in_time, is_count, seconds, time_order
from persona_plug.data.rows import FIELDS, Row, local_path, read_rows
from persona_plug.errors import DataError

__all__ = [
    "Event", "Example", "HistoryItem", "ReadResult", "by_user", "collect_events", "detect_answers", "events_of",
    "is_twin", "items_of", "leave_one_out", "parse_event", "read_events", "time_ordered",
]  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """One thing a user reacted to (`input`) and what they wrote or chose (`output`).

    `timestamp` is in seconds since 1970; whatever `moments.seconds` reads may be given.
    """

    input: str
    output: str
    timestamp: float | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        """Turn a time in another form into seconds, and refuse what is none, or no text."""
        where = "history item" if self.id is None else f"history item {self.id!r:.60}"
        check_texts(where, input=self.input, output=self.output)
        if self.timestamp is not None:
            object.__setattr__(self, "timestamp", _time(scalar(self.timestamp), where))

    @classmethod
    def of(
        cls, item: HistoryItem | Mapping[str, Any] | tuple[str, str | float] | str, where: str = "history item"
    ) -> HistoryItem:
        """Accept an item, a mapping or a tuple of `input` and `output`, or the user's own plain text (an output).

        Args:
            item: The item.
            where: Its place, for messages.

        Raises:
            DataError: It is none of these, or one of its fields cannot be used.
        """
        if isinstance(item, HistoryItem):
            return item
        if isinstance(item, str):
            item = {"output": item}
        elif is_pair(item):
            item = {"input": item[0], "output": item[1]}
        if isinstance(item, Mapping):
            return parse_event({"user_id": "-", "input": "", **item}, where, item).item
        raise DataError(
            f"{where}: must be a HistoryItem, a mapping, a tuple of input and output, or a text, not {item!r:.60}"
        )


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
    the request's vector is the input's all the same. `history` is put in order of time, oldest first. `strength`, above
    0 up to 1, says how much it counts: 1 is as trained, less is nearer to a user nobody knows.
    """

    user_id: str
    input: str
    output: str
    history: tuple[HistoryItem, ...] = ()
    id: str = ""
    prompt: str | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Order the history by time, so that its end is what is latest; refuse what is no text."""
        check_texts(f"example {self.id!r:.60}" if self.id else "example", input=self.input, output=self.output)
        if not all(isinstance(item, HistoryItem) for item in self.history):
            object.__setattr__(self, "history", items_of(self.history))
        object.__setattr__(self, "history", in_time(self.history))


@dataclass(frozen=True, slots=True)
class ReadResult:
    """Events of a file and what could not be read (`skipped`: one line each, naming file, line and field)."""

    events: list[Event]
    skipped: list[str]


def parse_event(record: Mapping[str, Any], where: str, item: Mapping[str, Any] | None = None) -> Event:
    """Check one record `{user_id, input, output, timestamp?, id?}`; a number as output becomes its digits.

    Args:
        record: The record.
        where: Its place, for messages.
        item: The item of a history that the record was made of.

    Raises:
        DataError: A field is missing or has the wrong type; the message names `where` and the field.
    """
    values = {name: scalar(record.get(name)) for name in FIELDS}

    def refusal(name: str, reason: str) -> DataError:
        if name in record:
            shown = f"{record[name]!r:.60}"
        elif item is None:
            shown = _missing(record, name)
        else:
            shown = f"nothing (field missing; the item has {', '.join(map(str, item))})"
        return DataError(f"{where}: field {name!r} {reason}, got {shown}")

    user, ident, source, output = (_name(values["user_id"]), _name(values["id"]), values["input"], values["output"])
    if user is None or not user.strip():
        raise refusal("user_id", "must be a non-empty text")
    if not isinstance(source, str):
        raise refusal("input", "must be a text")
    answer = written(output)
    if answer is None:
        raise refusal("output", "must be a text or a number")
    if not answer.strip():
        raise DataError(f"{where}: field 'output' is empty; remove the record or fill it")
    if ident is None and values["id"] is not None:
        raise refusal("id", "must be a text or a whole number")
    for name, text in (("user_id", user), ("input", source), ("output", answer), ("id", ident or "")):
        if is_halved(text):
            raise DataError(f"{where}: field {name!r} holds half a character (a lone surrogate); repair the text")
    at = _time(values["timestamp"], where)
    extra = {name: value for name, value in record.items() if name not in FIELDS}
    return Event(user, HistoryItem(source, answer, at, ident or None), extra)


def events_of(record: Mapping[str, Any], where: str) -> Iterator[Event]:
    """Yield the events of a record: one, or of a chat one for each answer in it.

    Raises:
        DataError: As `parse_event`, and where a chat cannot be read.
    """
    if not is_chat(record):
        yield parse_event(record, where)
        return
    for answer in split_chat(record, where):
        yield parse_event(answer, where)


def items_of(rows: Iterable[Any]) -> tuple[HistoryItem, ...]:
    """Return the items of a history; a chat gives one for each answer in it.

    Args:
        rows: What `HistoryItem.of` accepts, and records of chats.

    Raises:
        DataError: An item cannot be used, or some times are dates and others counts.
    """
    items: list[HistoryItem] = []
    clocks: dict[bool, str] = {}
    for number, row in enumerate(rows, 1):
        where = f"history item {number}"
        if isinstance(row, Mapping):
            chat = is_chat(row)
            fresh = (
                [e.item for e in events_of({"user_id": "-", **row}, where)] if chat else [HistoryItem.of(row, where)]
            )
            _check_clock(fresh[0], row.get("timestamp"), clocks, where)
        else:
            fresh = [HistoryItem.of(row, where)]
        items += fresh
    return tuple(items)


def check_texts(where: str, **texts: object) -> None:
    """Refuse a field that is no text.

    Raises:
        DataError: There is one; it is named.
    """
    for name, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: field {name!r} must be a text, got {text!r:.60}")


def written(value: object) -> str | None:
    """Return a text as it is, and a finite number as it is written: 5.0 as 5. Anything else is None."""
    name = _name(value)
    return str(value) if name is None and isinstance(value, float) and math.isfinite(value) else name


def _time(value: object, where: str) -> float | None:
    return None if value is None or (isinstance(value, str) and not value.strip()) else seconds(value, where)


def scalar(value: object) -> object:
    """Return a numpy scalar (known by its method) or a decimal as Python's own number, pandas' NaT and NA as None."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        number: object = value.item()
        return number
    if isinstance(value, Decimal):
        return float(value)
    return None if type(value).__name__ in ("NaTType", "NAType") else value


def _name(value: object) -> str | None:
    """Return a text as it is, and a whole number as its digits: 5.0 is 5. Anything else is None."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and value % 1 != 0):
        return None  # the remainder of infinity and of NaN is NaN
    return str(int(value))


def _missing(record: Mapping[str, Any], name: str) -> str:
    """Say that a record lacks a field, and how the column that is meant may be named."""
    alike = (str(c) for c in record if str(c).strip().casefold().replace(" ", "_") == name)
    names = ", ".join(map(str, record))
    return (
        f"nothing (field missing; of {names:.90} name the one that is meant: --columns {name}={next(alike, 'NAME')}, "
        "or columns= in Python)"
    )


def read_events(
    path: str | os.PathLike[str],
    skip_bad: bool = False,
    owner: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> ReadResult:
    """Read events from a JSONL, JSON, CSV, TSV or Parquet file, packed or not; nothing of it is left in a cache.

    Args:
        path: The file; see `rows.read_rows`.
        skip_bad: Leave bad records out and list them in `skipped` instead of raising at the first.
        owner: Whose the records without a `user_id` are; by default these are bad.
        columns: Field -> the file's own name of it, as `{"user_id": "agent"}`.

    Raises:
        DataError: The file is missing or empty, or a record is bad; file, line and field are named.
    """
    return collect_events(read_rows(path, columns), str(local_path(path)), skip_bad, owner)


def collect_events(rows: Iterable[Row], name: str, skip_bad: bool = False, owner: str | None = None) -> ReadResult:
    """Check rows and what holds between them: ids are unique for each user, times are all dates or all counts.

    Args:
        rows: Places and records, from `rows.read_rows` or `rows.table_rows`.
        name: What the rows are of, for messages.
        skip_bad: As in `read_events`.
        owner: As in `read_events`.

    Raises:
        DataError: A record is bad, or none is left.
    """
    events: list[Event] = []
    skipped: list[str] = []
    ids: dict[tuple[str, str], str] = {}
    clocks: dict[bool, str] = {}  # whether times are counts -> the first place where they are
    for where, record in rows:
        try:
            if isinstance(record, DataError):
                raise record
            fresh = list(events_of(record if owner is None else {"user_id": owner, **record}, where))
            _check_ids(fresh, ids, where)
            _check_clock(fresh[0].item, record.get("timestamp"), clocks, where)
        except DataError as exc:
            if not skip_bad:
                raise
            skipped.append(str(exc))
        else:
            ids.update({(e.user_id, e.item.id): where for e in fresh if e.item.id is not None})
            events += fresh
    if skipped:
        logger.warning("%s: %d bad records skipped, first: %s", name, len(skipped), skipped[0])
    if not events:
        raise DataError(f"{name}: holds no usable record" + (f" ({len(skipped)} skipped)" if skipped else ""))
    return ReadResult(events, skipped)


def _check_ids(fresh: Sequence[Event], ids: Mapping[tuple[str, str], str], where: str) -> None:
    for event in fresh:
        ident = event.item.id
        if ident is not None and (event.user_id, ident) in ids:
            place = ids[event.user_id, ident]
            raise DataError(f"{where}: field 'id' {ident!r:.60} of this user was already used at {place}")


def _check_clock(item: HistoryItem, value: object, clocks: dict[bool, str], where: str) -> None:
    if item.timestamp is None:
        return
    count = is_count(scalar(value))
    if (not count) in clocks:
        kind, other = ("a count", "a date") if count else ("a date", "a count")
        raise DataError(
            f"{where}: field 'timestamp' {value!r:.40} is {kind}, but {other} stands at {clocks[not count]}; "
            "write dates everywhere, or counts"
        )
    clocks.setdefault(count, where)


def by_user(events: Iterable[Event]) -> dict[str, list[HistoryItem]]:
    """Group events by user, in order of appearance."""
    users: dict[str, list[HistoryItem]] = {}
    for event in events:
        users.setdefault(event.user_id, []).append(event.item)
    return users


def is_halved(text: str) -> bool:
    """Whether a text holds half a character, a lone surrogate, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def is_pair(item: object) -> TypeGuard[tuple[str, str | float]]:
    """Whether a history item is given as a tuple of input and output, a text or a number."""
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and written(item[1]) is not None


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
    order = time_order(items)  # of all items: without the target a list may no longer show that it is newest first
    return [
        Example(
            user_id,
            target.input,
            target.output,
            tuple(items[j] for j in order if j != i and not is_twin(items[j], target.input, target.output)),
            target.id or f"{user_id}-{i}",
        )
        for i, target in enumerate(items)
    ]


def time_ordered(user_id: str, items: Sequence[HistoryItem]) -> list[Example]:
    """Make every item the target once, with only the items before it (twins excluded) as history.

    Items of one time, such as a day, count in their order in the list.

    Raises:
        DataError: An item has no timestamp.
    """
    for i, item in enumerate(items):
        if item.timestamp is None:
            raise DataError(
                f"user {user_id!r}: item {item.id or i} has no timestamp; add it or use leave-one-out samples"
            )
    order = in_time(items)
    return [
        Example(
            user_id,
            target.input,
            target.output,
            tuple(o for o in order[:i] if not is_twin(o, target.input, target.output)),
            target.id or f"{user_id}-{i}",
        )
        for i, target in enumerate(order)
    ]
