"""Histories as several tokens: UEM and PERSOMA, the neighbours of PPlug that keep more than one vector per user.

Both map items (B, n, v) and a mask (B, n) to token vectors (B, s, w) and a mask (B, s). A learned null item stands in
front of every history, so that an empty one is no special case. Positions are not encoded: a history is a set here.
`per_item` tells whether s grows with the history; all these tokens then start alike.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from persona_plug.config import PlugConfig

FORMS = ("mlp", "transformer", "perceiver")
HEADS = 4


class ItemTokens(nn.Module):
    """UEM (arXiv 2401.04858): a small transformer over the items gives one token per item, behind one for a null item.

    There it is trained together with the LM; here the LM is frozen.
    """

    per_item = True

    def __init__(self, dim: int, width: int, layers: int = 2) -> None:
        """Create it for item values of width `dim`; tokens have `width` numbers."""
        super().__init__()
        self.items = _Items(dim, width)
        self.body = _transformer(width, layers)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, 1 + n, width) and their mask."""
        items, seen = self.items(values, mask)
        return self.body(items, src_key_padding_mask=~seen), seen


class Resampler(nn.Module):
    """PERSOMA (arXiv 2408.00960): an adapter that resamples a history to `count` tokens.

    `mlp` and `transformer` treat the items alone or together, and `count` learned queries pool the result; the latents
    of `perceiver` look at the items twice.
    """

    per_item = False

    def __init__(self, form: str, dim: int, width: int, count: int, layers: int = 2) -> None:
        """Create one of `FORMS` for item values of width `dim`; tokens have `width` numbers."""
        super().__init__()
        self.form = form
        self.items = _Items(dim, width)
        self.latents = nn.Parameter(torch.randn(count, width) * width**-0.5)
        if form == "mlp":
            self.body: nn.Module = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        elif form == "transformer":
            self.body = _transformer(width, layers)
        else:
            self.body = nn.ModuleList(nn.MultiheadAttention(width, HEADS, batch_first=True) for _ in range(layers))
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens (B, count, width) and a mask of ones."""
        items, seen = self.items(values, mask)
        tokens = self.latents.expand(len(items), -1, -1)
        if isinstance(self.body, nn.ModuleList):
            for attention, norm in zip(self.body, self.norms, strict=True):
                looked, _ = attention(norm(tokens), items, items, key_padding_mask=~seen, need_weights=False)
                tokens = tokens + looked
        else:
            options = {"src_key_padding_mask": ~seen} if self.form == "transformer" else {}
            items = self.body(items, **options)
            scores = (tokens @ items.transpose(1, 2)).masked_fill(~seen.unsqueeze(1), float("-inf"))
            tokens = scores.softmax(-1) @ items
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


class _Items(nn.Module):
    """Items in the width of the tokens, behind the null item."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(dim, width)
        self.null = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        null = self.null.expand(len(values), 1, -1)
        items = torch.cat([null, self.enter(values) * mask.unsqueeze(-1)], 1)
        return items, torch.cat([mask.new_ones(len(mask), 1), mask], 1)


def _transformer(width: int, layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(width, HEADS, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


RESAMPLERS: dict[str, Callable[[int, PlugConfig], ItemTokens | Resampler]] = {
    "uem": lambda dim, config: ItemTokens(dim, config.projector_hidden),
    "persoma_mlp": lambda dim, config: Resampler("mlp", dim, config.projector_hidden, config.user_tokens),
    "persoma_transformer": lambda dim, config: Resampler(
        "transformer", dim, config.projector_hidden, config.user_tokens
    ),
    "persoma_perceiver": lambda dim, config: Resampler("perceiver", dim, config.projector_hidden, config.user_tokens),
}
