"""The words head as a logits processor of transformers: each row of a batch has a memory of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor

from persona_plug.heads.words import WordsReader


class WordsProcessor(LogitsProcessor):
    """Mixes each row's memory into its next-token scores. It keeps no state, so beams may be reordered."""

    def __init__(self, readers: Sequence[WordsReader | None], start: int = 0) -> None:
        """Bind rows to memories.

        Args:
            readers: One per request, None for the LLM alone; beams of one request stand side by side.
            start: Tokens that stand in front of every answer in the ids that `generate` hands on.
        """
        self.readers, self.start = readers, start

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return log-probabilities (rows, V) of the next token."""
        share = len(scores) // len(self.readers)
        rows = []
        for i, ids in enumerate(input_ids):
            reader, written = self.readers[i // share], ids[self.start :].tolist()
            row = scores[i : i + 1].float()
            rows.append(row.log_softmax(-1) if reader is None else reader.mix(row, written, len(written))[0])
        return torch.cat(rows).to(scores.dtype)
