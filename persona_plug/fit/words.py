"""Fitting the words head: maps from some of the data, the gate by the likelihood of what users wrote."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import DataError
from persona_plug.heads.fitting import GateSample, fit_gate, gate_samples
from persona_plug.heads.recollection import Recollection
from persona_plug.heads.slots import common_words
from persona_plug.measure.stats import spread
from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)

GATE_SHARE = 1 / 3  # of the training users; the soft tokens are not trained on them, and would be too sure of them
USERS, VALID_USERS = 64, 24  # whose answers the gate learns from, and is chosen by, at most
FEWEST = 8  # of them, however long their texts are
TEXTS = 16  # of a user at most, each an answer whose history the others are
TOKENS = 100_000  # of all these texts with their prompts
VALID_SHARE = 0.2  # of these tokens
MAP_ANSWERS, MAP_REQUESTS = 32, 96  # answers and requests whose states the maps are fitted to
COMMON_SHARE = 0.1  # a word that stands in more of the requests is no slot
NOBODY = 0.1  # of the samples with a shortened history have none


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
            "add users, or build the plug with words=False (--no-words)"
        )
    gate = {users[i] for i in np.random.default_rng(seed).permutation(len(users))[:count]}
    return [e for e in data.train if e.user_id not in gate], [e for e in data.train if e.user_id in gate]


@torch.no_grad()
def fit_words(
    plug: PlugModel, train: Sequence[Example], valid: Sequence[Example], seed: int = 0, tokens: float = TOKENS
) -> float:
    """Fit the plug's words head in place, and return its NLL per token on validation users.

    Args:
        plug: A plug whose soft tokens are trained.
        train: Samples of users that its soft tokens were not trained on, with their histories.
        valid: Samples of other users.
        seed: Of the draws.
        tokens: Tokens that the LLM reads at most, about so many; `FEWEST` users are read in any case.

    Raises:
        ConfigError: The LLM's output layer cannot be inverted.
    """
    head, recollection = plug.words, plug.recollection
    if head is None or recollection is None:
        raise DataError("this plug has no words head: build it with words=True")
    draw = np.random.default_rng(seed)
    learned = _by_user(plug, train, USERS, (1 - VALID_SHARE) * tokens, draw)
    asked = _by_user(plug, valid, VALID_USERS, VALID_SHARE * tokens, draw)
    examples = [e for group in learned for e in group]
    requests = [*dict.fromkeys(text for e in examples for text in (e.input, *(i.input for i in e.history)))]
    head.set_common(sorted(common_words(requests, COMMON_SHARE)))
    head.fit_maps(plug.encoder, [text for text in requests if text.strip()][:MAP_REQUESTS])
    answers = list(dict.fromkeys((e.input, e.output) for e in examples))[:MAP_ANSWERS]
    head.states.fit(plug.llm, torch.cat([row.logits for _, row in recollection.passes(answers)]), seed)
    recollection.forget()
    samples, looked_at = ([s for g in part for s in _samples(plug, recollection, g, draw)] for part in (learned, asked))
    with torch.enable_grad():
        nll = fit_gate(head.gate, samples, looked_at, seed)
    head.fitted.fill_(True)
    logger.info("words head: %.3f nats per token on %d answers of validation users", nll, len(looked_at) // 2)
    return nll


def _samples(
    plug: PlugModel, recollection: Recollection, examples: Sequence[Example], draw: np.random.Generator
) -> Iterator[GateSample]:
    """Yield each answer of one user twice, with the user's whole history and with a part of it.

    One pass over each of the user's texts serves both: as an answer and as another answer's history.
    """
    histories = {(e.input, e.output): e.history[-plug.config.max_words :] for e in examples}
    items = [(i.input, i.output) for history in histories.values() for i in history]
    rows = {}
    for pair, row in recollection.passes(list(dict.fromkeys([*histories, *items]))):
        recollection.keep(pair, row)
        if pair in histories:
            rows[pair] = row
    if plug.config.retrieve:  # an answer stands behind the user's turns, an item does not
        shown = dict(zip(((e.input, e.output) for e in examples), plug.turns(examples), strict=True))
        rows |= recollection.passes(list(histories), shown)
    for pair, history in histories.items():
        readers = [recollection.reader(pair[0], kept) for kept in (history, _part(history, draw))]
        yield from gate_samples(readers, rows[pair].logits, rows[pair].tokens)


def _part(history: Sequence[HistoryItem], draw: np.random.Generator) -> Sequence[HistoryItem]:
    """Return a part of a history: as many items as not, most of the time few."""
    if not history or draw.random() < NOBODY:
        return ()
    count = int(np.exp(draw.uniform(0, np.log(len(history) + 1))))
    return [history[i] for i in sorted(draw.choice(len(history), count, replace=False))]


def _by_user(
    plug: PlugModel, examples: Sequence[Example], limit: int, tokens: float, draw: np.random.Generator
) -> list[list[Example]]:
    """Return the examples of `limit` users at most, within some texts of each, and within so many tokens of all."""
    users: dict[str, list[Example]] = {}
    for example in examples:
        users.setdefault(example.user_id, []).append(example)
    groups: list[list[Example]] = []
    names = sorted(users)
    for at in draw.permutation(len(names))[:limit]:
        group = _within(users[names[at]], draw)
        tokens -= _tokens(plug, group)
        if tokens < 0 and len(groups) >= FEWEST:
            break
        groups.append(group)
    return groups


def _within(examples: Sequence[Example], draw: np.random.Generator) -> list[Example]:
    """Return one user's examples, of answers and histories `TEXTS` texts at most: the answers first."""
    asked = [examples[i] for i in spread(len(examples), TEXTS)]
    texts = {(e.input, e.output) for e in asked}
    others = sorted({(i.input, i.output) for e in asked for i in e.history} - texts)
    some = draw.permutation(len(others))[: TEXTS - len(texts)]
    texts |= {others[i] for i in some}
    return [dataclasses.replace(e, history=tuple(i for i in e.history if (i.input, i.output) in texts)) for e in asked]


def _tokens(plug: PlugModel, examples: Sequence[Example]) -> int:
    """Return how many tokens the LLM reads for one user's texts."""
    texts = {(e.input, e.output) for e in examples} | {(i.input, i.output) for e in examples for i in e.history}
    return sum(len(plug.prompter.parts(input_)) + len(plug.prompter.answer(output)) for input_, output in texts)
