"""The gateway's routes: OpenAI's completions and models, users' histories, probes and metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import Send

from persona_plug import __version__
from persona_plug.serving import schema, users
from persona_plug.serving.auth import store_key
from persona_plug.serving.completions import Completion
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Backend, Gateway, Settings
from persona_plug.serving.guard import Guard, error_response
from persona_plug.serving.logs import Log
from persona_plug.serving.openapi import openapi, page
from persona_plug.serving.running import Running
from persona_plug.serving.streaming import send_json, send_pieces

_TYPES = frozenset({"str", "list", "int", "float", "bool"})  # parts of pydantic's locations that are no fields


def create_app(settings: Settings, load: Callable[[], Backend], log: Log | None = None) -> FastAPI:
    """Make the gateway as an ASGI app.

    Args:
        settings: Name of the model, keys, limits.
        load: Loads plug, store and engine when the app starts, in a thread; until it is done /readyz says no.
        log: Where log lines go; default standard error.

    Returns:
        The app; its `state.gateway` is the `Gateway`.

    Raises:
        ConfigError: The key file cannot be used.
    """
    gateway = Gateway(settings, load, log)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        loading = asyncio.create_task(gateway.start())
        yield
        await loading
        await gateway.close()

    app = FastAPI(title="persona_plug", version=__version__, lifespan=life, docs_url=None, redoc_url=None)
    app.openapi = partial(openapi, app)  # type: ignore[method-assign]
    app.state.gateway = gateway
    app.add_middleware(Guard, gateway=gateway)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    _add_completions(app, gateway)
    _add_users(app, gateway)
    _add_probes(app, gateway)
    return app


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: the key's tenant, and the user of the path (if there is one) with their name in the store."""

    tenant: str
    user: str
    told: dict[str, Any]

    @property
    def key(self) -> str:
        """The user's name in the store."""
        return store_key(self.tenant, self.user)


async def _asker(request: Request) -> Asker:
    asker = Asker(request.state.key.tenant, "", request.state.told)
    if "user" in request.path_params:
        asker = replace(asker, user=_name(request.path_params["user"], "user"))
        asker.told["user"] = request.app.state.gateway.hash("user", asker.key)
    return asker


Asking = Annotated[Asker, Depends(_asker)]
UserId = Annotated[str, Path(description="The user's id, percent-encoded.")]
EventId = Annotated[str, Path(description="The event's id, percent-encoded.")]
EXPORT_SECONDS = 3600


def _name(part: str, param: str) -> str:
    """Return a part of the path as it was meant."""
    try:
        return schema.check_id(unquote(part, errors="strict"))
    except ValueError as exc:  # UnicodeDecodeError is one
        raise ApiError(400, f"{param} must be 1 to {schema.MAX_ID} bytes of UTF-8 without NUL", param=param) from exc


def _add_completions(app: FastAPI, gateway: Gateway) -> None:
    def completed(body: schema.ChatRequest | schema.CompletionRequest, asker: Asker) -> Response:
        work = Completion(gateway, body, asker.tenant, asker.told).run
        return Running(gateway, work, asker.tenant, events=body.stream)

    @app.post("/v1/chat/completions")
    async def chat(body: schema.ChatRequest, asker: Asking) -> Response:
        """Answer a conversation in the manner of `user`."""
        return completed(body, asker)

    @app.post("/v1/completions")
    async def complete(body: schema.CompletionRequest, asker: Asking) -> Response:
        """Answer a request in the manner of `user`."""
        return completed(body, asker)

    def model() -> dict[str, Any]:
        return {"id": gateway.settings.model, "object": "model", "created": started, "owned_by": "persona_plug"}

    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name}")
    async def model_by_name(name: str) -> dict[str, Any]:
        """Describe the model."""
        gateway.check_model(_name(name, "model"))
        return model()


def _add_users(app: FastAPI, gateway: Gateway) -> None:
    def told(added: int, count: int) -> bytes:
        return json.dumps({"object": "user.events", "added": added, "known": count - added}).encode()

    @app.post("/v1/users/{user}/events")
    async def add(user: UserId, body: schema.EventsRequest, asker: Asking) -> Response:
        """Add events to a user's history; an event that is there already adds nothing."""

        async def work(send: Send) -> None:
            if body.accept is None:
                items = body.items()
                await send_json(send, told(await users.add(gateway, asker.key, items), len(items)))
            else:
                await send_json(send, told(await users.accept(gateway, asker.key, body.accept), 1))

        return Running(gateway, work, asker.tenant, gateway.writes)

    @app.get("/v1/users/{user}/events")
    async def events(user: UserId, asker: Asking, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Response:
        """List a user's newest events, oldest first; texts only where the store keeps them."""

        async def work(send: Send) -> None:
            await send_pieces(send, users.listed(gateway, asker.key, limit), "application/json")

        return Running(gateway, work, asker.tenant, gateway.writes)

    @app.put("/v1/users/{user}/events/{event}")
    async def correct(user: UserId, event: EventId, body: schema.EventBody, asker: Asking) -> Response:
        """Put a corrected event in the place of an event."""
        ident = _name(event, "event")

        async def work(send: Send) -> None:
            await users.replace(gateway, asker.key, ident, body.model_dump(exclude_none=True))
            await send_json(send, json.dumps({"id": ident, "object": "user.event", "replaced": True}).encode())

        return Running(gateway, work, asker.tenant, gateway.writes)

    @app.delete("/v1/users/{user}/events/{event}")
    async def delete_event(user: UserId, event: EventId, asker: Asking) -> dict[str, Any]:
        """Delete one event."""
        ident = _name(event, "event")
        if not await users.delete(gateway, asker.key, ident):
            raise ApiError(404, "this user has no such event", "event_not_found")
        return {"id": ident, "object": "user.event.deleted", "deleted": True}

    @app.delete("/v1/users/{user}")
    async def forget(user: UserId, asker: Asking) -> dict[str, Any]:
        """Forget a user: events, vectors, and completions that could still be accepted."""
        events = await users.forget(gateway, asker.key)
        return {"id": asker.user, "object": "user.deleted", "deleted": True, "events": events}

    @app.get("/v1/users/{user}/export")
    async def export(user: UserId, asker: Asking) -> Response:
        """Give everything that is held about a user, as JSONL."""

        async def work(send: Send) -> None:
            await send_pieces(send, users.exported(gateway, asker.key, asker.user), "application/x-ndjson")

        return Running(gateway, work, asker.tenant, gateway.writes, seconds=EXPORT_SECONDS)


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    def probe(path: str) -> Callable[[Any], Any]:
        """Have a path answered to GET and HEAD."""

        def add(answer: Any) -> Any:  # noqa: ANN401
            app.head(path, operation_id=f"head_{path[1:]}")(answer)
            return app.get(path, operation_id=path[1:])(answer)

        return add

    @probe("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @probe("/readyz")
    async def readyz() -> Response:
        """Say whether requests can be answered: the models are loaded, and the store answers."""
        state = await gateway.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @probe("/metrics")
    async def metrics() -> Response:
        """Give Prometheus metrics."""
        return PlainTextResponse(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        """Show the routes, and a request to try."""
        return HTMLResponse(page(app, gateway.settings.model))


async def _answer_invalid(_: Request, exc: Any) -> Response:  # noqa: ANN401
    """Name the field; pydantic's own answer would repeat what was sent."""
    first = max(exc.errors(), key=lambda error: len(error["loc"]))  # of several shapes the one that was nearly met
    names = [str(p) for p in first["loc"][1:] if isinstance(p, int) or (re.fullmatch("[a-z_]+", p) and p not in _TYPES)]
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, "the body is no JSON", "invalid_json"))
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        known = name in schema.NEUTRAL or name in schema.ANSWER_FIELDS
        message = (
            f"{name:.64} is not implemented here; leave it out" if known else f"{name:.64} is no field of this API"
        )
        return error_response(ApiError(400, message, "unsupported_field", ".".join([*names[:-1], name])[:200]))
    param = ".".join(names) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return error_response(ApiError(400, message, "invalid_value", param))


async def _answer_http(_: Request, exc: Any) -> Response:  # noqa: ANN401
    return error_response(ApiError(exc.status_code, exc.detail, headers=exc.headers))
