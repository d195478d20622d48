"""Limits: how much one key may ask, how many requests are in hand at once, and what is remembered for how long."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from persona_plug.errors import ConfigError

Clock = Callable[[], float]


class Rates:
    """A token bucket a key: `per_minute` requests on average, a tenth of a minute's worth at once."""

    def __init__(self, per_minute: float, clock: Clock = time.monotonic) -> None:
        """Start with full buckets; 0 means no limit."""
        self.per_second, self.clock = per_minute / 60, clock
        self.burst = max(1.0, per_minute / 10)
        self._buckets: dict[str, tuple[float, float]] = {}  # key id -> (tokens, when); keys are few and known

    def wait(self, key: str) -> int:
        """Take a token and return 0, or return the seconds until there is one."""
        if self.per_second == 0:
            return 0
        now = self.clock()
        tokens, then = self._buckets.get(key, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        taken = tokens >= 1
        self._buckets[key] = tokens - taken, now
        return 0 if taken else math.ceil((1 - tokens) / self.per_second)


class Overloaded(Exception):
    """As many requests are in hand as may be; the client is to come again."""


class Slots:
    """Requests in hand, running or waiting: beyond the limit one is refused at once instead of making all slow."""

    def __init__(self, limit: int) -> None:
        """Create free slots."""
        self.limit, self.used = limit, 0

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a slot.

        Raises:
            Overloaded: None is free.
        """
        if self.used >= self.limit:
            raise Overloaded
        self.used += 1
        try:
            yield
        finally:
            self.used -= 1


@dataclass(frozen=True, slots=True)
class Written:
    """A completion that may still be accepted."""

    user: str
    request: str
    answer: str
    made: float


class Memory:
    """Completions of the last minutes, in memory only, found by their id and by nobody but their user."""

    def __init__(self, seconds: float, count: int, clock: Clock = time.monotonic) -> None:
        """Remember at most `count` completions for `seconds` each."""
        self.seconds, self.count, self.clock = seconds, count, clock
        self._kept: OrderedDict[str, Written] = OrderedDict()
        self._forgotten: dict[str, float] = {}  # user -> when; a completion that was under way then is not kept

    def __len__(self) -> int:
        """Return how many are held."""
        return len(self._kept)

    def keep(self, ident: str, user: str, request: str, answer: str, begun: float) -> None:
        """Remember a completion of a user (its store key) that was begun at a time of the clock."""
        self.prune()
        if self._forgotten.get(user, -math.inf) < begun:
            self._kept[ident] = Written(user, request, answer, self.clock())
            if len(self._kept) > self.count:
                self._kept.popitem(last=False)

    def find(self, ident: str, user: str) -> Written | None:
        """Return a completion if it is this user's and still remembered."""
        self.prune()
        found = self._kept.get(ident)
        return found if found is not None and found.user == user else None

    def forget(self, user: str) -> None:
        """Drop what is remembered of a user, and what is being written for them."""
        self.prune()
        self._forgotten[user] = self.clock()
        self._kept = OrderedDict((k, w) for k, w in self._kept.items() if w.user != user)

    def prune(self) -> None:
        """Drop what is too old."""
        oldest = self.clock() - self.seconds
        while self._kept and next(iter(self._kept.values())).made < oldest:
            self._kept.popitem(last=False)
        while self._forgotten and next(iter(self._forgotten.values())) < oldest:
            del self._forgotten[next(iter(self._forgotten))]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a gateway bears; a request beyond is refused with a status that says why.

    Attributes:
        body_bytes: Size of a request's body (413).
        body_seconds: Time for sending it (408).
        per_minute: Requests a minute and key, 0 for any number (429).
        pending: Completions in hand at once, running and waiting (429).
        seconds: Time of one completion, from its admission to its last byte (504).
        prompt_characters: Characters of a completion's messages or prompt (400): what is too long for the LLM costs
            time to tokenise before that is known.
        max_tokens: New tokens of a completion (400).
        events: Stored events of a user (409).
        event_characters: Characters of one event's input and output together (400).
        remember_seconds: How long a completion can be accepted; 0 remembers none.
        remember: How many completions are remembered.
    """

    body_bytes: int = 1_000_000
    body_seconds: float = 10
    per_minute: float = 0
    pending: int = 64
    seconds: float = 120
    prompt_characters: int = 50_000
    max_tokens: int = 1024
    events: int = 10_000
    event_characters: int = 20_000
    remember_seconds: float = 600
    remember: int = 1000

    def __post_init__(self) -> None:
        """Refuse limits under which nothing works."""
        for field in fields(self):
            value, may_be_zero = getattr(self, field.name), field.name in ("per_minute", "remember_seconds", "remember")
            if not value >= 0 or (value == 0 and not may_be_zero):
                raise ConfigError(f"{field.name}={value} must be {'at least' if may_be_zero else 'above'} 0")
