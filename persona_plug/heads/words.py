"""The words head: what a user's own past words say of the next token, mixed with what the LLM says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from persona_plug.heads.gate import PARTS, Sight, WordGate, look
from persona_plug.heads.memory import ItemWords, RequestWords, WordMemory, facts_of, recall, token_slots
from persona_plug.heads.slots import Slot, find_slots, split_words
from persona_plug.heads.states import StateMap

SIZE = 64  # numbers of a kept state
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
        word_map: (encoder's d, SIZE) directions in which requests' words are compared.
        fitted: () whether the head may be used.
        common: (COMMON,) hashes of words that stand in many requests, 0 where there is none.
    """

    fitted: Tensor
    word_map: Tensor
    common: Tensor

    def __init__(self, llm: Any, encoder_dim: int, parts: Sequence[str] = PARTS) -> None:  # noqa: ANN401
        """Create an unfitted head for an LLM and an encoder of a width."""
        super().__init__()
        self.states = StateMap.of(llm, SIZE)
        self.gate = WordGate(parts)
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self.register_buffer("word_map", torch.zeros(encoder_dim, SIZE))
        self.register_buffer("common", torch.zeros(COMMON, dtype=torch.long))

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
    def fit_word_map(self, encoder: TokenEncoder, requests: Sequence[str]) -> None:
        """Keep the directions in which the words of requests differ most, each less its request's mean."""
        rows = torch.cat([_word_states(encoder, text)[1] for text in requests])
        directions = torch.linalg.svd(rows, full_matrices=False).Vh[:SIZE].T
        self.word_map.zero_()
        self.word_map[:, : directions.shape[1]] = directions

    def request_words(self, encoder: TokenEncoder, request: str) -> RequestWords:
        """Return a request as slots are placed in it."""
        spans, states = _word_states(encoder, request)
        common = self.common_words(request)
        allowed = [request[start:end].casefold() not in common for start, end in spans]
        return RequestWords(request, spans, nn.functional.normalize(states @ self.word_map, dim=-1), allowed)

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
        words = self.request_words(encoder, request) if request.strip() else None
        slots: list[Slot] = find_slots(request, answer, self.common_words(request)) if words else []
        kept = token_slots(slots, answer, offsets, words.states.half()) if words else ()
        return ItemWords(tuple(tokens), self.states(logits).half().cpu(), kept, facts_of(answer, offsets, kept))

    def reader(self, memory: WordMemory, request: Sequence[int], end: int) -> WordsReader:
        """Bind the head to one request's memory."""
        return WordsReader(self, memory, torch.tensor(list(request), dtype=torch.long), end)

    def recall(self, items: Sequence[ItemWords], request: RequestWords | None, tokenise: Any) -> WordMemory:  # noqa: ANN401
        """Return the memory that a request reads."""
        return recall(items, request, tokenise, SIZE)


@dataclass(frozen=True, slots=True)
class WordsReader:
    """The head as one request uses it.

    Attributes:
        head: The fitted head.
        memory: The user's words, slots filled from this request.
        request: (R,) token ids of the request, which may be copied from.
        end: The end token.
    """

    head: WordsHead
    memory: WordMemory
    request: Tensor
    end: int

    def look(self, logits: Tensor, written: Sequence[int], offset: int = 0) -> Sight:
        """Return what the gate sees of positions offset, offset + 1, ... whose logits (L, V) are given."""
        logp = logits.float().log_softmax(-1)
        return look(logp, self.head.states(logits), written, offset, self.memory, self.request, self.end)

    def mix(self, logits: Tensor, written: Sequence[int], offset: int = 0) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (L, V) of the mixture, and the weights (L, 4) of its parts.

        Args:
            logits: (L, V) the LLM's logits in front of tokens offset, offset + 1, ...
            written: The answer's tokens so far, at least offset + L - 1 of them.
            offset: Tokens in front of the first position.
        """
        sight = self.look(logits, written, offset)
        mixed, rest, weights = self.head.gate(sight)
        logp = logits.float().log_softmax(-1) + rest.unsqueeze(1)
        return logp.index_copy(1, sight.tokens, mixed), weights

    def score(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the log-probability (n,) of each token of an answer, whose logits (n, V) are given."""
        mixed, _ = self.mix(logits, tokens)
        return mixed.gather(1, torch.tensor(list(tokens), device=mixed.device).unsqueeze(1)).squeeze(1)


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode("utf-8", "surrogatepass")).digest()[:7], "big") + 1


def _word_states(encoder: TokenEncoder, text: str) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the characters of each word that the encoder reads, and the mean of its tokens' states less the text's."""
    offsets, states = encoder.token_states(text)
    if not len(states):
        return [], torch.zeros(0, encoder.dim)
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
    return spans, torch.stack(rows) if rows else torch.zeros(0, encoder.dim)
