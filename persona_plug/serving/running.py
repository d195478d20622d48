"""Work that takes long: done while the client is there, within its time, in one of the server's places."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from persona_plug.serving.engine import EngineError
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Gateway
from persona_plug.serving.limits import Overloaded, Slots


class Running(Response):
    """Runs `work(send)`, which sends the answer, and cancels it when the client goes away or its time is over.

    The time includes what the client takes to read: one that does not read keeps no place.
    """

    def __init__(
        self,
        gateway: Gateway,
        work: Callable[[Send], Awaitable[None]],
        tenant: str,
        slots: Slots | None = None,
        seconds: float | None = None,
        events: bool = False,
    ) -> None:
        """Prepare the answer; nothing runs before it is called.

        Args:
            gateway: The gateway.
            work: Sends the answer.
            tenant: Whose place it takes.
            slots: The places; default those of completions.
            seconds: Its time; default a completion's.
            events: Whether the answer is a stream of events, whose last one may tell of an error.
        """
        super().__init__()
        self.gateway, self.work, self.tenant, self.events = gateway, work, tenant, events
        self.slots, self.seconds = slots or gateway.slots, seconds or gateway.limits.seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer.

        Raises:
            ApiError: 429 without a free place, 504 after too long, 503 when the engine fails or the server ends. Once a
                stream of events has begun the error is its last event instead.
        """
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            with self.slots.take(self.tenant):
                await self._run(receive, noting)
            return
        except Overloaded:
            error = ApiError(429, "as much is in hand as may be; try again", "overloaded", headers={"Retry-After": "1"})
        except TimeoutError:
            message = f"not answered within {self.seconds:g} s; ask for less, or later"
            error = ApiError(504, message, "timeout")
        except EngineError as exc:
            self.gateway.log.event("engine", message=str(exc))
            error = ApiError(503, "the engine could not answer; ask again", "engine", headers={"Retry-After": "1"})
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            error = ending()
        if not begun:
            raise error
        scope["state"]["told"]["error"] = error.code
        self.gateway.metrics.refused.labels(error.code).inc()
        if not self.events:
            return  # the server closes the connection of an answer that is not whole
        with contextlib.suppress(TimeoutError):  # of a client that does not read
            async with asyncio.timeout(1):
                body = f"data: {json.dumps(error.body())}\n\n".encode()
                await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _run(self, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self.seconds):
            work = asyncio.ensure_future(self.work(send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    work.result()
                else:
                    self.gateway.metrics.cancelled.inc()
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)


def ending() -> ApiError:
    """Return the error of what a server that ends can no longer finish."""
    return ApiError(503, "the server is shutting down; ask again", "shutting_down", headers={"Retry-After": "5"})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
