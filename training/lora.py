"""LoRA adapters of one's own for each user (OPPU, arXiv 2402.04401), trained further from those of all."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch

from persona_plug.data.history import Example, leave_one_out
from persona_plug.dataset import PlugDataset
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.models.adapters import Adapters
from persona_plug.plug import PersonaPlug

RANK = 8  # of the LaMP authors' per-user adapters (arXiv 2409.09510), there with dropout


def for_each_user(
    plug: PersonaPlug, questions: Sequence[Example], config: FitConfig, steps: int
) -> Iterator[tuple[list[int], PersonaPlug]]:
    """Train the adapters further on one user's history after the other.

    Args:
        plug: A plug with trained adapters; it is left as it was.
        questions: Each user's own are asked once their adapter is trained. A user's history is that of their first
            question: the questions' own answers are no part of it.
        config: Learning rate, batch size and seed.
        steps: Optimiser steps per user.

    Yields:
        Indices into `questions`, and the plug with that user's adapter.

    Raises:
        ConfigError: The plug has no adapters.
    """
    adapters = plug.adapters
    if adapters is None:
        raise ConfigError("an adapter for each user begins with one for all: build the plug with lora=8")
    start = copy.deepcopy(adapters.state_dict())
    users: dict[str, list[int]] = {}
    for i, example in enumerate(questions):
        users.setdefault(example.user_id, []).append(i)
    for indices in users.values():
        try:
            _train(plug, adapters, questions[indices[0]], config, steps)
            yield indices, plug
        finally:
            adapters.load_state_dict(start)


def _train(plug: PersonaPlug, adapters: Adapters, question: Example, config: FitConfig, steps: int) -> None:
    """Train adapters on the history of a question's user; there may be nothing to train on."""
    answers = plug.config.answers
    items = leave_one_out(question.user_id, question.history)
    items = [e for e in items if e.output.strip() and (answers is None or e.output.strip() in answers)]
    if not items:
        return
    samples = PlugDataset(plug, items)
    optimizer = torch.optim.AdamW(adapters, lr=config.lr, weight_decay=config.weight_decay)
    draw = torch.Generator().manual_seed(config.seed)
    for _ in range(steps):
        batch = samples.collate(torch.randperm(len(samples), generator=draw)[: config.batch_size].tolist())
        output = plug(batch.history, batch.parts, batch.trees)
        optimizer.zero_grad()
        batch.loss(output, plug.answers, config.token_weight).backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
