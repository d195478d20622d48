"""HistoryStore: users' histories as vectors in SQLite or PostgreSQL; texts only where they are asked for."""

from __future__ import annotations

import dataclasses
import logging
import sqlite3
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from persona_plug.data.history import HistoryItem
from persona_plug.data.moments import arrival_order, in_time
from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.models import zoo
from persona_plug.models.vector_cache import VectorCache
from persona_plug.store.database import StoreUnavailable, alone, erase, migrate, open_engine, shown, sql, transaction
from persona_plug.store.format import (
    FORMATS,
    HASH,
    ForgetResult,
    ImportResult,
    StoredHistory,
    UserRow,
    VectorFormat,
    to_text,
    unpack,
)
from persona_plug.store.rows import as_base64, check_id, events, rows, vector_fields

if TYPE_CHECKING:
    import os

    from sqlalchemy import Connection

    from persona_plug.models.encoder import HistoryEncoder

logger = logging.getLogger(__name__)

__all__ = ["ForgetResult", "HistoryStore", "ImportResult", "StoreUnavailable", "StoredHistory", "UserRow"]

CHUNK = 512  # records of a file that are encoded and committed at a time; also ids in one question
PAGE_ROWS = 1000  # rows of a listing that are read at a time, so that no reader holds up writers
ITEMS_PER_USER = 1 << 32

# An item's id is the user's key in the upper half and a running number in the lower: a user's items lie side by side
# in the file, in the order they came, and the primary key is the index on users.
_MINE = (
    "id BETWEEN (SELECT key * 4294967296 FROM persona_users WHERE name = :user)"
    " AND (SELECT key * 4294967296 + 4294967295 FROM persona_users WHERE name = :user)"
)
_TIMES = f"SELECT id, at FROM persona_items WHERE {_MINE} ORDER BY id"  # noqa: S608
_ITEMS = "SELECT id, item_id, at, hashes, vectors, input, output FROM persona_items WHERE id IN :ids"
_KNOWN = f"SELECT item_id FROM persona_items WHERE {_MINE} AND item_id IN :ids"  # noqa: S608
_HASHES = f"SELECT hashes FROM persona_items WHERE {_MINE}"  # noqa: S608
_LOCK = "UPDATE persona_users SET items = items WHERE name = :user RETURNING key"
_ENTER = (
    "INSERT INTO persona_users (name, items, next, updated) VALUES (:user, 0, 0, :now)"
    " ON CONFLICT (name) DO UPDATE SET updated = :now RETURNING key, next"
)
_INSERT = (
    "INSERT INTO persona_items (id, user_key, item_id, at, hashes, vectors, input, output)"
    " VALUES (:id, :user_key, :item_id, :at, :hashes, :vectors, :input, :output)"
)


class HistoryStore:
    """Users' histories in a database: per item two vectors, its id and time, and its texts if `keep_text`.

    Items have the order of their times, or without times the order they were added; adding one whose id the user has
    already changes nothing. Fields of records other than input, output, timestamp and id are not stored. Vectors depend
    on the encoder: another encoder than the store was made with is refused whenever it is opened. Threads and processes
    may share a store.

    Attributes:
        fingerprint: Identity of the encoder whose vectors are stored.
        dim: Width d of the vectors.
        keep_text: Whether texts are stored.
        vectors: How vectors are stored, `fp16` or `int8`.
    """

    def __init__(
        self,
        url: str,
        encoder: HistoryEncoder | None = None,
        keep_text: bool | None = None,
        vectors: VectorFormat | None = None,
    ) -> None:
        """Open a store, or make one; an older schema is migrated.

        Args:
            url: `sqlite:///users.db` or `postgresql://user:password@host/database`.
            encoder: The history encoder. Without it an existing store can be looked at and deleted from.
            keep_text: Keep texts beside their vectors; default what the store was made with, False for a new one.
            vectors: `fp16` (exactly what the encoder gives) or `int8` (half the bytes, rounded); default what the
                store was made with, `fp16` for a new one.

        Raises:
            MismatchError: The store was made with another encoder, format or `keep_text`, or by a newer version.
            ConfigError: The URL or a value cannot be used.
            DataError: There is no such store, and no encoder is given to make one.
            StoreUnavailable: The database cannot be reached.
            CorruptFileError: The file is no database.
        """
        if vectors is not None and vectors not in FORMATS:
            raise ConfigError(f"vectors={vectors!r:.40} is not one of {', '.join(FORMATS)}")
        self.encoder = encoder
        self._engine = open_engine(url, create=encoder is not None)
        self.name = shown(self._engine)
        self._missing_texts_logged = False
        with alone(self._engine) as connection:
            migrate(connection)
            made_with = self._settings(connection, keep_text, vectors)
        self.fingerprint, self.dim, self.vectors, self.keep_text = made_with
        wanted = {"encoder": (None if encoder is None else encoder.fingerprint, self.fingerprint),
                  "vectors": (vectors, self.vectors), "keep_text": (keep_text, self.keep_text)}  # fmt: skip
        for name, (asked, present) in wanted.items():
            if asked is not None and asked != present:
                self.close()
                raise MismatchError(
                    f"{self.name} was made with {name} {present}, not {asked}: open it so, or make another store"
                )

    def _settings(
        self, connection: Connection, keep_text: bool | None, vectors: VectorFormat | None
    ) -> tuple[str, int, VectorFormat, bool]:
        """Return what the store was made with; a new store is made with what was asked."""
        question = sql("SELECT encoder, dim, vectors, keep_text FROM persona_store")
        row = connection.execute(question).one_or_none()
        if row is None:
            if self.encoder is None:
                raise DataError(f"{self.name} holds no store yet; `persona-plug users add` makes one")
            insert = "INSERT INTO persona_store (id, encoder, dim, vectors, keep_text) VALUES (1, :e, :d, :v, :k)"
            asked = {"e": self.encoder.fingerprint, "d": self.encoder.dim, "v": vectors or "fp16", "k": bool(keep_text)}
            connection.execute(sql(insert), asked)
            row = connection.execute(question).one()
        return row[0], row[1], row[2], bool(row[3])

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(self, user: str, items: Sequence[HistoryItem | Mapping[str, Any] | str]) -> int:
        """Add items to a user's history in one transaction, and return how many are new.

        Args:
            user: The user's id, any text without a NUL character.
            items: Items as in `history=`; one without an id gets one, one whose id is there already is left as it is.

        Raises:
            DataError: An id or an item cannot be used.
            ConfigError: The store was opened without its encoder.
        """
        if isinstance(items, str | Mapping):
            raise DataError("items must be a list; put a single item into a list")
        made = [HistoryItem.of(item) for item in items]
        named = [item if item.id is not None else dataclasses.replace(item, id=uuid.uuid4().hex) for item in made]
        return self._write([(user, item) for item in named])

    def load_file(
        self,
        path: str | os.PathLike[str],
        skip_bad: bool = False,
        progress: bool | None = None,
        rename: Callable[[str], str] = str,
        columns: Mapping[str, str] | None = None,
    ) -> ImportResult:
        """Add the events of a JSONL, JSON, CSV, TSV or Parquet file, a few hundred in a transaction.

        Running it again goes on where it broke off: what is stored is neither encoded nor stored again. Records
        without an id get one from their content and from how often the same content came before in the file.

        Args:
            path: The file.
            skip_bad: Leave bad records out and list them in the result.
            progress: Show a progress bar; default only on a terminal.
            rename: What a record's user is called in the store; a gateway has names of its own for a tenant's users.
            columns: Field -> the file's own name of it, as `{"user_id": "agent"}`.

        Raises:
            DataError: The file or a record cannot be used; the records before it are stored.
        """
        from tqdm.auto import tqdm

        shows = progress if progress is not None else sys.stderr.isatty()
        skipped: list[str] = []
        read = new = 0
        found = events(Path(path), skipped if skip_bad else None, columns)
        with tqdm(desc="store", unit="event", disable=not shows) as bar:
            while chunk := list(islice(found, CHUNK)):
                read += len(chunk)
                new += self._write([(rename(user), item) for user, item in chunk])
                bar.update(len(chunk))
        return ImportResult(new, read - new, skipped)

    def _write(self, entries: Sequence[tuple[str, HistoryItem]]) -> int:
        """Encode and add those (user, item with id) that are not there yet, and return their number."""
        if self.encoder is None:
            raise ConfigError(f"{self.name} was opened without its encoder: pass encoder= to add items")
        users: dict[str, dict[str, HistoryItem]] = {}
        for user, item in entries:
            check_id("user id", user)
            check_id("item id", item.id)
            users.setdefault(user, {}).setdefault(str(item.id), item)
        # Numbers go by time: of one date, a list that runs from new to old is turned round, as it is in memory.
        users = {user: {str(item.id): item for item in in_time(list(items.values()))} for user, items in users.items()}
        with transaction(self._engine) as connection:
            known = {user: self._known(connection, user, list(items)) for user, items in users.items()}
        wanted = [(user, i) for user, items in users.items() for name, i in items.items() if name not in known[user]]
        if not wanted:
            return 0
        made = rows([item for _, item in wanted], self.encoder, self.vectors, self.keep_text)  # nobody waits for this
        fresh: dict[str, list[dict[str, Any]]] = {}
        for (user, _), row in zip(wanted, made, strict=True):
            fresh.setdefault(user, []).append(row)
        with transaction(self._engine, writes=True) as connection:
            # Always in the same order: two writers never wait for each other.
            return sum(self._insert(connection, user, fresh[user]) for user in sorted(fresh))

    def _known(self, connection: Connection, user: str, names: Sequence[str]) -> set[str]:
        from sqlalchemy import bindparam

        question = sql(_KNOWN).bindparams(bindparam("ids", expanding=True))
        parts = [names[start : start + CHUNK] for start in range(0, len(names), CHUNK)]
        return {name for ids in parts for (name,) in connection.execute(question, {"user": user, "ids": ids})}

    def _insert(self, connection: Connection, user: str, made: Sequence[Mapping[str, Any]]) -> int:
        key, number = connection.execute(sql(_ENTER), {"user": user, "now": time.time()}).one()
        known = self._known(connection, user, [r["item_id"] for r in made])  # the user is locked: nobody else adds now
        fresh = [row for row in made if row["item_id"] not in known]
        if fresh:
            first = key * ITEMS_PER_USER + number
            connection.execute(sql(_INSERT), [{"id": first + i, "user_key": key, **r} for i, r in enumerate(fresh)])
            step = sql("UPDATE persona_users SET items = items + :n, next = next + :n WHERE key = :key")
            connection.execute(step, {"n": len(fresh), "key": key})
        return len(fresh)

    # -- reading ---------------------------------------------------------------------------------------------------

    def read(self, user: str, limit: int | None = None) -> StoredHistory:
        """Return a user's newest items, oldest first; an unknown user has none.

        Items are in the order of their times, and of one time in the order they were added. An item without a time
        stays behind the latest that was added before it.

        Args:
            user: The user's id.
            limit: Items at most; default all.

        Raises:
            StoreUnavailable: The database cannot be reached.
            CorruptFileError: Vectors are not as wide as the store's.
        """
        from sqlalchemy import bindparam

        question = sql(_ITEMS).bindparams(bindparam("ids", expanding=True))
        with transaction(self._engine) as connection:
            marks = connection.execute(sql(_TIMES), {"user": user}).all()  # without vectors: there may be many
            order = [marks[place][0] for place in arrival_order([at for _, at in marks])]
            newest = order if limit is None else order[max(0, len(order) - limit) :]
            parts = [newest[start : start + CHUNK] for start in range(0, len(newest), CHUNK)]
            by_id = {row[0]: row[1:] for ids in parts for row in connection.execute(question, {"ids": ids})}
        rows = [by_id[number] for number in newest if number in by_id]  # some may have been deleted meanwhile
        ids, times, hashes, blobs, *texts = zip(*rows, strict=True) if rows else ((),) * 6
        inputs, outputs = unpack(blobs, self.vectors, self.dim)
        kept = list(zip(*texts, strict=True)) if self.keep_text else None
        answers = [h[2 * HASH :] for h in hashes]
        return StoredHistory(user, list(ids), inputs, outputs, kept, list(times), answers, len(marks))

    def users(self, prefix: str = "") -> Iterator[UserRow]:
        """Yield the users whose id begins with a prefix, ordered by the bytes of their ids."""
        page = "SELECT name, items, updated FROM persona_users WHERE name {} :last ORDER BY name LIMIT :limit"
        last, compare = prefix, ">="
        while True:
            with transaction(self._engine) as connection:
                rows = connection.execute(sql(page.format(compare)), {"last": last, "limit": PAGE_ROWS}).all()
            for name, items, updated in rows:
                if not name.startswith(prefix):
                    return
                yield UserRow(name, items, updated)
            if len(rows) < PAGE_ROWS:
                return
            last, compare = rows[-1][0], ">"

    def export(self, user: str) -> Iterator[dict[str, Any]]:
        """Yield everything held about a user, one JSON-able record an item; nothing for an unknown user.

        `input` and `output` are there where texts are kept: such records can be loaded again. Vectors and hashes are
        base64 of the stored bytes: little-endian fp16, or int8 with a scale.
        """
        page = sql(
            "SELECT i.id, item_id, at, hashes, vectors, input, output, updated"
            " FROM persona_items i JOIN persona_users ON key = user_key"
            " WHERE name = :user AND i.id > :last ORDER BY i.id LIMIT :limit"
        )
        last = -1
        while True:
            with transaction(self._engine) as connection:
                rows = connection.execute(page, {"user": user, "last": last, "limit": PAGE_ROWS}).all()
            for number, name, at, hashes, blob, given, answer, updated in rows:
                texts = {"input": to_text(given), "output": to_text(answer)} if self.keep_text else {}
                yield {
                    "user_id": user,
                    "id": name,
                    **texts,
                    **({} if at is None else {"timestamp": at}),
                    "last_update_of_user": updated,
                    "text_hashes": as_base64(hashes),
                    "encoder": self.fingerprint,
                    **vector_fields(blob, self.vectors, self.dim),
                }
                last = number
            if len(rows) < PAGE_ROWS:
                return

    # -- deleting --------------------------------------------------------------------------------------------------

    def delete(self, user: str, item_id: str) -> bool:
        """Delete one item, and its texts' vectors from the encoder's cache; return whether it was there.

        The row is overwritten and the log emptied. Copies that SQLite made while it moved rows may stay in unused
        bytes of the file until a user is forgotten. A user's last item takes the user's id along.
        """
        with transaction(self._engine, writes=True) as connection:
            key = connection.execute(sql(_LOCK), {"user": user}).scalar()
            remove = sql("DELETE FROM persona_items WHERE user_key = :key AND item_id = :id RETURNING hashes")
            hashes = connection.execute(remove, {"key": key, "id": item_id}).scalar()
            if hashes is not None:
                step = sql("UPDATE persona_users SET items = items - 1, updated = :now WHERE key = :key")
                connection.execute(step, {"key": key, "now": time.time()})
                connection.execute(sql("DELETE FROM persona_users WHERE key = :key AND items = 0"), {"key": key})
        if hashes is None:
            return False
        self._uncache([hashes], rewrite=False)
        erase(self._engine, rewrite=False)
        return True

    def forget(self, user: str) -> ForgetResult:
        """Delete a user so that no byte of their id, texts or vectors is left, and return what was deleted.

        Vectors of their texts go from the encoder's cache first; others who wrote the same need not notice, since it
        is only a cache. Then the rows go, and the files are written anew, which takes as long as copying them: other
        writers wait, readers do not. On PostgreSQL the tables are vacuumed.

        Raises:
            StoreUnavailable: Another process kept reading an old state; forgetting again finishes the work.
        """
        with transaction(self._engine) as connection:
            hashes = set(connection.execute(sql(_HASHES), {"user": user}).scalars())
        cached = self._uncache(hashes, rewrite=True)
        with transaction(self._engine, writes=True) as connection:
            key = connection.execute(sql(_LOCK), {"user": user}).scalar()
            remove = sql("DELETE FROM persona_items WHERE user_key = :key RETURNING hashes")
            gone = connection.execute(remove, {"key": key}).scalars().all()
            connection.execute(sql("DELETE FROM persona_users WHERE key = :key"), {"key": key})
        if late := set(gone) - hashes:  # added meanwhile
            cached += self._uncache(late, rewrite=True)
        erase(self._engine, rewrite=True)
        return ForgetResult(len(gone), cached)

    def _uncache(self, hashes: Iterable[bytes], rewrite: bool) -> int:
        """Delete from the encoder's cache what it holds of the texts with these hashes."""
        if self.encoder is not None:
            cache = self.encoder.cache
        else:
            path = zoo.cache_dir() / "vectors" / f"{self.fingerprint}.sqlite"
            cache = VectorCache(path, self.dim) if path.is_file() else None
        if cache is None:
            return 0
        prefixes = {h[start : start + HASH] for h in hashes for start in range(0, len(h), HASH)}
        try:
            return cache.delete(prefixes, rewrite)
        except sqlite3.OperationalError as exc:
            raise StoreUnavailable(f"{cache.path}: the cache of vectors is in use ({exc}); try again") from exc

    def log_missing_texts(self) -> None:
        """Warn, once for each store that is open, that a plug which quotes finds no texts here."""
        if not self._missing_texts_logged:
            self._missing_texts_logged = True
            logger.warning(
                "%s keeps no texts: this plug quotes, and does without for items out of it; "
                "a store made with keep_text gives all the plug can do",
                self.name,
            )

    def close(self) -> None:
        """Close all connections; the store can be opened again."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
