"""Slots: words of an answer that also stand in its request, and the place of such words in another request.

A reply that greets "Hi Ben," says how its writer greets, not whom. What an answer shares with its own request is kept
as a pointer: the encoder's states of the first and the last word there. In a new request the pointer goes to the words
with the nearest states, so that no fact of another request can enter an answer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = re.compile(r"\w+(?:['’-]\w+)*")
SPAN_WORDS = 6  # a slot has at most so many words
SHAPES = ("digits", "capital", "left edge", "right edge")  # what of a word is compared beside its meaning
SHAPE_WEIGHTS = (1.0, 1.0, 0.7, 0.7)  # over a unit vector of meaning
NEAREST = 0.28  # mean cosine below which a slot has no place in a request; above, the gate weighs it


@dataclass(frozen=True, slots=True)
class Word:
    """A word of a text: characters [start, end), and the word without case."""

    start: int
    end: int
    folded: str


@dataclass(frozen=True, slots=True)
class Slot:
    """Words of an answer that stand in its request.

    Attributes:
        start: First character in the answer.
        end: Character behind the last one.
        first: Index of the first word in the request.
        last: Index of the last word in the request.
        form: How the answer writes them: `same` as the request, `lower`, `upper`, `title`, or `capital`, the first
            letter alone.
    """

    start: int
    end: int
    first: int
    last: int
    form: str


def split_words(text: str) -> list[Word]:
    """Return the words of a text; Unicode letters and digits count, joined by apostrophes and hyphens."""
    return [Word(m.start(), m.end(), m.group().casefold()) for m in WORD.finditer(text)]


def common_words(texts: Iterable[str], share: float) -> frozenset[str]:
    """Return the words that stand in more than a share of the texts: they say nothing about one of them."""
    counts: Counter[str] = Counter()
    total = 0
    for text in texts:
        counts.update({word.folded for word in split_words(text)})
        total += 1
    return frozenset(word for word, count in counts.items() if count > share * total)


def word_shapes(text: str, spans: Sequence[tuple[int, int]], common: Collection[str]) -> Tensor:
    """Return the weighted shapes (W, 4) of a text's words, see `SHAPES`.

    A word has an edge where no further word of a name or a thing stands beside it: at the text's end, at a mark, or
    beside a common word. So "the desk lamp" is taken whole, and a name is not taken for a thing.

    Args:
        text: The text.
        spans: (start, end) characters of each word.
        common: The common words, without case.
    """
    rows = []
    for i, (start, end) in enumerate(spans):
        word = text[start:end]
        digits = any(character.isdigit() for character in word)
        left = i == 0 or _apart(text, spans[i - 1], (start, end), common, 0)
        right = i + 1 == len(spans) or _apart(text, (start, end), spans[i + 1], common, 1)
        rows.append([digits, word[:1].isupper() and not digits, left, right])
    return torch.tensor(rows, dtype=torch.float).reshape(-1, len(SHAPES)) * torch.tensor(SHAPE_WEIGHTS)


def _apart(text: str, one: tuple[int, int], next_one: tuple[int, int], common: Collection[str], which: int) -> bool:
    """Return whether something stands between two words, or one of them (`which`) is common."""
    beside = (one, next_one)[which]
    return bool(text[one[1] : next_one[0]].strip()) or text[slice(*beside)].casefold() in common


def find_slots(request: str, answer: str, common: frozenset[str]) -> list[Slot]:
    """Return an answer's slots: longest runs of words that the request holds, with no common word at either end."""
    asked, written = split_words(request), split_words(answer)
    places: dict[str, list[int]] = {}
    for j, word in enumerate(asked):
        if word.folded not in common:
            places.setdefault(word.folded, []).append(j)
    slots, i = [], 0
    while i < len(written):
        length, first = max(
            ((_run(asked, written, i, j, common), -j) for j in places.get(written[i].folded, ())), default=(0, 0)
        )
        if not length:
            i += 1
            continue
        start, end = written[i].start, written[i + length - 1].end
        source = request[asked[-first].start : asked[-first + length - 1].end]
        slots.append(Slot(start, end, -first, -first + length - 1, _form(answer[start:end], source)))
        i += length
    return slots


def _run(asked: Sequence[Word], written: Sequence[Word], i: int, j: int, common: frozenset[str]) -> int:
    """Return how many words from i and j on are the same, without common ones at the end."""
    length = 0
    for k in range(min(SPAN_WORDS, len(written) - i, len(asked) - j)):
        if written[i + k].folded != asked[j + k].folded:
            break
        if written[i + k].folded not in common:
            length = k + 1
    return length


def _form(text: str, source: str) -> str:
    if text == source:
        return "same"
    if text == text.lower():
        return "lower"
    if text == text.upper():
        return "upper"
    if text == text.title():
        return "title"
    return "capital" if text[:1].isupper() and not source[:1].isupper() else "same"


def shape(text: str, form: str) -> str:
    """Write a text in a slot's form."""
    if form == "capital":
        return text[:1].upper() + text[1:]
    return {"lower": text.lower, "upper": text.upper, "title": text.title}.get(form, lambda: text)()


def place(first: Tensor, last: Tensor, states: Tensor, allowed: Sequence[bool]) -> tuple[int, int, float] | None:
    """Return the words (first, last) of a request nearest to a slot's and their mean cosine; None if none is near.

    Args:
        first: (d,) unit vector of the slot's first word.
        last: (d,) unit vector of its last word.
        states: (W, d) unit vectors of the request's words.
        allowed: (W,) whether a slot may begin or end there.
    """
    if not any(allowed):
        return None
    barred = ~torch.tensor(list(allowed))
    begins = (states @ first).masked_fill(barred, -2.0)
    ends = (states @ last).masked_fill(barred, -2.0)
    width = len(states)
    pairs = begins.unsqueeze(1) + ends.unsqueeze(0)
    index = torch.arange(width)
    reach = index.unsqueeze(0) - index.unsqueeze(1)
    pairs = pairs.masked_fill((reach < 0) | (reach >= SPAN_WORDS), -4.0)
    best = int(pairs.argmax())
    cosine = float(pairs.flatten()[best]) / 2
    return (best // width, best % width, cosine) if cosine >= NEAREST else None
