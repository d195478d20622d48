"""What writes an answer: the `Engine` protocol, and transformers in this process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from persona_plug.errors import PersonaPlugError
from persona_plug.heads.processor import WordsProcessor
from persona_plug.heads.words import WordsReader
from persona_plug.serving.writing import Penalties, Sampler, Writer
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import PromptParts

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug

logger = logging.getLogger(__name__)

Finish = Literal["stop", "length"]


class EngineError(PersonaPlugError):
    """The engine cannot answer: it is down, closed, or failed in the middle."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request to an engine. Texts are gone by now: what is left are ids and soft tokens.

    Attributes:
        parts: Token ids in front of and behind the soft tokens.
        soft: (S, H) float32 on the CPU, dense and finite; S is 0 for the plain LLM.
        max_tokens: New tokens at most.
        temperature: 0 takes the most probable token.
        top_p: Probability mass that is sampled from.
        seed: Of the sampling; None draws one.
        stop: Texts that end the answer and do not belong to it.
        repetition_penalty: Logits of tokens in the answer so far are divided by it, negative ones multiplied.
        frequency_penalty: Taken from a token's logit for each time it is in the answer so far.
        presence_penalty: Taken from the logit of each token in the answer so far.
        logit_bias: (token, what is added to its logit).
        reader: What mixes the user's own words in, or None.
        plain: Whether the LLM runs without the LoRA adapters that the plug may have.
        salt: Keyed hash of whose request it is; an engine shares no cache between calls of different salts.
        tenant: Whose turn it is; tenants take turns.
    """

    parts: PromptParts
    soft: Tensor
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    salt: str = ""
    reader: WordsReader | None = None
    plain: bool = False
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    tenant: str = ""

    @property
    def penalties(self) -> Penalties:
        """What changes the logits by what is written."""
        return Penalties(self.repetition_penalty, self.frequency_penalty, self.presence_penalty, self.logit_bias)

    @property
    def prompt_tokens(self) -> int:
        """Positions of the LLM's input, soft tokens included."""
        return len(self.parts) + len(self.soft)


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer: whole characters, how many tokens were written since the last one, and how it ended."""

    text: str
    tokens: int
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer without white space around it; `tokens` counts the end token too."""

    text: str
    tokens: int
    finish: Finish


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


@dataclass(eq=False, slots=True)
class _Job:
    """A call on its way through the worker; `tell` hands a delta or an error to the event loop."""

    call: Call
    streams: bool
    tell: Callable[[Delta | Exception], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


class TransformersEngine:
    """The LLM in this process: a worker thread runs waiting calls of any users together, in the order they came.

    Rows of a batch see nothing of each other, each has its own sampling, and greedy text is that of `plug.generate`.
    A call that comes while a batch runs waits for its end. How many may wait is the gateway's to say.
    """

    def __init__(self, plug: PersonaPlug, max_batch: int = 16, seen: Callable[[int], None] | None = None) -> None:
        """Start the worker.

        Args:
            plug: Its LLM, splicer and a copy of its tokenizer are used.
            max_batch: Rows at a time.
            seen: Told the number of rows of each batch.
        """
        self.plug, self.max_batch, self.seen = plug, max_batch, seen
        for splicer in (plug.splicer, plug.plain_splicer):
            splicer.keep_nothing()  # users would share states of prompts
        self.tokenizer = copy.deepcopy(plug.tokenizer)  # a fast tokenizer must not serve two threads
        ends = plug.llm.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="persona-plug-engine", daemon=True)
        self._closing = False
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
        """Let the running batch finish its token, fail what waits, and end the worker."""
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

        job = _Job(call, streams, tell)
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
        """Take what waits, up to a batch, and run it; the worker's whole life."""
        while (jobs := self._take()) is not None:
            jobs = [job for job in jobs if not job.cancelled.is_set()]
            if not jobs:
                continue
            if self.seen:
                self.seen(len(jobs))
            try:
                for plain in (False, True):
                    self._run_together(plain, [job for job in jobs if job.call.plain == plain])
            except Exception as exc:
                # Its message may quote a text, so it goes no further; one bad call must not end the worker.
                logger.error("a batch of %d calls failed: %s", len(jobs), type(exc).__name__)
                for job in jobs:
                    job.tell(EngineError(f"the LLM failed ({type(exc).__name__}); ask again, or see the server's log"))

    def _take(self) -> list[_Job] | None:
        """Wait for a call, and take those that wait with it; None when the engine closes."""
        jobs: list[_Job] = []
        while len(jobs) < self.max_batch:
            try:
                job = self._jobs.get(block=not jobs)
            except queue.Empty:
                break
            if job is None:
                self._refuse(jobs)
                return None
            jobs.append(job)
        return jobs

    def _refuse(self, jobs: Sequence[_Job]) -> None:
        waiting = [*jobs]
        while not self._jobs.empty():
            job = self._jobs.get()
            waiting += [job] if job else []
        for job in waiting:
            job.tell(EngineError("the server is shutting down; ask again"))

    def _run_together(self, plain: bool, jobs: Sequence[_Job]) -> None:
        """Run calls in as few batches as their LLM allows."""
        splicer = self.plug.plain_splicer if plain else self.plug.splicer
        calls = [job.call for job in jobs]
        for rows in splicer.together([c.parts for c in calls], [c.soft for c in calls]) if jobs else ():
            self._batch(splicer, [jobs[i] for i in rows])

    @torch.no_grad()
    def _batch(self, splicer: Splicer, jobs: Sequence[_Job]) -> None:
        from transformers import LogitsProcessorList, StoppingCriteriaList

        plug, calls = self.plug, [job.call for job in jobs]
        soft = [call.soft.to(plug.llm.device) for call in calls]
        pad = self.tokenizer.pad_token_id
        writers = [
            Writer(call.max_tokens, call.stop, job.streams, self._decode) for call, job in zip(calls, jobs, strict=True)
        ]

        def step(ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ANN401
            """Look at the newest token of each row; (B,) bool, which rows are done."""
            for job, writer, token in zip(jobs, writers, ids[:, -1].tolist(), strict=True):
                if writer.finish is None and not job.cancelled.is_set():
                    text, tokens = writer.add(token, token in self.ends)
                    if writer.finish or text:
                        job.tell(Delta(text, tokens, writer.finish))
            done = [
                w.finish is not None or j.cancelled.is_set() or self._closing
                for j, w in zip(jobs, writers, strict=True)
            ]
            return torch.tensor(done, device=ids.device)

        samplers = [Sampler.of(call.temperature, call.top_p, call.seed) for call in calls]
        readers = [call.reader for call in calls]
        processors: list[Any] = []
        if any(reader is not None for reader in readers):
            processors.append(WordsProcessor(readers, start=len(splicer.start)))
        penalties = [call.penalties for call in calls]
        start = len(splicer.start)
        processors.append(lambda ids, scores: _penalised(penalties, ids[:, start:], scores))
        if any(samplers):
            processors.append(_choose(samplers))
        splicer.llm.generate(
            **splicer.generation_inputs([call.parts for call in calls], soft),
            pad_token_id=plug.prompter.eos if pad is None else pad,
            max_new_tokens=max(call.max_tokens for call in calls),
            num_beams=1,
            do_sample=False,  # the samplers choose, each for its row
            temperature=None,
            top_p=None,
            top_k=None,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([step]),
        )
        for job, writer in zip(jobs, writers, strict=True):
            if writer.finish is None:
                job.tell(EngineError("the server is shutting down; ask again"))

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def _penalised(penalties: Sequence[Penalties], ids: Tensor, scores: Tensor) -> Tensor:
    return torch.stack([p.apply(row, own.tolist()) for p, own, row in zip(penalties, ids, scores, strict=True)])


def _choose(samplers: Sequence[Sampler | None]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a logits processor that leaves rows without a sampler alone, and in others leaves one token."""

    def choose(ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row, sampler in enumerate(samplers):
            if sampler is not None:
                token = sampler.draw(scores[row])
                scores[row] = float("-inf")
                scores[row, token] = 0.0
        return scores

    return choose
