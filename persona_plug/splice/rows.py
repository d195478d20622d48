"""Decoder-only LLMs whose layers cannot read a tree: each candidate is a row of its own, and no row is padded in front.

Recurrent layers read whatever stands before them, through any mask; ALiBi and local or chunked attention count columns
instead of positions; some layers keep keys and values of unlike shapes. All of them read a plain row rightly.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_plug.splice.base import Splicer
from persona_plug.splice.chains import chains, sum_chains
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft
from persona_plug.splice.states import StateCache


class RowSplicer(Splicer):
    """Decoder-only LLMs of which nothing is asked but a pass over a plain row; no states are kept."""

    reuses = False

    def __init__(self, llm: Any, cache: StateCache, batch_size: int = 16) -> None:  # noqa: ANN401
        """See `Splicer`."""
        super().__init__(llm, cache, batch_size)
        self.cuts_logits = "logits_to_keep" in inspect.signature(llm.forward).parameters

    def in_one_pass(
        self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]
    ) -> tuple[Tensor, Tensor]:
        """See `Splicer.loglik`; rows run in passes of `batch_size`, padded behind their end only."""
        prompts = self._prompts(parts, soft)
        answers = [(b, chain) for b, tree in enumerate(trees) for chain in chains(tree)]
        order = sorted(range(len(answers)), key=lambda i: len(prompts[answers[i][0]]) + len(answers[i][1]))
        picked: list[Tensor] = [prompts[0]] * len(answers)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            rows = [answers[i] for i in batch]
            for i, values in zip(batch, self._pick([prompts[b] for b, _ in rows], [c for _, c in rows]), strict=True):
                picked[i] = values
        wide = torch.nn.utils.rnn.pad_sequence(picked, batch_first=True)
        return sum_chains(wide, trees, [chain for _, chain in answers])

    def _pick(self, prompts: Sequence[Tensor], answers: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return the log-probability of each answer's tokens, one tensor a row."""
        rows = [torch.cat([p, self.embed(a[:-1]).to(p.dtype)]) for p, a in zip(prompts, answers, strict=True)]
        embeds = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.dtype)
        first = min(len(p) for p in prompts) - 1  # the column that predicts the first answer token of any row
        options = {"logits_to_keep": embeds.shape[1] - first} if self.cuts_logits else {}
        logits = self.llm(inputs_embeds=embeds, use_cache=False, **options).logits
        lost = embeds.shape[1] - logits.shape[1]
        values = []
        for row, prompt, answer in zip(logits, prompts, answers, strict=True):
            at = len(prompt) - 1 - lost
            here = row[at : at + len(answer)].float()
            ids = torch.tensor(answer, device=here.device)
            values.append(here.gather(1, ids.unsqueeze(1)).squeeze(1) - here.logsumexp(-1))
        return values

    def together(self, parts: Sequence[PromptParts], soft: Soft) -> list[list[int]]:
        """See `Splicer.together`: only rows of one length, since none may be padded in front."""
        groups: dict[int, list[int]] = {}
        for i, (part, row) in enumerate(zip(parts, soft, strict=True)):
            groups.setdefault(len(part.left) + len(row) + len(part.right), []).append(i)
        return list(groups.values())

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return `inputs_embeds` of rows of one length for the LLM's own generate."""
        embeds = torch.stack(self._prompts(parts, soft)).to(self.dtype)
        return {"inputs_embeds": embeds, "attention_mask": embeds.new_ones(embeds.shape[:2], dtype=torch.long)}
