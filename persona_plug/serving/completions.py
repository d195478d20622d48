"""A completion in OpenAI's shape, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from starlette.types import Send

from persona_plug.data.rows import json_line
from persona_plug.serving.auth import store_key
from persona_plug.serving.engine import Delta
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Gateway, Prepared
from persona_plug.serving.schema import ChatRequest, CompletionRequest
from persona_plug.serving.streaming import send_json

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
        self.created, self.begun = int(time.time()), time.monotonic()
        self.key = None if body.user is None else store_key(tenant, body.user)
        if self.key is not None:
            told["user"] = gateway.hash("user", self.key)

    async def run(self, send: Send) -> None:
        """Send the whole answer."""
        prepared = await self.gateway.prepare(self.body, self.tenant)
        tokens = sum(one.call.prompt_tokens + one.call.max_tokens for one in prepared)
        if tokens > self.gateway.limits.tokens:
            message = (
                f"prompts and answers would have {tokens} tokens, {self.gateway.limits.tokens} at most; ask for less"
            )
            raise ApiError(400, message, "too_many_tokens", "max_tokens")
        with self.gateway.tokens.take(self.tenant, tokens):
            await (self._stream if self.body.stream else self._whole)(prepared, send)

    async def _whole(self, prepared: Sequence[Prepared], send: Send) -> None:
        tasks = [asyncio.ensure_future(self.gateway.generate(one)) for one in prepared]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        await self._finish(prepared, [(a.text, a.tokens, a.finish) for a in answers])
        choices = []
        for index, answer in enumerate(answers):
            said: dict[str, Any] = {"text": answer.text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": answer.finish})
        kind = "chat.completion" if self.chat else "text_completion"
        tokens = sum(answer.tokens for answer in answers)
        told = {"usage": _usage(prepared, tokens), "persona_plug": prepared[0].info}
        await send_json(send, _json(self._frame(kind, choices, **told)))

    async def _stream(self, prepared: Sequence[Prepared], send: Send) -> None:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        empty = {"usage": None} if self.body.usage_in_stream else {}

        async def event(choices: list[dict[str, Any]], **more: Any) -> None:  # noqa: ANN401
            data = b"data: " + _json(self._frame(kind, choices, **{**empty, **more})) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        def choice(index: int, text: str | None, finish: str | None) -> dict[str, Any]:
            said: Mapping[str, Any] = {"text": text or ""}
            if self.chat:
                said = {"delta": {} if text is None else {"content": text}}
            return {"index": index, **said, "logprobs": None, "finish_reason": finish}

        written = [("", 0, "") for _ in prepared]
        started = False
        async with aclosing(self._merged(prepared)) as pieces:
            async for index, delta in pieces:
                if not started:  # only now: until the engine takes the request, a refusal still has its status
                    started = True
                    self.gateway.metrics.first.observe(time.monotonic() - self.begun)
                    await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    for at in range(len(prepared) if self.chat else 0):
                        await event([{**choice(at, "", None), "delta": {"role": "assistant", "content": ""}}])
                text, tokens, _ = written[index]
                written[index] = (text + delta.text, tokens + delta.tokens, delta.finish or "")
                if delta.text:
                    await event([choice(index, delta.text, None)])
                if delta.finish:
                    if all(finish for _, _, finish in written):
                        await self._finish(prepared, written)
                    await event([choice(index, None, delta.finish)], persona_plug=prepared[index].info)
        if self.body.usage_in_stream:
            await event([], usage=_usage(prepared, sum(tokens for _, tokens, _ in written)))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _merged(self, prepared: Sequence[Prepared]) -> AsyncGenerator[tuple[int, Delta]]:
        """Give the pieces of all answers as they come, each with its answer's index."""
        if len(prepared) == 1:
            async with aclosing(self.gateway.stream(prepared[0])) as pieces:
                async for delta in pieces:
                    yield 0, delta
            return
        queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async with aclosing(self.gateway.stream(prepared[index])) as pieces:
                    async for delta in pieces:
                        queue.put_nowait((index, delta))
                queue.put_nowait(None)
            except Exception as exc:
                queue.put_nowait(exc)

        tasks = [asyncio.ensure_future(pump(index)) for index in range(len(prepared))]
        try:
            left = len(tasks)
            while left:
                got = await queue.get()
                if isinstance(got, Exception):
                    raise got
                if got is None:
                    left -= 1
                else:
                    yield got
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)

    def _frame(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:  # noqa: ANN401
        named = {"id": self.id, "object": kind, "created": self.created, "model": self.gateway.settings.model}
        return {**named, "choices": choices, **more}

    async def _finish(self, prepared: Sequence[Prepared], written: Sequence[tuple[str, int, str | None]]) -> None:
        """Note what the log may hold, and remember the answers for the case that one is accepted.

        The first has the completion's id; the others have it with their index behind.
        """
        usage = _usage(prepared, sum(tokens for _, tokens, _ in written))
        self.told |= {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
        self.told |= {"soft_tokens": usage["prompt_tokens_details"]["soft_tokens"], "finish": written[0][2]}
        self.told |= prepared[0].info
        if self.key is not None:
            ids = [self.id if index == 0 else f"{self.id}-{index}" for index in range(len(prepared))]
            await self.gateway.remember(prepared, ids, [text for text, _, _ in written], self.key)


def _usage(prepared: Sequence[Prepared], tokens: int) -> dict[str, Any]:
    """Return OpenAI's usage object; soft tokens are positions of the prompt, and named."""
    read = sum(one.call.prompt_tokens for one in prepared)
    return {
        "prompt_tokens": read,
        "completion_tokens": tokens,
        "total_tokens": read + tokens,
        "prompt_tokens_details": {"cached_tokens": 0, "soft_tokens": sum(len(one.call.soft) for one in prepared)},
    }


def _json(value: Any) -> bytes:  # noqa: ANN401
    return json_line(value, compact=True).encode()
