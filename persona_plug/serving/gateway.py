"""What stands behind the routes: the plug and the store, each in its thread, and the engine that writes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from persona_plug.data.history import Example
from persona_plug.heads.words import WordsReader
from persona_plug.pairing import pair
from persona_plug.serving.auth import Keyring, store_key
from persona_plug.serving.engine import Call, Delta, Engine
from persona_plug.serving.errors import ApiError
from persona_plug.serving.limits import Limits, Memory, Rates, Slots
from persona_plug.serving.logs import Hasher, Log, Metrics
from persona_plug.serving.schema import ChatRequest, CompletionRequest
from persona_plug.store.batches import StoredExample

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Settings:
    """How a gateway is run.

    Attributes:
        model: Name under which the plug is asked for.
        keys: File of API keys; without it everybody is one tenant, and only this machine may ask.
        limits: What it bears.
        hash_key: Key of the hashes that stand for users in logs and cache salts; None draws one at each start.
    """

    model: str
    keys: Path | None = None
    limits: Limits = field(default_factory=Limits)
    hash_key: bytes | None = None


@dataclass(frozen=True, slots=True)
class Backend:
    """What is loaded: a plug, a store of its encoder, and an engine."""

    plug: PersonaPlug
    store: HistoryStore
    engine: Engine


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request made ready for the engine, with what has to be told of it.

    Attributes:
        call: For the engine.
        request: The text that steered the plug.
        info: The answer's `persona_plug` object.
    """

    call: Call
    request: str
    info: dict[str, Any]

    def usage(self, tokens: int) -> dict[str, Any]:
        """Return OpenAI's usage object; soft tokens are positions of the prompt, and named."""
        read, soft = self.call.prompt_tokens, len(self.call.soft)
        return {
            "prompt_tokens": read,
            "completion_tokens": tokens,
            "total_tokens": read + tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "soft_tokens": soft},
        }


class Gateway:
    """Keeps limits, tells of itself, and leads requests through plug, store and engine.

    Texts are encoded, prompts made and soft tokens computed on one thread: tokenizers bear no second one. Everything
    else that touches the store has a thread of its own, so that a long export delays no answer.
    """

    def __init__(self, settings: Settings, load: Callable[[], Backend], log: Log | None = None) -> None:
        """Prepare a gateway whose models are loaded by `start`.

        Raises:
            ConfigError: The key file cannot be used.
        """
        self.settings, self.limits, self._load = settings, settings.limits, load
        self.keyring = Keyring(settings.keys)
        self.rates, self.slots = Rates(self.limits.per_minute), Slots(self.limits.pending)
        self.memory = Memory(self.limits.remember_seconds, self.limits.remember)
        self.log, self.metrics, self.hash = log or Log(), Metrics(), Hasher(settings.hash_key)
        self.metrics.pending.set_function(lambda: self.slots.used)
        self.failure: BaseException | None = None
        self._backend: Backend | None = None
        self._plug_thread = ThreadPoolExecutor(1, "persona-plug-prepare")
        self._store_thread = ThreadPoolExecutor(1, "persona-plug-store")
        # The plug's thread must not wait while the store is rewritten by another of ours.
        self._writing = asyncio.Lock()

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self._backend is not None

    @property
    def backend(self) -> Backend:
        """What is loaded.

        Raises:
            ApiError: 503 while it is not.
        """
        if self._backend is None:
            raise ApiError(503, "the model is being loaded; try again", "loading", headers={"Retry-After": "5"})
        return self._backend

    async def start(self) -> None:
        """Load the models; a failure is kept in `failure` for whoever runs the server."""
        began = time.monotonic()
        try:
            self._backend = await self.on_plug(self._load)
        except Exception as exc:
            self.failure = exc
            self.log.failure("-", exc)
            return
        self.log.event("ready", model=self.settings.model, seconds=round(time.monotonic() - began, 3))

    async def close(self) -> None:
        """End the engine and close the store."""
        backend, self._backend = self._backend, None
        if backend is not None:
            await backend.engine.close()
            await self.on_store(backend.store.close)
        self._plug_thread.shutdown(wait=False)
        self._store_thread.shutdown(wait=False)

    async def on_plug(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something that encodes, or uses the LLM's tokenizer."""
        return await asyncio.get_running_loop().run_in_executor(self._plug_thread, lambda: call(*args, **kwargs))

    async def on_store(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run something that only uses the store."""
        return await asyncio.get_running_loop().run_in_executor(self._store_thread, lambda: call(*args, **kwargs))

    # -- completions -----------------------------------------------------------------------------------------------

    async def prepare(self, body: ChatRequest | CompletionRequest, tenant: str) -> Prepared:
        """Make a request ready for the engine.

        Raises:
            ApiError: The model is unknown, or the request is beyond a limit.
            DataError: The LLM's chat template refuses the conversation.
        """
        backend = self.backend
        self.check_model(body.model)
        if body.characters > self.limits.prompt_characters:
            message = f"the prompt has {body.characters} characters, {self.limits.prompt_characters} at most; send less"
            raise ApiError(400, message, "prompt_too_long")
        tokens = body.limit or backend.plug.config.max_answer_tokens
        if tokens > self.limits.max_tokens:
            raise ApiError(
                400, f"max_tokens={tokens} is above this gateway's {self.limits.max_tokens}", param="max_tokens"
            )
        return await self.on_plug(self._prepare, backend, body, tenant, tokens)

    def _prepare(
        self, backend: Backend, body: ChatRequest | CompletionRequest, tenant: str, max_tokens: int
    ) -> Prepared:
        plug = backend.plug
        if isinstance(body, ChatRequest):
            messages = [message.pair() for message in body.messages]
        else:
            messages = [("user", body.text)]
        user = None if body.user is None else store_key(tenant, body.user)
        soft, reader, shown = torch.zeros(0, plug.config.llm_width), None, []
        info: dict[str, Any] = {"personal": body.personal}
        if body.personal:
            request = messages[plug.prompter.asked(messages)][1]
            stored = (None, user, backend.store) if user is not None else ()
            examples = pair(plug.config, request, *stored)
            soft, reader, known = _soft(plug, examples)
            shown = plug.turns(examples)[0]
            info |= known
        parts, request = plug.prompter.chat(messages, shown)
        info["input_tokens_cut"] = parts.cut
        call = Call(
            parts=parts,
            soft=soft,
            max_tokens=max_tokens,
            temperature=body.temperature or 0.0,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            stop=body.stops,
            reader=reader,
            plain=not body.personal,
            # Without a user nobody knows whose the next one is: it shares no cache with anything.
            salt="" if user is None else self.hash("salt", user),
        )
        room = getattr(plug.llm.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if room is not None and call.prompt_tokens + max_tokens > room:
            message = f"{call.prompt_tokens} prompt tokens and {max_tokens} new ones do not fit the LLM's {room}"
            raise ApiError(400, f"{message}; send less, or lower max_tokens", "context_length_exceeded")
        self.metrics.cut.inc(parts.cut)
        self.metrics.dropped.inc(info.get("items_dropped", 0))
        return Prepared(call, request, info)

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is served."""
        if name != self.settings.model:
            raise ApiError(
                404, f"no such model; this gateway serves {self.settings.model!r}", "model_not_found", "model"
            )

    async def write(self, prepared: Prepared, streams: bool) -> AsyncGenerator[Delta]:
        """Give the answer in pieces; where it does not stream, as one."""
        engine = self.backend.engine
        self.metrics.tokens.labels("prompt").inc(prepared.call.prompt_tokens - len(prepared.call.soft))
        self.metrics.tokens.labels("soft").inc(len(prepared.call.soft))
        if not streams:
            answer = await engine.generate(prepared.call)
            self.metrics.tokens.labels("completion").inc(answer.tokens)
            yield Delta(answer.text, answer.tokens, answer.finish)
            return
        async with aclosing(engine.stream(prepared.call)) as pieces:
            async for delta in pieces:
                self.metrics.tokens.labels("completion").inc(delta.tokens)
                yield delta

    # -- users -----------------------------------------------------------------------------------------------------

    async def add(self, key: str, items: Sequence[dict[str, Any]]) -> int:
        """Append events to a user's history, and return how many are new.

        Raises:
            ApiError: An event is too long, or the user has too many.
            DataError: An event is malformed.
        """
        store = self.backend.store
        longest = self.limits.event_characters
        if any(len(item.get("input", "")) + len(item["output"]) > longest for item in items):
            raise ApiError(400, f"an event has more than {longest} characters; send a shorter one", "event_too_long")
        held = await self.count(key)
        if held + len(items) > self.limits.events:
            message = f"the user has {held} events, and at most {self.limits.events} are kept; delete some first"
            raise ApiError(409, message, "history_full")
        async with self._writing:
            added = await self.on_plug(store.append, key, items)
        self.metrics.events.labels("added").inc(added)
        return added

    async def delete(self, key: str, event: str) -> bool:
        """Delete one event of a user, and return whether it was there."""
        async with self._writing:
            gone = await self.on_store(self.backend.store.delete, key, event)
        self.metrics.events.labels("deleted").inc(gone)
        return gone

    async def forget(self, key: str) -> int:
        """Forget a user with all that could still be accepted, and return how many events there were."""
        self.memory.forget(key)
        async with self._writing:
            gone = await self.on_store(self.backend.store.forget, key)
        self.metrics.events.labels("deleted").inc(gone.items)
        return gone.items

    async def count(self, key: str) -> int:
        """Return how many events the store holds of a user."""
        return (await self.on_store(self.backend.store.read, key, 1)).total


@torch.no_grad()
def _soft(plug: Any, examples: Sequence[Example]) -> tuple[torch.Tensor, WordsReader | None, dict[str, Any]]:  # noqa: ANN401
    """Return the soft tokens (S, H) of a request, what reads the user's words, and how much history there is."""
    soft = plug.embed(plug.table(examples).batch(examples)).soft[0].float().cpu()
    held = examples[0].stored if isinstance(examples[0], StoredExample) else None
    used = len(held.ids) if held else 0
    unquoted = used if held and held.texts is None and plug.config.quotes else 0
    dropped = held.total - used if held else 0
    readers = plug.readers(examples)
    known = {"history_items": used, "items_dropped": dropped, "items_unquoted": unquoted}
    return soft, readers[0] if readers else None, known
