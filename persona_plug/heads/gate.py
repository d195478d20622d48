"""The gate: how far to trust the LLM, the user's memory, the request's own words, and the user's length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_plug.heads.memory import CHAIN, NONE, WordMemory

PARTS = ("llm", "memory", "copy", "end")
MEMORY_FEATURES = 11
FEATURES = MEMORY_FEATURES + 16
HIDDEN = 32
FLOOR = -12.0  # log-probabilities are read down to here


@dataclass(frozen=True, slots=True)
class Sight:
    """What the gate sees of L positions of one answer; U tokens are all that memory, request or end can bring.

    Attributes:
        tokens: (U,) token ids, the end token first.
        logp: (L, U) the LLM's log-probabilities of these tokens.
        top: (L,) the LLM's highest log-probability.
        top_index: (L,) where its token stands among the U, -1 where it does not.
        entropy: (L,) of the LLM, in nats.
        cosine: (L, N) of the state and each place of the memory; 1 inside a placed slot.
        equal: (L, N) how many of the last tokens are those in front of the place, CHAIN at most and inside a slot.
        again: (L, N) whether the place's token and the two in front of it stand in the text so far.
        top_again: (L,) whether the LLM's likeliest token and the two in front of it do.
        open: (L, N) whether the place can count: inside a slot only behind exactly its beginning.
        places: (N,) where each place's token stands among the U.
        memory: Of which each place is one.
        match: (L, R) tokens that the request's places have in common with the text so far.
        copies: (R,) where each request place's token stands among the U.
        position: (L, 2) log(1 + position), and that less the user's usual one.
    """

    tokens: Tensor
    logp: Tensor
    top: Tensor
    top_index: Tensor
    entropy: Tensor
    cosine: Tensor
    equal: Tensor
    again: Tensor
    top_again: Tensor
    open: Tensor
    places: Tensor
    memory: WordMemory
    match: Tensor
    copies: Tensor
    position: Tensor


def look(
    logp: Tensor, states: Tensor, written: Sequence[int], offset: int, memory: WordMemory, request: Tensor, end: int
) -> Sight:
    """Return what the gate sees.

    Args:
        logp: (L, V) the LLM's log-probabilities in front of tokens offset, offset + 1, ...
        states: (L, d) unit vectors of the LLM's states there.
        written: The answer's tokens, at least offset + L - 1 of them.
        offset: Tokens in front of the first position.
        memory: The user's words.
        request: (R,) token ids of the request.
        end: The end token.
    """
    length = len(logp)
    device = logp.device
    pool = torch.cat([torch.tensor([end], device=device), memory.tokens.to(device), request.to(device)])
    tokens, index = pool.unique(return_inverse=True)
    order = torch.cat(
        [index[:1], torch.arange(len(tokens), device=device)[torch.arange(len(tokens), device=device) != index[0]]]
    )
    rank = order.argsort()
    tokens, index = tokens[order], rank[index]
    tails = torch.full((length, CHAIN), NONE - 1, dtype=torch.long)
    padded = [NONE] * CHAIN + list(written)
    for row in range(length):
        tails[row] = torch.tensor(padded[offset + row : offset + row + CHAIN])
    tails = tails.to(device)
    before, inside = memory.before.to(device), memory.inside.to(device)
    same = tails.unsqueeze(1) == before.unsqueeze(0)  # (L, N, CHAIN)
    required = same | (before == NONE).unsqueeze(0)
    whole = memory.whole.to(device)
    written_whole = ((tails.unsqueeze(1) == whole.unsqueeze(0)) | (whole == NONE).unsqueeze(0)).all(-1)
    is_open = ~inside.unsqueeze(0) | (required.all(-1) & ~written_whole)  # else a number would begin again
    cosine = torch.where(inside.unsqueeze(0), 1.0, states @ memory.states.to(device).T)
    run = same.flip(-1).long().cumprod(-1).sum(-1)
    equal = torch.where(inside.unsqueeze(0), CHAIN, run)
    top = logp.max(-1)
    where = (tokens.unsqueeze(0) == top.indices.unsqueeze(1)).float()
    top_index = torch.where(where.any(-1), where.argmax(-1), NONE)
    entropy = -(logp.exp() * logp.clamp(min=-50)).sum(-1)
    position = torch.log1p(torch.arange(offset, offset + length, device=device, dtype=torch.float))
    usual = position - memory.length if memory.count else torch.zeros_like(position)
    return Sight(
        tokens,
        logp[:, tokens],
        top.values,
        top_index,
        entropy,
        cosine,
        equal,
        _written_before(torch.cat([memory.before[:, -2:], memory.tokens.unsqueeze(1)], 1), written, offset, length).to(
            device
        ),
        _written_before(torch.cat([tails[:, -2:].cpu(), top.indices.cpu().unsqueeze(1)], 1), written, offset, length)
        .diagonal()
        .to(device),
        is_open,
        index[1 : 1 + len(memory.tokens)],
        memory,
        _matches(tails, request.to(device)),
        index[1 + len(memory.tokens) :],
        torch.stack([position, usual], -1),
    )


def _written_before(rows: Tensor, written: Sequence[int], offset: int, length: int) -> Tensor:
    """Return whether three tokens (N, 3) stand in the text in front of each position, (L, N)."""
    text = torch.tensor(list(written[: offset + length - 1]), dtype=torch.long)
    if len(text) < 3:
        return torch.zeros(length, len(rows), dtype=torch.bool)
    same = (text.unfold(0, 3, 1).unsqueeze(0) == rows.unsqueeze(1)).all(-1)  # (N, places in the text)
    first = torch.where(same.any(-1), same.int().argmax(-1) + 3, len(text) + 2)  # tokens that the text needs
    return torch.arange(offset, offset + length).unsqueeze(1) >= first.unsqueeze(0)


def _matches(tails: Tensor, request: Tensor) -> Tensor:
    """Return how many tokens in front of each place of the request end the text so far, (L, R)."""
    count = torch.zeros(len(tails), len(request), dtype=torch.long, device=tails.device)
    running = torch.ones_like(count, dtype=torch.bool)
    for back in range(1, CHAIN + 1):
        shifted = torch.full_like(request, NONE - 1)
        if back < len(request):
            shifted[back:] = request[:-back]
        running = running & (tails[:, -back].unsqueeze(1) == shifted.unsqueeze(0))
        count += running
    return count


class WordGate(nn.Module):
    """Mixes p = sum of weight x distribution over LLM, memory, copying and ending; the weights are learned.

    Attributes:
        log_temperature: Log of what cosines are multiplied by before the softmax over places.
        equality: (3,) what one, two and four equal last tokens add to a place's score.
        trust: (6,) what a place's score gains by a like position in its answer, the item's recency, the nearness of
            the item's request, by being a slot's, by how well that fits, and by standing in the text already.
        log_copy: Log of what a matching token adds to a place of the request.
        parts: Which of `PARTS` take part besides the LLM.
    """

    mask: Tensor
    center: Tensor
    spread: Tensor

    def __init__(self, parts: Sequence[str] = PARTS) -> None:
        """Create a gate that trusts the LLM."""
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(30.0)))
        self.equality = nn.Parameter(torch.tensor([1.0, 1.0, 0.5]))
        self.trust = nn.Parameter(torch.tensor([0.1, 0.1, 1.0, 0.0, 1.0, -0.5]))
        self.log_copy = nn.Parameter(torch.tensor(0.0))
        self.hidden = nn.Linear(FEATURES, HIDDEN)
        self.out = nn.Linear(HIDDEN, len(PARTS))
        nn.init.normal_(self.out.weight, std=1e-2)
        with torch.no_grad():
            self.out.bias.copy_(torch.tensor([1.0, 0.0, -1.0, -2.0]))
        self.register_buffer("center", torch.zeros(FEATURES))
        self.register_buffer("spread", torch.ones(FEATURES))
        self.register_buffer("mask", torch.tensor([p == "llm" or p in parts for p in PARTS]))

    def forward(self, sight: Sight, strength: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mixture.

        Args:
            sight: What the gate sees.
            strength: Share of what the LLM gives up for the other parts; it keeps the rest.

        Returns:
            (L, U) log-probabilities of the sight's tokens, (L,) log weight of the LLM, which all other tokens keep, and
            (L, 4) the weights.
        """
        memory = self._memory(sight)
        copied, matched = self._copy(sight)
        weights = self._weights(sight, self._features(sight, memory, copied, matched), matched)
        if strength != 1:
            others = strength * weights[:, 1:]
            weights = torch.cat([1 - others.sum(1, keepdim=True), others], 1)
        ending = torch.zeros_like(sight.logp)
        ending[:, 0] = 1.0
        rest = weights[:, 1:2] * memory.probability + weights[:, 2:3] * copied + weights[:, 3:] * ending
        mixed = torch.logaddexp(weights[:, :1].log() + sight.logp, (rest + 1e-30).log())
        return mixed, weights[:, 0].log(), weights

    def memory_share(self, sight: Sight, strength: float = 1.0) -> Tensor:
        """Return which share of the probability of each of the sight's tokens the memory gives, (L, U)."""
        mixed, _, weights = self(sight, strength)
        return weights[:, 1:2] * self._memory(sight).probability / mixed.exp().clamp(min=1e-30)

    def _memory(self, sight: Sight) -> _Recollection:
        memory, device = sight.memory, sight.logp.device
        if not memory.count or not len(sight.places):
            zero = torch.zeros_like(sight.logp)
            return _Recollection(zero, torch.zeros(len(zero), MEMORY_FEATURES, device=device))
        items = memory.items.to(device)
        starts, finishes, nearness = (t.to(device) for t in (memory.starts, memory.finishes, memory.nearness))
        near = nearness[items]
        recency = -torch.log1p((memory.count - 1 - items).float())
        equal = torch.stack([sight.equal >= 1, sight.equal >= 2, sight.equal >= 4], -1).float()
        slots, fits, again = memory.slots.float().to(device), memory.fits.to(device), sight.again.float()
        known = torch.stack([recency, near, slots, fits], -1) @ self.trust[1:5]
        passing = -(sight.position[:, :1] - starts).abs() * self.trust[0] + again * self.trust[5]
        scores = self.log_temperature.exp() * sight.cosine + equal @ self.equality + known + passing
        attention = scores.masked_fill(~sight.open, float("-inf")).softmax(-1)
        probability = torch.zeros_like(sight.logp).index_add(1, sight.places, attention)
        top, index = probability.max(-1)
        behind = attention * (sight.places.unsqueeze(0) == index.unsqueeze(1))
        per_item = torch.zeros(len(behind), memory.count, device=device).index_add(1, items, behind)
        spread = per_item / top.unsqueeze(1).clamp(min=1e-9)
        voters = 1 / (spread**2).sum(-1).clamp(min=1e-6)
        facts = torch.stack(
            [
                sight.cosine.masked_fill(~sight.open, -1.0).max(-1).values,
                voters.log(),
                (attention * equal[..., 0]).sum(-1),
                (attention * equal[..., 1]).sum(-1),
                attention @ slots,
                attention @ fits,
                (attention * again).sum(-1),
                (attention * torch.log1p(sight.equal.float())).sum(-1),
                attention @ starts,
                attention @ finishes,
                attention @ near,
            ],
            -1,
        )
        return _Recollection(probability, facts)

    def _copy(self, sight: Sight) -> tuple[Tensor, Tensor]:
        if not len(sight.copies):
            return torch.zeros_like(sight.logp), torch.zeros(len(sight.logp), device=sight.logp.device)
        match = sight.match.float()
        scores = (self.log_copy.exp() * match).masked_fill(match == 0, float("-inf"))
        some = (match > 0).any(-1)
        attention = torch.where(some.unsqueeze(1), scores.masked_fill(~some.unsqueeze(1), 0.0).softmax(-1), 0.0)
        return torch.zeros_like(sight.logp).index_add(1, sight.copies, attention), match.max(-1).values

    @torch.no_grad()
    def standardize(self, sights: Sequence[Sight]) -> None:
        """Center and scale what the gate reads by its mean and deviation over some sights."""
        rows = []
        for sight in sights:
            memory, (copied, matched) = self._memory(sight), self._copy(sight)
            rows.append(self._features(sight, memory, copied, matched))
        features = torch.cat(rows)
        self.center.copy_(features.mean(0))
        self.spread.copy_(features.std(0).clamp(min=0.1))

    def _features(self, sight: Sight, memory: _Recollection, copied: Tensor, matched: Tensor) -> Tensor:
        """Return the numbers that the gate reads, (L, FEATURES)."""
        probability = memory.probability
        top, index = probability.max(-1)
        copy_top, copy_index = copied.max(-1)
        own = _gather(probability, sight.top_index)
        return torch.stack(
            [
                *memory.facts.unbind(-1),
                top,
                -(probability * probability.clamp(min=1e-9).log()).sum(-1),
                math.log1p(sight.memory.count) * torch.ones_like(top),
                sight.top,
                sight.top_again.float(),
                sight.entropy,
                sight.logp.gather(1, index.unsqueeze(1)).squeeze(1).clamp(min=FLOOR),
                own.clamp(min=1e-5).log(),
                *sight.position.unbind(-1),
                probability[:, 0],
                sight.logp[:, 0].clamp(min=FLOOR),
                copy_top,
                torch.log1p(matched),
                sight.logp.gather(1, copy_index.unsqueeze(1)).squeeze(1).clamp(min=FLOOR),
                probability.gather(1, copy_index.unsqueeze(1)).squeeze(1),
            ],
            -1,
        )

    def _weights(self, sight: Sight, features: Tensor, matched: Tensor) -> Tensor:
        scores = self.out(torch.tanh(self.hidden((features - self.center) / self.spread)))
        there = torch.stack(
            [
                torch.ones_like(matched, dtype=torch.bool),
                torch.full_like(matched, sight.memory.count > 0, dtype=torch.bool),
                matched > 0,
                torch.full_like(matched, sight.memory.count > 0, dtype=torch.bool),
            ],
            -1,
        )
        return scores.masked_fill(~(there & self.mask), float("-inf")).softmax(-1)


@dataclass(frozen=True, slots=True)
class _Recollection:
    """Memory's distribution (L, U), and what the gate reads of it, (L, MEMORY_FEATURES)."""

    probability: Tensor
    facts: Tensor


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """Return values[l, index[l]], zero where the index is -1."""
    picked = values.gather(1, index.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(index >= 0, picked, 0.0)
