"""What the gateway tells of itself: JSON lines and Prometheus metrics, without texts and without names in clear."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from persona_plug.errors import ConfigError, CorruptFileError, MismatchError, ModelUnavailable
from persona_plug.store.database import StoreUnavailable

# Their messages tell of databases, files and settings, and of no request.
TELLING = (ConfigError, CorruptFileError, MismatchError, ModelUnavailable, StoreUnavailable, OSError)

LONGEST = 300  # characters of a field: whoever asks must not fill the log
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Hasher:
    """Keyed hashes of names: equal for equal names while the key is the same, and telling nothing without it."""

    def __init__(self, key: bytes | None = None) -> None:
        """Use a key, or draw one that lives as long as the process."""
        self._key = key or secrets.token_bytes(32)

    def __call__(self, purpose: str, name: str) -> str:
        """Return 16 hex digits; the same name has another hash for each purpose."""
        return hmac.new(self._key, f"{purpose}\0{name}".encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[
            :16
        ]


class Log:
    """Writes one JSON object a line to standard error, or wherever it is told to."""

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        """Use `write` for whole lines."""
        self._write = write or _to_stderr

    def event(self, event: str, **fields: Any) -> None:  # noqa: ANN401
        """Write an event; None fields are left out. Nobody may pass a text, an id or a path of a request."""
        shown = {k: v[:LONGEST] if isinstance(v, str) else v for k, v in fields.items() if v is not None}
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{int(time.time() * 1000) % 1000:03d}Z"
        self._write(json.dumps({"time": stamp, "event": event, **shown}) + "\n")

    def failure(self, request: str, exc: BaseException) -> None:
        """Write where an unexpected exception came from; its message may quote a text, and is shown of some alone."""
        frames = traceback.extract_tb(exc.__traceback__)
        where = [f"{f.filename.rpartition('site-packages/')[2].rpartition('/')[2]}:{f.lineno}" for f in frames]
        cause = str(exc) if isinstance(exc, TELLING) else None
        self.event("failure", request=request, exception=type(exc).__name__, cause=cause, where=where[-8:])


def _to_stderr(line: str) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()


class Metrics:
    """Prometheus metrics of one gateway. Labels are routes, statuses and reasons: nothing that names anybody."""

    def __init__(self) -> None:
        """Register them in a registry of their own."""
        self.registry = CollectorRegistry()
        r, p = self.registry, "persona_plug_"
        self.requests = Counter(p + "requests", "Requests answered.", ["route", "status"], registry=r)
        self.seconds = Histogram(
            p + "request_seconds", "Time to the last byte.", ["route"], buckets=SECONDS, registry=r
        )
        self.first = Histogram(p + "first_token_seconds", "Time to a stream's first text.", buckets=SECONDS, registry=r)
        self.refused = Counter(p + "refused", "Requests refused by a limit.", ["reason"], registry=r)
        self.pending = Gauge(p + "pending", "Completions in hand, running and waiting.", registry=r)
        self.writing = Gauge(p + "writing", "Requests in hand that add, list or export events.", registry=r)
        self.batch = Histogram(
            p + "batch_rows", "Calls that ran together.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=r
        )
        self.tokens = Counter(p + "tokens", "Tokens read and written.", ["kind"], registry=r)
        self.cut = Counter(p + "input_tokens_cut", "Tokens of requests that did not fit.", registry=r)
        self.dropped = Counter(p + "items_dropped", "History items beyond the plug's limit.", registry=r)
        self.cancelled = Counter(p + "cancelled", "Completions whose client went away.", registry=r)
        self.events = Counter(p + "events", "History events added and deleted.", ["what"], registry=r)
