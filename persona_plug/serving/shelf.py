"""One user's words out of the store, looked up before a request is made ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_plug.data.history import HistoryItem
from persona_plug.store.format import StoredHistory

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore


class Shelf:
    """What a store keeps of one user's words, looked up before, so that making soft tokens waits for no database."""

    def __init__(self, blobs: dict[str, bytes]) -> None:
        """Hold words by items' ids."""
        self.blobs = blobs
        self.kept: tuple[str, list[tuple[HistoryItem, bytes]], int] = ("", [], 0)

    @property
    def made(self) -> bool:
        """Whether words were made that the store does not have."""
        return bool(self.kept[1])

    def words(self, user: str, identity: str, items: Sequence[HistoryItem]) -> dict[str, bytes]:
        """See `HistoryStore.words`."""
        return dict(self.blobs)

    def keep_words(self, user: str, identity: str, made: Sequence[tuple[HistoryItem, bytes]], moment: int) -> None:
        """See `HistoryStore.keep_words`; they wait here to be stored."""
        self.blobs |= {str(item.id): blob for item, blob in made}
        self.kept = (identity, [*self.kept[1], *made], moment)


def read_shelf(plug: PersonaPlug, store: HistoryStore, held: StoredHistory) -> Shelf:
    """Return what a store keeps of the words of the items that a plug reads; none where it keeps no texts."""
    if plug.recollection is None or not held.texts:
        return Shelf({})
    items = held.texts[-plug.config.max_words :]
    return Shelf(store.words(held.user, plug.recollection.identity, items))
