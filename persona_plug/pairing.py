"""Requests and the histories that belong to them, as examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem, is_halved, is_pair, items_of
from persona_plug.data.rows import is_table, unfold
from persona_plug.errors import ConfigError, DataError
from persona_plug.models.caching import uncached
from persona_plug.splice.prompts import Turns
from persona_plug.store.batches import StoredExample, stored_examples

if TYPE_CHECKING:
    from persona_plug.models.encoder import HistoryEncoder
    from persona_plug.store.history_store import HistoryStore

Requests = str | Sequence[str] | Sequence[Example]
History = Sequence[HistoryItem | Mapping[str, Any] | str]


def pair(
    config: PlugConfig,
    inputs: Requests,
    history: History | Sequence[History] | None = None,
    user: str | Sequence[str] | None = None,
    store: HistoryStore | None = None,
    strength: float = 1.0,
) -> Sequence[Example]:
    """Pair requests with histories; one history or user for a list of requests is every request's.

    Args:
        config: The plug's; says how many stored items are read, and of which encoder they must be.
        inputs: One request or several, or examples, which have their histories.
        history: One history, or one for each request.
        user: In place of a history, a user in `store`, or one for each request.
        store: Where the users' histories are.
        strength: How much the histories count, see `Example`.

    Raises:
        DataError: Requests and histories differ in number, or an item is malformed.
        ConfigError: Histories are given in two ways, a user without a store, or a strength that is none.
        MismatchError: The store's vectors come from another encoder than the plug's.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise ConfigError(f"strength={strength!r:.40} must be a number from 0 to 1")
    examples = _pair(config, inputs, history, user, store)
    return examples if strength == 1 else [replace(example, strength=strength) for example in examples]


def _pair(
    config: PlugConfig,
    inputs: Requests,
    history: History | Sequence[History] | None,
    user: str | Sequence[str] | None,
    store: HistoryStore | None,
) -> Sequence[Example]:
    if not isinstance(inputs, Iterable):
        raise DataError(f"inputs must be texts, not {inputs!r:.40}")
    requests: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
    stored = user is not None or store is not None
    if not requests:
        raise DataError("no input given")
    if history is None and not stored and all(isinstance(r, Example) for r in requests):
        return requests
    for request in requests:
        if not isinstance(request, str):
            raise DataError(f"inputs must be texts, not {request!r:.40}")
        if is_halved(request):
            raise DataError(f"the input {request!r:.60} holds half a character (a lone surrogate); repair the text")
    if stored and history is not None:
        raise ConfigError("give history=, or user= with store=, not both")
    if stored:
        return stored_examples(config, requests, user, store)
    if isinstance(history, str | Mapping):
        raise DataError("history must be a list of items; put a single item into a list")
    items: Any = history
    if items is not None and not isinstance(items, Sequence):  # a table or an iterator
        items = list(unfold(items))
    histories = _histories(items, not isinstance(inputs, str), len(requests))
    if len(histories) != len(requests):
        raise DataError(f"{len(requests)} inputs but {len(histories)} histories; give one history for each input")
    return [Example("", r, "", items_of(unfold(h))) for r, h in zip(requests, histories, strict=True)]


def candidates_of(config: PlugConfig, candidates: Iterable[str] | None) -> Sequence[str]:
    """Return the candidate answers to score: those given, or the plug's own.

    Raises:
        ConfigError: There are none, one text stands in place of a list, or one of them is no text.
    """
    if isinstance(candidates, str) or not isinstance(candidates, Iterable | None):
        raise ConfigError(f"candidates must be a list of texts, not {candidates!r:.60}")
    names = [] if candidates is None else list(candidates)
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(f"candidates must be texts, not {name!r:.40}")
        if is_halved(name):
            raise ConfigError(f"the candidate {name!r:.60} holds half a character (a lone surrogate); repair the text")
    if not (names or config.answers):
        raise ConfigError("no candidates to score: pass candidates=[...] or fit the plug on a labelling task")
    return names or config.answers or ()


def _histories(history: Any, many: bool, count: int) -> list[History]:  # noqa: ANN401
    """Return one history for each request: those that are given, if there may be `many`, or the same one each time."""
    if not many or not history or isinstance(history[0], str):
        return [history or ()] * count
    if is_pair(history[0]):
        if len(history) == count > 1:
            raise DataError("history holds as many tuples as inputs: items or histories? Use lists for histories")
        return [history] * count
    if isinstance(history[0], Sequence) or is_table(history[0]):
        return list(history)
    return [history] * count


def nearest(encoder: HistoryEncoder, examples: Sequence[Example], count: int, limit: int) -> list[list[Turns]]:
    """Return input and output of each example's items that are nearest to its request, the nearest last.

    Args:
        encoder: Says what is near; vectors of stored items come from the store.
        examples: Requests with their histories; those out of a store have texts.
        count: Items at most; of an example that counts less, that share of them, rounded up.
        limit: Items of a history that are looked at; the latest are.
    """
    stored = any(isinstance(e, StoredExample) for e in examples)
    own = [() if isinstance(e, StoredExample) else e.history[-limit:] for e in examples]
    texts = dict.fromkeys([*(e.input for e in examples), *(_key(i) for items in own for i in items)])
    with uncached() if stored else nullcontext():
        vectors = dict(zip(texts, encoder.encode(list(texts)), strict=True))
    rows = []
    for example, known in zip(examples, own, strict=True):
        items: Sequence[HistoryItem] = known
        if isinstance(example, StoredExample):
            items, keys = example.stored.texts or (), _stored_keys(example)
        else:
            keys = torch.stack([vectors[_key(i)] for i in items]) if items else torch.zeros(0, encoder.dim)
        shown = min(math.ceil(count * example.strength - 1e-9), len(keys))
        near = (keys @ vectors[example.input]).topk(shown).indices.tolist()
        rows.append([(items[i].input, items[i].output) for i in reversed(near)])
    return rows


def _key(item: HistoryItem) -> str:
    """Return the text that an item is found by."""
    return item.input if item.input.strip() else item.output


def _stored_keys(example: StoredExample) -> Tensor:
    """Return the vectors (n, d) that stored items are found by: of the input, or of the output where that is blank."""
    inputs, outputs = (torch.from_numpy(rows).float() for rows in (example.stored.inputs, example.stored.outputs))
    return torch.where((inputs == 0).all(-1, keepdim=True), outputs, inputs)
