"""A stored user's style card, against a sample of the store's other users."""

from __future__ import annotations

from typing import TYPE_CHECKING

from persona_plug.data.style import Style, style_of
from persona_plug.errors import ConfigError, DataError

if TYPE_CHECKING:
    from persona_plug.store.history_store import HistoryStore

ITEMS = 500  # newest items of the user
OTHER_USERS, OTHER_ITEMS = 50, 20  # users that a user is compared with, spread over all ids, and newest items of each


def read_style(store: HistoryStore, user: str, prefix: str = "") -> Style:
    """Return a user's manner as it stands in the store's texts now.

    Args:
        store: A store that keeps texts.
        user: The user's id.
        prefix: Of the ids that the user may be compared with, so that no tenant is told of another's users.

    Raises:
        ConfigError: The store keeps no texts.
        DataError: There is no such user.
    """
    if not store.keep_text:
        raise ConfigError(f"{store.name} keeps no texts, and style is read from them; make a store with --keep-text")
    own = store.read(user, ITEMS).texts
    if not own:
        raise DataError(f"{store.name} holds no such user; `persona-plug users list` shows who is there")
    ids = [row.user_id for row in store.users(prefix) if row.user_id != user]
    count = min(OTHER_USERS, len(ids))
    others = [store.read(ids[i * len(ids) // count], OTHER_ITEMS).texts or [] for i in range(count)]
    return style_of([item.output for item in own], [item.output for items in others for item in items])
