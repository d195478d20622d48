"""From tokens to an answer's text while it is written: whole characters, stop texts, and each row's own sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import torch
from torch import Tensor

from persona_plug.generation import is_loop

BROKEN = "\ufffd"  # what bytes decode to that are no character yet


@dataclass(slots=True)
class Writer:
    """The text of one row, as far as it is certain.

    What may still change is held back: bytes of an unfinished character, the beginning of a stop text, and white space
    at the end. The deltas of `add` therefore add up to `decode(all tokens)` up to the first stop text, stripped.

    Attributes:
        max_tokens: Tokens at most.
        stop: Texts that end the answer and do not belong to it.
        streams: Whether deltas are wanted before the end.
        decode: Tokens -> text, special ones left out.
        stop_loops: Whether an answer that repeats itself ends.
        finish: How it ended, None while it goes on.
    """

    max_tokens: int
    stop: tuple[str, ...]
    streams: bool
    decode: Callable[[Sequence[int]], str]
    stop_loops: bool = False
    finish: Literal["stop", "length"] | None = None
    _ids: list[int] = field(default_factory=list)
    _sent: int = 0  # characters
    _told: int = 0  # tokens

    def add(self, token: int, last: bool) -> tuple[str, int]:
        """Take the next token.

        Args:
            token: Its id.
            last: Whether it is an end token, which is counted and not written.

        Returns:
            New text, and how many tokens were added since text was last returned.
        """
        self._ids.append(token)
        if last or (self.stop_loops and is_loop(self._ids)):
            self.finish = "stop"
        elif len(self._ids) >= self.max_tokens:
            self.finish = "length"
        if not (self.finish or self.streams or self.stop):
            return "", 0
        text = self.decode(self._ids)
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.finish = text[: min(found)], "stop"
        if not (self.finish or self.streams):
            return "", 0
        certain = text.strip() if self.finish else self._certain(text).strip()
        new, self._sent = certain[self._sent :], max(self._sent, len(certain))
        if not (new or self.finish):
            return "", 0
        tokens, self._told = len(self._ids) - self._told, len(self._ids)
        return new, tokens

    def _certain(self, text: str) -> str:
        text = text.rstrip(BROKEN)
        longest = max((len(stop) for stop in self.stop), default=0)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                return text[:-size]
        return text


@dataclass(frozen=True, slots=True)
class Penalties:
    """What changes a row's logits by what is written so far.

    Attributes:
        repetition: Divides the logits of tokens in the answer, and multiplies negative ones.
        frequency: Taken for each time a token is in the answer.
        presence: Taken where a token is in the answer.
        biases: (token, what is added).
    """

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    biases: tuple[tuple[int, float], ...] = ()

    def apply(self, scores: Tensor, written: Sequence[int]) -> Tensor:
        """Return scores (V,) of the next token behind tokens that are written."""
        if self == NONE:
            return scores
        scores = scores.clone()
        counts = Counter(written)
        if counts:
            tokens = torch.tensor(list(counts), device=scores.device)
            times = torch.tensor(list(counts.values()), device=scores.device, dtype=scores.dtype)
            picked = scores[tokens]
            picked = torch.where(picked > 0, picked / self.repetition, picked * self.repetition)
            scores[tokens] = picked - self.frequency * times - self.presence
        for token, bias in self.biases:
            scores[token] += bias
        return scores


NONE = Penalties()


@dataclass(slots=True)
class Sampler:
    """Draws tokens of one row with its own temperature, nucleus and random numbers."""

    temperature: float
    top_p: float
    generator: torch.Generator

    @classmethod
    def of(cls, temperature: float, top_p: float, seed: int | None) -> Self | None:
        """Return a sampler, or None where the most probable token is to be taken."""
        if temperature == 0:
            return None
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return cls(temperature, top_p, generator)

    def draw(self, scores: Tensor) -> int:
        """Return a token drawn from scores (V,).

        It is drawn on the CPU in float64 by the row's own numbers: a seed gives the same text whoever shares the batch.
        """
        # From the largest down: divided by however small a temperature, nothing becomes infinite or no number.
        scores = scores.detach().cpu().double()
        probabilities = ((scores - scores.max()) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, index = probabilities.sort(descending=True, stable=True)
            kept = ordered.cumsum(-1) - ordered < self.top_p  # the token that crosses the mass is still in
            return int(index[torch.multinomial(ordered * kept, 1, generator=self.generator)])
        return int(torch.multinomial(probabilities, 1, generator=self.generator))
