"""From a user's items to what is kept of them, and to the reader of a new request."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from persona_plug.data.history import Example, HistoryItem
from persona_plug.heads.memory import ItemWords, WordMemory, recall
from persona_plug.heads.packing import pack_item, unpack_item
from persona_plug.heads.slots import SHAPE_WEIGHTS, SHAPES
from persona_plug.heads.words import SIZE, TokenEncoder, WordsHead, WordsReader
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import AnswerTree, Prompter, PromptParts, Turns
from persona_plug.splice.soft import Soft
from persona_plug.store.batches import StoredExample, WordStore
from persona_plug.store.database import StoreUnavailable
from persona_plug.store.format import StoredHistory

logger = logging.getLogger(__name__)

ROWS = 8  # items per pass of the LLM
CACHED = 20_000  # items whose words stay in memory

MARKED = 0.5  # share of a token's probability above which it counts as the memory's

Pair = tuple[str, str]
Span = tuple[int, int]
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
        parts: Callable[[], Mapping[str, nn.Module]],
    ) -> None:
        """Join the parts.

        Args:
            head: Maps logits to states, and states to a mixture.
            splicer: The LLM.
            prompter: Its prompts.
            encoder: Places the slots.
            soft_tokens: Requests -> soft tokens (B, S, H) of a user nobody knows, with which items are read.
            parts: Gives what was trained, by the beginnings of its tensors' names.
        """
        self.head, self.splicer, self.prompter, self.encoder = head, splicer, prompter, encoder
        self.soft_tokens, self._parts = soft_tokens, parts
        self._identity = ""
        self._cache: OrderedDict[Pair, ItemWords] = OrderedDict()
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mix no words in for the block of a `with`: what the soft tokens do alone."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def forget(self) -> None:
        """Drop all words that are cached: a head or soft tokens that change make them stale."""
        self._cache.clear()
        self._identity = ""

    @property
    def identity(self) -> str:
        """The name under which a store keeps words: of LLM, encoder, prompt, soft tokens and the head's maps."""
        if not self._identity:
            config = self.prompter.config
            limits = [config.max_input_tokens, config.max_answer_tokens]
            known = [config.llm_fingerprint, config.encoder_fingerprint, self.prompter.digest, config.template]
            digest = hashlib.sha256(repr([*known, *limits, SHAPES, SHAPE_WEIGHTS]).encode())
            for part in self._parts().values():
                for name, tensor in part.state_dict().items():
                    if not name.startswith("gate."):
                        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            self._identity = digest.hexdigest()[:16]
        return self._identity

    @torch.no_grad()
    def remember(self, items: Sequence[HistoryItem]) -> list[ItemWords]:
        """Return the words of items, from the cache or by passes of the LLM over items of like length."""
        pairs = list(dict.fromkeys((item.input, item.output) for item in items))
        words = {pair: self._cache[pair] for pair in pairs if pair in self._cache}
        for pair, row in self.passes([pair for pair in pairs if pair not in words]):
            words[pair] = self.keep(pair, row)
        for pair in words:
            self._cache.move_to_end(pair)
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)
        return [words[item.input, item.output] for item in items]

    def keep(self, pair: Pair, row: AnswerRow) -> ItemWords:
        """Return the words of an item whose pass gave this row, and cache them."""
        words = self._cache[pair] = unpack_item(self._packed(pair, row))
        return words

    def _packed(self, pair: Pair, row: AnswerRow) -> bytes:
        """Return an item's words as a store keeps them: fresh words and stored ones give the same answers."""
        return pack_item(self.head.item_words(self.encoder, *pair, row.tokens, row.offsets, row.logits))

    @torch.no_grad()
    def restore(self, store: WordStore, history: StoredHistory) -> tuple[list[ItemWords], int]:
        """Return the words of a stored history's newest items, and how many the LLM had to read.

        The store keeps what was read. Nothing of a user is cached in this process: it goes when the store forgets.
        Without texts there are no words.
        """
        items = (history.texts or [])[-self.prompter.config.max_words :]
        blobs = store.words(history.user, self.identity, items)
        missing = [item for item in items if str(item.id) not in blobs]
        rows = dict(self.passes(list(dict.fromkeys((item.input, item.output) for item in missing))))
        made = {str(i.id): self._packed((i.input, i.output), rows[i.input, i.output]) for i in missing}
        if made:
            try:
                store.keep_words(history.user, self.identity, [(i, made[str(i.id)]) for i in missing], history.moment)
            except StoreUnavailable as exc:
                logger.warning("words of %d items could not be kept, and are read again next time: %s", len(made), exc)
        blobs |= made
        return [unpack_item(blobs[str(item.id)]) for item in items], len(made)

    def passes(
        self, pairs: Sequence[Pair], shown: Mapping[Pair, Sequence[Turns]] | None = None
    ) -> Iterator[tuple[Pair, AnswerRow]]:
        """Yield each request and answer with what the LLM says in front of its tokens, in order of length."""
        limit = self.prompter.config.max_answer_tokens - 1
        answers = {pair: self._tokens(pair[1], limit) for pair in pairs}
        parts = {pair: self.prompter.parts(pair[0], shown=(shown or {}).get(pair, ())) for pair in pairs}
        order = sorted(pairs, key=lambda pair: len(parts[pair]) + len(answers[pair][0]))
        for start in range(0, len(order), ROWS):
            batch = order[start : start + ROWS]
            trees = [AnswerTree.build([tuple(answers[pair][0])], self.prompter.eos, gold=0) for pair in batch]
            soft = self.soft_tokens([pair[0] for pair in batch])
            logits = self.splicer.answer_logits([parts[pair] for pair in batch], soft, trees)
            for pair, row in zip(batch, logits, strict=True):
                tokens, offsets = answers[pair]
                yield pair, AnswerRow([*tokens, self.prompter.eos], offsets, row)

    @torch.no_grad()
    def marks(
        self, readers: Sequence[WordsReader], parts: Sequence[PromptParts], soft: Soft, texts: Sequence[str]
    ) -> list[list[Span]]:
        """Return the characters of written texts whose tokens the user's memory brought for more than half.

        Args:
            readers: What read the user's words for each text.
            parts: Its prompt.
            soft: Its soft tokens.
            texts: What was written. Each is read once more.
        """
        rows = [self._tokens(text) for text in texts]
        trees = [AnswerTree.build([tuple(tokens)], self.prompter.eos, gold=0) for tokens, _ in rows]
        marked = []
        for start in range(0, len(texts), ROWS):
            some = slice(start, start + ROWS)
            logits = self.splicer.answer_logits(parts[some], soft[some], trees[some])
            batch = zip(texts[some], readers[some], rows[some], logits, strict=True)
            for text, reader, (tokens, offsets), row in batch:
                shares = reader.memory_share(row, [*tokens, self.prompter.eos])[:-1].tolist()
                marked.append(join_spans(text, [o for o, s in zip(offsets, shares, strict=True) if s > MARKED]))
        return marked

    def readers(self, examples: Sequence[Example]) -> list[WordsReader] | None:
        """Return what reads each example's words, or None before the head is fitted and while paused.

        Items out of a store count where it keeps their texts; of long histories the latest items do.
        """
        if self._paused or not bool(self.head.fitted):
            return None
        own = [e.history[-self.prompter.config.max_words :] for e in examples]
        self.remember([item for history in own for item in history])  # all in few passes
        return [replace(self._reader(e, h), strength=e.strength) for e, h in zip(examples, own, strict=True)]

    def _reader(self, example: Example, history: Sequence[HistoryItem]) -> WordsReader:
        if not isinstance(example, StoredExample):
            return self.reader(example.input, history)
        return self._bind(example.input, self.restore(example.store, example.stored)[0])

    def reader(self, request: str, items: Sequence[HistoryItem]) -> WordsReader:
        """Return the reader of one request of a user with these items."""
        return self._bind(request, self.remember(items))

    def _bind(self, request: str, words: Sequence[ItemWords]) -> WordsReader:
        memory = WordMemory.empty(SIZE)
        if words:
            memory = recall(words, self.head.request_words(self.encoder, request), self.prompter.ids)
        limit = self.prompter.config.max_input_tokens
        return self.head.reader(memory, self.prompter.ids(request)[:limit], self.prompter.eos)

    def _tokens(self, answer: str, limit: int | None = None) -> tuple[list[int], list[Span]]:
        """Return an answer's first tokens without the end token, and the characters of each."""
        row = self.prompter.tokenizer(
            answer, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        return list(row["input_ids"])[:limit], [tuple(pair) for pair in row["offset_mapping"]][:limit]


def join_spans(text: str, spans: Sequence[Span]) -> list[Span]:
    """Return spans in order, joined where only white space lies between, without white space at their ends."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and not text[joined[-1][1] : start].strip():
            start, end = joined[-1][0], max(end, joined.pop()[1])
        joined.append((start, end))
    stripped = [(end - len(text[start:end].lstrip()), start + len(text[start:end].rstrip())) for start, end in joined]
    return [(start, end) for start, end in stripped if start < end]
