"""Time: seconds as work is charged for, and phases of work as a user sees them pass."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

SECONDS = 20.0  # between lines of a phase, off a terminal

_SHOWN: ContextVar[bool] = ContextVar("shown", default=True)
Advance = Callable[..., None]
"""Tells of a phase's progress: `advance(done, remark="")`."""


def clock(llm: Any) -> float:  # noqa: ANN401
    """Return seconds: of the process's threads on a CPU, which other work on the machine hardly moves; else of time."""
    return time.process_time() if llm.device.type == "cpu" else time.perf_counter()


@contextmanager
def unshown() -> Iterator[None]:
    """Show neither phases nor lines inside, in this thread."""
    token = _SHOWN.set(False)
    try:
        yield
    finally:
        _SHOWN.reset(token)


@contextmanager
def phase(name: str, total: int = 1, unit: str = "step", *, announced: bool = True) -> Iterator[Advance]:
    """Show a phase of work on standard error with the time left: a bar on a terminal or in a notebook, else lines.

    Args:
        name: What is done, in words.
        total: How many units of work there are.
        unit: What a unit is.
        announced: Off a terminal, whether a line tells of its beginning; else only what takes long is told of.
    """
    if not _shows():
        yield lambda done, remark="": None
    elif sys.stderr.isatty() or "ipykernel" in sys.modules:
        yield from _bar(name, total, unit)
    else:
        yield from _lines(name, total, unit, announced)


def _bar(name: str, total: int, unit: str) -> Iterator[Advance]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=name, unit=unit, file=sys.stderr, leave=None) as bar:

        def advance(done: int, remark: str = "") -> None:
            bar.set_postfix_str(remark, refresh=False)
            bar.update(done - bar.n)

        yield advance
        bar.update(total - bar.n)


def _lines(name: str, total: int, unit: str, announced: bool) -> Iterator[Advance]:
    start = last = time.monotonic()
    first: int | None = None

    def advance(done: int, remark: str = "") -> None:
        nonlocal last, first
        first = done - 1 if first is None else first  # a resumed training begins in its middle
        now = time.monotonic()
        if now - last >= SECONDS and done < total:
            last = now
            left = duration((now - start) / max(1, done - first) * (total - done))
            tell(f"{name}: {unit} {done} of {total}, about {left} left{f', {remark}' if remark else ''}")

    if announced:
        tell(f"{name} ({total} {unit}s)" if total > 1 else name)
    yield advance
    if announced and (took := time.monotonic() - start) >= SECONDS:
        tell(f"{name}: done in {duration(took)}")


def duration(seconds: float) -> str:
    """Return a time in words: 40 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def tell(line: str) -> None:
    """Show a line on standard error."""
    if _shows():
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def _shows() -> bool:
    """Whether this thread of this process speaks: of several processes on a machine the first one alone does."""
    return _SHOWN.get() and os.environ.get("LOCAL_RANK", "0") == "0"
