"""What `persona-plug data check` says of a file of events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from persona_plug.data.history import Event, by_user, read_events
from persona_plug.data.labels import detect_answers, label_of
from persona_plug.data.moments import COUNTS
from persona_plug.data.splits import prepare
from persona_plug.errors import DataError

EXAMPLE_LENGTH = 160  # letters of each text of the example


def summarise(file: Path, columns: Mapping[str, str] | None = None, skip_bad: bool = False) -> dict[str, Any]:
    """Return what is in a file: sizes, times, labels with their counts, an example, the split, bad records.

    Args:
        file: The file.
        columns: Field -> the file's own name of it.
        skip_bad: List bad records instead of raising at the first.

    Raises:
        DataError: The file or a record cannot be read.
    """
    result = read_events(file, skip_bad, columns=columns)
    events = result.events
    sizes = sorted(len(items) for items in by_user(events).values())
    row: dict[str, Any] = {"events": len(events), "users": len(sizes), "median_items": sizes[len(sizes) // 2],
                           "most_items": sizes[-1], **_times(events), **_answers(events)}  # fmt: skip
    return {**row, "example": _example(events[0]), "split": _split(file, columns, skip_bad), "bad": result.skipped}


def _times(events: Sequence[Event]) -> dict[str, Any]:
    times = [event.item.timestamp for event in events if event.item.timestamp is not None]
    first, last = (_moment(min(times)), _moment(max(times))) if times else (None, None)
    return {"with_timestamp": len(times), "first": first, "last": last}


def _moment(seconds: float) -> str:
    """Return a time as ISO 8601; small numbers only count."""
    if abs(seconds) < COUNTS:
        return f"{seconds:g} (a count, no date)"
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} (no date of the calendar)"


def _answers(events: Sequence[Event]) -> dict[str, Any]:
    outputs = [event.item.output for event in events]
    try:
        answers = detect_answers(outputs)
    except DataError as exc:
        return {"answers": str(exc)}
    if answers is None:
        return {"answers": "free text"}
    counts = Counter(map(label_of, outputs))
    return {"answers": list(answers), "label_counts": {answer: counts[answer] for answer in answers}}


def _example(event: Event) -> dict[str, Any]:
    fields = {"user_id": event.user_id, **asdict(event.item)}
    return {k: v[:EXAMPLE_LENGTH] if isinstance(v, str) else v for k, v in fields.items() if v is not None}


def _split(file: Path, columns: Mapping[str, str] | None, skip_bad: bool) -> dict[str, Any]:
    """Return users and samples of each part of the default split, or why there is none."""
    try:
        data = prepare(file, columns=columns, skip_bad=skip_bad)
    except DataError as exc:
        return {"problem": str(exc)}
    parts = {"train": data.train, "valid": data.valid, "held_out": data.held_out}
    sizes = {name: f"{len(part)} samples of {len({e.user_id for e in part})} users" for name, part in parts.items()}
    return {**sizes, "notes": data.notes}
