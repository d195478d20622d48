"""Deleting for good: rows, what was kept of them elsewhere, and the bytes in every file."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from persona_plug.models import zoo
from persona_plug.models.vector_cache import VectorCache
from persona_plug.store import answers, words
from persona_plug.store.database import StoreUnavailable, sql, transaction
from persona_plug.store.format import HASH, ForgetResult
from persona_plug.store.marks import PARTS, mark_of
from persona_plug.store.reading import ReadableStore
from persona_plug.store.tables import User

if TYPE_CHECKING:
    from sqlalchemy import Connection


class ErasableStore(ReadableStore):
    """A store that is deleted from; see `HistoryStore`."""

    def delete(self, user: str, item_id: str) -> bool:
        """Delete one item, and its texts' vectors from the encoder's cache; return whether it was there.

        No byte of it is left. A user's last item takes the user's id along.

        Raises:
            StoreUnavailable: Bytes are left in the database's files; deleting again finishes the work.
        """
        return self._replace(user, item_id, None)

    def _replace(self, user: str, item_id: str, row: Mapping[str, Any] | None) -> bool:
        """Delete an item, and put a row of the same id in its place; return whether it was there."""
        tables = self._tables
        with transaction(self._engine) as connection:
            found = tables.find(connection, user)
            item = None if found is None else self._find_item(connection, found, item_id)
        if item is not None:
            self._uncache([bytes(item[1])])  # first: afterwards nothing tells which vectors they are
        with transaction(self._engine, writes=True) as connection:
            found = tables.find(connection, user, lock=True)
            item = None if found is None else self._find_item(connection, found, item_id)
            if found is None or item is None:
                key = tables.buried(connection, user, item_id)
            else:
                key = found.key
                words.drop(connection, tables, user, [item_id])
                if row is not None:
                    tables.drop(connection, key, [item[0]])
                    tables.insert(connection, found, [row])
                    self._count(connection, key, -1)
                else:
                    self._take(connection, found, [item[0]])
                    tables.bury(connection, key, user, item_id)
            deletion = self._eraser.number(connection)
        if key is not None:
            self._eraser.erase([key], deletion)
        return item is not None

    def _take(self, connection: Connection, found: User, ids: Sequence[int]) -> None:
        """Remove items of a user; the last one takes the user along."""
        self._tables.drop(connection, found.key, ids)
        self._count(connection, found.key, -len(ids))
        if found.items <= len(ids):
            self._tables.leave(connection, found.key)

    def _count(self, connection: Connection, key: int, more: int) -> None:
        step = sql("UPDATE persona_users SET items = items + :n, updated = :now WHERE key = :key")
        connection.execute(step, {"n": more, "key": key, "now": time.time()})

    def _find_item(self, connection: Connection, found: User, item_id: str) -> Any:  # noqa: ANN401
        question = "SELECT id, hashes FROM persona_items WHERE part = :part AND user_key = :key AND mark = :mark"
        where = {"part": found.key % PARTS, "key": found.key, "mark": mark_of(self._tables.secret, item_id)}
        return connection.execute(sql(question), where).one_or_none()

    def forget(self, user: str, *more: str) -> ForgetResult:
        """Delete users so that no byte of their ids, texts or vectors is left, and return what was deleted.

        It costs what they hold, not what the store holds. Vectors of their texts go from the encoder's cache first;
        others who wrote the same need not notice, since it is only a cache. What was begun before is refused later.

        Raises:
            StoreUnavailable: Bytes are left in the database's files; forgetting again finishes the work.
        """
        items = cached = deletion = 0
        keys: set[int] = set()
        for name in (user, *more):
            with transaction(self._engine) as connection:
                found = self._tables.find(connection, name)
                hashes = set() if found is None else set(self._hashes(connection, found))
            cached += self._uncache(hashes)
            with transaction(self._engine, writes=True) as connection:
                gone, had = self._remove(connection, name)
                deletion = self._eraser.number(connection)
            items += len(gone)
            cached += self._uncache(set(gone) - hashes)  # added meanwhile
            keys |= had
        if keys:
            self._eraser.erase(keys, deletion)
        return ForgetResult(items, cached)

    def _hashes(self, connection: Connection, found: User) -> list[bytes]:
        ids = [row[0] for row in self._tables.order(connection, found.key)]
        return [bytes(row[1]) for row in self._tables.rows(connection, found.key, ids, "hashes").values()]

    def _remove(self, connection: Connection, user: str) -> tuple[list[bytes], set[int]]:
        """Remove a user; return the items' hashes, and the keys that the user has or had when deleted before."""
        tables = self._tables
        found = tables.find(connection, user, lock=True)
        before = tables.buried(connection, user)
        keys = {key for key in (before, found and found.key) if key}
        gone: list[bytes] = []
        if found is not None:
            gone = self._hashes(connection, found)
            tables.drop(connection, found.key, [row[0] for row in tables.order(connection, found.key)])
            tables.leave(connection, found.key)
        answers.forget(connection, tables, user)
        words.drop(connection, tables, user)
        tables.bury(connection, found.key if found else before or 0, user)
        return gone, keys

    def expire(self, days: float) -> int:
        """Delete the items that were added more than some days ago, and return their number."""
        then, gone, deletion = time.time() - 86400 * days, 0, 0
        question = (
            "SELECT DISTINCT user_key, name FROM persona_items JOIN persona_names ON key = user_key WHERE added < :then"
        )
        with transaction(self._engine) as connection:
            users = connection.execute(sql(question), {"then": then}).all()
        for key, name in users:
            with transaction(self._engine) as connection:
                old = self._added_before(connection, key, then)
            self._uncache([bytes(row[1]) for row in old])
            with transaction(self._engine, writes=True) as connection:
                found = self._tables.find(connection, name, lock=True)
                ids = [] if found is None else [row[0] for row in self._added_before(connection, found.key, then)]
                if found is not None and ids:
                    self._take(connection, found, ids)
                    words.drop(connection, self._tables, name)  # those of newer items are made anew
                deletion = self._eraser.number(connection)
            gone += len(ids)
        if gone:
            self._eraser.erase([key for key, _ in users], deletion)
        return gone

    def _added_before(self, connection: Connection, key: int, then: float) -> Sequence[Any]:
        question = "SELECT id, hashes FROM persona_items WHERE part = :part AND user_key = :key AND added < :then"
        return connection.execute(sql(question), {"part": key % PARTS, "key": key, "then": then}).all()

    def _uncache(self, hashes: Iterable[bytes]) -> int:
        """Delete from the encoder's cache what it holds of the texts with these hashes."""
        prefixes = {h[start : start + HASH] for h in hashes for start in range(0, len(h), HASH)}
        if not prefixes:
            return 0
        cache = getattr(self.encoder, "cache", None)
        if cache is None:  # the encoder caches nothing, or there is none: others on this machine may have cached
            path = getattr(self.encoder, "cache_path", zoo.cache_dir() / "vectors" / f"{self.fingerprint}.sqlite")
            if not path.is_file():
                return 0
            cache = VectorCache(path, self.dim)
        try:
            return int(cache.delete(prefixes, self._eraser.wait))
        except sqlite3.OperationalError as exc:
            raise StoreUnavailable(f"{cache.path}: the cache of vectors is in use ({exc}); try again") from exc
