"""Fitting the gate: by the likelihood of what users wrote, on users that the LLM's soft tokens were not trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from persona_plug.heads.gate import Sight, WordGate, look
from persona_plug.heads.words import WordsReader

STEPS, BATCH, LR = 400, 16, 1e-2
LOOK_EVERY, PATIENCE = 25, 4  # steps between looks at the validation samples, and looks without improvement


@dataclass(frozen=True, slots=True)
class GateSample:
    """One answer as the gate learns from it.

    Attributes:
        sight: What the gate sees.
        index: (L,) where each token of the answer stands among the sight's, -1 where only the LLM brings it.
        logp: (L,) the LLM's log-probability of each token.
    """

    sight: Sight
    index: Tensor
    logp: Tensor


@torch.no_grad()
def gate_samples(readers: Sequence[WordsReader], logits: Tensor, tokens: Sequence[int]) -> Iterator[GateSample]:
    """Yield the sample of one answer for each memory.

    Args:
        readers: The request's memories, of more or fewer of the user's other items.
        logits: (L, V) the LLM's logits in front of each token.
        tokens: (L,) the answer's tokens, the end token last.
    """
    gold = torch.tensor(list(tokens), device=logits.device)
    logp, states = logits.float().log_softmax(-1), readers[0].head.states(logits)
    known = logp.gather(1, gold.unsqueeze(1)).squeeze(1)
    for reader in readers:
        sight = look(logp, states, tokens, 0, reader.memory, reader.request, reader.end)
        same = sight.tokens.unsqueeze(0) == gold.unsqueeze(1)
        yield GateSample(sight, torch.where(same.any(1), same.float().argmax(1), -1), known)


def sample_nll(gate: WordGate, sample: GateSample) -> Tensor:
    """Return the mean negative log-likelihood of an answer's tokens, in nats."""
    mixed, rest, _ = gate(sample.sight)
    known = mixed.gather(1, sample.index.clamp(min=0).unsqueeze(1)).squeeze(1)
    return -torch.where(sample.index >= 0, known, rest + sample.logp).mean()


@torch.no_grad()
def mean_nll(gate: WordGate, samples: Sequence[GateSample]) -> float:
    """Return the mean of `sample_nll` over samples."""
    return float(torch.stack([sample_nll(gate, s) for s in samples]).mean())


def fit_gate(gate: WordGate, train: Sequence[GateSample], valid: Sequence[GateSample], seed: int = 0) -> float:
    """Fit a gate in place by Adam, keep it as it was at the best look, and return its NLL on the validation samples.

    Args:
        gate: The gate.
        train: Samples to learn from.
        valid: Samples of other users, which say when to stop.
        seed: Of the draw of batches.
    """
    draw = random.Random(seed)  # noqa: S311 (no secret hangs on it)
    gate.standardize([s.sight for s in train])
    optimizer = torch.optim.Adam(gate.parameters(), lr=LR)
    best, state, since = mean_nll(gate, valid), _copy(gate), 0
    for step in range(1, STEPS + 1):
        batch = [draw.choice(train) for _ in range(BATCH)]
        optimizer.zero_grad()
        torch.stack([sample_nll(gate, s) for s in batch]).mean().backward()
        torch.nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        if step % LOOK_EVERY == 0:
            nll = mean_nll(gate, valid)
            best, state, since = (nll, _copy(gate), 0) if nll < best else (best, state, since + 1)
            if since >= PATIENCE:
                break
    gate.load_state_dict(state)
    return best


def _copy(gate: WordGate) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in gate.state_dict().items()}
