"""What a question costs, as if the method that is asked stood alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persona_plug.clock import clock
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.plug import PersonaPlug
from persona_plug.splice.states import StateBill


class LLMClock:
    """Measures how long something takes, and which share of it is spent outside the LLM's passes.

    Caches are shared, and which method fills them is chance. Frozen states that another one has left count as if they
    had been computed here, for a new question has none. What the encoder does meanwhile does not count: an item is
    encoded once, when it comes. A method that reads the vector of the request is charged for it when the clock stops.
    """

    def __init__(self, plug: PersonaPlug) -> None:
        """Start the clock (see `persona_plug.splice.states.clock`)."""
        llm = plug.llm
        self.llm, self.inside, self.entered, self.depth = llm, 0.0, 0.0, 0
        self.bill = plug.splicer.bill = StateBill()
        # An encoder runs by itself, too.
        parts = [llm, llm.get_encoder()] if llm.config.is_encoder_decoder else [llm]
        self.hooks = [part.register_forward_pre_hook(self._enter) for part in parts]
        self.hooks += [part.register_forward_hook(self._leave) for part in parts]
        self.encoder, self.encoded = plug.encoder, plug.encoder.stats.seconds
        self.began = clock(llm)

    def _enter(self, *_: Any) -> None:  # noqa: ANN401
        if self.depth == 0:
            self.entered = clock(self.llm)
        self.depth += 1

    def _leave(self, *_: Any) -> None:  # noqa: ANN401
        self.depth -= 1
        if self.depth == 0:
            self.inside += clock(self.llm) - self.entered

    def stop(self, reading: float = 0.0) -> tuple[float, float]:
        """Return seconds and the share outside the LLM; `reading` are seconds of encoding requests, see above."""
        seconds = clock(self.llm) - self.began - (self.encoder.stats.seconds - self.encoded) + reading
        for hook in self.hooks:
            hook.remove()
        outside = seconds - self.inside
        seconds += self.bill.owed - self.bill.spent
        return seconds, outside / seconds


def reading_seconds(encoder: HistoryEncoder, texts: Sequence[str]) -> float:
    """Return the seconds in which the encoder reads texts, none of them from its cache."""
    start = clock(encoder)
    ids = sorted((encoder.ids(text) for text in texts), key=len)
    for begin in range(0, len(ids), encoder.batch_size):
        encoder.forward(ids[begin : begin + encoder.batch_size])
    return clock(encoder) - start
