"""The gateway's OpenAPI document, and a page that shows it without fetching anything from elsewhere."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REASONS = {
    "400": "The request cannot be used; `param` names the field.",
    "401": "No valid API key.",
    "403": "Without keys only localhost is served.",
    "404": "There is no such model, event or completion.",
    "408": "The body did not arrive in time.",
    "409": "The user has as many events as are kept, or was forgotten meanwhile.",
    "413": "The body is too large.",
    "429": "The key asks too often, or as much is in hand as may be; see Retry-After.",
    "500": "An internal error.",
    "503": "Loading, shutting down, or the engine or the store does not answer; see Retry-After.",
    "504": "Not answered in time.",
}
ALWAYS = ("401", "403", "429", "500", "503")
OBJECT: Mapping[str, Any] = {"application/json": {"schema": {"type": "object"}}}
JSON_LINES = {"application/x-ndjson": {"schema": {"type": "string"}}}
STREAM = {**OBJECT, "text/event-stream": {"schema": {"type": "string"}}}
METRICS = {"text/plain": {"schema": {"type": "string"}}}
PROBES = ("/healthz", "/readyz", "/metrics")


def openapi(app: FastAPI) -> dict[str, Any]:
    """Return the document of what is taken and sent: FastAPI's own, with our errors in place of its."""
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = ERROR
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, method, operation in _operations(made):
            operation["responses"] = _responses(path, method, "requestBody" in operation)
            if path not in PROBES:
                operation["security"] = [{"key": []}, {}]
        app.openapi_schema = made
    return app.openapi_schema


def _operations(document: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _responses(path: str, method: str, body: bool) -> dict[str, Any]:
    """Return the answers of a route."""
    if path in PROBES:
        content = METRICS if path == "/metrics" else OBJECT
        told = {"200": {"description": "As it should be.", "content": content}}
        if path == "/readyz":
            told["503"] = {"description": "Loading, or the store does not answer.", "content": OBJECT}
        return {**told, "403": _error("403")}
    content = OBJECT
    if path.endswith("/export"):
        content = JSON_LINES
    elif path.endswith("/completions"):
        content = STREAM
    codes = {*ALWAYS}
    if body:
        codes |= {"400", "408", "413", "504"}
    if "{" in path:
        codes |= {"400"}
    if path.endswith(("/completions", "{event}", "{name}")) or (path.endswith("/events") and body):
        codes |= {"404"}
    if body and "/users/" in path:
        codes |= {"409"}
    if method == "get" and "/users/" in path:
        codes |= {"504"}
    return {"200": {"description": "Done.", "content": content}, **{code: _error(code) for code in sorted(codes)}}


def _error(code: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Error"}
    told: dict[str, Any] = {"description": REASONS[code], "content": {"application/json": {"schema": schema}}}
    if code in ("429", "503"):
        told["headers"] = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
    if code == "401":
        told["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}}}
    return told


def page(app: FastAPI, model: str) -> str:
    """Return a page of the routes and a request to try."""
    rows = [
        f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{html.escape(operation.get('description', ''))}"
        for path, method, operation in _operations(openapi(app))
        if method != "head"
    ]
    body = html.escape(f'{{"model": "{model}", "user": "ann", "messages": [{{"role": "user", "content": "Hello"}}]}}')
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>persona_plug</title>'
        f"<h1>persona_plug</h1><p>Serves <code>{html.escape(model)}</code> with OpenAI's API. "
        '<a href="/openapi.json">openapi.json</a> describes it.'
        f"<pre>curl ADDRESS/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'</pre>"
        f"<table>{''.join(rows)}</table></html>"
    )
