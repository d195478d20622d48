"""The answers head: what a request and a user's own answers say of each answer, beside the LLM's log-likelihoods."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from persona_plug.config import PARTS, SMOOTHING, PlugConfig
from persona_plug.data.labels import levels_of
from persona_plug.embedder.batch import HistoryBatch, check_finite
from persona_plug.errors import ConfigError
from persona_plug.splice.base import Splicer
from persona_plug.splice.prompts import PromptParts


class AnswersHead(nn.Module):
    """score_c = weight_c . [request; prompt] + offset_c + power * log(p_user / p_all)_c.

    `request` is the encoder's vector, `prompt` the LLM's own summary of the prompt, out of states that scoring computes
    anyway. p_user are the shares of the answers in the user's items. Items near the request and late ones may count
    more, and a rating may speak for the ratings beside it. A soft token bounds what a long history can say; log shares
    add up, as evidence does.

    All of it is fitted before the steps but `llm_log_weight`: jointly trained, the shares would explain most answers
    before the request is learned. The LLM then learns what it adds, against scores of heads that did not see the user.

    Attributes:
        weight: (C, d + D), of the request's vector and the prompt's summary.
        offset: (C,).
        population: (C,) p_all.
        power: () of p_user / p_all; 0 where validation users do better without their history.
        pseudo: () items of p_all that every user has beside their own.
        sharpness: () an item counts exp(sharpness * (cosine to the request - 1)) ...
        fading: () ... over the number of its place, counted from the latest, to the power of this.
        spread: () an answer's share that its neighbour gets, over its own; 0 for answers without order.
        llm_share: () 0 where validation users do better without the LLM's log-likelihoods, else 1.
    """

    weight: Tensor
    offset: Tensor
    population: Tensor
    power: Tensor
    pseudo: Tensor
    sharpness: Tensor
    fading: Tensor
    spread: Tensor
    llm_share: Tensor
    gaps: Tensor
    crossed: Tensor

    def __init__(self, answers: Sequence[str], encoder_dim: int, prompt_width: int = 0) -> None:
        """Create a head that says nothing.

        Args:
            answers: The C answers.
            encoder_dim: d, the width of the encoder's vectors.
            prompt_width: D, the width of prompts' summaries; 0 for a head without them.
        """
        super().__init__()
        count = len(answers)
        self.encoder_dim = encoder_dim
        numbers = {"power": 0.0, "pseudo": SMOOTHING, "sharpness": 0.0, "fading": 0.0, "spread": 0.0, "llm_share": 1.0}
        for name, value in numbers.items():
            self.register_buffer(name, torch.tensor(value))
        self.register_buffer("weight", torch.zeros(count, encoder_dim + prompt_width))
        self.register_buffer("offset", torch.zeros(count))
        self.register_buffer("population", torch.full((count,), 1 / count))
        self.register_buffer("gaps", answer_gaps(answers), persistent=False)
        self.register_buffer("crossed", torch.zeros(0, count, encoder_dim + prompt_width + 1), persistent=False)
        self.llm_log_weight = nn.Parameter(torch.tensor([0.1]).log())

    @classmethod
    def of(cls, config: PlugConfig, device: torch.device | None = None) -> Self | None:
        """Create the head that a plug of this config has, or None where it has none."""
        if not config.judges:
            return None
        width = (
            config.prompt_width if config.placement == "suffix" else 0
        )  # else no request in front of the soft tokens
        return cls(config.answers or (), config.encoder_dim, width).to(device, torch.float32)

    @property
    def reads_prompt(self) -> bool:
        """Whether the LLM's summary of the prompt counts."""
        return bool(self.weight[:, self.encoder_dim :].any())

    def forward(self, batch: HistoryBatch, prompts: Tensor | None, folds: Tensor | None = None) -> Tensor:
        """Return what is added to the LLM's weighted log-likelihoods, (B, C).

        Args:
            batch: Requests and histories.
            prompts: (B, D) summaries; None for a head that does not read them.
            folds: (B,) for training: which of the heads that did not see a row's user scores it.
        """
        check_finite(batch)
        views = [batch.request] if prompts is None else [batch.request, prompts.to(batch.request.device)]
        seen = torch.cat(views, 1)
        width = seen.shape[1]
        if folds is None:
            words = seen @ self.weight[:, :width].T + self.offset
        else:
            crossed = self.crossed[folds.to(self.crossed.device)]
            words = torch.einsum("bcd,bd->bc", crossed[..., :width], seen) + crossed[..., -1]
        shares = evidence(
            look(batch, len(self.offset)),
            self.population,
            self.pseudo,
            self.sharpness,
            self.fading,
            neighbourhood(self.gaps, self.spread),
        )
        power = self.power if batch.strength is None else self.power * batch.strength.unsqueeze(1)
        return words + power * shares


def judge(
    head: AnswersHead | None,
    splicer: Splicer,
    history: HistoryBatch | None,
    prompts: Sequence[PromptParts],
    folds: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor] | None]:
    """Return what a plug's head adds to its scores (B, C), and the states of prompts that it read.

    The LLM can go on from these states, so that reading them costs nothing.

    Args:
        head: The head, if the plug has one.
        splicer: Gives the states.
        history: Requests and histories; None for the plain LLM.
        prompts: The prompts.
        folds: See `AnswersHead.forward`.
    """
    if history is None or head is None:
        return None, None
    history = history.to(head.offset.device)
    if not head.reads_prompt:
        return head(history, None, folds), None
    lefts = [prompt.left for prompt in prompts]
    states = splicer.states(lefts)
    return head(history, splicer.summaries(lefts, states), folds), states


def combine(head: AnswersHead | None, loglik: Tensor, bias: Tensor | None) -> Tensor:
    """Return scores (B, C) from the LLM's log-likelihoods and what `judge` gives of the same answers."""
    return loglik if head is None or bias is None else head.llm_share * head.llm_log_weight.exp() * loglik + bias


def counted(parts: Collection[str], head: AnswersHead | None) -> tuple[bool, bool]:
    """Return whether soft tokens count, and whether the answers head does.

    Raises:
        ConfigError: There is no such part, or no other is asked for than a head that is not there.
    """
    if unknown := [part for part in parts if part not in PARTS]:
        raise ConfigError(f"parts={unknown[0]!r} is not one of {', '.join(PARTS)}")
    if set(parts) == {"answers"} and head is None:
        raise ConfigError("parts=['answers'] alone needs a plug with an answers head, and candidates of its own")
    return "soft" in parts, "answers" in parts and head is not None


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of the histories of B requests, with n items at most.

    Attributes:
        nearness: (B, n) cosine of each item to its request.
        place: (B, n) the item's place, the latest has 1.
        given: (B, n, C) which answer each item gives, one-hot; 0 where it is none of them, or there is no item.
    """

    nearness: Tensor
    place: Tensor
    given: Tensor


def look(batch: HistoryBatch, answers: int) -> Look:
    """Return what is seen of a batch's histories, for so many answers."""
    nearness = (batch.keys @ batch.request.unsqueeze(-1)).squeeze(-1)
    place = (batch.mask.sum(1, keepdim=True) - torch.arange(batch.mask.shape[1], device=batch.mask.device)).clamp(min=1)
    return Look(nearness, place, batch.values[..., -answers:] * batch.mask.unsqueeze(-1))


def evidence(
    history: Look, population: Tensor, pseudo: Tensor, sharpness: Tensor, fading: Tensor, neighbours: Tensor
) -> Tensor:
    """Return log(p_user / p_all), (B, C); see `AnswersHead` for the arguments, `neighbourhood` for the last."""
    weights = (sharpness * (history.nearness - 1) - fading * history.place.log()).exp()
    counts = torch.einsum("bn,bnc->bc", weights, history.given) + pseudo * population
    shares = (counts / counts.sum(1, keepdim=True)) @ neighbours
    return (shares / (population @ neighbours)).log()


def neighbourhood(gaps: Tensor, spread: Tensor) -> Tensor:
    """Return (C, C) what an answer speaks for: itself, and the answers beside it; rows sum to 1."""
    shares = spread**gaps
    return shares / shares.sum(1, keepdim=True)


def answer_gaps(answers: Sequence[str]) -> Tensor:
    """Return how many places apart answers are, (C, C): for ratings by their order, else infinitely many."""
    levels = levels_of(answers)
    if levels is None:
        return torch.full((len(answers), len(answers)), float("inf")).fill_diagonal_(0.0)
    places = torch.tensor(levels).argsort().argsort().float()
    return (places.unsqueeze(1) - places.unsqueeze(0)).abs()
