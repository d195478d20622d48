"""The words head: what a user's own past words say of the next token, mixed with what the LLM says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from persona_plug.heads.gate import PARTS, Sight, WordGate, look
from persona_plug.heads.memory import ItemWords, RequestWords, WordMemory, facts_of, token_slots
from persona_plug.heads.slots import SHAPES, find_slots, split_words, word_shapes
from persona_plug.heads.states import StateMap, softcap

SIZE = 48  # numbers of a kept state: 40 answers of 20 tokens fit into 64 kB
COMMON = 512  # common words at most


class TokenEncoder(Protocol):
    """A sentence encoder that gives the states of single tokens."""

    dim: int

    def token_states(self, text: str) -> tuple[list[tuple[int, int]], Tensor]:
        """Return characters (start, end) of a text's tokens, and their states (n, d)."""


class WordsHead(nn.Module):
    """Maps, gate and common words: all that is fitted; a user's words themselves are no part of it.

    Attributes:
        states: Logits -> states.
        gate: The mixture.
        word_map: (encoder's d, SIZE) directions in which requests' words are compared; the words' shapes take the place
            of the last ones.
        topic_map: (encoder's d + 1, SIZE) directions in which requests are compared; the last row is their mean's.
        fitted: () whether the head may be used.
        common: (COMMON,) hashes of words that stand in many requests, 0 where there is none.
    """

    fitted: Tensor
    word_map: Tensor
    topic_map: Tensor
    common: Tensor

    def __init__(self, states: StateMap, encoder_dim: int, parts: Sequence[str] = PARTS) -> None:
        """Create an unfitted head for an LLM's states and an encoder of a width."""
        super().__init__()
        self.states = states
        self.gate = WordGate(parts)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("word_map", torch.zeros(encoder_dim, SIZE))
        self.register_buffer("topic_map", torch.zeros(encoder_dim + 1, SIZE))
        self.register_buffer("common", torch.zeros(COMMON, dtype=torch.long))

    @classmethod
    def read(cls, weights: Mapping[str, Tensor], llm_config: Any) -> Self:  # noqa: ANN401
        """Return the head with these weights, for an LLM of which the config alone is at hand."""
        rows, size = weights["states.matrix"].shape
        head = cls(StateMap(size, rows, softcap(llm_config)), weights["word_map"].shape[0])
        head.load_state_dict(dict(weights))
        return head.eval()

    def set_common(self, words: Sequence[str]) -> None:
        """Set the words that no slot begins or ends with."""
        hashes = sorted(_hash(word) for word in words)[:COMMON]
        self.common.zero_()
        self.common[: len(hashes)] = torch.tensor(hashes, dtype=torch.long)

    def common_words(self, text: str) -> frozenset[str]:
        """Return which words of a text are common ones."""
        known = set(self.common.tolist()) - {0}
        return frozenset(w.folded for w in split_words(text) if _hash(w.folded) in known)

    @torch.no_grad()
    def fit_maps(self, encoder: TokenEncoder, requests: Sequence[str]) -> None:
        """Keep the directions in which requests differ most, and their words, each less its request's mean."""
        states = [encoder.token_states(text) for text in requests]
        words = torch.cat([_word_states(text, *row)[1] for text, row in zip(requests, states, strict=True)])
        topics = torch.stack([row[1].mean(0) for row in states if len(row[1])])
        center = topics.mean(0)
        for matrix, rows in ((self.word_map, words), (self.topic_map, topics - center)):
            directions = torch.linalg.svd(rows, full_matrices=False).Vh[:SIZE].T
            matrix.zero_()
            matrix[: len(directions), : directions.shape[1]] = directions
        self.topic_map[-1] = -center @ self.topic_map[:-1]

    def request_words(self, encoder: TokenEncoder, request: str) -> RequestWords:
        """Return a request as slots are placed in it."""
        offsets, tokens = encoder.token_states(request) if request.strip() else ([], torch.zeros(0, encoder.dim))
        spans, states = _word_states(request, offsets, tokens)
        topic = torch.zeros(SIZE)
        if len(tokens):
            topic = nn.functional.normalize(tokens.mean(0) @ self.topic_map[:-1] + self.topic_map[-1], dim=0)
        common = self.common_words(request)
        allowed = [request[start:end].casefold() not in common for start, end in spans]
        meaning = nn.functional.normalize(states @ self.word_map[:, : -len(SHAPES)], dim=-1)
        states = nn.functional.normalize(torch.cat([meaning, word_shapes(request, spans, common)], -1), dim=-1)
        return RequestWords(request, spans, states, topic, allowed)

    def item_words(
        self,
        encoder: TokenEncoder,
        request: str,
        answer: str,
        tokens: Sequence[int],
        offsets: Sequence[tuple[int, int]],
        logits: Tensor,
    ) -> ItemWords:
        """Return what is kept of an item.

        Args:
            encoder: Places the slots.
            request: The item's request.
            answer: What the user wrote.
            tokens: (n,) its tokens, the end token last.
            offsets: (n - 1,) characters of each token but the end token.
            logits: (n, V) the LLM's logits in front of each token.
        """
        words = self.request_words(encoder, request)
        slots = find_slots(request, answer, self.common_words(request))
        kept = token_slots(slots, answer, offsets, *(_without(words.states, edge).half() for edge in (-1, -2)))
        states = self.states(logits).half().cpu()
        return ItemWords(tuple(tokens), states, words.topic.half(), kept, facts_of(answer, offsets, kept))

    def reader(self, memory: WordMemory, request: Sequence[int], end: int) -> WordsReader:
        """Bind the head to one request's memory."""
        return WordsReader(self, memory, torch.tensor(list(request), dtype=torch.long), end)


@dataclass(frozen=True, slots=True)
class WordsReader:
    """The head as one request uses it.

    Attributes:
        head: The fitted head.
        memory: The user's words, slots filled from this request.
        request: (R,) token ids of the request, which may be copied from.
        end: The end token.
        strength: How much the head counts; 1 is as fitted.
    """

    head: WordsHead
    memory: WordMemory
    request: Tensor
    end: int
    strength: float = 1.0

    def look(self, logits: Tensor, written: Sequence[int], offset: int = 0) -> Sight:
        """Return what the gate sees of positions offset, offset + 1, ... whose logits (L, V) are given."""
        return self._sight(logits, logits.float().log_softmax(-1), written, offset)

    def _sight(self, logits: Tensor, logp: Tensor, written: Sequence[int], offset: int) -> Sight:
        return look(logp, self.head.states(logits), written, offset, self.memory, self.request, self.end)

    def mix(self, logits: Tensor, written: Sequence[int], offset: int = 0) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (L, V) of the mixture, and the weights (L, 4) of its parts.

        Args:
            logits: (L, V) the LLM's logits in front of tokens offset, offset + 1, ...
            written: The answer's tokens so far, at least offset + L - 1 of them.
            offset: Tokens in front of the first position.
        """
        logp = logits.float().log_softmax(-1)
        sight = self._sight(logits, logp, written, offset)
        mixed, rest, weights = self.head.gate(sight, self.strength)
        return (logp + rest.unsqueeze(1)).index_copy(1, sight.tokens, mixed), weights

    def score(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the log-probability (n,) of each token of an answer, whose logits (n, V) are given."""
        mixed, _ = self.mix(logits, tokens)
        return mixed.gather(1, torch.tensor(list(tokens), device=mixed.device).unsqueeze(1)).squeeze(1)

    def memory_share(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return which share (n,) of each token's probability the user's memory gives, slots in it included."""
        sight = self.look(logits, tokens)
        written = torch.tensor(list(tokens), device=logits.device).unsqueeze(1)
        at = written == sight.tokens.unsqueeze(0)  # a token that memory cannot bring is none of the sight's
        return (self.head.gate.memory_share(sight, self.strength) * at).sum(-1)


def _without(states: Tensor, shape: int) -> Tensor:
    """Return unit vectors (W, d) without a shape: where a slot begins, its right edge says nothing."""
    mask = torch.ones(states.shape[1])
    mask[shape] = 0.0
    return nn.functional.normalize(states * mask, dim=-1)


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:7], "big") + 1


def _word_states(text: str, offsets: Sequence[tuple[int, int]], states: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the characters of each word that the encoder reads, and the mean of its tokens' states less the text's.

    Args:
        text: The text.
        offsets: (start, end) characters of each of its tokens.
        states: (n, d) the encoder's states of these.
    """
    if not len(states):
        return [], states
    centered = states - states.mean(0)
    spans, rows = [], []
    at = 0
    for word in split_words(text):
        while at < len(offsets) and offsets[at][1] <= word.start:
            at += 1
        touched = []
        i = at
        while i < len(offsets) and offsets[i][0] < word.end:
            touched.append(i)
            i += 1
        if not touched:
            break  # beyond what the encoder reads
        spans.append((word.start, word.end))
        rows.append(centered[touched].mean(0))
    return spans, torch.stack(rows) if rows else states[:0]
