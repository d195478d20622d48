"""Candidate answers as rows of their own: what every LLM can read, whatever its layers are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from persona_plug.splice.base import PathReader
from persona_plug.splice.prompts import AnswerTree


def chains(tree: AnswerTree) -> list[tuple[int, ...]]:
    """Return the predicted tokens of each candidate; the gold's end token is added where paths leave it out."""
    rows = [tuple(token for _, token in path) for path in tree.paths]
    if tree.gold_end is not None:
        gold = next(i for i, path in enumerate(tree.paths) if _leaf(tree, path) == tree.gold_end[0])
        rows[gold] = (*rows[gold], tree.gold_end[1])
    return rows


def score_row(logits: Tensor, tokens: Sequence[int], reader: PathReader | None = None) -> Tensor:
    """Return the log-probability (n,) of each token, whose logits (n, V) are given: the LLM's own, or a reader's."""
    if reader is not None:
        return reader.score(logits, tokens)
    logits = logits.float()
    ids = torch.tensor(list(tokens), device=logits.device)
    return logits.gather(1, ids.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1)


def sum_chains(picked: Tensor, trees: Sequence[AnswerTree], rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sum the log-probabilities of each candidate's tokens.

    Args:
        picked: (N, L) log-probability of each row's tokens; the rows of one tree follow each other.
        trees: B trees.
        rows: The N rows' tokens, as `chains` gives them.

    Returns:
        (B, C) log-likelihoods, -inf where a tree has fewer candidates, and (B,) log-probability of gold end tokens.
    """
    total = picked.new_full((len(trees), max(len(tree.paths) for tree in trees)), float("-inf"))
    end = picked.new_zeros(len(trees))
    at = 0
    for b, tree in enumerate(trees):
        lengths = [len(path) for path in tree.paths]
        sums = torch.stack([picked[at + i, :n].sum() for i, n in enumerate(lengths)])
        place = (torch.full((len(sums),), b, device=picked.device), torch.arange(len(sums), device=picked.device))
        total = total.index_put(place, sums)
        for i, n in enumerate(lengths):
            if len(rows[at + i]) > n:
                end = end.index_put((torch.tensor(b, device=picked.device),), picked[at + i, n])
        at += len(lengths)
    return total, end


def _leaf(tree: AnswerTree, path: tuple[tuple[int, int], ...]) -> int:
    parent, token = path[-1]
    return next(
        (i for i, (p, t) in enumerate(zip(tree.parents, tree.tokens, strict=True)) if (p, t) == (parent, token)), -2
    )
