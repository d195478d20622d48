"""UserEmbedder: aggregator + projector + task tokens -> soft tokens. The only part that is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from persona_plug.config import SMOOTHING, PlugConfig
from persona_plug.embedder.aggregators import AttentionAggregator, MeanAggregator, PaperAggregator, Pooled
from persona_plug.embedder.batch import HistoryBatch, check_finite, value_dim
from persona_plug.embedder.resamplers import ItemTokens, Resampler
from persona_plug.errors import ConfigError, DataError
from persona_plug.splice.soft import Soft


@dataclass(frozen=True, slots=True)
class Embedded:
    """What the embedder says of B requests.

    Attributes:
        soft: (B, m + T + k, H) soft tokens [task; quoted; user]; with `uem` B tensors of different lengths.
        bias: (B, C) what request and answer frequencies add to the scores of the C answers without the LLM, or None.
        weights: (B, n) mean weight of each history item over the heads (quoting is one more), or None without user
            tokens.
    """

    soft: Soft
    bias: Tensor | None
    weights: Tensor | None


class UserEmbedder(nn.Module):
    """Maps requests and histories to soft tokens [task; quoted; user], (B, m + T + k, H), float32.

    Soft tokens are scaled to a learned gain that starts at the LLM's mean embedding norm; PPlug multiplies by a
    constant of one model instead (`fixed_scale`). At the start the user tokens hardly depend on the user; quoted ones
    do.

    Attributes:
        score_temperature: Divides log-likelihoods of candidate answers; fitted on held-out users.
    """

    score_temperature: Tensor
    frequency_weight: Tensor
    population: Tensor

    def __init__(
        self,
        config: PlugConfig,
        embedding_norm: float,
        start: Tensor | None = None,
        request_encoder: nn.Module | None = None,
    ) -> None:
        """Create the embedder.

        Args:
            config: Architecture; `llm_width` and `encoder_dim` must be set.
            embedding_norm: Mean L2 norm of the LLM's input embeddings.
            start: (m + T + k, H) where the soft tokens start; rows of the LLM's embedding table are a good choice.
            request_encoder: (B, L) ids -> (B, d) vectors of requests, needed where the config trains it.
        """
        super().__init__()
        self.config = config
        total, width = config.soft_tokens, config.llm_width
        start = torch.randn(total, width) if start is None else start.detach().clone().float()
        start = nn.functional.normalize(start, dim=-1)
        self.tokens = nn.Parameter(start)
        gain = torch.full((total,), config.fixed_scale or embedding_norm)
        if config.fixed_scale:
            gain[: config.task_tokens] /= 7
        self.log_gain = nn.Parameter(gain.log(), requires_grad=not config.fixed_scale)
        self.register_buffer("score_temperature", torch.ones(()))
        # Set by training: the largest share of a row's items left out, and the share of rows left without any.
        self.history_dropout = self.empty_history = 0.0
        if config.user_tokens == 0:
            return
        if config.train_request:
            if request_encoder is None:
                raise ConfigError("train_request=True needs the encoder to copy: pass request_encoder=")
            self.request_encoder = request_encoder
        text, answers = value_dim(config)
        self.null_value = nn.Parameter(torch.zeros(text))
        self.null_answers = nn.Parameter(torch.zeros(answers))
        if config.answer_head and answers:
            # Fitted once before training (see `fit.start_answer_head`), so no gradient: the LLM learns what it adds.
            self.answer_head = nn.Linear(config.encoder_dim, answers).requires_grad_(False)
            nn.init.zeros_(self.answer_head.weight)
            nn.init.zeros_(self.answer_head.bias)
            self.register_buffer("frequency_weight", torch.ones(()))
            self.register_buffer("population", torch.full((answers,), 1 / answers))
            self.llm_log_weight = nn.Parameter(torch.tensor([0.1]).log())
        if config.aggregator not in ("attention", "mean", "paper"):
            size = text + (answers if config.use_answer_counts else 0)
            self.resampler = (
                ItemTokens(size, config.projector_hidden)
                if config.aggregator == "uem"
                else Resampler(
                    config.aggregator.removeprefix("persoma_"), size, config.projector_hidden, config.user_tokens
                )
            )
            self._output(config.projector_hidden, width)
            return
        self.aggregator: AttentionAggregator | MeanAggregator | PaperAggregator
        if config.aggregator == "attention":
            self.aggregator = AttentionAggregator(config.encoder_dim, config.heads, config.key_dim)
        else:
            self.aggregator = MeanAggregator() if config.aggregator == "mean" else PaperAggregator()
        if config.quotes:
            # Where it starts, the item closest to the request is quoted almost alone, and none that is not near.
            self.quote_log_temperature = nn.Parameter(torch.tensor([40.0]).log())
            self.quote_threshold = nn.Parameter(torch.tensor([0.4]))
        per_head = 0 if config.aggregator == "paper" else self.aggregator.heads
        width_in = (text + (answers if config.use_answer_counts else 0)) * (per_head or 1)
        width_in += config.encoder_dim if config.use_request else 0
        self.hidden = nn.Linear(width_in, config.projector_hidden)
        self._output(config.projector_hidden, config.user_tokens * width)

    def _output(self, hidden: int, width: int) -> None:
        self.dropout = nn.Dropout(0.0)
        self.out = nn.Linear(hidden, width, bias=False)
        nn.init.normal_(self.out.weight, std=1e-2 / hidden**0.5)

    def forward(self, batch: HistoryBatch, vocabulary: Tensor | None = None) -> Embedded:
        """Embed a batch.

        Args:
            batch: Requests and histories.
            vocabulary: (V, H) the LLM's input embeddings, needed where the config quotes.

        Raises:
            DataError: A vector is not finite, or what quoting needs is missing.
        """
        check_finite(batch)
        if self.config.train_request and self.config.user_tokens:
            if batch.request_ids is None:
                raise DataError("this plug reads requests itself: its batch needs `request_ids`")
            batch = replace(batch, request=self.request_encoder(batch.request_ids))
        b = batch.request.shape[0]
        m, t, k = self.config.task_tokens, self.config.quotes, self.config.user_tokens
        if hasattr(self, "resampler"):
            return self._resampled(batch)
        directions = self.tokens.unsqueeze(0).expand(b, -1, -1)
        weights = bias = None
        if k:
            mask = self._drop_items(batch.mask)
            offset, pooled = self._user_offset(batch, mask)
            heads = pooled.weights
            parts = [directions[:, :m], directions[:, m + t :] + offset.view(b, k, -1)]
            if t:
                quoted, quoting = self._quote(batch, mask, vocabulary)
                parts.insert(1, quoted)
                heads = torch.cat([heads, quoting.unsqueeze(1)], 1)
            weights = heads.mean(1)
            directions = torch.cat(parts, 1)
            bias = self._answer_bias(batch)
        soft = nn.functional.normalize(directions, dim=-1) * self.log_gain.exp().view(1, -1, 1)
        return Embedded(soft, bias, weights)

    def _resampled(self, batch: HistoryBatch) -> Embedded:
        """Return the task tokens and a history's resampled ones, each row without padding."""
        m, text = self.config.task_tokens, value_dim(self.config)[0]
        size = self.config.encoder_dim**0.5
        values = batch.values if self.config.use_answer_counts else batch.values[..., :text]
        values = torch.cat([values[..., :text] * size, values[..., text:]], -1)
        vectors, seen = self.resampler(values, self._drop_items(batch.mask))
        offset = self.out(self.dropout(vectors))
        user = self.tokens[m:] + offset if self.config.aggregator != "uem" else self.tokens[m] + offset
        gain = self.log_gain.exp()
        task = nn.functional.normalize(self.tokens[:m], dim=-1) * gain[:m, None]
        scale = gain[m:, None] if self.config.aggregator != "uem" else gain[m]
        user = nn.functional.normalize(user, dim=-1) * scale
        rows = [torch.cat([task, row[here]]) for row, here in zip(user, seen, strict=True)]
        same = self.config.aggregator != "uem"
        return Embedded(torch.stack(rows) if same else rows, self._answer_bias(batch), None)

    def _answer_bias(self, batch: HistoryBatch) -> Tensor | None:
        """Return head(request) + weight * log(p_user / p_all), p_user smoothed by one pseudo-count of p_all.

        A soft token bounds what a long history can say; log frequencies add up, as evidence does.
        """
        text, _ = value_dim(self.config)
        if not self.has_answer_head:
            return None
        counts = (batch.values[..., text:] * batch.mask.unsqueeze(-1)).sum(1)
        user = (counts + SMOOTHING * self.population) / (counts.sum(1, keepdim=True) + SMOOTHING)
        return self.answer_head(batch.request) + self.frequency_weight * (user / self.population).log()

    def combine(self, loglik: Tensor, bias: Tensor | None) -> Tensor:
        """Return scores (B, C) from the LLM's log-likelihoods and the bias of the same answers."""
        return loglik if bias is None else self.llm_log_weight.exp() * loglik + bias

    def _user_offset(self, batch: HistoryBatch, mask: Tensor) -> tuple[Tensor, Pooled]:
        null = torch.cat([self.null_value, self.null_answers.softmax(0)])
        if self.config.aggregator == "paper":
            # Eq. 4 projects each item before the weighted sum; the null item is projected alike.
            null_item = null.expand(batch.values.shape[0], 1, -1)
            projected = self._project(batch.values, batch.request), self._project(null_item, batch.request)[:, 0]
            pooled = self.aggregator(batch.request, batch.keys, projected[0], mask, projected[1])
            return pooled.vector[:, 0], pooled
        pooled = self.aggregator(batch.request, batch.keys, batch.values, mask, null)
        return self._project(pooled.vector.flatten(1), batch.request), pooled

    def _quote(self, batch: HistoryBatch, mask: Tensor, vocabulary: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return quoted tokens (B, T, H) and the items' weights (B, n).

        Position t is the weighted mean of the LLM's embeddings of the t-th token of the user's outputs: a sentence
        vector says what a text is about, not how it is worded, and a frozen LLM reads its own words without training.
        What no item near enough fills goes to learned tokens.
        """
        if batch.quotes is None or vocabulary is None:
            raise DataError("this plug quotes: its batch needs `quotes`, and its forward the LLM's embeddings")
        b, n, t = batch.quotes.shape
        near = (batch.keys @ batch.request.unsqueeze(-1)).squeeze(-1) - self.quote_threshold
        scores = (self.quote_log_temperature.exp() * near).masked_fill(~mask, float("-inf"))
        weights = torch.cat([scores, scores.new_zeros(b, 1)], 1).softmax(-1)[:, :-1]
        share = weights.unsqueeze(-1) * (batch.quotes >= 0)
        mixed = nn.functional.embedding_bag(
            batch.quotes.clamp(min=0).transpose(1, 2).reshape(b * t, n),
            vocabulary,
            per_sample_weights=share.transpose(1, 2).reshape(b * t, n).to(vocabulary.dtype),
            mode="sum",
        )
        m = self.config.task_tokens
        size = vocabulary[:1024].float().norm(dim=-1).mean()  # rows as they are stored: some LLMs scale them when read
        rest = (1 - share.sum(1)).unsqueeze(-1) * self.tokens[m : m + t] * size
        return mixed.float().view(b, t, -1) + rest, weights

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

    def _drop_items(self, mask: Tensor) -> Tensor:
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

    @property
    def has_answer_head(self) -> bool:
        """Whether scores have a part that does not come from the LLM."""
        return hasattr(self, "answer_head")

    def trainable_bytes(self) -> int:
        """Return the size of everything a saved plug must hold."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())
