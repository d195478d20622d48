"""What heads keep of items' texts, sealed with these texts: once an item is deleted, nothing reads its words again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from persona_plug.data.history import HistoryItem
from persona_plug.store.database import sql
from persona_plug.store.marks import mark_of, seal, unseal
from persona_plug.store.tables import Tables, chunks, many

if TYPE_CHECKING:
    from sqlalchemy import Connection


def keep(
    connection: Connection,
    tables: Tables,
    user: str,
    identity: str,
    words: Sequence[tuple[HistoryItem, bytes]],
    moment: int,
) -> None:
    """Keep the words of items that a user still has, in place of those of another identity.

    Args:
        connection: In a transaction that writes.
        tables: The store's.
        user: The user's id.
        identity: Of what read the texts.
        words: Items with their texts and ids, and the bytes to keep.
        moment: When their texts were read; items deleted after it are left out.

    Raises:
        Forgotten: The user was deleted after the moment.
    """
    found = tables.find(connection, user, lock=True)
    tables.refuse_deleted(connection, user, [], moment)
    present = set() if found is None else tables.known(connection, found.key, [str(item.id) for item, _ in words])
    rows = [
        {
            "mark": mark_of(tables.secret, "words", user, str(item.id)),
            "owner": mark_of(tables.secret, user),
            "identity": identity,
            "sealed": seal(_key(identity, item), blob),
        }
        for item, blob in words
        if item.id in present
    ]
    if rows:
        insert = (
            "INSERT INTO persona_words (mark, owner, identity, sealed) VALUES (:mark, :owner, :identity, :sealed)"
            " ON CONFLICT (mark) DO UPDATE SET identity = :identity, sealed = :sealed"
        )
        connection.execute(sql(insert), rows)


def find(
    connection: Connection, tables: Tables, user: str, identity: str, items: Sequence[HistoryItem]
) -> dict[str, bytes]:
    """Return the bytes kept of those items, given with their texts, that the identity has read: id -> bytes."""
    marks = {mark_of(tables.secret, "words", user, str(item.id)): item for item in items}
    question = many("SELECT mark, sealed FROM persona_words WHERE identity = :identity AND mark IN :ids")
    found: dict[str, bytes] = {}
    for part in chunks(list(marks)):
        for mark, sealed in connection.execute(question, {"identity": identity, "ids": list(part)}):
            item = marks[bytes(mark)]
            blob = unseal(_key(identity, item), bytes(sealed))
            if blob is not None:  # else the item has other texts by now
                found[str(item.id)] = blob
    return found


def drop(connection: Connection, tables: Tables, user: str, names: Sequence[str] | None = None) -> None:
    """Drop the words of some of a user's items, by default of all."""
    if names is None:
        step = sql("DELETE FROM persona_words WHERE owner = :owner")
        connection.execute(step, {"owner": mark_of(tables.secret, user)})
        return
    marks = [mark_of(tables.secret, "words", user, name) for name in names]
    for part in chunks(marks):
        connection.execute(many("DELETE FROM persona_words WHERE mark IN :ids"), {"ids": list(part)})


def _key(identity: str, item: HistoryItem) -> str:
    """Return what seals an item's words: its texts, which are gone for good once it is deleted."""
    parts = (identity, str(item.id), item.input, item.output)
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
