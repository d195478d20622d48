"""Connections that say nothing, or very slowly, are ended; and they never take the place of those that ask."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

PATIENCE = 10.0  # seconds in which a whole head must come
CONNECTIONS = 1000  # open at once; far above what can be answered, and below what a process may hold


class PatientProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol with a clock on the heads of requests, the first one included.

    Where connections run short, the one that has been silent longest is closed for a new one.
    """

    silent: dict[PatientProtocol, asyncio.TimerHandle] = {}  # noqa: RUF012 (all of a process, the longest silent first)

    def connection_made(self, transport: Any) -> None:  # noqa: ANN401
        """Take a connection."""
        super().connection_made(transport)
        if len(self.connections) >= CONNECTIONS and self.silent:
            next(iter(self.silent)).end()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read; the clock runs from the first byte of a head to its last."""
        super().data_received(data)
        if self._waits_for_head():
            self._watch()
        else:
            self._unwatch()

    def _waits_for_head(self) -> bool:
        return self.cycle is None or bool(self.cycle.response_complete)

    def _watch(self) -> None:
        if self not in self.silent:
            self.silent[self] = asyncio.get_running_loop().call_later(PATIENCE, self.end)

    def _unwatch(self) -> None:
        if (timer := self.silent.pop(self, None)) is not None:
            timer.cancel()

    def end(self) -> None:
        """Close the connection, unless a request has come meanwhile."""
        self._unwatch()
        if self._waits_for_head() and not self.transport.is_closing():
            self.transport.close()
