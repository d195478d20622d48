"""The tables of users and items: rows are found by keyed marks, and what is deleted is emptied where it stands.

SQLite copies rows to other pages while it balances its trees, and such copies outlive a deletion. It never copies a row
that was added at the end and stays as long as it was. So items and names are added at the end, emptied in place, and
their places are used again for what fits. PostgreSQL deletes rows; `erasing` then rewrites the part they were in.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from persona_plug.errors import DataError
from persona_plug.store.database import sql
from persona_plug.store.marks import PARTS, mark_of

if TYPE_CHECKING:
    from sqlalchemy import Connection, TextClause

CHUNK = 512  # ids in one question
STEP = 64  # bytes by which places differ in size
SLACK = 40  # bytes by which two rows with fields of one length may differ: SQLite's numbers take 0 to 8
LARGEST = 7000  # bytes: what is longer lies on pages of its own, which are free at once
REMEMBERED = 24 * 3600  # seconds for which it is known who was forgotten
BLOBS = ("mark", "item_id", "hashes", "vectors", "input", "output")
FIELDS = ("part", "user_key", "n", "mark", "at", "added", "item_id", "hashes", "vectors", "input", "output")
_ITEMS = "part = :part AND user_key = :key"
_EMPTY = ", ".join(f"{name} = NULL" for name in (*(f for f in FIELDS if f != "part"), "spare"))


class Forgotten(DataError):
    """What was to be stored was begun before its user, or the item, was deleted."""


class HistoryFull(DataError):
    """A user has as many items as may be kept."""


class User(NamedTuple):
    """A row of the users' table: key, number of items, the number of the next one, and the time of the last change."""

    key: int
    items: int
    next: int
    updated: float


def many(statement: str) -> TextClause:
    """Return a statement whose `:ids` is a list."""
    from sqlalchemy import bindparam

    return sql(statement).bindparams(bindparam("ids", expanding=True))


def chunks(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    """Return lists short enough for one question."""
    return (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))


class Tables:
    """Statements on one store's tables.

    Attributes:
        secret: Key of its marks.
        lite: Whether it is SQLite.
    """

    def __init__(self, secret: bytes, lite: bool) -> None:
        """Bind them to a store."""
        self.secret, self.lite = secret, lite

    # -- users -----------------------------------------------------------------------------------------------------

    def find(self, connection: Connection, user: str, lock: bool = False) -> User | None:
        """Return a user, or None; with `lock` nobody else writes of this user until the transaction ends."""
        question = "SELECT key, items, next, updated FROM persona_users WHERE mark = :mark"
        mark = mark_of(self.secret, user)
        if not lock or self.lite:  # SQLite has one writer at a time
            row = connection.execute(sql(question), {"mark": mark}).one_or_none()
            return None if row is None else User(*row)
        row = connection.execute(sql(f"{question} FOR UPDATE"), {"mark": mark}).one_or_none()
        if row is None:  # there is no row to lock, and somebody may be adding one
            number = int.from_bytes(mark[:8], "big", signed=True)
            connection.execute(sql("SELECT pg_advisory_xact_lock(:number)"), {"number": number})
            row = connection.execute(sql(f"{question} FOR UPDATE"), {"mark": mark}).one_or_none()
        return None if row is None else User(*row)

    def enter(self, connection: Connection, user: str) -> User:
        """Return a user, locked for writing; made if there is none."""
        found = self.find(connection, user, lock=True)
        if found is not None:
            return found
        insert = sql("INSERT INTO persona_names (name) VALUES (:name) RETURNING key")
        key = int(connection.execute(insert, {"name": user}).scalar_one())
        insert = sql("INSERT INTO persona_users (key, mark, items, next, updated) VALUES (:key, :mark, 0, 0, :now)")
        now = time.time()
        connection.execute(insert, {"key": key, "mark": mark_of(self.secret, user), "now": now})
        return User(key, 0, 0, now)

    def leave(self, connection: Connection, key: int) -> None:
        """Remove a user without items, the name included."""
        connection.execute(sql("DELETE FROM persona_users WHERE key = :key"), {"key": key})
        empty = "UPDATE persona_names SET name = NULL" if self.lite else "DELETE FROM persona_names"
        connection.execute(sql(f"{empty} WHERE key = :key"), {"key": key})

    # -- items -----------------------------------------------------------------------------------------------------

    def order(self, connection: Connection, key: int) -> Sequence[Any]:
        """Return (id, at) of a user's items in the order they came; the index alone is read."""
        question = sql(f"SELECT id, at FROM persona_items WHERE {_ITEMS} ORDER BY n")  # noqa: S608
        return connection.execute(question, _of(key)).all()

    def rows(self, connection: Connection, key: int, ids: Sequence[int], columns: str) -> dict[int, tuple[Any, ...]]:
        """Return columns of items, the id first."""
        question = many(f"SELECT id, {columns} FROM persona_items WHERE part = :part AND id IN :ids")  # noqa: S608
        found: dict[int, tuple[Any, ...]] = {}
        for part in chunks(ids):
            rows: Iterable[Any] = connection.execute(question, {"part": key % PARTS, "ids": list(part)})
            found |= {row[0]: row for row in rows}
        return found

    def page(self, connection: Connection, key: int, last: int, limit: int, columns: str) -> Sequence[Any]:
        """Return columns of the items that came after number `last`, their number first."""
        question = f"SELECT n, {columns} FROM persona_items WHERE {_ITEMS} AND n > :last ORDER BY n LIMIT :limit"  # noqa: S608
        return connection.execute(sql(question), {**_of(key), "last": last, "limit": limit}).all()

    def known(self, connection: Connection, key: int, names: Sequence[str]) -> set[str]:
        """Return which of these ids a user has already."""
        question = many(f"SELECT mark FROM persona_items WHERE {_ITEMS} AND mark IN :ids")  # noqa: S608
        marks = {mark_of(self.secret, name): name for name in names}
        parts = [connection.execute(question, {**_of(key), "ids": part}) for part in chunks(list(marks))]
        return {marks[bytes(mark)] for rows in parts for (mark,) in rows}

    def insert(self, connection: Connection, user: User, made: Sequence[Mapping[str, Any]]) -> None:
        """Add items to a user who was entered."""
        own = {**_of(user.key), "added": time.time()}
        rows = [
            {**own, **row, "n": user.next + i, "mark": mark_of(self.secret, row["item_id"]), "spare": None, "room": 0}
            for i, row in enumerate(made)
        ]
        if self.lite:
            self._insert_in_place(connection, rows)
        else:
            connection.execute(_insertion(), rows)
        step = "UPDATE persona_users SET items = items + :n, next = next + :n, updated = :now WHERE key = :key"
        connection.execute(sql(step), {"n": len(rows), "key": user.key, "now": time.time()})

    def _insert_in_place(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """Use emptied places that are large enough; the rest goes to the end, each row with room to be replaced."""
        largest = connection.execute(sql("SELECT max(room) FROM persona_items WHERE user_key IS NULL")).scalar() or 0
        ends = []
        for row in rows:
            size = sum(_length(row[name]) for name in BLOBS)
            place = self._unused(connection, size + SLACK) if size + SLACK <= largest else None
            room = place[1] if place else -(-(size + SLACK) // STEP) * STEP if size < LARGEST else 0
            filled = {**row, "room": room, "spare": bytes(max(0, room - size - (SLACK if place else 0)))}
            if place:
                connection.execute(_replacement(), {**filled, "id": place[0]})
            else:
                ends.append(filled)
        if ends:
            connection.execute(_insertion(), ends)

    def _unused(self, connection: Connection, need: int) -> Any:  # noqa: ANN401
        question = "SELECT id, room FROM persona_items WHERE user_key IS NULL AND room >= :need ORDER BY room LIMIT 1"
        return connection.execute(sql(question), {"need": need}).one_or_none()

    def drop(self, connection: Connection, key: int, ids: Sequence[int]) -> None:
        """Empty the places of a user's items, or delete the rows."""
        step = f"UPDATE persona_items SET {_EMPTY}" if self.lite else "DELETE FROM persona_items"  # noqa: S608
        statement = many(f"{step} WHERE part = :part AND id IN :ids")
        for part in chunks(ids):
            connection.execute(statement, {"part": key % PARTS, "ids": list(part)})

    # -- what was deleted ------------------------------------------------------------------------------------------

    def moment(self, connection: Connection) -> int:
        """Return how many deletions there have been: what is begun now carries this number."""
        return int(connection.execute(sql("SELECT forgets FROM persona_store")).scalar_one())

    def bury(self, connection: Connection, key: int, *names: str) -> None:
        """Note that a user, or an item of theirs, was deleted now; what was noted a day ago is dropped."""
        step = sql("UPDATE persona_store SET forgets = forgets + 1 RETURNING forgets")
        number, now = connection.execute(step).scalar_one(), time.time()
        note = sql(
            "INSERT INTO persona_forgotten (mark, user_key, number, at) VALUES (:mark, :key, :number, :now)"
            " ON CONFLICT (mark) DO UPDATE SET user_key = :key, number = :number, at = :now"
        )
        connection.execute(note, {"mark": mark_of(self.secret, *names), "key": key, "number": number, "now": now})
        old = sql("DELETE FROM persona_forgotten WHERE at < :then RETURNING number")
        dropped = connection.execute(old, {"then": now - REMEMBERED}).scalars().all()
        if dropped:
            floor = sql("UPDATE persona_store SET floor = :floor WHERE floor < :floor")
            connection.execute(floor, {"floor": max(dropped)})

    def refuse_deleted(self, connection: Connection, user: str, names: Sequence[str], begun: int) -> None:
        """Refuse to store what was begun before the user or an item of these ids was deleted.

        Raises:
            Forgotten: It was, or was begun so long ago that nobody knows.
        """
        question = many("SELECT 1 FROM persona_forgotten WHERE mark IN :ids AND number > :begun LIMIT 1")
        marks = [mark_of(self.secret, user), *(mark_of(self.secret, user, name) for name in names)]
        found = any(connection.execute(question, {"ids": p, "begun": begun}).scalar() for p in chunks(marks))
        floor = connection.execute(sql("SELECT floor FROM persona_store")).scalar_one()
        if found or begun < floor:
            raise Forgotten("the user, or this item, was deleted after this was begun; send it again to add it anew")

    def buried(self, connection: Connection, *names: str) -> int | None:
        """Return the key that a deleted user, or a deleted item's user, had; None where nothing was stored."""
        question = sql("SELECT user_key FROM persona_forgotten WHERE mark = :mark")
        return connection.execute(question, {"mark": mark_of(self.secret, *names)}).scalar() or None

    def deleted_since(self, connection: Connection, number: int) -> set[bytes]:
        """Return the marks of what was deleted after a moment."""
        question = sql("SELECT mark FROM persona_forgotten WHERE number > :number")
        return {bytes(mark) for mark in connection.execute(question, {"number": number}).scalars()}


def _of(key: int) -> dict[str, int]:
    return {"part": key % PARTS, "key": key}


def _insertion() -> TextClause:
    names = (*FIELDS, "room", "spare")
    values = ", ".join(":key" if name == "user_key" else f":{name}" for name in names)
    return sql(f"INSERT INTO persona_items ({', '.join(names)}) VALUES ({values})")  # noqa: S608


def _replacement() -> TextClause:
    values = ", ".join(f"{name} = :{'key' if name == 'user_key' else name}" for name in (*FIELDS, "spare"))
    return sql(f"UPDATE persona_items SET {values} WHERE id = :id")  # noqa: S608


def _length(value: str | bytes | None) -> int:
    return len(value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value or b"")
