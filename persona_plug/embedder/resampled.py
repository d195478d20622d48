"""ResampledEmbedder: a user's history as several soft tokens, one per item or a fixed number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.batch import HistoryBatch, value_dim
from persona_plug.embedder.resamplers import RESAMPLERS
from persona_plug.embedder.user_embedder import UserEmbedder
from persona_plug.splice.soft import Soft


class ResampledEmbedder(UserEmbedder):
    """UEM and PERSOMA: their soft tokens depend on the history alone, not on the request."""

    def build(self, config: PlugConfig) -> None:
        """See `UserEmbedder.build`."""
        self.resampler = RESAMPLERS[config.aggregator](self._value_width, config)
        self._output(config.projector_hidden, config.llm_width)

    def soft_tokens(self, batch: HistoryBatch, mask: Tensor) -> tuple[Soft, Tensor | None]:
        """Return the task tokens and a history's resampled ones, each row without padding."""
        m, per_item = self.config.shared_tokens, self.resampler.per_item
        text = value_dim(self.config)[0]
        values = batch.values if self.config.use_answer_counts else batch.values[..., :text]
        values = torch.cat([values[..., :text] * self.config.encoder_dim**0.5, values[..., text:]], -1)
        vectors, seen = self.resampler(values, mask)
        own = slice(m, m + 1) if per_item else slice(m, None)  # tokens of items all start at the same one
        gain = self.log_gain.exp().unsqueeze(-1)
        task = nn.functional.normalize(self.tokens[:m], dim=-1) * gain[:m]
        user = nn.functional.normalize(self.tokens[own] + self.out(self.dropout(vectors)), dim=-1) * gain[own]
        rows = [torch.cat([task, row[here]]) for row, here in zip(user, seen, strict=True)]
        return rows if per_item else torch.stack(rows), None

    def soft_count(self, items: int) -> int:
        """See `Embedder.soft_count`."""
        if not self.resampler.per_item:
            return super().soft_count(items)
        return self.config.shared_tokens + 1 + min(items, self.config.max_history)
