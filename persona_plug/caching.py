"""Whether what is computed of a text may be cached; each thread says so for itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CACHING: ContextVar[bool] = ContextVar("caching", default=True)


@contextmanager
def uncached() -> Iterator[None]:
    """Cache neither vectors of texts nor frozen states of prompts inside, in this thread; undone after exceptions, too.

    Vectors that are cached already are still read. Prompts run in one pass, so that no state is computed ahead.
    It is meant for texts of people who may ask to be forgotten, and for prompts that are read once.
    """
    token = _CACHING.set(False)
    try:
        yield
    finally:
        _CACHING.reset(token)


def caching() -> bool:
    """Return whether this thread caches what it computes."""
    return _CACHING.get()
