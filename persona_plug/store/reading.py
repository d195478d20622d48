"""What a store tells of its users: histories, lists and exports, in pages that hold nobody up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from persona_plug.data.history import HistoryItem
from persona_plug.data.moments import arrival_order
from persona_plug.errors import ConfigError
from persona_plug.store.database import sql, transaction
from persona_plug.store.format import HASH, StoredHistory, UserRow, to_text, unpack
from persona_plug.store.opened import OpenStore
from persona_plug.store.rows import Entry, as_base64, vector_fields
from persona_plug.store.tables import User

if TYPE_CHECKING:
    from sqlalchemy import Connection

PAGE_ROWS = 100  # items that are read at a time, so that no reader holds up writers
_COLUMNS = "item_id, at, hashes, vectors, input, output"


class ReadableStore(OpenStore):
    """A store that is read from; see `HistoryStore`."""

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
        with transaction(self._engine) as connection:
            moment = self._tables.moment(connection)
            found = self._tables.find(connection, user)
            newest, total = ([], 0) if found is None else self._newest(connection, found, limit)
            return self._history(connection, user, found, newest, total, moment)

    def pages(self, user: str, limit: int, size: int | None = None) -> Iterator[StoredHistory]:
        """Yield what `read` returns in pages, each read when it is asked for; there is always one.

        Args:
            user: The user's id.
            limit: Items at most.
            size: Items of a page.
        """
        with transaction(self._engine) as connection:
            moment = self._tables.moment(connection)
            found = self._tables.find(connection, user)
            newest, total = ([], 0) if found is None else self._newest(connection, found, limit)
        size = size or PAGE_ROWS
        for start in range(0, max(1, len(newest)), size):
            with transaction(self._engine) as connection:
                page = self._history(connection, user, found, newest[start : start + size], total, moment)
            yield page

    def _newest(self, connection: Connection, found: User, limit: int | None) -> tuple[list[int], int]:
        marks = self._tables.order(connection, found.key)
        order = [marks[place][0] for place in arrival_order([at for _, at in marks])]
        return order if limit is None else order[max(0, len(order) - limit) :], len(order)

    def _history(
        self, connection: Connection, user: str, found: User | None, ids: Sequence[int], total: int, moment: int
    ) -> StoredHistory:
        by_id = {} if found is None else self._tables.rows(connection, found.key, ids, f"user_key, {_COLUMNS}")
        # Some may have been deleted meanwhile, and their places used for others.
        got = [by_id[i][2:] for i in ids if i in by_id and found is not None and by_id[i][1] == found.key]
        names, times, hashes, blobs, *texts = zip(*got, strict=True) if got else ((),) * 6
        inputs, outputs = unpack(blobs, self.vectors, self.dim)
        kept = list(zip(*texts, strict=True)) if self.keep_text else None
        labels = [h[2 * HASH :] for h in hashes]
        return StoredHistory(user, list(names), inputs, outputs, kept, list(times), labels, total, moment)

    def kept(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the items of all users whose ids begin with a prefix, with their texts and the times they were added.

        Raises:
            ConfigError: The store keeps no texts.
        """
        if not self.keep_text:
            raise ConfigError(f"{self.name} keeps no texts, so nothing can be made anew; add its events again")
        for user in self.users(prefix):
            for row in self.export(user.user_id):
                item = HistoryItem(row["input"], row["output"], row.get("timestamp"), row["id"])
                yield Entry(user.user_id, item, None, row["added"])

    def users(self, prefix: str = "") -> Iterator[UserRow]:
        """Yield the users whose id begins with a prefix, ordered by the bytes of their ids."""
        with transaction(self._engine) as connection:
            # Not ordered by the database: names stand in no index, which would keep copies of them.
            question = sql("SELECT name, items, updated FROM persona_users JOIN persona_names USING (key)")
            found = [UserRow(*row) for row in connection.execute(question) if row[0].startswith(prefix)]
        yield from sorted(found, key=lambda row: row.user_id.encode("utf-8", "surrogatepass"))

    def count(self) -> int:
        """Return how many users there are."""
        with transaction(self._engine) as connection:
            return int(connection.execute(sql("SELECT count(*) FROM persona_users")).scalar_one())

    def export(self, user: str, size: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield everything held about a user, one JSON-able record an item; nothing for an unknown user.

        Such records can be loaded again, also without texts. `input` and `output` are there where texts are kept.
        Vectors and hashes are base64 of the stored bytes: little-endian fp16, or int8 with a scale. `size` items are
        read at a time.
        """
        with transaction(self._engine) as connection:
            found = self._tables.find(connection, user)
        last, size = -1, size or PAGE_ROWS
        while found is not None:
            with transaction(self._engine) as connection:
                page = self._tables.page(connection, found.key, last, size, f"{_COLUMNS}, added")
            for n, name, at, hashes, blob, given, answer, added in page:
                last = n
                texts = {"input": to_text(given), "output": to_text(answer)} if self.keep_text else {}
                yield {
                    "user_id": user,
                    "id": name,
                    **texts,
                    **({} if at is None else {"timestamp": at}),
                    "last_update_of_user": found.updated,
                    "added": added,
                    "text_hashes": as_base64(hashes),
                    "encoder": self.fingerprint,
                    **vector_fields(blob, self.vectors, self.dim),
                }
            if len(page) < size:
                return
