"""Aggregators: a user's item vectors -> one vector, for a request.

Each maps request (B, d), keys (B, n, d), values (B, n, v) and mask (B, n) to `Pooled`. None depends on the order of the
items, and no row sees another row. `projects_items` tells whether values are projected before they are pooled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig


@dataclass(frozen=True, slots=True)
class Pooled:
    """A pooled history.

    Attributes:
        vector: (B, heads, v), the weighted mean of the values.
        weights: (B, heads, n), weight of each item; what is missing to 1 went to the null item.
    """

    vector: Tensor
    weights: Tensor


class AttentionAggregator(nn.Module):
    """Input-aware pooling with learned views and temperatures (the default recipe).

    PPlug's eq. 3 is softmax_i(x.h_i). Here request and keys go through learned projections, each head has a learned
    temperature (head 0 starts at 0: the plain mean), and a learned null item takes part in every softmax. The null item
    is the user of whom nothing is known: alone for an empty history, and a pseudo-count against short ones.
    """

    projects_items = False

    def __init__(self, dim: int, heads: int, key_dim: int) -> None:
        """Create the views for vectors of width `dim`."""
        super().__init__()
        self.heads, self.key_dim = heads, key_dim
        view = torch.empty(key_dim, dim)
        nn.init.orthogonal_(view)
        # Both views start alike, so that a score starts as a (projected) cosine.
        self.query = nn.Parameter(view.repeat(heads, 1))
        self.key = nn.Parameter(view.repeat(heads, 1))
        self.temperature = nn.Parameter(torch.tensor([0.0] + [6.0 * 2.0**h for h in range(heads - 1)]))
        self.null_score = nn.Parameter(torch.zeros(heads))

    def forward(self, request: Tensor, keys: Tensor, values: Tensor, mask: Tensor, null: Tensor) -> Pooled:
        """Pool `values`; `null` (v,) is the value of the null item."""
        b, n, _ = keys.shape
        q = nn.functional.normalize((request @ self.query.T).view(b, self.heads, 1, self.key_dim), dim=-1)
        k = nn.functional.normalize((keys @ self.key.T).view(b, n, self.heads, self.key_dim), dim=-1)
        scores = (q * k.transpose(1, 2)).sum(-1) * self.temperature.view(1, -1, 1)
        # Centred on the user's own items, so that the null item's share does not hinge on how close a user's texts are.
        inside = mask.unsqueeze(1)
        count = inside.sum(-1, keepdim=True).clamp(min=1)
        scores = scores - (scores * inside).sum(-1, keepdim=True) / count
        scores = scores.masked_fill(~inside, float("-inf"))
        weights = torch.cat([scores, self.null_score.view(1, -1, 1).expand(b, -1, 1)], -1).softmax(-1)
        vector = weights[..., :-1] @ values + weights[..., -1:] * null
        return Pooled(vector, weights[..., :-1])


class MeanAggregator(nn.Module):
    """The plain mean of a user's items; the null item for an empty history."""

    heads = 1
    projects_items = False

    def forward(self, request: Tensor, keys: Tensor, values: Tensor, mask: Tensor, null: Tensor) -> Pooled:
        """Pool `values`; `null` (v,) stands in for an empty history."""
        weights = mask.float() / mask.sum(1, keepdim=True).clamp(min=1)
        return Pooled(_with_null(weights, values, mask, null), weights.unsqueeze(1))


class PaperAggregator(nn.Module):
    """PPlug eq. 3-4 as printed: w_i = softmax_i(x.h_i), no temperature, no learned views.

    The values it is given are already projected, item by item, as in eq. 4.
    """

    heads = 1
    projects_items = True

    def forward(self, request: Tensor, keys: Tensor, values: Tensor, mask: Tensor, null: Tensor) -> Pooled:
        """Pool `values`; `null` (v,) or (B, v) stands in for an empty history."""
        scores = (keys @ request.unsqueeze(-1)).squeeze(-1).masked_fill(~mask, torch.finfo(keys.dtype).min)
        weights = scores.softmax(-1) * mask
        return Pooled(_with_null(weights, values, mask, null), weights.unsqueeze(1))


def _with_null(weights: Tensor, values: Tensor, mask: Tensor, null: Tensor) -> Tensor:
    pooled = (weights.unsqueeze(-1) * values).sum(1)
    return torch.where(mask.any(1, keepdim=True), pooled, null.expand_as(pooled)).unsqueeze(1)


Aggregator = AttentionAggregator | MeanAggregator | PaperAggregator

AGGREGATORS: dict[str, Callable[[PlugConfig], Aggregator]] = {
    "attention": lambda config: AttentionAggregator(config.encoder_dim, config.heads, config.key_dim),
    "mean": lambda _: MeanAggregator(),
    "paper": lambda _: PaperAggregator(),
}
