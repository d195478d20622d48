"""What stands behind the routes: the plug and the store, each in its threads, and the engine that writes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from persona_plug.data.history import Example
from persona_plug.errors import PersonaPlugError
from persona_plug.heads.words import WordsReader
from persona_plug.pairing import pair
from persona_plug.serving.auth import Keyring, store_key, tenant_of
from persona_plug.serving.engine import Answer, Call, Delta, Engine
from persona_plug.serving.errors import ApiError
from persona_plug.serving.limits import Limits, Rates, Slots
from persona_plug.serving.logs import Hasher, Log, Metrics
from persona_plug.serving.schema import ChatRequest, CompletionRequest
from persona_plug.serving.shelf import Shelf, read_shelf
from persona_plug.serving.threads import Threads
from persona_plug.store.batches import StoredExample
from persona_plug.store.format import StoredHistory

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

ANSWERS_SECONDS = 60
EXPIRY_SECONDS = 3600
BODIES = 64  # of the greatest size, in hand at once


@dataclass(frozen=True, slots=True)
class Settings:
    """How a gateway is run.

    Attributes:
        model: Name under which the plug is asked for.
        keys: File of API keys; without it everybody is one tenant, and only this machine may ask.
        limits: What it bears.
        hash_key: Key of the hashes that stand for users in logs and cache salts; None draws one at each start.
        address: Where it can be asked.
    """

    model: str
    keys: Path | None = None
    limits: Limits = field(default_factory=Limits)
    hash_key: bytes | None = None
    address: str = "http://127.0.0.1:8000"


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
        moment: The store's when its user's history was read, None without a user.
    """

    call: Call
    request: str
    info: dict[str, Any]
    moment: int | None = None


class Gateway:
    """Keeps limits, tells of itself, and leads requests through plug, store and engine."""

    def __init__(self, settings: Settings, load: Callable[[], Backend], log: Log | None = None) -> None:
        """Prepare a gateway whose models are loaded by `start`.

        Raises:
            ConfigError: The key file cannot be used.
        """
        self.settings, self.limits, self._load = settings, settings.limits, load
        self.keyring = Keyring(settings.keys)
        self.rates = Rates(self.limits.per_minute)
        self.slots = Slots(self.limits.pending, self._tenants)
        self.tokens = Slots(self.limits.tokens, self._tenants)
        self.writes = Slots(self.limits.writes, self._tenants)
        self.bodies = Slots(BODIES * self.limits.body_bytes, self._tenants)
        self.log, self.metrics, self.hash = log or Log(), Metrics(), Hasher(settings.hash_key)
        self.metrics.pending.set_function(lambda: self.slots.used)
        self.metrics.writing.set_function(lambda: self.writes.used)
        self.failure: BaseException | None = None
        self.threads = Threads(self.limits.store_seconds)
        self._backend: Backend | None = None
        self._housekeeping: asyncio.Task[None] | None = None

    # -- life ------------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the models are loaded."""
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
            backend = await self.threads.run("plug", self._load)
            if backend.store.encoder is backend.plug.encoder:  # events are encoded on a thread of their own
                backend.store.encoder = await self.threads.run("plug", backend.plug.encoder.sibling)
            seen = await self.threads.run("plug", self._users, backend)
        except Exception as exc:
            self.failure = exc
            self.log.failure("-", exc)
            return
        self._backend = backend
        self._housekeeping = asyncio.create_task(self._keep_house(backend))
        self.log.event(
            "ready",
            model=self.settings.model,
            **seen,
            seconds=round(time.monotonic() - began, 3),
        )

    def _tenants(self) -> int:
        return len(self.keyring.tenants)

    def _users(self, backend: Backend) -> dict[str, Any]:
        """Return what an operator should know of the store: whose users it holds, and what is kept of them."""
        store, config = backend.store, backend.plug.config
        names = [row.user_id for row in store.users()]
        users = sum(tenant_of(name) in self.keyring.tenants for name in names)
        if names and not users:
            tenants = ", ".join(sorted(self.keyring.tenants))
            cure = "add users with `persona-plug users add --tenant`"
            self.log.event("warning", message=f"the store holds {len(names)} users, none of tenant {tenants}: {cure}")
        said = [{"role": "user", "content": "Hi"}]
        asked = json.dumps({"model": self.settings.model, "user": "me", "messages": said})
        header = "-H 'Authorization: Bearer KEY' " if self.settings.keys else ""
        url = f"{self.settings.address}/v1/chat/completions"
        return {
            "users": users,
            "users_of_others": len(names) - users,
            "keeps_texts": store.keep_text,
            "remembers_words": config.remembers,
            "try": f"curl {url} {header}-H 'Content-Type: application/json' -d '{asked}'",
        }

    async def close(self) -> None:
        """End the engine and close the store."""
        backend, self._backend = self._backend, None
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        if backend is not None:
            await backend.engine.close()
            with contextlib.suppress(PersonaPlugError):
                await self.threads.run("read", backend.store.close)
        self.threads.close()

    async def state(self) -> str:
        """Return `ready`, or why requests cannot be answered: `loading`, or `store unavailable`."""
        if self._backend is None:
            return "loading"
        try:
            async with asyncio.timeout(2):
                await self.threads.run("probe", self._backend.store.moment)
        except (TimeoutError, PersonaPlugError) as exc:
            self.log.failure("-", exc)
            return "store unavailable"
        return "ready"

    async def _keep_house(self, backend: Backend) -> None:
        """Drop answers that nobody accepted, and events too old."""
        store, last_expired = backend.store, float("-inf")
        while True:
            try:
                now = time.monotonic()
                await self.threads.run("write", store.drop_answers, self.limits.remember_seconds)
                if self.limits.keep_days and now > last_expired + EXPIRY_SECONDS:
                    last_expired = now
                    gone = await self.threads.run("erase", store.expire, self.limits.keep_days)
                    self.metrics.events.labels("expired").inc(gone)
            except Exception as exc:  # it must go on when the store is there again
                self.log.failure("-", exc)
            await asyncio.sleep(ANSWERS_SECONDS)

    # -- completions -----------------------------------------------------------------------------------------------

    async def prepare(self, body: ChatRequest | CompletionRequest, tenant: str) -> list[Prepared]:
        """Make a request ready for the engine: one call for each of its prompts and choices.

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
        held, moment, shelf = None, None, Shelf({})
        if body.user is not None:
            key = store_key(tenant, body.user)
            if body.counts:
                held = await self.threads.run("read", backend.store.read, key, backend.plug.config.max_history)
                moment, shelf = (
                    held.moment,
                    await self.threads.run("read", read_shelf, backend.plug, backend.store, held),
                )
            else:
                moment = await self.threads.run("read", backend.store.moment)
        prepare = partial(self._prepare, backend, body, tenant, held, shelf)
        made = [replace(await self.threads.run("plug", prepare, prompt), moment=moment) for prompt in body.prompts]
        if held is not None and shelf.made:
            await self._keep_words(held, shelf)
        return [_choice(one, at) for one in made for at in range(body.n or 1)]

    def _prepare(
        self,
        backend: Backend,
        body: ChatRequest | CompletionRequest,
        tenant: str,
        held: StoredHistory | None,
        shelf: Shelf,
        prompt: str,
    ) -> Prepared:
        plug = backend.plug
        if isinstance(body, ChatRequest):
            messages = [message.pair() for message in body.messages]
        else:
            messages = [("user", prompt)]
        soft, reader, shown = torch.zeros(0, plug.config.llm_width), None, []
        info: dict[str, Any] = {"personal": body.counts}
        if body.counts:
            request = messages[plug.prompter.asked(messages)][1]
            examples = _examples(backend, request, held, shelf, body.strength)
            soft, reader, known = _soft(plug, examples)
            shown = plug.turns(examples)[0]
            info |= known
        parts, request = plug.prompter.chat(messages, shown)
        info["input_tokens_cut"] = parts.cut
        call = Call(
            parts=parts,
            soft=soft,
            max_tokens=body.limit or plug.config.max_answer_tokens,
            reader=reader,
            tenant=tenant,
            plain=not body.counts,
            # Without a user nobody knows whose the next one is: it shares no cache with anything.
            salt="" if body.user is None else self.hash("salt", store_key(tenant, body.user)),
            **body.sampling(),
        )
        self._check_fit(plug, call)
        self.metrics.cut.inc(parts.cut)
        self.metrics.dropped.inc(info.get("items_dropped", 0))
        return Prepared(call, request, info)

    async def _keep_words(self, held: StoredHistory, shelf: Shelf) -> None:
        """Store the words that the LLM has just read of a user's events; else they are read again next time."""
        try:
            await self.threads.run("write", self.backend.store.keep_words, held.user, *shelf.kept)
        except PersonaPlugError as exc:
            self.log.failure("-", exc)

    def _check_fit(self, plug: PersonaPlug, call: Call) -> None:
        """Refuse what the LLM has no positions or tokens for."""
        config = plug.llm.config.get_text_config(decoder=True)
        room = getattr(config, "max_position_embeddings", None)
        if room is not None and call.prompt_tokens + call.max_tokens > room:
            message = f"{call.prompt_tokens} prompt tokens and {call.max_tokens} new ones do not fit the LLM's {room}"
            raise ApiError(400, f"{message}; send less, or lower max_tokens", "context_length_exceeded")
        if any(token >= config.vocab_size for token, _ in call.logit_bias):
            raise ApiError(400, f"logit_bias names a token beyond the LLM's {config.vocab_size}", param="logit_bias")

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is served."""
        if name != self.settings.model:
            raise ApiError(
                404, f"no such model; this gateway serves {self.settings.model!r}", "model_not_found", "model"
            )

    async def generate(self, prepared: Prepared) -> Answer:
        """Give the whole answer."""
        self._count(prepared.call)
        answer = await self.backend.engine.generate(prepared.call)
        self.metrics.tokens.labels("completion").inc(answer.tokens)
        return answer

    async def stream(self, prepared: Prepared) -> AsyncGenerator[Delta]:
        """Give the answer in pieces."""
        self._count(prepared.call)
        async with aclosing(self.backend.engine.stream(prepared.call)) as pieces:
            async for delta in pieces:
                self.metrics.tokens.labels("completion").inc(delta.tokens)
                yield delta

    def _count(self, call: Call) -> None:
        self.metrics.tokens.labels("prompt").inc(call.prompt_tokens - len(call.soft))
        self.metrics.tokens.labels("soft").inc(len(call.soft))

    async def remember(self, prepared: Sequence[Prepared], ids: Sequence[str], texts: Sequence[str], key: str) -> None:
        """Keep answers for `accept`; where the store is slow or away, they are only not acceptable."""
        if not self.limits.remember_seconds:
            return
        store = self.backend.store
        try:
            async with asyncio.timeout(2):
                for one, ident, text in zip(prepared, ids, texts, strict=True):
                    if text and one.moment is not None:
                        keep = partial(store.keep_answer, key, ident, one.request, text, one.moment)
                        await self.threads.run("write", keep, self.limits.remember_seconds)
        except (TimeoutError, PersonaPlugError) as exc:
            self.log.failure("-", exc)


def _choice(prepared: Prepared, at: int) -> Prepared:
    """Return a request for its choice number `at`: a seed gives each choice random numbers of its own."""
    call = prepared.call
    return prepared if not at or call.seed is None else replace(prepared, call=replace(call, seed=call.seed + at))


def _examples(
    backend: Backend, request: str, held: StoredHistory | None, shelf: Shelf, strength: float
) -> Sequence[Example]:
    """Return a request with its user's history, as a list of one."""
    config = backend.plug.config
    if held is None:
        return pair(config, request, strength=strength)
    if held.total and held.texts is None and config.remembers:
        backend.store.log_missing_texts()
    return [StoredExample(held.user, request, "", strength=strength, stored=held, store=shelf)]


@torch.no_grad()
def _soft(plug: PersonaPlug, examples: Sequence[Example]) -> tuple[torch.Tensor, WordsReader | None, dict[str, Any]]:
    """Return the soft tokens (S, H) of a request, what reads the user's words, and how much history there is."""
    held = examples[0].stored if isinstance(examples[0], StoredExample) else None
    soft = plug.embed(plug.table(examples).batch(examples)).soft[0].float().cpu()
    used = len(held.ids) if held else 0
    dropped = held.total - used if held else 0
    readers = plug.readers(examples)
    known = {"history_items": used, "items_dropped": dropped}
    return soft, readers[0] if readers else None, known
