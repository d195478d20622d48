"""LaMP's in-prompt augmentation (arXiv 2304.11406, section 3): history items in the prompt, within a length."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from persona_plug.data.history import HistoryItem
from training.tasks import Task

ALONE = '"{output}"'  # an item whose input is empty, as LaMP writes tweets and titles
MIN_TOKENS = 4  # of each text of an item; one that is shorter stays whole


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt.

    Attributes:
        text: The prompt; the question is whole and at its end (or around the items, with `Task.insert_after`).
        items_used: Items in the prompt, the first ones of those given.
        items_cut: How many of these lost a part of their text.
        tokens: Tokens of `text`, special ones not counted.
    """

    text: str
    items_used: int
    items_cut: int
    tokens: int


def render(task: Task, text: str, items: Sequence[HistoryItem], tokenizer: Any, max_tokens: int) -> Prompt:  # noqa: ANN401
    """Write items into a question's prompt by LaMP's length budget.

    Of the budget B = max_tokens - len(input), less what stands between the items, each of n items gets the same share;
    what one does not need rolls over to the next. Within its share an item's input is cut at its end. Its output stays
    whole unless it leaves the input fewer than `MIN_TOKENS`: then both are cut, and neither takes more than half of the
    share that the other could use. An answer of the task's answer space is never cut.

    Two things differ from LaMP's script. There, a question longer than f = 0.6 of the length gives way to the items (f
    falls by 0.1 until they fit) and loses its end, where the request itself stands; here the question is kept whole,
    so that f is always what the question needs. And where the shares are too small for n items, the last are left out
    one by one; the script goes back to the plain input at once, which is here what remains if no item fits.

    Args:
        task: Gives the wording: `item`, `join`, `prompt`, `insert_after`.
        text: The question's whole input.
        items: Best first; those with an empty output are passed over.
        tokenizer: A fast tokenizer (it must give offsets).
        max_tokens: Most tokens of the prompt, special ones not counted. Only a question that is longer by itself
            exceeds it; it is returned as it is.

    Returns:
        The prompt; without items, or if none fits, the question as it is.
    """
    plain = Prompt(text, 0, 0, count_tokens(tokenizer, text))
    # The question alone fills the length, or has no place for items: `insert_after` does not occur in it.
    if plain.tokens >= max_tokens or assemble(task, ["-"], text) == text:
        return plain
    # More items than tokens never fit: a long history is not tokenised in vain.
    items = [item for item in items if item.output.strip()][:max_tokens]
    pieces = [_Piece.of(task, item, tokenizer) for item in items]
    frame = count_tokens(tokenizer, assemble(task, [""], text))
    join = count_tokens(tokenizer, task.join)
    for count in range(len(pieces), 0, -1):
        budget = max_tokens - frame - join * (count - 1)
        while (shares := _fit(pieces[:count], budget)) is not None:
            texts = [piece.write(*sizes) for piece, sizes in zip(pieces, shares, strict=False)]
            prompt = assemble(task, texts, text)
            tokens = count_tokens(tokenizer, prompt)
            if tokens <= max_tokens:
                cuts = sum(p.cuts(*sizes) for p, sizes in zip(pieces, shares, strict=False))
                return Prompt(prompt, count, cuts, tokens)
            budget -= tokens - max_tokens  # texts that meet may be tokenised otherwise than each alone
    return plain


def find_query(task: Task, text: str) -> str | None:
    """Return what retrieval looks for in a question's whole input, or None where the task's `query` does not match."""
    if not task.query:
        return text
    match = re.search(task.query, text, re.DOTALL)
    return " ".join(g.strip() for g in match.groups() if g is not None) if match else None


def assemble(task: Task, items: Sequence[str], text: str) -> str:
    """Return the prompt of a question's whole input with items of its history, none being the input alone.

    Where `insert_after` does not occur in the input, the input stays without items, as in LaMP's own code.

    Args:
        task: Gives `join`, `prompt` and `insert_after`.
        items: History items, each already written out by the task's `item`.
        text: The question's whole input.
    """
    if not items:
        return text
    history = task.join.join(items)
    if not task.insert_after:
        return task.prompt.format(items=history, input=text)
    before, place, after = text.partition(task.insert_after)
    return before + place + task.prompt.format(items=history) + after if place else text


@dataclass(frozen=True, slots=True)
class _Piece:
    """One item: its wording, its texts and where their tokens end (characters); `overhead` tokens are wording."""

    wording: str
    input: str
    output: str
    input_ends: tuple[int, ...]
    output_ends: tuple[int, ...]
    overhead: int
    label: bool

    @classmethod
    def of(cls, task: Task, item: HistoryItem, tokenizer: Any) -> _Piece:  # noqa: ANN401
        with_input = bool(item.input.strip()) and "{input}" in task.item
        wording = task.item if item.input.strip() else ALONE
        return cls(
            wording,
            item.input if with_input else "",
            item.output,
            token_ends(tokenizer, item.input) if with_input else (),
            token_ends(tokenizer, item.output),
            count_tokens(tokenizer, wording.format(input="", output="")),
            item.output.strip() in (task.answers or ()),
        )

    def sizes(self, share: int) -> tuple[int, int] | None:
        """Return how many tokens of input and output fit into a share, None if too few do."""
        room = share - self.overhead
        inputs, outputs = len(self.input_ends), len(self.output_ends)
        least = min(MIN_TOKENS, inputs)
        if outputs + least <= room:
            return min(inputs, room - outputs), outputs
        if self.label or least + min(MIN_TOKENS, outputs) > room:
            return None
        length = min(inputs, room // 2)
        return length, room - length

    def write(self, inputs: int, outputs: int) -> str:
        return self.wording.format(
            input=first_tokens(self.input, self.input_ends, inputs),
            output=first_tokens(self.output, self.output_ends, outputs),
        )

    def cuts(self, inputs: int, outputs: int) -> bool:
        return inputs < len(self.input_ends) or outputs < len(self.output_ends)


def _fit(pieces: Sequence[_Piece], budget: int) -> list[tuple[int, int]] | None:
    """Share a budget out over items, LaMP's way; None if one of them cannot get what it needs at least."""
    share, rest = divmod(budget, len(pieces))
    shares = []
    for piece in pieces:
        sizes = piece.sizes(share + rest)
        if sizes is None:
            return None
        rest += share - piece.overhead - sum(sizes)
        shares.append(sizes)
    return shares


def first_tokens(text: str, ends: Sequence[int], tokens: int) -> str:
    """Return a text's first tokens; `ends` are those of `token_ends`."""
    if tokens >= len(ends):
        return text
    return text[: ends[tokens - 1]].rstrip() if tokens else ""


# As the plug's prompts are: nothing is added, and special tokens that people write out are mere characters.
_PLAIN = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def token_ends(tokenizer: Any, text: str) -> tuple[int, ...]:  # noqa: ANN401
    """Return where a text's tokens end (characters)."""
    return tuple(end for _, end in tokenizer(text, return_offsets_mapping=True, **_PLAIN)["offset_mapping"])


def count_tokens(tokenizer: Any, text: str) -> int:  # noqa: ANN401
    """Return how many tokens a text has, special ones not counted."""
    return len(tokenizer(text, **_PLAIN)["input_ids"])
