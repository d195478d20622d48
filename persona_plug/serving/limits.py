"""Limits: how much one key may ask, and how much is in hand at once, shared fairly among tenants."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from persona_plug.errors import ConfigError

MAY_BE_ZERO = ("per_minute", "remember_seconds", "keep_days")
LONGEST = 12 * 3600  # seconds for which an answer may be under way and wait to be accepted
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
    """What may be in hand, running or waiting: beyond the limit one is refused at once instead of making all slow.

    Half of it is kept for tenants that ask for little: each has an equal share of that half to itself. So nobody can
    take everything, and whoever is alone gets all that is not kept for others.
    """

    def __init__(self, limit: int, tenants: Callable[[], int] = lambda: 1) -> None:
        """Create free places; `tenants` says how many may ask."""
        self.limit, self.tenants, self.used = limit, tenants, 0
        self._held: Counter[str] = Counter()

    @contextmanager
    def take(self, tenant: str = "", amount: int = 1) -> Iterator[None]:
        """Hold some places for a tenant.

        Raises:
            Overloaded: They are not free.
        """
        count = max(1, self.tenants())
        share = 0 if count == 1 else self.limit // (2 * count)
        others = [held for name, held in self._held.items() if name != tenant]
        kept = sum(max(0, share - held) for held in others) + share * max(0, count - 1 - len(others))
        if self.used + amount + kept > self.limit:
            raise Overloaded
        self.used += amount
        self._held[tenant] += amount
        try:
            yield
        finally:
            self.used -= amount
            self._held[tenant] -= amount
            if not self._held[tenant]:
                del self._held[tenant]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a gateway bears; a request beyond is refused with a status that says why.

    Attributes:
        body_bytes: Size of a request's body (413).
        body_seconds: Time for sending it (408).
        per_minute: Requests a minute and key, 0 for any number (429).
        pending: Completions in hand at once, running and waiting (429).
        tokens: Tokens of these, of prompts and as many as answers may have (429).
        writes: Requests in hand that add events or export them (429).
        seconds: Time of one completion or one adding of events, from its admission to its last byte (504).
        store_seconds: Time in which the store must answer (503).
        prompt_characters: Characters of a completion's messages or prompt (400): what is too long for the LLM costs
            time to tokenise before that is known.
        max_tokens: New tokens of a completion (400).
        events: Stored events of a user (409).
        event_characters: Characters of one event's input and output together (400).
        remember_seconds: How long a completion can be accepted; 0 remembers none.
        keep_days: Days after which an event is deleted, counted from when it was added; 0 keeps events.
    """

    body_bytes: int = 1_000_000
    body_seconds: float = 10
    per_minute: float = 0
    pending: int = 64
    tokens: int = 131_072
    writes: int = 32
    seconds: float = 120
    store_seconds: float = 10
    prompt_characters: int = 50_000
    max_tokens: int = 1024
    events: int = 10_000
    event_characters: int = 20_000
    remember_seconds: float = 600
    keep_days: float = 0

    def __post_init__(self) -> None:
        """Refuse limits under which nothing works."""
        for field in fields(self):
            value, may_be_zero = getattr(self, field.name), field.name in MAY_BE_ZERO
            if not value >= 0 or (value == 0 and not may_be_zero):
                raise ConfigError(f"{field.name}={value} must be {'at least' if may_be_zero else 'above'} 0")
        if self.remember_seconds + self.seconds > LONGEST:
            raise ConfigError(
                f"remember_seconds={self.remember_seconds:g} plus seconds={self.seconds:g} is above {LONGEST}; "
                "the store knows for a day who was forgotten"
            )
