"""Which rows of a batch run together: padding costs as much as text, and a pass costs something beside its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# In tokens. Some tens on a CPU (SmolLM2-135M), since each pass reads all weights. Elsewhere a guess, so high that rows
# are parted only where very much is padding: a GPU waits for its launches.
PASS_TOKENS = {"cpu": 32}
OTHER_PASS_TOKENS = 4096


def pass_tokens(device: torch.device) -> int:
    """Return what a pass costs beside its tokens, in tokens."""
    return PASS_TOKENS.get(device.type, OTHER_PASS_TOKENS)


def passes(sizes: Sequence[int], fixed: int) -> list[list[int]]:
    """Split rows into passes so that padded tokens, and `fixed` tokens for each pass, are fewest.

    Args:
        sizes: Tokens of each row; a pass is as wide as its longest.
        fixed: What a pass costs beside its tokens, in tokens.

    Returns:
        Indices of rows, the shortest first.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    best, cut = [0], [0]
    for end in range(1, len(order) + 1):
        costs = [best[start] + (end - start) * sizes[order[end - 1]] + fixed for start in range(end)]
        cut.append(min(range(end), key=costs.__getitem__))
        best.append(costs[cut[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(order[cut[end] : end])
        end = cut[end]
    return groups[::-1]


def last(count: int, rows: Tensor) -> Tensor:
    """Return the indices of the last `count` positions of rows (B, L, ...), for `logits_to_keep`.

    A number would do, but makes transformers take a slice. It is not contiguous, and torch then copies the whole output
    layer for each row.
    """
    return torch.arange(rows.shape[1] - count, rows.shape[1], device=rows.device)
