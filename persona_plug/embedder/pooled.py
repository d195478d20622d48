"""PooledEmbedder: a user's items pooled to one vector, projected to a fixed number of soft tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.aggregators import AGGREGATORS, Pooled
from persona_plug.embedder.batch import HistoryBatch, value_dim
from persona_plug.embedder.user_embedder import UserEmbedder


class PooledEmbedder(UserEmbedder):
    """PPlug and its kind: aggregator + projector."""

    def build(self, config: PlugConfig) -> None:
        """See `UserEmbedder.build`."""
        self.reads_request = not config.train_request
        self.aggregator = AGGREGATORS[config.aggregator](config)
        width = self._value_width * self.aggregator.heads + (config.encoder_dim if config.use_request else 0)
        self.hidden = nn.Linear(width, config.projector_hidden)
        self._output(config.projector_hidden, config.user_tokens * config.llm_width)

    def soft_tokens(self, batch: HistoryBatch, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `UserEmbedder.soft_tokens`."""
        b, m = batch.request.shape[0], self.config.shared_tokens
        directions = self.tokens.unsqueeze(0).expand(b, -1, -1)
        offset, weights = self._user_offset(batch, mask)
        user = directions[:, m:] + offset.view(b, self.config.user_tokens, -1)
        return self.scaled(torch.cat([directions[:, :m], user], 1)), weights.mean(1)

    def _user_offset(self, batch: HistoryBatch, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the user adds to the user tokens (B, k * H), and the items' weights (B, heads, n)."""
        null = torch.cat([self.null_value, self.null_answers.softmax(0)])
        pooled: Pooled
        if self.aggregator.projects_items:
            # Eq. 4 projects each item before the weighted sum; the null item is projected alike.
            items = self._project(batch.values, batch.request)
            null_item = self._project(null.expand(batch.values.shape[0], 1, -1), batch.request)[:, 0]
            pooled = self.aggregator(batch.request, batch.keys, items, mask, null_item)
            return pooled.vector[:, 0], pooled.weights
        pooled = self.aggregator(batch.request, batch.keys, batch.values, mask, null)
        return self._project(pooled.vector.flatten(1), batch.request), pooled.weights

    def _project(self, vector: Tensor, request: Tensor) -> Tensor:
        text, answers = value_dim(self.config)
        parts = vector.unflatten(-1, (-1, text + answers))
        # Unit vectors have entries of size d**-.5; frequencies enter as logs, relative to the uniform answer.
        features: list[Tensor] = [parts[..., :text].flatten(-2) * self.config.encoder_dim**0.5]
        if answers and self.config.use_answer_counts:
            features.append(((parts[..., text:] + 1e-3) * answers).log().flatten(-2))
        if self.config.use_request:
            wide = request * self.config.encoder_dim**0.5
            features.append(wide if vector.dim() == 2 else wide.unsqueeze(1).expand(-1, vector.shape[1], -1))
        return self.out(self.dropout(nn.functional.gelu(self.hidden(self.dropout(torch.cat(features, -1))))))
