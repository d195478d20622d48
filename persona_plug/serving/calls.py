"""A request to an engine, what comes back of it, and the job that it is for the one in this process."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from persona_plug.errors import PersonaPlugError
from persona_plug.heads.words import WordsReader
from persona_plug.serving.writing import Penalties, Sampler, Writer
from persona_plug.splice.prompts import PromptParts

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
        stop_loops: Whether an answer that repeats itself ends, see `generation.is_loop`.
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
    stop_loops: bool = False

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


@dataclass(eq=False, slots=True)
class Job:
    """A call that runs in this process, token by token; any of its faults ends it alone.

    Attributes:
        call: The call.
        writer: Its text so far.
        tell: Hands a delta or an error to whoever waits.
        sampler: Draws its tokens; None takes the most probable one.
        ends: Tokens that end an answer.
        cancelled: Set when nobody waits any more.
        written: Its tokens so far.
    """

    call: Call
    writer: Writer
    tell: Callable[[Delta | Exception], None]
    sampler: Sampler | None
    ends: frozenset[int]
    cancelled: threading.Event = field(default_factory=threading.Event)
    written: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def done(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.failed or self.writer.finish is not None or self.cancelled.is_set()

    @torch.no_grad()
    def choose(self, logits: Tensor) -> int:
        """Return the next token, given its logits (V,).

        Raises:
            EngineError: They are no numbers.
        """
        scores = logits.float()
        if self.call.reader is not None:
            scores = self.call.reader.mix(scores.unsqueeze(0), self.written, len(self.written))[0][0]
        scores = self.call.penalties.apply(scores, self.written)
        if bool(scores.isnan().any()) or float(scores.max()) == float("-inf"):
            raise EngineError("the LLM gave no numbers for this request; change it or its penalties")
        return int(scores.argmax()) if self.sampler is None else self.sampler.draw(scores)

    def take(self, logits: Tensor) -> None:
        """Write the next token, given its logits (V,)."""
        try:
            self.write(self.choose(logits))
        except Exception as exc:
            self.fail(exc)

    def write(self, token: int) -> None:
        """Write a token."""
        self.written.append(token)
        text, tokens = self.writer.add(token, token in self.ends)
        if self.writer.finish or text:
            self.tell(Delta(text, tokens, self.writer.finish))

    def fail(self, exc: Exception) -> None:
        """End the call with an error; the message of an unexpected one may quote a text, and goes no further."""
        if self.done:
            return
        self.failed = True
        if not isinstance(exc, EngineError):
            logger.error("a call failed: %s", type(exc).__name__)
            exc = EngineError(f"the LLM failed ({type(exc).__name__}); ask again, or see the server's log")
        self.tell(exc)
