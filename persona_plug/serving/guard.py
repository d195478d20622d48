"""In front of every route: who asks, how often, how much; afterwards a log line and the metrics."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from persona_plug.errors import DataError, PersonaPlugError
from persona_plug.serving.auth import is_loopback
from persona_plug.serving.body import check_body
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Gateway
from persona_plug.serving.limits import Overloaded
from persona_plug.serving.running import ending

OPEN = frozenset({"/healthz", "/readyz", "/metrics"})  # they tell of nobody, and probes have no key
REFUSALS = frozenset(
    {
        "body_too_large", "body_too_slow", "body_too_complex", "rate_limit_exceeded", "overloaded", "timeout",
        "history_full", "shutting_down",
    }
)  # fmt: skip
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
GONE = 499  # status in logs and metrics where the client went away


class Guard:
    """ASGI middleware. The request's body is read here, so that nothing is read for whoever may not ask.

    Handlers find the key in `state["key"]`, and leave what the log shall hold in `state["told"]`. Routes are matched
    on the path as it was sent: a user's id with an encoded slash stays one part of it.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        """Wrap an app."""
        self.app, self.gateway = app, gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, request = time.monotonic(), secrets.token_hex(8)
        told: dict[str, Any] = {}
        scope["state"] = {**scope.get("state", {}), "told": told}
        scope["path"] = scope["raw_path"].decode("ascii", "replace")
        status = 0
        held = ExitStack()

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request.encode())]
            await send(message)

        try:
            with held:
                await self.app(scope, await self._admit(scope, receive, held), answer)
        except (Exception, asyncio.CancelledError) as exc:
            error = self._error(exc, request)
            told["error"] = error.code
            if not status:
                await error_response(error)(scope, receive, answer)
        finally:
            self._tell(scope, request, status or GONE, time.monotonic() - began, told)

    def _error(self, exc: BaseException, request: str) -> ApiError:
        if isinstance(exc, asyncio.CancelledError):  # the server ends, and has waited long enough
            exc = ending()
        if isinstance(exc, Overloaded):
            exc = ApiError(429, "as much is in hand as may be; try again", "overloaded", headers={"Retry-After": "1"})
        if isinstance(exc, DataError):
            exc = ApiError(400, str(exc), "invalid_value")
        if isinstance(exc, PersonaPlugError):  # of the store; it may name addresses that are not the client's affair
            self.gateway.log.failure(request, exc)
            message = f"temporarily unavailable; the server's log tells of request {request}"
            return ApiError(503, message, "unavailable", headers={"Retry-After": "5"})
        if not isinstance(exc, ApiError):
            self.gateway.log.failure(request, exc)
            return ApiError(500, f"internal error; the server's log tells of request {request}", "internal")
        if exc.code in REFUSALS:
            self.gateway.metrics.refused.labels(exc.code).inc()
        return exc

    async def _admit(self, scope: Scope, receive: Receive, held: ExitStack) -> Receive:
        """Check who asks and how often, and return a `receive` that gives the whole body at once.

        Room for the body is taken until `held` is closed.
        """
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        if self.gateway.settings.keys is None and not is_loopback(_host(headers.get(b"host", ""))):
            # A page that a browser on this machine shows could have its own name resolve to 127.0.0.1.
            raise ApiError(403, "without keys only localhost is served; ask for it by that name", "wrong_host")
        if scope["path"] in OPEN:
            return receive
        key = self.gateway.keyring.find(headers.get(b"authorization", ""))
        if key is None:
            message = "no valid API key; send `Authorization: Bearer KEY` with one made by `persona-plug keys new`"
            raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        scope["state"]["key"] = key
        if wait := self.gateway.rates.wait(key.id):
            message = f"this key may ask {self.gateway.limits.per_minute:g} times a minute; wait {wait} s"
            raise ApiError(429, message, "rate_limit_exceeded", headers={"Retry-After": str(wait)})
        announced = headers.get(b"content-length", "")
        size = int(announced) if announced.isdecimal() else self.gateway.limits.body_bytes
        if announced or b"transfer-encoding" in headers:
            held.enter_context(self.gateway.bodies.take(key.tenant, min(size, self.gateway.limits.body_bytes)))
        body = await self._body(announced, receive)
        if body:
            await check_body(body)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()  # the end of the connection
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay

    async def _body(self, announced: str, receive: Receive) -> bytes:
        limits = self.gateway.limits
        much = ApiError(413, f"the body has more than {limits.body_bytes} bytes; send less", "body_too_large")
        if announced.isdecimal() and int(announced) > limits.body_bytes:
            raise much
        body = bytearray()
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    body += message.get("body", b"")
                    if len(body) > limits.body_bytes:
                        raise much
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            message_ = f"the body did not arrive within {limits.body_seconds:g} s; send it faster"
            raise ApiError(408, message_, "body_too_slow") from None

    def _tell(self, scope: Scope, request: str, status: int, seconds: float, told: dict[str, Any]) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        metrics = self.gateway.metrics
        metrics.requests.labels(route, status).inc()
        metrics.seconds.labels(route).observe(seconds)
        if route in OPEN:
            return
        key = scope["state"].get("key")
        self.gateway.log.event(
            "request",
            request=request,
            method=scope["method"] if scope["method"] in METHODS else "other",
            route=route,
            status=status,
            ms=round(seconds * 1000, 1),
            key=key and key.id,
            **told,
        )


def _host(header: str) -> str:
    """Return the name or address in a Host header, without its port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def error_response(exc: ApiError) -> JSONResponse:
    """Return an error as OpenAI's clients expect it."""
    return JSONResponse(exc.body(), exc.status, dict(exc.headers or {}))
