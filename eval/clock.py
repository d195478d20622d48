"""How long a method takes for a question, as if no other method had run before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from persona_plug.clock import clock
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.plug import PersonaPlug
from persona_plug.splice.states import StateBill


class LLMClock:
    """Measures how long the block of a `with` takes, and which share of it is spent outside the LLM's passes.

    Methods share caches, and chance decides which of them fills one. A frozen state that another method has left counts
    as if it had been computed here, for a new question has none. The encoder's seconds do not count: an item is encoded
    once, when it comes. A method that reads the vector of the request is charged for it by `cost`.
    """

    def __init__(self, plug: PersonaPlug) -> None:
        """Take the plug whose LLM and encoder are measured."""
        self.llm, self.encoder, self.splicer = plug.llm, plug.encoder, plug.splicer
        self.seconds = self.inside = 0.0
        self.bill = StateBill()

    def __enter__(self) -> Self:
        """Start the clock (see `persona_plug.clock.clock`)."""
        self.entry, self.depth = 0.0, 0
        self.usual_bill, self.splicer.bill = self.splicer.bill, self.bill
        # An encoder runs by itself, too.
        parts = [self.llm, self.llm.get_encoder()] if self.llm.config.is_encoder_decoder else [self.llm]
        self.hooks = [part.register_forward_pre_hook(self._enter) for part in parts]
        self.hooks += [part.register_forward_hook(self._leave) for part in parts]
        self.encoding, self.start = self.encoder.stats.seconds, clock(self.llm)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the clock, and leave the LLM and the splicer as they were."""
        for hook in self.hooks:
            hook.remove()
        self.splicer.bill = self.usual_bill
        self.seconds = clock(self.llm) - self.start - (self.encoder.stats.seconds - self.encoding)

    def _enter(self, *_: Any) -> None:  # noqa: ANN401
        if self.depth == 0:
            self.entry = clock(self.llm)
        self.depth += 1

    def _leave(self, *_: Any) -> None:  # noqa: ANN401
        self.depth -= 1
        if self.depth == 0:
            self.inside += clock(self.llm) - self.entry

    def cost(self, reading: float = 0.0) -> tuple[float, float]:
        """Return the block's seconds and the share of them outside the LLM.

        Args:
            reading: Seconds in which the encoder reads the requests, for a method that needs them.
        """
        outside = self.seconds + reading - self.inside
        seconds = self.seconds + reading + self.bill.owed - self.bill.spent
        return seconds, outside / seconds


def reading_seconds(encoder: HistoryEncoder, texts: Sequence[str]) -> float:
    """Return the seconds in which the encoder reads texts, none of them from its cache."""
    start = clock(encoder)
    ids = sorted((encoder.ids(text) for text in texts), key=len)
    for begin in range(0, len(ids), encoder.batch_size):
        encoder.forward(ids[begin : begin + encoder.batch_size])
    return clock(encoder) - start
