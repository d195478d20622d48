"""UserEmbedder: what all architectures that read a user's history share."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.batch import HistoryBatch, check_finite, value_dim
from persona_plug.embedder.contract import Embedded
from persona_plug.embedder.task_prompt import TaskPrompt
from persona_plug.errors import ConfigError, DataError
from persona_plug.splice.soft import Soft


class UserEmbedder(TaskPrompt):
    """Maps requests and histories to soft tokens [task; user], (B, m + k, H), float32.

    At the start the user tokens hardly depend on the user. `make_embedder` picks the subclass that the config's
    aggregator names.
    """

    def __init__(
        self,
        config: PlugConfig,
        embedding_norm: float,
        start: Tensor | None = None,
        request_encoder: nn.Module | None = None,
    ) -> None:
        """Create what all architectures share.

        Args:
            config: Architecture; `llm_width` and `encoder_dim` must be set.
            embedding_norm: Mean L2 norm of the LLM's input embeddings.
            start: (m + k, H) where the soft tokens start; rows of the LLM's embedding table are a good choice.
            request_encoder: (B, L) ids -> (B, d) vectors of requests, needed where the config trains it.

        Raises:
            ConfigError: The config trains an encoder that is not given.
        """
        super().__init__(config, embedding_norm, start)
        self.history_dropout = self.empty_history = 0.0  # set by training, see `set_dropout`
        if config.train_request:
            if request_encoder is None:
                raise ConfigError("train_request=True needs the encoder to copy: pass request_encoder=")
            self.request_encoder = request_encoder
        text, answers = value_dim(config)
        self.null_value = nn.Parameter(torch.zeros(text))
        self.null_answers = nn.Parameter(torch.zeros(answers))
        self.build(config)

    @abstractmethod
    def build(self, config: PlugConfig) -> None:
        """Create what the architecture has beside the parts of all."""

    def forward(self, batch: HistoryBatch) -> Embedded:
        """See `Embedder.forward`."""
        check_finite(batch)
        if self.config.train_request:
            if batch.request_ids is None:
                raise DataError("this plug reads requests itself: its batch needs `request_ids`")
            batch = replace(batch, request=self.request_encoder(batch.request_ids))
        soft, weights = self.soft_tokens(batch, self._remaining(batch.mask))
        return Embedded(soft, weights)

    @abstractmethod
    def soft_tokens(self, batch: HistoryBatch, mask: Tensor) -> tuple[Soft, Tensor | None]:
        """Return the soft tokens and the items' weights (B, n), without a look at whether the vectors are finite.

        Args:
            batch: Requests and histories.
            mask: (B, n) bool, True for the items to read.
        """

    def set_dropout(self, history_dropout: float, empty_history: float, dropout: float) -> None:
        """See `Embedder.set_dropout`."""
        self.history_dropout, self.empty_history, self.dropout.p = history_dropout, empty_history, dropout

    @torch.no_grad()
    def set_population(self, population: Tensor) -> None:
        """See `Embedder.set_population`."""
        if self.null_answers.numel():
            self.null_answers.copy_(population.log())

    def _output(self, hidden: int, width: int) -> None:
        """Create the projector's last layer, whose output starts near 0."""
        self.dropout = nn.Dropout(0.0)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.out.weight, std=1e-2 / hidden**0.5)

    @property
    def _value_width(self) -> int:
        """Width of what the projector reads of an item."""
        text, answers = value_dim(self.config)
        return text + (answers if self.config.use_answer_counts else 0)

    def _remaining(self, mask: Tensor) -> Tensor:
        """Leave out a random share of each row's items in training, and some rows' whole history.

        The share is PPlug's sub-history augmentation, drawn anew at each step; rows without any history teach what the
        request says by itself, and train the null item.
        """
        if not self.training:
            return mask
        b, device = mask.shape[0], mask.device
        rate = torch.rand(b, 1, device=device) * self.history_dropout
        emptied = torch.rand(b, 1, device=device) < self.empty_history
        return mask & (torch.rand(mask.shape, device=device) >= rate) & ~emptied
