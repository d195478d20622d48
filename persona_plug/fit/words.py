"""Fitting the words head: maps from some of the data, the gate by the likelihood of what users wrote."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import DataError
from persona_plug.heads.fitting import GateSample, fit_gate, gate_sample
from persona_plug.heads.recollection import Recollection
from persona_plug.heads.slots import common_words
from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)

GATE_SHARE = (
    1 / 3
)  # of the training users, on whom the soft tokens are not trained: they would be too sure of themselves
SAMPLES, VALID_SAMPLES = 240, 96  # answers that the gate learns from, and is chosen by
MAP_ANSWERS, MAP_REQUESTS = 48, 96  # answers and requests whose states the maps are fitted to
COMMON_SHARE = 0.1  # a word that stands in more of the requests is no slot
SHORTENED = 0.5  # of the samples lose some or all of their history: short ones are learned, too


def split_users(data: FitData, seed: int) -> tuple[list[Example], list[Example]]:
    """Return training samples for the soft tokens, and those of other users for the gate.

    Raises:
        DataError: There are too few users.
    """
    users = sorted({e.user_id for e in data.train})
    count = round(GATE_SHARE * len(users))
    if count < 1:
        raise DataError(
            f"{len(users)} training users are too few for a words memory, whose gate needs users of its own: "
            "add users, or build the plug with words=False"
        )
    gate = {users[i] for i in np.random.default_rng(seed).permutation(len(users))[:count]}
    return [e for e in data.train if e.user_id not in gate], [e for e in data.train if e.user_id in gate]


@torch.no_grad()
def fit_words(plug: PlugModel, train: Sequence[Example], valid: Sequence[Example], seed: int = 0) -> float:
    """Fit the plug's words head in place, and return its NLL per token on validation users.

    Args:
        plug: A plug whose soft tokens are trained.
        train: Samples of users that its soft tokens were not trained on, with their histories.
        valid: Samples of other users.
        seed: Of the draws.

    Raises:
        ConfigError: The LLM's output layer cannot be inverted.
    """
    head, recollection = plug.words, plug.recollection
    if head is None or recollection is None:
        raise DataError("this plug has no words head: build it with words=True")
    draw = np.random.default_rng(seed)
    train, valid = _some(train, SAMPLES, draw), _some(valid, VALID_SAMPLES, draw)
    requests = [e.input for e in train] + [i.input for e in train for i in e.history]
    head.set_common(sorted(common_words(requests, COMMON_SHARE)))
    head.fit_word_map(plug.encoder, [text for text in dict.fromkeys(requests) if text.strip()][:MAP_REQUESTS])
    answers = list(dict.fromkeys((e.input, e.output) for e in train))[:MAP_ANSWERS]
    logits = [row[2] for _, rows in recollection.passes(answers) for row in rows]
    head.states.fit(plug.llm, torch.cat(logits), seed)
    recollection.forget()
    learned, looked_at = (list(_samples(plug, recollection, part, draw)) for part in (train, valid))
    with torch.enable_grad():
        nll = fit_gate(head.gate, learned, looked_at, seed)
    head.fitted.fill_(True)
    logger.info("words head: %.3f nats per token on %d validation answers", nll, len(valid))
    return nll


def _samples(
    plug: PlugModel, recollection: Recollection, examples: Sequence[Example], draw: np.random.Generator
) -> Iterator[GateSample]:
    recollection.remember([item for e in examples for item in _items(plug, e)])
    by_pair = {(e.input, e.output): e for e in examples}
    for pairs, rows in recollection.passes(list(by_pair)):
        for pair, (tokens, _, logits) in zip(pairs, rows, strict=True):
            items = _items(plug, by_pair[pair])
            if draw.random() < SHORTENED:
                items = items[: int(draw.integers(0, len(items) + 1))]
            reader = recollection.reader(pair[0], items)
            yield gate_sample(reader, logits, tokens)


def _items(plug: PlugModel, example: Example) -> Sequence[HistoryItem]:
    return example.history[-plug.config.max_words :]


def _some(examples: Sequence[Example], limit: int, draw: np.random.Generator) -> list[Example]:
    if len(examples) <= limit:
        return list(examples)
    return [examples[i] for i in sorted(draw.choice(len(examples), limit, replace=False))]
