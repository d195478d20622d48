"""A completion in OpenAI's shape, whole or as a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Any

from starlette.types import Send

from persona_plug.serving.auth import store_key
from persona_plug.serving.gateway import Gateway, Prepared
from persona_plug.serving.schema import ChatRequest, CompletionRequest

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # a proxy in between must not wait for the end
]


class Completion:
    """Answers one request: prepares it, has it written, and sends what OpenAI's API would."""

    def __init__(
        self, gateway: Gateway, body: ChatRequest | CompletionRequest, tenant: str, told: dict[str, Any]
    ) -> None:
        """Take a request.

        Args:
            gateway: The gateway.
            body: The request.
            tenant: Whose key it came with.
            told: Filled with what the log may hold.
        """
        self.gateway, self.body, self.tenant, self.told = gateway, body, tenant, told
        self.chat = isinstance(body, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(16)
        self.created, self.begun = int(time.time()), gateway.memory.clock()
        if body.user is not None:
            told["user"] = gateway.hash("user", store_key(tenant, body.user))

    async def run(self, send: Send) -> None:
        """Send the whole answer."""
        prepared = await self.gateway.prepare(self.body, self.tenant)
        if self.body.stream:
            await self._stream(prepared, send)
        else:
            await self._whole(prepared, send)

    async def _whole(self, prepared: Prepared, send: Send) -> None:
        async with aclosing(self.gateway.write(prepared, streams=False)) as pieces:
            delta = await anext(pieces)
        self._finish(prepared, delta.text, delta.tokens, delta.finish)
        if self.chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": delta.text, "refusal": None}}
        else:
            said = {"text": delta.text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": delta.finish}
        kind = "chat.completion" if self.chat else "text_completion"
        content = _json(self._frame(kind, [choice], usage=prepared.usage(delta.tokens), persona_plug=prepared.info))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    async def _stream(self, prepared: Prepared, send: Send) -> None:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        empty = {"usage": None} if self.body.usage_in_stream else {}

        async def event(choices: list[dict[str, Any]], **more: Any) -> None:  # noqa: ANN401
            data = b"data: " + _json(self._frame(kind, choices, **{**empty, **more})) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        def choice(text: str | None, finish: str | None) -> dict[str, Any]:
            said: Mapping[str, Any] = {"text": text or ""}
            if self.chat:
                said = {"delta": {} if text is None else {"content": text}}
            return {"index": 0, **said, "logprobs": None, "finish_reason": finish}

        text, tokens, started = "", 0, False
        async with aclosing(self.gateway.write(prepared, streams=True)) as pieces:
            async for delta in pieces:
                if not started:  # only now: until the engine takes the request, a refusal still has its status
                    started = True
                    self.gateway.metrics.first.observe(self.gateway.memory.clock() - self.begun)
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    if self.chat:
                        await event([{**choice("", None), "delta": {"role": "assistant", "content": ""}}])
                text, tokens = text + delta.text, tokens + delta.tokens
                if delta.text:
                    await event([choice(delta.text, None)])
                if delta.finish:
                    self._finish(prepared, text, tokens, delta.finish)
                    await event([choice(None, delta.finish)], persona_plug=prepared.info)
        if self.body.usage_in_stream:
            await event([], usage=prepared.usage(tokens))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:  # noqa: ANN401
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.gateway.settings.model}
        return {**named, "choices": choices, **more}

    def _finish(self, prepared: Prepared, text: str, tokens: int, finish: str | None) -> None:
        """Note what the log may hold, and remember the answer for the case that it is accepted."""
        info, call = prepared.info, prepared.call
        self.told |= {"prompt_tokens": call.prompt_tokens, "soft_tokens": len(call.soft), "completion_tokens": tokens}
        self.told |= {"finish": finish, **info}
        if self.body.user is not None and text:
            key = store_key(self.tenant, self.body.user)
            self.gateway.memory.keep(self.id, key, prepared.request, text, self.begun)


def _json(value: Any) -> bytes:  # noqa: ANN401
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
