"""The memory of a user's own words: states and tokens of past answers, read for a new request."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_plug.heads.slots import Slot, place, shape

CHAIN = 8  # tokens inside a placed slot that have to be written in order before the next one is
CLOSING = 8  # tokens at an answer's end, its end token aside, whose numbers are the writer's: a desk, a telephone
NONE = -1  # where there is no token: in front of an answer, or none required
DIGITS = re.compile(r"\w*\d\w*")

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class SlotTokens:
    """A slot in tokens.

    Attributes:
        begin: First token of the answer that touches the slot.
        end: Token behind the last one.
        before: Characters of these tokens in front of the slot, mostly a space.
        after: Characters behind it, mostly none.
        form: See `Slot.form`.
        first: (d,) unit vector of the slot's first word in its request.
        last: (d,) unit vector of its last word.
    """

    begin: int
    end: int
    before: str
    after: str
    form: str
    first: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True)
class ItemWords:
    """What is kept of one item.

    Attributes:
        tokens: (n,) token ids of the answer, the end token last.
        states: (n, d) unit vectors of the LLM's state in front of each token, fp16.
        topic: (d,) unit vector of its request, fp16; zero where the request is blank.
        slots: Its slots, in order.
        facts: (token, word) of words with digits that stand in no slot.
    """

    tokens: tuple[int, ...]
    states: Tensor
    topic: Tensor
    slots: tuple[SlotTokens, ...] = ()
    facts: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WordMemory:
    """A user's words as one request reads them: N places, each with the token that followed.

    Attributes:
        states: (N, d) unit vectors, zero inside a placed slot.
        tokens: (N,) the token that followed.
        items: (N,) the item that a place belongs to.
        before: (N, CHAIN) the tokens in front, the nearest last, `NONE` where there is none or none is required.
        inside: (N,) whether the place lies inside a placed slot: it counts only behind exactly its `before`.
        whole: (N, CHAIN) for such places the end of the slot's tokens: behind them the slot is written, and the place
            does not count. All `NONE` elsewhere.
        slots: (N,) whether the token is a slot's.
        fits: (N,) how near a slot's words are to those that it had, as a cosine; 0 elsewhere.
        starts: (N,) log(1 + tokens in front of the place in its answer).
        finishes: (N,) log(1 + tokens behind it).
        nearness: (count,) cosine of each item's request and this one.
        count: Items, the latest last.
        length: Mean of log(1 + tokens) over the items' answers.
    """

    states: Tensor
    tokens: Tensor
    items: Tensor
    before: Tensor
    inside: Tensor
    whole: Tensor
    slots: Tensor
    fits: Tensor
    starts: Tensor
    finishes: Tensor
    nearness: Tensor
    count: int
    length: float

    @classmethod
    def empty(cls, size: int) -> WordMemory:
        """Return the memory of a user nobody knows."""
        return cls(
            torch.zeros(0, size),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, dtype=torch.long),
            torch.zeros(0, CHAIN, dtype=torch.long),
            torch.zeros(0, dtype=torch.bool),
            torch.zeros(0, CHAIN, dtype=torch.long),
            torch.zeros(0, dtype=torch.bool),
            torch.zeros(0),
            torch.zeros(0),
            torch.zeros(0),
            torch.zeros(0),
            0,
            0.0,
        )


@dataclass(frozen=True, slots=True)
class RequestWords:
    """A request as slots are placed in it.

    Attributes:
        text: The request.
        spans: (start, end) characters of each word that the encoder reads.
        states: (W, d) unit vectors of these words.
        topic: (d,) unit vector of the request.
        allowed: (W,) whether a slot may begin or end there: whether the word is none of the common ones.
    """

    text: str
    spans: Sequence[tuple[int, int]]
    states: Tensor
    topic: Tensor
    allowed: Sequence[bool]

    def fill(self, slot: SlotTokens) -> tuple[str, float] | None:
        """Return what stands in the slot for this request, and how near it is; None where nothing is near."""
        placed = place(slot.first.float(), slot.last.float(), self.states, self.allowed)
        if placed is None:
            return None
        first, last, cosine = placed
        return shape(self.text[self.spans[first][0] : self.spans[last][1]], slot.form), cosine


def token_slots(
    slots: Sequence[Slot], answer: str, offsets: Sequence[tuple[int, int]], begins: Tensor, ends: Tensor
) -> tuple[SlotTokens, ...]:
    """Return slots in tokens.

    Args:
        slots: Slots of an answer.
        answer: The answer.
        offsets: (start, end) characters of each of its tokens.
        begins: (W, d) unit vectors of the request's words, where a slot begins there.
        ends: (W, d) the same where it ends there.
    """
    rows: list[SlotTokens] = []
    for slot in slots:
        touched = [i for i, (start, end) in enumerate(offsets) if start < slot.end and end > slot.start]
        if not touched or slot.last >= len(ends) or (rows and touched[0] < rows[-1].end):
            continue
        begin, end = touched[0], touched[-1] + 1
        before = answer[min(offsets[begin][0], slot.start) : slot.start]
        after = answer[slot.end : max(offsets[end - 1][1], slot.end)]
        rows.append(SlotTokens(begin, end, before, after, slot.form, begins[slot.first], ends[slot.last]))
    return tuple(rows)


def facts_of(
    answer: str, offsets: Sequence[tuple[int, int]], slots: Sequence[SlotTokens]
) -> tuple[tuple[int, str], ...]:
    """Return (token, word) of each token of a word with digits that lies in no slot."""
    inside = {i for slot in slots for i in range(slot.begin, slot.end)}
    rows = []
    for match in DIGITS.finditer(answer):
        for i, (start, end) in enumerate(offsets):
            if i not in inside and start < match.end() and end > match.start():
                rows.append((i, match.group().casefold()))
    return tuple(rows)


def recall(items: Sequence[ItemWords], request: RequestWords, tokenise: Tokenise) -> WordMemory:
    """Return the memory that a request reads: slots filled from it, other requests' facts left out.

    A word with digits counts where it stands in two items at least, or closes its answer: then it is this user's, not
    one request's.

    Args:
        items: The user's items, the latest last.
        request: Where slots are placed.
        tokenise: The LLM's tokenizer.
    """
    if not items:
        return WordMemory.empty(len(request.topic))
    known = Counter(word for item in items for word in {w for _, w in item.facts})
    rows = _Rows()
    for number, item in enumerate(items):
        body = len(item.tokens) - 1 - CLOSING
        rows.add_item(number, item, {i for i, word in item.facts if known[word] < 2 and i < body}, request, tokenise)
    return rows.memory(items, request.topic)


class _Rows:
    """The places of a memory while it is put together."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.items: list[int] = []
        self.before: list[list[int]] = []
        self.inside: list[bool] = []
        self.whole: list[list[int]] = []
        self.slots: list[bool] = []
        self.fits: list[float] = []
        self.starts: list[int] = []
        self.finishes: list[int] = []
        self.sources: list[tuple[int, int]] = []  # (item, token) whose state the place has, token -1 for none

    def add_item(
        self, number: int, item: ItemWords, barred: set[int], request: RequestWords, tokenise: Tokenise
    ) -> None:
        """Add an item's places, its slots filled from a request."""
        written: list[int] = []
        begin = len(self.tokens)
        slots = {slot.begin: slot for slot in item.slots}
        i = 0
        while i < len(item.tokens):
            slot = slots.get(i)
            if slot is None:
                if i not in barred:
                    self._add(number, i, item.tokens[i], written, inside=0)
                written.append(item.tokens[i])
                i += 1
                continue
            placed = request.fill(slot)
            filled = [] if placed is None else tokenise(slot.before + placed[0] + slot.after)
            for depth, token in enumerate(filled):
                self._add(number, i if depth == 0 else NONE, token, written, depth, filled, placed[1] if placed else 0)
                written.append(token)
            if placed is None:  # what stood there is another request's
                written.append(NONE)
            i = slot.end
        self.finishes += [len(written) - 1 - start for start in self.starts[begin:]]

    def _add(
        self,
        number: int,
        source: int,
        token: int,
        written: Sequence[int],
        inside: int,
        slot: Sequence[int] = (),
        fit: float = 0.0,
    ) -> None:
        self.before.append(_tail(written[-inside:] if inside else written))
        self.whole.append(_tail(slot if inside else ()))
        self.starts.append(len(written))
        self.tokens.append(token)
        self.items.append(number)
        self.inside.append(inside > 0)
        self.slots.append(bool(slot))
        self.fits.append(fit)
        self.sources.append((number, source))

    def memory(self, items: Sequence[ItemWords], topic: Tensor) -> WordMemory:
        """Return the memory of a request with this topic."""
        size = items[0].states.shape[1]
        lengths = [math.log1p(len(item.tokens)) for item in items]
        zero = torch.zeros(size)
        states = [items[n].states[i].float() if i >= 0 else zero for n, i in self.sources]
        return WordMemory(
            torch.stack(states) if states else torch.zeros(0, size),
            torch.tensor(self.tokens, dtype=torch.long),
            torch.tensor(self.items, dtype=torch.long),
            torch.tensor(self.before, dtype=torch.long).view(-1, CHAIN),
            torch.tensor(self.inside, dtype=torch.bool),
            torch.tensor(self.whole, dtype=torch.long).view(-1, CHAIN),
            torch.tensor(self.slots, dtype=torch.bool),
            torch.tensor(self.fits, dtype=torch.float),
            torch.tensor(self.starts, dtype=torch.float).log1p(),
            torch.tensor(self.finishes, dtype=torch.float).log1p(),
            torch.stack([item.topic.float() for item in items]) @ topic,
            len(items),
            sum(lengths) / len(lengths),
        )


def _tail(tokens: Sequence[int]) -> list[int]:
    """Return the last CHAIN tokens, with `NONE` in front of fewer."""
    tail = list(tokens[-CHAIN:])
    return [NONE] * (CHAIN - len(tail)) + tail
