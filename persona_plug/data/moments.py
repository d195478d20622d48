"""Times as people write them, as seconds since 1970; and the order of items in time."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from typing import Protocol, TypeVar

from persona_plug.errors import DataError

LAST = 1e11
"""Seconds of the last time that is read, in the year 5138: what lies behind means "never", as 9999-12-31 does."""
UNITS = ((LAST, 1.0), (1e14, 1e3), (1e17, 1e6), (1e20, 1e9))
"""Numbers below the first value are seconds; those below the next are milli-, micro- and nanoseconds."""
COUNTS = 1e8
"""Numbers below this are counts (the first item, the second, ...) rather than times: as seconds they end in 1973."""
REMEDY = "write it as 2024-05-02T10:00:00+00:00 or as seconds since 1970"

_YEAR_FIRST = re.compile(r"(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(.*)", re.DOTALL)
_YEAR_LAST = re.compile(r"(\d{1,2})([-/.])(\d{1,2})\2(\d{4})(.*)", re.DOTALL)
_MONTH = re.compile(r"(\d{4})[-/.](\d{1,2})")
_COMPACT = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}  # as numbers, the longer ones would be of no year
_DIGITS = re.compile(r"[+-]?\d+(\.\d+)?")
_ZONE = re.compile(r"\s*(UTC|GMT|Z)$", re.IGNORECASE)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", " %I:%M%p", " %I %p")
_WORDED = ("%d %b %Y", "%d %B %Y", "%b %d %Y", "%B %d %Y", "%d-%b-%Y", "%Y %b %d")
_WITH_WEEKDAY = ("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Y")


def seconds(value: object, where: str) -> float:
    """Return a time as seconds since 1970; one without a zone is taken as UTC.

    Args:
        value: A `datetime` or `date`; a number of seconds, milli-, micro- or nanoseconds, told apart by its size; the
            digits of such a number; digits of a date, or of date and time (20240502, 20240502101500), from 1900 to
            2099; ISO 8601, also with slashes, dots or missing zeros; a date with the day first (2.5.2024, 13/03/2020)
            or the month first (03/13/2020) where only one of the two is possible; an English date (5 March 2024); the
            date of an e-mail.
        where: What has the time, for the message.

    Raises:
        DataError: The value is no time, or two days are possible.
    """
    try:
        if isinstance(value, date):
            return _at(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _number(value)
        if isinstance(value, str):
            return _text(" ".join(value.split()))
    except (ValueError, OverflowError) as exc:
        reason = str(exc) if "possible" in str(exc) else "is no time"
        raise DataError(f"{where}: field 'timestamp' {reason}, got {value!r:.60}; {REMEDY}") from exc
    raise DataError(f"{where}: field 'timestamp' is no time, got {value!r:.60}; {REMEDY}")


def is_count(value: object) -> bool:
    """Whether a timestamp only counts items: such numbers have an order, but no date."""
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < COUNTS and _compact(value) is None


def _at(value: date) -> float:
    moment = value if isinstance(value, datetime) else datetime(value.year, value.month, value.day)
    at = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    if not abs(at) < LAST:  # NaN too
        raise ValueError(value)
    return at


def _number(value: float) -> float:
    if (day := _compact(value)) is not None:
        return _at(day)
    for limit, unit in UNITS:
        if abs(value) < limit:  # false of NaN and of infinity
            return float(value) / unit
    raise ValueError(value)


def _compact(value: float) -> date | None:
    """Return the time that the digits of a number like 20240502, 202405021015 or 20240502101500 spell."""
    if not 19000101 <= value < 2.1e13 or value != int(value):
        return None
    text = str(int(value))
    if text[:2] not in ("19", "20") or len(text) not in _COMPACT:
        return None
    try:
        return datetime.strptime(text, _COMPACT[len(text)])
    except ValueError:
        return None


def _text(text: str) -> float:
    if _DIGITS.fullmatch(text):
        return _number(float(text) if "." in text else int(text))
    try:
        return _at(datetime.fromisoformat(text))
    except ValueError:
        pass
    if (match := _YEAR_FIRST.fullmatch(text)) is not None:
        year, month, day, rest = match.groups()
        return _clock(f"{year}-{int(month):02}-{int(day):02}", rest)
    if (match := _YEAR_LAST.fullmatch(text)) is not None:
        first, mark, second, year, rest = match.groups()
        day, month = _day_and_month(int(first), int(second), mark)
        return _clock(f"{year}-{month:02}-{day:02}", rest)
    if (match := _MONTH.fullmatch(text)) is not None:
        return _clock(f"{match[1]}-{int(match[2]):02}-01", "")
    return _worded(text)


def _day_and_month(first: int, second: int, mark: str) -> tuple[int, int]:
    """Return day and month; with dots the day comes first, otherwise only what one order allows is read."""
    if mark == "." or first > 12 or first == second:
        return first, second
    if second > 12:
        return second, first
    raise ValueError("may be day or month first: two days are possible")


def _clock(day: str, rest: str) -> float:
    """Return the time of an ISO date and of what follows it: a clock, with or without a zone."""
    rest = _ZONE.sub("+00:00", rest.strip())
    if not rest or rest == "+00:00":
        return _at(datetime.fromisoformat(day))
    rest = re.sub(r"\s+([+-]\d\d:?\d\d)$", r"\1", rest.removeprefix("T"))
    try:
        return _at(datetime.fromisoformat(f"{day}T{rest}"))
    except ValueError:
        return _by_formats(f"{day} {rest}", tuple("%Y-%m-%d" + clock for clock in _CLOCKS))


def _worded(text: str) -> float:
    """Return the time of an English date, or of an e-mail's."""
    plain = _ZONE.sub("", text.replace(",", " ").replace(".", " "))
    plain = re.sub(r"(\d)(st|nd|rd|th)\b", r"\1", " ".join(plain.split()))
    try:
        return _by_formats(plain, (*(day + clock for day in _WORDED for clock in _CLOCKS), *_WITH_WEEKDAY))
    except ValueError:
        if not re.match(r"\w{3},? \d", text):  # the reader of e-mails' dates guesses at anything
            raise
        return _at(parsedate_to_datetime(text))


def _by_formats(text: str, formats: Sequence[str]) -> float:
    for form in formats:
        try:
            return _at(datetime.strptime(text, form))
        except ValueError:
            continue
    raise ValueError(text)


class Timed(Protocol):
    """Anything with a time, or with None."""

    @property
    def timestamp(self) -> float | None:
        """Seconds since 1970."""


Item = TypeVar("Item", bound=Timed)


def in_time(items: Sequence[Item]) -> tuple[Item, ...]:
    """Return items oldest first; see `time_order`."""
    return tuple(items[place] for place in time_order(items))


def time_order(items: Sequence[Timed]) -> Sequence[int]:
    """Return the places of items, oldest first.

    Items of one time stay in their order, which is turned round where the list runs from new to old. An item without a
    time stays behind the one before it. A list without any time is taken as oldest first.
    """
    times = [item.timestamp for item in items]
    present = [at for at in times if at is not None]
    if all(a <= b for a, b in itertools.pairwise(present)):
        return range(len(items))
    if all(a >= b for a, b in itertools.pairwise(present)):
        return [len(items) - 1 - place for place in arrival_order(times[::-1])]
    return arrival_order(times)


def arrival_order(times: Sequence[float | None]) -> list[int]:
    """Return the places of times in their order; what came without one stays behind the latest that came before it."""
    keys, latest = [], float("-inf")
    for at in times:
        latest = latest if at is None else max(latest, at)
        keys.append(latest if at is None else at)
    return sorted(range(len(keys)), key=keys.__getitem__)
