"""The gateway's routes: OpenAI's completions and models, users' histories, probes and metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any
from urllib.parse import unquote

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from persona_plug import __version__
from persona_plug.serving import schema
from persona_plug.serving.auth import store_key
from persona_plug.serving.completions import Completion
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Backend, Gateway, Settings
from persona_plug.serving.guard import Guard, error_response
from persona_plug.serving.logs import Log
from persona_plug.serving.running import Running
from persona_plug.store.format import StoredHistory

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


def _name(part: str, param: str) -> str:
    """Return a part of the path as it was meant."""
    try:
        return schema.check_id(unquote(part, errors="strict"))
    except ValueError as exc:  # UnicodeDecodeError is one
        raise ApiError(400, f"{param} must be 1 to {schema.MAX_ID} bytes of UTF-8 without NUL", param=param) from exc


def _add_completions(app: FastAPI, gateway: Gateway) -> None:
    @app.post("/v1/chat/completions")
    async def chat(body: schema.ChatRequest, asker: Asking) -> Response:
        """Answer a conversation in the manner of `user`."""
        return Running(gateway, Completion(gateway, body, asker.tenant, asker.told).run)

    @app.post("/v1/completions")
    async def complete(body: schema.CompletionRequest, asker: Asking) -> Response:
        """Answer a request in the manner of `user`."""
        return Running(gateway, Completion(gateway, body, asker.tenant, asker.told).run)

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
    @app.post("/v1/users/{user}/events")
    async def add(body: schema.EventsRequest, asker: Asking) -> dict[str, Any]:
        """Add events to a user's history; an id that is there already adds nothing."""
        items = body.items() if body.accept is None else [_accepted(gateway, body.accept, asker.key)]
        added = await gateway.add(asker.key, items)
        return {"object": "user.events", "added": added, "known": len(items) - added}

    @app.get("/v1/users/{user}/events")
    async def events(asker: Asking, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> dict[str, Any]:
        """List a user's newest events, oldest first; texts only where the store keeps them."""
        held = await gateway.on_store(gateway.backend.store.read, asker.key, limit)
        return {"object": "list", "data": _events(held), "total": held.total}

    @app.delete("/v1/users/{user}/events/{event}")
    async def delete_event(event: str, asker: Asking) -> dict[str, Any]:
        """Delete one event."""
        ident = _name(event, "event")
        if not await gateway.delete(asker.key, ident):
            raise ApiError(404, "this user has no such event", "event_not_found")
        return {"id": ident, "object": "user.event.deleted", "deleted": True}

    @app.delete("/v1/users/{user}")
    async def forget(asker: Asking) -> dict[str, Any]:
        """Forget a user: events, vectors, and completions that could still be accepted."""
        events = await gateway.forget(asker.key)
        return {"id": asker.user, "object": "user.deleted", "deleted": True, "events": events}

    @app.get("/v1/users/{user}/export")
    async def export(asker: Asking) -> Response:
        """Give everything that is held about a user, as JSONL."""
        rows = await gateway.on_store(lambda: list(gateway.backend.store.export(asker.key)))

        async def lines() -> AsyncIterator[bytes]:
            for row in rows:
                yield json.dumps({**row, "user_id": asker.user}, ensure_ascii=False).encode() + b"\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")


def _accepted(gateway: Gateway, ident: str, key: str) -> dict[str, Any]:
    found = gateway.memory.find(ident, key)
    if found is None:
        message = f"no such completion of this user; one is remembered for {gateway.memory.seconds:g} s"
        raise ApiError(404, message, "completion_not_found", "accept")
    return {"input": found.request, "output": found.answer, "id": ident, "timestamp": time.time()}


def _events(held: StoredHistory) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for at, ident in enumerate(held.ids):
        texts = {} if held.texts is None else {"input": held.texts[at].input, "output": held.texts[at].output}
        rows.append({"object": "user.event", "id": ident, "timestamp": held.timestamps[at], **texts})
    return rows


def _add_probes(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        """Say whether requests can be answered."""
        ready = gateway.ready
        return JSONResponse({"status": "ready" if ready else "loading"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Give Prometheus metrics."""
        return PlainTextResponse(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)


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
