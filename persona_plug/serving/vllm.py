"""A vLLM server behind a plug, for decoder-only LLMs (in one process: `persona_plug.serving.offline`).

A whole prompt is sent as embeddings: the LLM's own of the ids around the soft tokens, and these. vLLM then sees neither
text nor ids, applies no chat template of its own, and its greedy text is that of `plug.generate`. `VllmServer.chat`
sends the soft tokens alone and leaves template and tokenizer to the server.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_plug.errors import ConfigError, DataError, first_line
from persona_plug.export import dense
from persona_plug.generation import is_text_loop
from persona_plug.serving.engine import Answer, Call, Delta, EngineError
from persona_plug.serving.vllm_request import MEMORY, WORDS_FOLDER, WORDS_LOGITS, Sampling, packed_words, prompt_embeds

if TYPE_CHECKING:
    import httpx

    from persona_plug.plug import PersonaPlug


class VllmServer:
    """Client of `vllm serve MODEL --enable-prompt-embeds`.

    Every request has a salt. vLLM reuses prefixes among requests of one salt alone, so a salt must be one user's: else
    the time to the first token tells a user what others have asked. Without a salt a request gets one of its own,
    because nobody knows whether two unnamed requests are the same person's.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        *,
        width: int | None = None,
        timeout: float = 120.0,
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            url: Address of the server, with or without `/v1`.
            model: Name it serves the LLM under; default the only one that it lists.
            api_key: Sent as a bearer token.
            width: H of the LLM; tensors of another are refused here, else by the server.
            timeout: Seconds without a byte after which a request fails.

        Raises:
            ConfigError: The address is none, or httpx is not installed.
        """
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url={url!r:.80} is no address of a vLLM server; give one like http://localhost:8000")
        if find_spec("httpx") is None:
            raise ConfigError("a vLLM server is asked through httpx: pip install 'persona-plug[serve]'")
        import httpx

        self.url, self.model, self.width = url.rstrip("/").removesuffix("/v1"), model, width
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(timeout, connect=10, pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def complete(self, embeds: Tensor, sampling: Sampling, salt: str = "") -> Answer:
        """Answer a whole prompt given as embeddings (n, H).

        Args:
            embeds: See `prompt_embeds`.
            sampling: How tokens are chosen.
            salt: Keyed hash of whose request it is; a new one where it is empty.

        Raises:
            DataError: The tensor is not dense, finite and (n, H).
            EngineError: The server cannot be reached, refuses, or breaks off.
        """
        return await self._answer("completions", self._prompt(embeds), sampling, salt)

    def stream(self, embeds: Tensor, sampling: Sampling, salt: str = "") -> AsyncGenerator[Delta]:
        """Answer as `complete` does, piece by piece; leaving early ends the work on the server."""
        return self._stream("completions", self._prompt(embeds), sampling, salt)

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        soft: Tensor,
        sampling: Sampling,
        salt: str = "",
        placement: str = "suffix",
    ) -> Answer:
        """Answer a conversation with soft tokens (S, H) in its last user message, through the server's chat template.

        Not exactly what the plug was trained with: for most templates the server puts a line break between text and
        soft tokens, and what people write out like a special token is one. `complete` has neither.

        Args:
            messages: `role` and `content` (texts) of each message.
            soft: Soft tokens of the user and request.
            sampling: How tokens are chosen.
            salt: See `complete`.
            placement: The plug's: `suffix` (behind the text) or `prefix`.

        Raises:
            DataError: There is no user message, or the tensor is not dense, finite and (S, H).
            EngineError: The server cannot be reached, refuses, or breaks off.
        """
        return await self._answer("chat/completions", self._messages(messages, soft, placement), sampling, salt)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        soft: Tensor,
        sampling: Sampling,
        salt: str = "",
        placement: str = "suffix",
    ) -> AsyncGenerator[Delta]:
        """Answer as `chat` does, piece by piece."""
        return self._stream("chat/completions", self._messages(messages, soft, placement), sampling, salt)

    async def models(self) -> dict[str, int]:
        """Return the LLMs that the server lists, each with its greatest length in tokens.

        Raises:
            EngineError: The server cannot be reached or refuses.
        """
        return {m["id"]: m.get("max_model_len") or 0 for m in await self._listed() if not m.get("parent")}

    async def find_adapter(self, name: str = "") -> str:
        """Return the LoRA adapter that the server lists, by its name where there are several.

        Raises:
            ConfigError: There is none, or not this one, or several and no name.
            EngineError: The server cannot be reached or refuses.
        """
        found = [m["id"] for m in await self._listed() if m.get("parent")]
        if name in found or (len(found) == 1 and not name):
            return name or str(found[0])
        if not found:
            raise ConfigError(
                f"{self.url} serves no LoRA adapter, and this plug has one: start vLLM with --enable-lora "
                "--lora-modules NAME=PLUG/adapter"
            )
        raise ConfigError(f"{self.url} serves the adapters {', '.join(found)}; choose this plug's with adapter=")

    async def _listed(self) -> list[dict[str, Any]]:
        async with self._sent("GET", "models", None) as response:
            return [dict(card) for card in json.loads(await response.aread())["data"]]

    async def check_words(self, embeds: Tensor) -> None:
        """Refuse a server that would ignore memories of words: one that reads them refuses this broken one.

        Args:
            embeds: Any prompt (n, H).

        Raises:
            ConfigError: The server took it.
            EngineError: The server cannot be reached.
        """
        try:
            await self.complete(embeds, Sampling(1, memory="?"))
        except EngineError as exc:
            if MEMORY in str(exc):
                return
            raise
        raise ConfigError(
            f"vLLM at {self.url} reads no memory of words: start it with {WORDS_FOLDER}=PLUG and "
            f"--logits-processors {WORDS_LOGITS}"
        )

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()

    def _prompt(self, embeds: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": self._packed(embeds)}

    def _messages(self, messages: Sequence[Mapping[str, str]], soft: Tensor, placement: str) -> dict[str, Any]:
        users = [i for i, message in enumerate(messages) if message["role"] == "user"]
        if not users:
            raise DataError("no user message to put the soft tokens into; give one with role 'user'")
        made: list[dict[str, Any]] = [dict(message) for message in messages]
        pieces = [
            {"type": "text", "text": made[users[-1]]["content"]},
            {"type": "prompt_embeds", "data": self._packed(soft)},
        ]
        made[users[-1]]["content"] = pieces if placement == "suffix" else pieces[::-1]
        return {"messages": made}

    def _packed(self, tensor: Tensor) -> str:
        """Return a tensor as vLLM reads it: base64 of what `torch.save` writes."""
        buffer = io.BytesIO()
        torch.save(dense(tensor, self.width or tensor.shape[-1]), buffer)
        return base64.b64encode(buffer.getvalue()).decode()

    async def _body(self, prompt: dict[str, Any], sampling: Sampling, salt: str) -> dict[str, Any]:
        if self.model is None:
            names = list(await self.models())
            if len(names) != 1:
                raise ConfigError(f"{self.url} serves {', '.join(names) or 'no model'}; choose one with model=")
            self.model = names[0]
        extra = {"vllm_xargs": {MEMORY: sampling.memory}} if sampling.memory else {}
        return {
            **prompt,
            **sampling.fields(),
            **extra,
            "model": sampling.adapter or self.model,
            "cache_salt": salt or secrets.token_hex(16),
        }

    async def _answer(self, route: str, prompt: dict[str, Any], sampling: Sampling, salt: str) -> Answer:
        async with self._sent("POST", route, await self._body(prompt, sampling, salt)) as response:
            told = json.loads(await response.aread())
            choice, tokens = told["choices"][0], told["usage"]["completion_tokens"]
            text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
            return Answer(text.strip(), tokens, _finish(choice["finish_reason"]))

    async def _stream(self, route: str, prompt: dict[str, Any], sampling: Sampling, salt: str) -> AsyncGenerator[Delta]:
        body = await self._body(prompt, sampling, salt)
        body |= {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
        held, begun, counted, told = "", False, 0, 0
        async with self._sent("POST", route, body) as response:
            async for line in _lines(response):
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise EngineError(f"vLLM broke off: {first_line(chunk['error'].get('message'))[:200]}")
                if not chunk["choices"]:
                    continue
                choice, counted = chunk["choices"][0], (chunk.get("usage") or {}).get("completion_tokens", counted)
                piece = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
                # Pieces add up to the stripped text: white space goes out with the word behind it, or not at all.
                text = held + piece if begun else piece.lstrip()
                certain = text.rstrip()
                held, begun = text[len(certain) :], begun or bool(certain)
                if choice["finish_reason"]:
                    yield Delta(certain, counted - told, _finish(choice["finish_reason"]))
                    return
                if certain:
                    yield Delta(certain, counted - told)
                    told = counted
        raise EngineError("vLLM broke off before the answer was written; ask again")

    @asynccontextmanager
    async def _sent(self, method: str, route: str, body: dict[str, Any] | None) -> AsyncIterator[httpx.Response]:
        """Send a request and give its response, if that is none of an error."""
        import httpx

        try:
            async with self.client.stream(method, f"/v1/{route}", json=body) as response:
                if response.status_code != 200:
                    raise EngineError(_refusal(response.status_code, await response.aread()))
                yield response
        except httpx.TimeoutException as exc:
            raise EngineError(f"vLLM at {self.url} did not answer in time; ask again, or raise timeout") from exc
        except httpx.TransportError as exc:
            raise EngineError(f"vLLM at {self.url} cannot be reached ({type(exc).__name__}); is it running?") from exc
        except (ValueError, LookupError, TypeError) as exc:
            raise EngineError(f"{self.url} does not answer as vLLM does ({type(exc).__name__}); check the url") from exc


class VllmEngine:
    """The gateway's `Engine` on a vLLM server; batching and queueing are the server's."""

    def __init__(self, plug: PersonaPlug, server: VllmServer, adapter: str = "") -> None:
        """Join a plug, whose LLM serves for the embeddings of ids alone, and a server of the same LLM.

        Args:
            plug: The plug.
            server: The server.
            adapter: What the server calls the plug's LoRA adapters; default the only ones that it has.

        Raises:
            ConfigError: The LLM is an encoder-decoder.
        """
        prompt_embeds(plug, [], [])
        self.plug, self.server, self.adapter = plug, server, adapter
        self.tokenizer = copy.deepcopy(plug.tokenizer)  # a fast tokenizer must not serve two threads
        self._words_checked, self._adapter_found = plug.recollection is None, plug.adapters is None

    async def stream(self, call: Call) -> AsyncGenerator[Delta]:
        """See `Engine.stream`."""
        embeds, sampling = await self._embeds(call), await self._sampling(call)
        text = ""
        async with contextlib.aclosing(self.server.stream(embeds, sampling, call.salt)) as deltas:
            async for delta in deltas:
                text += delta.text
                if delta.finish is None and call.stop_loops and is_text_loop(text, self.tokenizer):
                    yield replace(delta, finish="stop")
                    return
                yield delta

    async def generate(self, call: Call) -> Answer:
        """See `Engine.generate`; an answer whose loops are to end is watched while it is written."""
        if call.stop_loops:
            async with contextlib.aclosing(self.stream(call)) as deltas:
                pieces = [delta async for delta in deltas]
            text, tokens = "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces)
            return Answer(text, tokens, pieces[-1].finish or "stop")
        return await self.server.complete(await self._embeds(call), await self._sampling(call), call.salt)

    async def close(self) -> None:
        """See `Engine.close`; the server goes on."""
        await self.server.close()

    async def _embeds(self, call: Call) -> Tensor:
        embeds = prompt_embeds(self.plug, [call.parts], [call.soft])[0]
        if call.reader is not None and not self._words_checked:
            await self.server.check_words(embeds[:1])
            self._words_checked = True
        return embeds

    async def _sampling(self, call: Call) -> Sampling:
        if not (self._adapter_found or call.plain):
            self.adapter, self._adapter_found = await self.server.find_adapter(self.adapter), True
        return Sampling(
            call.max_tokens,
            call.temperature,
            call.top_p,
            call.seed,
            call.stop,
            packed_words(call.reader),
            "" if call.plain or self.plug.adapters is None else self.adapter,
            call.penalties,
        )


async def _lines(response: httpx.Response) -> AsyncIterator[str]:
    """Give the lines of a stream; httpx's own would end one at a line separator inside a text."""
    rest = b""
    async for block in response.aiter_bytes():
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.decode()


def _finish(reason: str | None) -> Any:  # noqa: ANN401
    if reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended the answer for the reason {reason!r}; ask again")
    return reason


def _refusal(status: int, content: bytes) -> str:
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = content.decode(errors="replace")
    return f"vLLM refused with status {status}: {first_line(message)[:200]}"
