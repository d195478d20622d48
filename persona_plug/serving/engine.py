"""What writes an answer: the `Engine` protocol, and transformers in this process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from persona_plug.serving.calls import Answer, Call, Delta, EngineError, Job
from persona_plug.serving.steps import steps_for
from persona_plug.serving.writing import Sampler, Writer

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug

__all__ = ["Answer", "Call", "Delta", "Engine", "EngineError", "TransformersEngine"]


class Engine(Protocol):
    """Writes answers. Leaving `stream` early or cancelling `generate` ends the work on that call.

    All methods are called from one event loop. Deltas of a stream add up to the text of `generate`, and exactly the
    last one has `finish`. A call that cannot be answered raises a `PersonaPlugError` of one line without the user's
    text.
    """

    def stream(self, call: Call) -> AsyncGenerator[Delta]:
        """Give the answer piece by piece."""
        ...

    async def generate(self, call: Call) -> Answer:
        """Give the whole answer."""
        ...

    async def close(self) -> None:
        """End what is running and free what is held."""
        ...


class TransformersEngine:
    """The LLM in this process: a worker thread gives each running call its next token by turns.

    Calls join and leave between two tokens. A prompt is read in parts, between which others get their tokens, and
    which end when the call is cancelled. Calls of like length share a pass; each has its own sampling, and its own
    faults. Greedy text is that of `plug.generate`. Tenants take turns; how many may wait is the gateway's to say.
    """

    def __init__(self, plug: PersonaPlug, max_batch: int = 16, seen: Callable[[int], None] | None = None) -> None:
        """Start the worker.

        Args:
            plug: Its LLM, splicer and a copy of its tokenizer are used.
            max_batch: Calls that run at a time.
            seen: Told how many run, whenever one has joined.
        """
        self.plug, self.max_batch, self.seen = plug, max_batch, seen
        for splicer in (plug.splicer, plug.plain_splicer):
            splicer.keep_nothing()  # users would share states of prompts
        self.tokenizer = copy.deepcopy(plug.tokenizer)  # a fast tokenizer must not serve two threads
        ends = plug.llm.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by tenant, whose turn is next first
        self._closing = False
        self._steps = steps_for(plug.splicer, plug.prompter.eos)
        apart = plug.plain_splicer is not plug.splicer  # the LLM without the plug's LoRA adapters
        self._plain_steps = steps_for(plug.plain_splicer, plug.prompter.eos) if apart else self._steps
        self._worker = threading.Thread(target=self._work, name="persona-plug-engine", daemon=True)
        self._worker.start()

    def stream(self, call: Call) -> AsyncGenerator[Delta]:
        """See `Engine.stream`."""
        return self._run(call, streams=True)

    async def generate(self, call: Call) -> Answer:
        """See `Engine.generate`."""
        async with contextlib.aclosing(self._run(call, streams=False)) as deltas:
            whole = await anext(deltas)
        assert whole.finish is not None  # noqa: S101 (where nothing streams the first delta is the last)
        return Answer(whole.text, whole.tokens, whole.finish)

    async def close(self) -> None:
        """Let the running step end, fail what runs and waits, and end the worker."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        await asyncio.to_thread(self._worker.join)

    async def _run(self, call: Call, streams: bool) -> AsyncGenerator[Delta]:
        if self._closing:
            raise EngineError("the engine is closed; start it again")
        loop = asyncio.get_running_loop()
        told: asyncio.Queue[Delta | Exception] = asyncio.Queue()

        def tell(what: Delta | Exception) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever waited
                loop.call_soon_threadsafe(told.put_nowait, what)

        writer = Writer(call.max_tokens, call.stop, streams, self._decode, call.stop_loops)
        job = Job(call, writer, tell, Sampler.of(call.temperature, call.top_p, call.seed), self.ends)
        self._jobs.put(job)
        try:
            while True:
                what = await told.get()
                if isinstance(what, Exception):
                    raise what
                yield what
                if what.finish:
                    return
        finally:
            job.cancelled.set()

    def _work(self) -> None:
        """Let calls join, and give those that run a token each, until the engine closes."""
        running: list[Job] = []
        while True:
            self._receive(block=not running)
            if self._closing:
                break
            running += self._join(len(running))
            self._step([job for job in running if not job.done])
            running = [job for job in running if not job.done]
            if not running:
                self._step([])  # nothing is held for calls that are done
        for job in [*running, *(job for jobs in self._waiting.values() for job in jobs)]:
            job.fail(EngineError("the server is shutting down; ask again"))
        self._step([])

    def _step(self, jobs: Sequence[Job]) -> None:
        if self._plain_steps is self._steps:
            self._steps.step(jobs)
        else:
            self._steps.step([job for job in jobs if not job.call.plain])
            self._plain_steps.step([job for job in jobs if job.call.plain])

    def _receive(self, block: bool) -> None:
        """Put what has come with what waits; if `block`, wait for something unless something waits."""
        block = block and not self._waiting
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get(block=block)
                block = False
                if job is not None:
                    self._waiting.setdefault(job.call.tenant, deque()).append(job)

    def _join(self, running: int) -> list[Job]:
        """Return the calls that run from now on, a tenant's after another's."""
        joined: list[Job] = []
        while self._waiting and running + len(joined) < self.max_batch:
            tenant, jobs = self._waiting.popitem(last=False)
            job = jobs.popleft()
            if jobs:
                self._waiting[tenant] = jobs  # behind the others
            if not job.done:
                joined.append(job)
                if self.seen:
                    self.seen(running + len(joined))
        return joined

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))
