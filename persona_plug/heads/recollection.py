"""From a user's items to what is kept of them, and to the reader of a new request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.heads.memory import ItemWords
from persona_plug.heads.words import TokenEncoder, WordsHead, WordsReader
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import AnswerTree, Prompter
from persona_plug.splice.soft import Soft
from persona_plug.store.batches import StoredExample

ROWS = 8  # items per pass of the LLM
CACHED = 20_000  # items whose words stay in memory

Key = tuple[str, str]
SoftTokens = Callable[[Sequence[str]], Soft]
AnswerRow = tuple[list[int], list[tuple[int, int]], torch.Tensor]


class Recollection:
    """Keeps the words of items: one pass of the LLM per item, once; and binds requests to their users' words."""

    def __init__(
        self,
        head: WordsHead,
        splicer: Splicer,
        prompter: Prompter,
        encoder: TokenEncoder,
        soft_tokens: SoftTokens,
    ) -> None:
        """Join the parts.

        Args:
            head: Maps logits to states, and states to a mixture.
            splicer: The LLM.
            prompter: Its prompts.
            encoder: Places the slots.
            soft_tokens: Requests -> soft tokens (B, S, H) of a user nobody knows, with which items are read.
        """
        self.head, self.splicer, self.prompter, self.encoder = head, splicer, prompter, encoder
        self.soft_tokens = soft_tokens
        self._cache: OrderedDict[Key, ItemWords] = OrderedDict()

    def forget(self) -> None:
        """Drop all words: they belong to the head and the soft tokens with which they were read."""
        self._cache.clear()

    @torch.no_grad()
    def remember(self, items: Sequence[HistoryItem]) -> list[ItemWords]:
        """Return the words of items, from the cache or by passes of the LLM over items of like length."""
        words = {key: self._cache[key] for item in items if (key := (item.input, item.output)) in self._cache}
        missing = [key for key in dict.fromkeys((i.input, i.output) for i in items) if key not in words]
        for keys, rows in self.passes(missing):
            for key, (tokens, offsets, logits) in zip(keys, rows, strict=True):
                words[key] = self.head.item_words(self.encoder, *key, tokens, offsets, logits)
        for key, value in words.items():
            self._cache[key] = value
            self._cache.move_to_end(key)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return [words[item.input, item.output] for item in items]

    def passes(self, pairs: Sequence[Key]) -> Iterator[tuple[list[Key], list[AnswerRow]]]:
        """Yield (pairs, rows) of passes over requests and answers; a row is (tokens, offsets, logits) of an answer.

        Tokens (n,) end with the end token, offsets (n - 1,) are characters, logits (n, V).
        """
        rows = {pair: self._tokens(pair[1]) for pair in pairs}
        parts = {pair: self.prompter.parts(pair[0]) for pair in pairs}
        order = sorted(pairs, key=lambda pair: len(parts[pair].left) + len(parts[pair].right) + len(rows[pair][0]))
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            trees = [AnswerTree.build([tuple(rows[pair][0])], self.prompter.eos, gold=0) for pair in batch]
            soft = self.soft_tokens([pair[0] for pair in batch])
            logits = self.splicer.answer_logits([parts[pair] for pair in batch], soft, trees)
            yield (
                batch,
                [([*rows[p][0], self.prompter.eos], rows[p][1], row) for p, row in zip(batch, logits, strict=True)],
            )

    def readers(self, examples: Sequence[Example]) -> list[WordsReader] | None:
        """Return what reads each example's words, or None before the head is fitted.

        Items out of a store count where it keeps their texts; of long histories the latest items do.
        """
        if not bool(self.head.fitted):
            return None
        limit = self.prompter.config.max_words
        histories = [texts_of(e)[-limit:] for e in examples]
        self.remember([item for history in histories for item in history])  # of all rows in few passes
        return [self.reader(e.input, history) for e, history in zip(examples, histories, strict=True)]

    def reader(self, request: str, items: Sequence[HistoryItem]) -> WordsReader:
        """Return the reader of one request of a user with these items."""
        words = self.remember(items)
        placed = self.head.request_words(self.encoder, request) if any(w.slots for w in words) else None
        memory = self.head.recall(words, placed, self.prompter.ids)
        limit = self.prompter.config.max_input_tokens
        return self.head.reader(memory, self.prompter.ids(request)[:limit], self.prompter.eos)

    def _tokens(self, answer: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return an answer's tokens without the end token, cut as in training, and the characters of each."""
        row = self.prompter.tokenizer(
            answer, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        limit = self.prompter.config.max_answer_tokens - 1
        return list(row["input_ids"])[:limit], [tuple(pair) for pair in row["offset_mapping"]][:limit]


def texts_of(example: Example) -> Sequence[HistoryItem]:
    """Return the items of an example whose texts are known."""
    return (example.stored.texts or ()) if isinstance(example, StoredExample) else example.history
