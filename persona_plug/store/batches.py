"""From a store's histories to the tensors that the embedder reads, without encoding any item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.labels import label_of
from persona_plug.embedder.batch import HistoryBatch, collate, with_requests
from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.models.caching import uncached
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.store.format import StoredHistory
from persona_plug.store.rows import text_hash

if TYPE_CHECKING:
    from persona_plug.store.history_store import HistoryStore


class WordStore(Protocol):
    """Where words of items are kept; see `HistoryStore`."""

    def words(self, user: str, identity: str, items: Sequence[HistoryItem]) -> dict[str, bytes]:
        """Return what is kept of a user's items."""

    def keep_words(self, user: str, identity: str, made: Sequence[tuple[HistoryItem, bytes]], moment: int) -> None:
        """Keep what was made of a user's items."""


@dataclass(frozen=True, slots=True)
class StoredExample(Example):
    """A request whose history is vectors out of a store."""

    stored: StoredHistory = field(kw_only=True)
    store: WordStore = field(kw_only=True, repr=False)


def stored_examples(
    config: PlugConfig, requests: Sequence[str], user: str | Sequence[str] | None, store: HistoryStore | None
) -> list[StoredExample]:
    """Pair requests with their users' stored histories; one user for several requests is every request's.

    Raises:
        ConfigError: Only one of user and store is given, or the plug shows items and the store keeps no texts.
        MismatchError: The store's vectors come from another encoder than the plug's.
        DataError: Requests and users differ in number.
    """
    if user is None or store is None:
        raise ConfigError("user= and store= belong together: give both, or history= alone")
    if store.fingerprint != config.encoder_fingerprint:
        raise MismatchError(
            f"{store.name} holds vectors of encoder {store.fingerprint}, the plug was trained with "
            f"{config.encoder_fingerprint}: use a store made with the plug's encoder"
        )
    if config.retrieve and not store.keep_text:
        raise ConfigError(
            f"{store.name} keeps no texts, and this plug puts items into the prompt (retrieve={config.retrieve}): "
            "use a store made with keep_text=True (--keep-text), or a plug with retrieve=0"
        )
    users = [user] * len(requests) if isinstance(user, str) else list(user)
    if len(users) != len(requests):
        raise DataError(f"{len(requests)} inputs but {len(users)} users; give one user for each input")
    histories = {name: store.read(name, config.max_history) for name in dict.fromkeys(users)}
    if config.remembers and not store.keep_text and any(h.total for h in histories.values()):
        store.log_missing_texts()
    return [
        StoredExample(name, text, "", stored=histories[name], store=store)
        for text, name in zip(requests, users, strict=True)
    ]


class StoredTable:
    """Makes batches of stored histories; only the requests are encoded, and those are not cached."""

    def __init__(self, encoder: HistoryEncoder, examples: Sequence[Example], config: PlugConfig) -> None:
        """Encode the requests.

        Args:
            encoder: The plug's encoder, whose vectors the store holds.
            examples: Requests with stored histories.
            config: Says what an item's value holds.
        """
        self.config, self.encoder = config, encoder
        self.rows = {text: row for row, text in enumerate(dict.fromkeys(e.input for e in examples))}
        with uncached():
            self.vectors = encoder.encode(list(self.rows))
        # Without texts an answer is known by its hash: vectors of short labels may lie too close together.
        # Earlier stores hashed a label as it was written.
        names = list(enumerate(config.answers or ()))
        self.answers = {text_hash(label_of(a)): i for i, a in names} | {text_hash(a): i for i, a in names}

    def batch(self, examples: Sequence[Example]) -> HistoryBatch:
        """Collate examples whose requests are in the table; all are `StoredExample`."""
        histories = [e.stored for e in examples if isinstance(e, StoredExample)]
        shape = (len(histories), max([len(h.ids) for h in histories] + [1]))
        inputs = torch.zeros(*shape, self.vectors.shape[1])
        outputs = torch.zeros_like(inputs)
        answers, mask = torch.full(shape, -1), torch.zeros(shape, dtype=torch.bool)
        for b, history in enumerate(histories):
            n = len(history.ids)
            inputs[b, :n] = torch.from_numpy(history.inputs)
            outputs[b, :n] = torch.from_numpy(history.outputs)
            answers[b, :n] = torch.tensor([self.answers.get(h, -1) for h in history.output_hashes], dtype=torch.long)
            mask[b, :n] = True
        request = self.vectors[torch.tensor([self.rows[e.input] for e in examples], dtype=torch.long)]
        batch = collate(self.config, request, inputs, outputs, answers, mask)
        return with_requests(self.config, self.encoder, batch, examples)
