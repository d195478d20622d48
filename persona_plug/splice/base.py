"""Running the frozen LLM around soft tokens: masks, positions, reused states; the decoder-only case.

A row is [left][soft][right][answers]. Nothing in `left` depends on what is trained, so it runs without a graph and its
keys and values (for an encoder-decoder: its encoder states) are cached under a memory budget and reused across epochs.
Placement only decides where a prompt is split: with `suffix` the whole input is in `left`, and training costs little
more than the soft and answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from persona_plug.clock import clock
from persona_plug.models.caching import caching
from persona_plug.models.llm import embedding_scale
from persona_plug.splice.passes import pass_tokens, passes
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft
from persona_plug.splice.states import StateBill, StateCache


class PathReader(Protocol):
    """Scores the tokens of an answer from the LLM's logits."""

    def score(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the log-probability (n,) of each token, whose logits (n, V) are given."""


class Splicer:
    """What both kinds of LLM share: embedding, reuse of states, gathering of log-likelihoods."""

    def __init__(self, llm: Any, cache: StateCache, batch_size: int = 16) -> None:  # noqa: ANN401
        """Wrap a frozen LLM; `batch_size` rows at a time run without a graph."""
        self.llm, self.cache, self.batch_size = llm, cache, batch_size
        self.groups: dict[tuple[int, ...], tuple[tuple[int, ...], ...]] = {}
        self.bill = StateBill()
        self.scale = embedding_scale(llm)

    frozen = True
    """False where something inside the LLM is trained: then no state of a prompt outlives a step."""

    prefix: Tensor | None = None
    """Trained keys and values in front of every prompt (layers, 2, heads, P, head_dim): prefix tuning."""

    @property
    def start(self) -> Sequence[int]:
        """Tokens that stand in front of every answer in the ids that the LLM's own generate gives."""
        return ()

    head: tuple[int, ...] = ()
    """Tokens that prompts begin with (chat header, instruction); they run once, and their states are cached once."""

    @property
    def reuses(self) -> bool:
        """Whether a prompt's states are computed ahead and cached, and not in one pass with what is behind them."""
        return self.frozen and self.prefix is None and caching()

    @property
    def prefix_length(self) -> int:
        """Positions of the trained prefix."""
        return 0 if self.prefix is None else self.prefix.shape[-2]

    def keep_nothing(self) -> None:
        """Forget all states, and cache none from now on."""
        self.cache, self.groups, self.bill = StateCache(0), {}, StateBill()

    def begin_with(self, head: tuple[int, ...]) -> None:
        """Set the head; states are cached without its positions, so those of another head are forgotten."""
        if head != self.head:
            self.cache.clear()
            self.groups = {}
        self.head = head

    def plan(self, lefts: Sequence[tuple[int, ...]], reads: int | None = None) -> None:
        """Fix which prompts run together, so that a state's last bit does not hinge on the order they are asked for.

        An interrupted training then goes on bit by bit. Each prompt runs alone if not all states fit the budget, or if
        many would be computed for nothing.

        Args:
            lefts: All prompts that may be asked for.
            reads: How many will be; default all of them.
        """
        self.bill = StateBill()
        if not self.reuses:
            return
        ordered = sorted(set(lefts), key=lambda left: (len(left), left))
        size = self.batch_size if reads is None or reads >= len(ordered) else 1
        if size > 1 and ordered and ordered[-1]:
            longest = self._compute_states([ordered[-1]])[0]
            each = longest.numel() * longest.element_size() / max(1, len(ordered[-1]) - self.shared(ordered[-1]))
            if each * sum(len(left) - self.shared(left) for left in ordered) > self.cache.budget:
                size = 1
        batches = [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]
        groups = {left: batch for batch in batches for left in batch}
        if groups != self.groups:  # the same plan again finds the same states: a second method need not recompute them
            self.cache.clear()
            self.groups = groups

    def shared(self, left: tuple[int, ...]) -> int:
        """Return how many tokens of `left` are the head's (none for an encoder: each of its states sees all tokens)."""
        return 0

    @property
    def summary_width(self) -> int:
        """Width of a prompt's summary; 0 where the states of a prompt are not to be had apart from what follows."""
        return 0

    def summaries(self, lefts: Sequence[tuple[int, ...]], states: Sequence[Tensor]) -> Tensor:
        """Return what the LLM's middle layers make of prompts, (B, summary_width) float32.

        Args:
            lefts: The prompts.
            states: What `states` gives of them: nothing more runs.
        """
        raise NotImplementedError

    def loglik(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
        states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods (B, C) of each row's candidates (-inf where a row has fewer) and (B,) of gold ends.

        Rows of unlike length run in passes of their own where padding would cost more.

        Args:
            parts: Prompts.
            soft: (B, S, H), or B tensors (S_b, H) of different lengths; differentiable; S may be 0 for the plain LLM.
            trees: Candidates of each row.
            readers: What each row's tokens are scored by in place of the LLM's own softmax.
            states: What `states` gives of each row's `left`, where the caller has it already.
        """
        sizes = [len(s) + len(p.right) + len(t.tokens) for p, s, t in zip(parts, soft, trees, strict=True)]
        if states is None and not self.reuses:
            sizes = [len(p.left) + size for p, size in zip(parts, sizes, strict=True)]
        groups = passes(sizes, pass_tokens(self.llm.device))
        if len(groups) == 1:
            return self.in_one_pass(parts, soft, trees, readers, states)
        scores = [
            self.in_one_pass(
                [parts[i] for i in g],
                [soft[i] for i in g],
                [trees[i] for i in g],
                [readers[i] for i in g] if readers is not None else None,
                [states[i] for i in g] if states is not None else None,
            )
            for g in groups
        ]
        count = max(total.shape[1] for total, _ in scores)
        wide = [F.pad(total, (0, count - total.shape[1]), value=float("-inf")) for total, _ in scores]
        back = torch.tensor([i for g in groups for i in g], device=wide[0].device).argsort()
        return torch.cat(wide)[back], torch.cat([end for _, end in scores])[back]

    def in_one_pass(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
        states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return what `loglik` does, of all rows at once."""
        raise NotImplementedError

    def answer_logits(self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]) -> list[Tensor]:
        """Return logits (n, V) in front of each token of each row's only candidate, its end token included."""
        raise NotImplementedError

    def together(self, parts: Sequence[PromptParts], soft: Soft) -> list[list[int]]:
        """Return which rows `generation_inputs` may take at once, as lists of their indices."""
        return [list(range(len(parts)))]

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return what the LLM's own `generate` takes, for rows that `together` puts together."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What the LLM computes in: quantised LLMs keep their embeddings as they are."""
        return self.llm.get_input_embeddings().weight.dtype

    def embed(self, ids: Sequence[int]) -> Tensor:
        """Return the LLM's input embeddings (len, H)."""
        table = self.llm.get_input_embeddings()
        embedded = table(torch.tensor(list(ids), dtype=torch.long, device=self.llm.device))
        return embedded if self.scale == 1.0 else embedded * self.scale

    def _prompts(self, parts: Sequence[PromptParts], soft: Soft) -> list[Tensor]:
        """Return each row's embeddings (L, H), soft tokens in their place, in the soft tokens' dtype."""
        return [
            torch.cat([self.embed(p.left).to(s.dtype), s, self.embed(p.right).to(s.dtype)])
            for p, s in zip(parts, soft, strict=True)
        ]

    def states(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the frozen states of each `left`, from the cache or computed in length-sorted batches."""
        if not caching():
            return self._compute_states(lefts)
        states = {left: state for left in dict.fromkeys(lefts) if (state := self.cache.get(left)) is not None}
        missing = sorted((left for left in dict.fromkeys(lefts) if left not in states), key=len)
        unplanned = [left for left in missing if left not in self.groups]
        batches = [unplanned[i : i + self.batch_size] for i in range(0, len(unplanned), self.batch_size)]
        batches += [list(batch) for batch in dict.fromkeys(self.groups[m] for m in missing if m in self.groups)]
        for part in batches:
            start = clock(self.llm)
            states.update(zip(part, self._compute_states(part), strict=True))
            if not self.cache.budget:  # not even whose prompt it was is remembered
                continue
            seconds = clock(self.llm) - start
            self.bill.spent += seconds
            for left in part:
                self.cache.put(left, states[left])
                self.cache.seconds[left] = seconds / len(part)
        if self.cache.budget:
            for left in dict.fromkeys(lefts):  # not the others of a planned group, which ran along
                if left not in self.bill.used:
                    self.bill.used.add(left)
                    self.bill.owed += self.cache.seconds.get(left, 0.0)
        return [states[left] for left in lefts]

    def _compute_states(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        raise NotImplementedError

    def _padded_ids(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(r) for r in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
            mask[i, : len(row)] = 1
        return ids.to(self.llm.device), mask.to(self.llm.device)
