"""Soft tokens between those of a user nobody knows and those of the user."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from persona_plug.embedder.batch import HistoryBatch
from persona_plug.embedder.contract import Embedded, Embedder
from persona_plug.errors import DataError


def embed_by_strength(embedder: Embedder, batch: HistoryBatch) -> Embedded:
    """Return what an embedder makes of a batch, each row as strongly its user's as the batch says.

    Tokens turn from those of an empty history to the user's, and keep their lengths.

    Args:
        embedder: The embedder.
        batch: Requests and histories.

    Raises:
        DataError: Users differ in how many tokens they have.
    """
    own = embedder(batch)
    if batch.strength is None:
        return own
    nobody = embedder(replace(batch, mask=torch.zeros_like(batch.mask)))
    if not (isinstance(own.soft, Tensor) and isinstance(nobody.soft, Tensor)):
        raise DataError(f"aggregator={embedder.config.aggregator!r} has a token for each item: use strength 0 or 1")
    share = batch.strength.view(-1, 1, 1)
    turned = normalize(torch.lerp(nobody.soft, own.soft, share), dim=-1) * own.soft.norm(dim=-1, keepdim=True)
    return Embedded(torch.where(share == 1, own.soft, turned), own.weights)
