"""What every embedder offers, whatever its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.batch import HistoryBatch
from persona_plug.splice.soft import Soft


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an embedder makes of B requests and their histories.

    Attributes:
        soft: (B, m + k, H) soft tokens [task; user]; with `uem` B tensors of different lengths.
        weights: (B, n) mean weight of each history item over the heads, or None where items have no weights.
    """

    soft: Soft
    weights: Tensor | None


class Embedder(nn.Module, ABC):
    """Maps requests and histories to soft tokens. It is the only part of a plug that is trained and saved.

    Attributes:
        config: Architecture.
        score_temperature: () Divides log-likelihoods of candidate answers; fitted on held-out users.
        reads_request: Whether the output depends on the frozen encoder's vectors of the requests.
    """

    score_temperature: Tensor
    reads_request = False

    def __init__(self, config: PlugConfig) -> None:
        """Create what all embedders have: the temperature of scores."""
        super().__init__()
        self.config = config
        self.register_buffer("score_temperature", torch.ones(()))

    @abstractmethod
    def forward(self, batch: HistoryBatch) -> Embedded:
        """Embed a batch.

        Args:
            batch: Requests and histories.

        Raises:
            DataError: A vector is not finite.
        """

    @abstractmethod
    def soft_count(self, items: int) -> int:
        """Return how many soft tokens a request of a user with `items` history items has."""

    def set_dropout(self, history_dropout: float, empty_history: float, dropout: float) -> None:
        """Set what training leaves out; an embedder that reads no history leaves out nothing.

        Args:
            history_dropout: The largest share of a row's items that is left out.
            empty_history: The share of rows that lose their whole history.
            dropout: The share of the projector's features that is set to 0.
        """

    def set_population(self, population: Tensor) -> None:
        """Start where an empty history stands for how often all users gave each answer, (C,)."""
