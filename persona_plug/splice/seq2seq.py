"""The frozen encoder-decoder around soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from persona_plug.splice.base import PathReader, Splicer
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft


class Seq2SeqSplicer(Splicer):
    """Encoder-decoder LLMs: soft tokens in front of the encoder's input, or behind the encoder's output."""

    @torch.no_grad()
    def _compute_states(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return self._encode(lefts)

    def _encode(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return encoder states (length, H) for each left; for prefix placement there is nothing to compute."""
        if not lefts[0]:
            return [torch.zeros(0), *(self._encode(lefts[1:]) if len(lefts) > 1 else [])]
        ids, mask = self._padded_ids(lefts)
        hidden = self.llm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return [hidden[i, : len(left)].clone() for i, left in enumerate(lefts)]

    def _encoded(self, parts: Sequence[PromptParts], soft: Soft) -> tuple[Tensor, Tensor]:
        """Return encoder states (B, L, H) with the soft tokens in place, and their mask (B, L)."""
        lefts = [p.left for p in parts]
        states = self.states(lefts) if self.reuses else self._encode(lefts)
        if any(p.right for p in parts):
            rows = [torch.cat([s, self.embed(p.right).to(s.dtype)]) for p, s in zip(parts, soft, strict=True)]
            embeds, mask = _right_padded(rows)
            out = self.llm.get_encoder()(inputs_embeds=embeds.to(self.dtype), attention_mask=mask)
            return out.last_hidden_state, mask
        rows = [torch.cat([state.to(s.dtype), s]) for state, s in zip(states, soft, strict=True)]
        embeds, mask = _right_padded(rows)
        return embeds.to(self.dtype), mask

    def in_one_pass(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Splicer.loglik`; each candidate is a decoder row, since relative position biases know no tree."""
        chains = [_chains(tree) for tree in trees]
        owner = [b for b, c in enumerate(chains) for _ in c]
        targets = [c for row in chains for c in row]
        logits = self._chain_logits(parts, soft, owner, targets)
        labels, valid = self._padded_ids(targets)
        if readers is None:
            logp = logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1) * valid
        else:
            rows = zip(logits, owner, targets, strict=True)
            scores = [readers[b].score(row[: len(target)], target) for row, b, target in rows]
            logp = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True)
        device = logits.device
        total = torch.full((len(trees), max(len(t.paths) for t in trees)), float("-inf"), device=device)
        end = torch.zeros(len(trees), device=device)
        at = 0
        for b, tree in enumerate(trees):
            lengths = [len(path) for path in tree.paths]
            sums = [logp[at + i, :n].sum() for i, n in enumerate(lengths)]
            total = total.index_put(
                (torch.full((len(sums),), b, device=device), torch.arange(len(sums), device=device)),
                torch.stack(sums),
            )
            for i, n in enumerate(lengths):
                if len(chains[b][i]) > n:
                    end = end.index_put((torch.tensor(b, device=device),), logp[at + i, n])
            at += len(sums)
        return total, end

    def answer_logits(self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]) -> list[Tensor]:
        """See `Splicer.answer_logits`."""
        targets = [_chains(tree)[0] for tree in trees]
        logits = self._chain_logits(parts, soft, range(len(trees)), targets)
        return [row[: len(target)] for row, target in zip(logits, targets, strict=True)]

    def _chain_logits(
        self, parts: Sequence[PromptParts], soft: Soft, owner: Sequence[int], targets: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return logits (rows, L, V) in front of each token of decoder rows, each of which belongs to a prompt."""
        encoded, mask = self._encoded(parts, soft)
        index = torch.tensor(list(owner), device=encoded.device)
        start = self.llm.config.decoder_start_token_id
        ids, _ = self._padded_ids([[start, *target[:-1]] for target in targets])
        out = self.llm(
            encoder_outputs=(encoded[index],), attention_mask=mask[index], decoder_input_ids=ids, use_cache=False
        )
        logits: Tensor = out.logits
        return logits

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return `encoder_outputs` and `attention_mask` for the LLM's own generate."""
        from transformers.modeling_outputs import BaseModelOutput

        encoded, mask = self._encoded(parts, soft)
        return {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "attention_mask": mask}


def _chains(tree: AnswerTree) -> list[tuple[int, ...]]:
    """Return the predicted tokens of each candidate; the gold's end token is added where paths leave it out."""
    chains = [tuple(token for _, token in path) for path in tree.paths]
    if tree.gold_end is not None:
        gold = next(i for i, path in enumerate(tree.paths) if _leaf(tree, path) == tree.gold_end[0])
        chains[gold] = (*chains[gold], tree.gold_end[1])
    return chains


def _leaf(tree: AnswerTree, path: tuple[tuple[int, int], ...]) -> int:
    parent, token = path[-1]
    return next(
        (i for i, (p, t) in enumerate(zip(tree.parents, tree.tokens, strict=True)) if (p, t) == (parent, token)), -2
    )


def _right_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(r), dtype=torch.long, device=r.device) for r in rows], batch_first=True
    )
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask
