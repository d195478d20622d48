"""From a user's items to what is kept of them, and to the reader of a new request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.heads.memory import ItemWords, WordMemory, recall
from persona_plug.heads.packing import pack_item, unpack_item
from persona_plug.heads.words import SIZE, TokenEncoder, WordsHead, WordsReader
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import AnswerTree, Prompter
from persona_plug.splice.soft import Soft
from persona_plug.store import keepers
from persona_plug.store.batches import StoredExample

ROWS = 8  # items per pass of the LLM
CACHED = 20_000  # items whose words stay in memory

Pair = tuple[str, str]
SoftTokens = Callable[[Sequence[str]], Soft]


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """What a pass over an answer gives.

    Attributes:
        tokens: (n,) its tokens, the end token last.
        offsets: (n - 1,) characters of each but the end token.
        logits: (n, V) in front of each.
    """

    tokens: list[int]
    offsets: list[tuple[int, int]]
    logits: torch.Tensor


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
        self._cache: OrderedDict[tuple[str, Pair], ItemWords] = OrderedDict()
        self._caching = threading.Lock()  # a store tells of a deletion on any thread
        keepers.tell(self)
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mix no words in for the block of a `with`: what the soft tokens do alone."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def forget(self, owner: str | None = None) -> None:
        """Drop the words of one owner; by default all, since a head or soft tokens that change make them stale."""
        with self._caching:
            for key in [key for key in self._cache if owner is None or key[0] == owner]:
                del self._cache[key]

    @property
    def owners(self) -> set[str]:
        """Whose words are kept."""
        with self._caching:
            return {owner for owner, _ in self._cache}

    @torch.no_grad()
    def remember(self, items: Sequence[HistoryItem], owner: str = "") -> list[ItemWords]:
        """Return the words of items, from the cache or by passes of the LLM over items of like length.

        Args:
            items: The items.
            owner: Whose they are: users of a store share no cached words, or times would tell who wrote the same.
        """
        pairs = list(dict.fromkeys((item.input, item.output) for item in items))
        with self._caching:
            words = {pair: self._cache[owner, pair] for pair in pairs if (owner, pair) in self._cache}
        for pair, row in self.passes([pair for pair in pairs if pair not in words]):
            words[pair] = self.keep(pair, row, owner)
        with self._caching:
            for pair in words:
                if (owner, pair) in self._cache:  # and not forgotten meanwhile
                    self._cache.move_to_end((owner, pair))
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return [words[item.input, item.output] for item in items]

    def keep(self, pair: Pair, row: AnswerRow, owner: str = "") -> ItemWords:
        """Return the words of an item whose pass gave this row, and cache them; for `owner` see `remember`.

        They are rounded as a store rounds them: fresh words and stored ones give the same answers.
        """
        words = self.head.item_words(self.encoder, *pair, row.tokens, row.offsets, row.logits)
        words = unpack_item(pack_item(words))
        with self._caching:
            self._cache[owner, pair] = words
        return words

    def passes(self, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, AnswerRow]]:
        """Yield each request and answer with what the LLM says in front of its tokens, in order of length."""
        answers = {pair: self._tokens(pair[1]) for pair in pairs}
        parts = {pair: self.prompter.parts(pair[0]) for pair in pairs}
        order = sorted(pairs, key=lambda pair: len(parts[pair]) + len(answers[pair][0]))
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            trees = [AnswerTree.build([tuple(answers[pair][0])], self.prompter.eos, gold=0) for pair in batch]
            soft = self.soft_tokens([pair[0] for pair in batch])
            logits = self.splicer.answer_logits([parts[pair] for pair in batch], soft, trees)
            for pair, row in zip(batch, logits, strict=True):
                tokens, offsets = answers[pair]
                yield pair, AnswerRow([*tokens, self.prompter.eos], offsets, row)

    def readers(self, examples: Sequence[Example]) -> list[WordsReader] | None:
        """Return what reads each example's words, or None before the head is fitted and while paused.

        Items out of a store count where it keeps their texts; of long histories the latest items do.
        """
        if self._paused or not bool(self.head.fitted):
            return None
        limit = self.prompter.config.max_words
        histories = [texts_of(e)[-limit:] for e in examples]
        owners = [e.user_id if isinstance(e, StoredExample) else "" for e in examples]
        for owner in dict.fromkeys(owners):  # all of an owner's rows in few passes
            own = [history for history, whose in zip(histories, owners, strict=True) if whose == owner]
            self.remember([item for history in own for item in history], owner)
        rows = zip(examples, histories, owners, strict=True)
        return [self.reader(e.input, history, owner) for e, history, owner in rows]

    def reader(self, request: str, items: Sequence[HistoryItem], owner: str = "") -> WordsReader:
        """Return the reader of one request of a user with these items; for `owner` see `remember`."""
        words = self.remember(items, owner)
        memory = WordMemory.empty(SIZE)
        if words:
            memory = recall(words, self.head.request_words(self.encoder, request), self.prompter.ids)
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
