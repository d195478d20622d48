"""Who keeps in memory what a store holds of users: they are told when a user is deleted, whoever does it."""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet


class Keeper(Protocol):
    """Keeps something of users in memory; any thread may call it."""

    def forget(self, owner: str | None = None) -> None:
        """Drop what is kept of a user."""


_KEEPERS: WeakSet[Keeper] = WeakSet()


def tell(keeper: Keeper) -> None:
    """Have somebody told of deletions for as long as they live."""
    _KEEPERS.add(keeper)


def forget(user: str) -> None:
    """Tell everybody that a user, or an item of theirs, was deleted."""
    for keeper in list(_KEEPERS):
        keeper.forget(user)
