"""The frozen encoder-decoder around soft tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from persona_plug.errors import ConfigError
from persona_plug.splice.base import PathReader, Splicer
from persona_plug.splice.chains import chains, score_row, sum_chains
from persona_plug.splice.prompts import AnswerTree, PromptParts
from persona_plug.splice.soft import Soft


class Seq2SeqSplicer(Splicer):
    """Encoder-decoder LLMs: soft tokens in front of the encoder's input, or behind the encoder's output."""

    pads = True
    """False where padding changes what the encoder says of a row: rows then run through it one by one."""

    @property
    def start(self) -> list[int]:
        """What the decoder begins with: its start token, and the token that some models are forced to write first."""
        first, forced = (self._token(name) for name in ("decoder_start_token_id", "forced_bos_token_id"))
        if first is None:
            raise ConfigError("the LLM's config has no decoder_start_token_id; set it")
        return [first] if forced is None else [first, forced]

    def _token(self, name: str) -> int | None:
        places = (self.llm.generation_config, self.llm.config, self.llm.config.get_text_config(decoder=True))
        return next((int(value) for place in places if (value := getattr(place, name, None)) is not None), None)

    @torch.no_grad()
    def _compute_states(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return self._encode(lefts)

    def _encode(self, lefts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Return encoder states (length, H) for each left; for prefix placement there is nothing to compute."""
        if not lefts[0]:
            return [torch.zeros(0), *(self._encode(lefts[1:]) if len(lefts) > 1 else [])]
        if not self.pads and len(lefts) > 1:
            return [self._encode([left])[0] for left in lefts]
        ids, mask = self._padded_ids(lefts)
        hidden = self.llm.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        return [hidden[i, : len(left)].clone() for i, left in enumerate(lefts)]

    @property
    def summary_width(self) -> int:
        """See `Splicer.summary_width`."""
        return self._summary_width if self.frozen else 0

    @cached_property
    @torch.no_grad()
    def _summary_width(self) -> int:
        return self._encode([(0,)])[0].shape[1]

    def summaries(self, lefts: Sequence[tuple[int, ...]], states: Sequence[Tensor]) -> Tensor:
        """See `Splicer.summaries`: the mean of the encoder's states."""
        return torch.stack(
            [s.float().mean(0) if len(s) else torch.zeros(self.summary_width, device=s.device) for s in states]
        )

    def _encoded(
        self, parts: Sequence[PromptParts], soft: Soft, states: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return encoder states (B, L, H) with the soft tokens in place, and their mask (B, L)."""
        if states is None:
            lefts = [p.left for p in parts]
            states = self.states(lefts) if self.reuses else self._encode(lefts)
        if any(p.right for p in parts):
            rows = [torch.cat([s, self.embed(p.right).to(s.dtype)]) for p, s in zip(parts, soft, strict=True)]
            if not self.pads:
                return _right_padded([self._read([row])[0][0] for row in rows])
            return self._read(rows)
        rows = [torch.cat([state.to(s.dtype), s]) for state, s in zip(states, soft, strict=True)]
        embeds, mask = _right_padded(rows)
        return embeds.to(self.dtype), mask

    def _read(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the encoder's states (B, L, H) of rows of embeddings, and their mask (B, L)."""
        embeds, mask = _right_padded(rows)
        out = self.llm.get_encoder()(input_ids=None, inputs_embeds=embeds.to(self.dtype), attention_mask=mask)
        return out.last_hidden_state[:, : embeds.shape[1]], mask

    def in_one_pass(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        trees: Sequence[AnswerTree],
        readers: Sequence[PathReader] | None = None,
        states: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Splicer.loglik`; each candidate is a decoder row, since relative position biases know no tree."""
        answers = [(b, chain) for b, tree in enumerate(trees) for chain in chains(tree)]
        logits = self._chain_logits(parts, soft, answers, states)
        scores = [
            score_row(row[: len(chain)], chain, None if readers is None else readers[b])
            for row, (b, chain) in zip(logits, answers, strict=True)
        ]
        picked = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True)
        return sum_chains(picked, trees, [chain for _, chain in answers])

    def answer_logits(self, parts: Sequence[PromptParts], soft: Soft, trees: Sequence[AnswerTree]) -> list[Tensor]:
        """See `Splicer.answer_logits`."""
        answers = [(b, chains(tree)[0]) for b, tree in enumerate(trees)]
        logits = self._chain_logits(parts, soft, answers)
        return [row[: len(chain)] for row, (_, chain) in zip(logits, answers, strict=True)]

    def _chain_logits(
        self,
        parts: Sequence[PromptParts],
        soft: Soft,
        answers: Sequence[tuple[int, tuple[int, ...]]],
        states: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Return logits (rows, L, V) in front of each token of answers, given as (index of the prompt, tokens)."""
        encoded, mask = self._encoded(parts, soft, states)
        owner = torch.tensor([b for b, _ in answers], device=encoded.device)
        ids, _ = self._padded_ids([[*self.start, *chain[:-1]] for _, chain in answers])
        out = self.llm(
            encoder_outputs=self._outputs(encoded[owner]),
            attention_mask=mask[owner],
            decoder_input_ids=ids,
            use_cache=False,
        )
        logits: Tensor = out.logits[:, len(self.start) - 1 :]
        return logits

    def generation_inputs(self, parts: Sequence[PromptParts], soft: Soft) -> dict[str, Any]:
        """Return `encoder_outputs` and `attention_mask` for the LLM's own generate."""
        encoded, mask = self._encoded(parts, soft)
        return {"encoder_outputs": self._outputs(encoded), "attention_mask": mask}

    def _outputs(self, encoded: Tensor) -> Any:  # noqa: ANN401
        from transformers.modeling_outputs import BaseModelOutput

        made = BaseModelOutput(last_hidden_state=encoded)
        made.router_logits = None  # what encoders with experts give beside it
        return made


def _right_padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(r), dtype=torch.long, device=r.device) for r in rows], batch_first=True
    )
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask
