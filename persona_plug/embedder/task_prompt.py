"""Embedders that know no user: learned tokens that are everyone's, and none at all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.batch import HistoryBatch, check_finite
from persona_plug.embedder.contract import Embedded, Embedder


class NoTokens(Embedder):
    """No soft tokens: what is trained lies inside the LLM, or nothing is."""

    def forward(self, batch: HistoryBatch) -> Embedded:
        """Return no soft tokens (B, 0, H)."""
        return Embedded(torch.zeros(len(batch.mask), 0, self.config.llm_width, device=batch.mask.device), None)

    def soft_count(self, items: int) -> int:
        """See `Embedder.soft_count`."""
        return 0


class TaskPrompt(Embedder):
    """Learned soft tokens, scaled to a learned gain that starts at the LLM's mean embedding norm.

    PPlug multiplies by a constant of one model instead (`fixed_scale`).
    """

    def __init__(self, config: PlugConfig, embedding_norm: float, start: Tensor | None = None) -> None:
        """Create the tokens.

        Args:
            config: Architecture; `llm_width` must be set.
            embedding_norm: Mean L2 norm of the LLM's input embeddings.
            start: (m + k, H) where the soft tokens start; rows of the LLM's embedding table are a good choice.
        """
        super().__init__(config)
        total, width = config.soft_tokens, config.llm_width
        start = torch.randn(total, width) if start is None else start.detach().clone().float()
        self.tokens = nn.Parameter(nn.functional.normalize(start, dim=-1))
        gain = torch.full((total,), config.fixed_scale or embedding_norm)
        if config.fixed_scale:
            gain[: config.shared_tokens] /= 7
        self.log_gain = nn.Parameter(gain.log(), requires_grad=not config.fixed_scale)

    def forward(self, batch: HistoryBatch) -> Embedded:
        """Return the same tokens (B, m, H) for every request; see `Embedder.forward`."""
        check_finite(batch)
        return Embedded(self.scaled(self.tokens.expand(batch.request.shape[0], -1, -1)), None)

    def scaled(self, directions: Tensor) -> Tensor:
        """Return soft tokens (B, S, H) of the learned lengths, in the directions given."""
        return nn.functional.normalize(directions, dim=-1) * self.log_gain.exp().view(1, -1, 1)

    def soft_count(self, items: int) -> int:
        """See `Embedder.soft_count`."""
        return self.config.soft_tokens
