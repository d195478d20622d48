"""Decoder-only LLMs whose layers cannot read a tree: each candidate is a row of its own, and no row is padded in front.

Recurrent layers read whatever stands before them, through any mask; ALiBi and local or chunked attention count columns
instead of positions; some layers keep keys and values of unlike shapes. All of them read a plain row rightly.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from persona_plug.splice.base import PathReader, Splicer
from persona_plug.splice.chains import chains, score_row, sum_chains
from persona_plug.splice.passes import last
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft
from persona_plug.splice.states import StateCache


class RowSplicer(Splicer):
    """Decoder-only LLMs of which nothing is asked but a pass over a plain row; no states are kept."""

    @property
    def reuses(self) -> bool:
        """See `Splicer.reuses`."""
        return False

    def __init__(self, llm: Any, cache: StateCache, batch_size: int = 16) -> None:  # noqa: ANN401
        """See `Splicer`."""
        super().__init__(llm, cache, batch_size)
        self.cuts_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters

    def in_one_pass(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
        states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Splicer.loglik`; rows run in passes of `batch_size`, padded behind their end only."""
        answers = [(b, chain) for b, tree in enumerate(trees) for chain in chains(tree)]

        def score(row: Tensor, b: int, chain: tuple[int, ...]) -> Tensor:
            return score_row(row, chain, None if readers is None else readers[b])

        wide = torch.nn.utils.rnn.pad_sequence(self._run(parts, soft, answers, score), batch_first=True)
        return sum_chains(wide, trees, [chain for _, chain in answers])

    def answer_logits(self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]) -> list[Tensor]:
        """See `Splicer.answer_logits`."""
        answers = [(b, chains(tree)[0]) for b, tree in enumerate(trees)]
        return self._run(parts, soft, answers, lambda row, _, __: row)

    def _run(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        answers: Sequence[tuple[int, tuple[int, ...]]],
        read: Callable[[Tensor, int, tuple[int, ...]], Tensor],
    ) -> list[Tensor]:
        """Return what `read` makes of each answer's logits (n, V), its prompt's index, and its tokens."""
        prompts = self._prompts(parts, soft)
        order = sorted(range(len(answers)), key=lambda i: len(prompts[answers[i][0]]) + len(answers[i][1]))
        values: dict[int, Tensor] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [answers[i] for i in batch]
            logits = self._logits([prompts[b] for b, _ in rows], [chain for _, chain in rows])
            values |= {i: read(row, *answers[i]) for i, row in zip(batch, logits, strict=True)}
        return [values[i] for i in range(len(answers))]

    def _logits(self, prompts: Sequence[Tensor], answers: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the logits (n, V) in front of each answer's tokens, one tensor per row."""
        rows = [torch.cat([p, self.embed(a[:-1]).to(p.dtype)]) for p, a in zip(prompts, answers, strict=True)]
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.dtype)
        first = min(len(p) for p in prompts) - 1  # the column that predicts the first answer token of any row
        options = {"logits_to_keep": last(embeds.shape[1] - first, embeds)} if self.cuts_logits else {}
        logits = self.llm(inputs_embeds=embeds, use_cache=False, **options).logits
        lost = embeds.shape[1] - logits.shape[1]
        starts = [len(prompt) - 1 - lost for prompt in prompts]
        return [row[at : at + len(answer)] for row, at, answer in zip(logits, starts, answers, strict=True)]

    def together(self, parts: Sequence[PromptParts], soft: Soft) -> list[list[int]]:
        """See `Splicer.together`: only rows of one length, since none may be padded in front."""
        groups: dict[int, list[int]] = {}
        for i, (part, row) in enumerate(zip(parts, soft, strict=True)):
            groups.setdefault(len(part) + len(row), []).append(i)
        return list(groups.values())

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return `inputs_embeds` of rows of one length for the LLM's own generate."""
        embeds = torch.stack(self._prompts(parts, soft)).to(self.dtype)
        return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2], dtype=torch.long)}
