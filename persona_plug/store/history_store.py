"""HistoryStore: users' histories as vectors in SQLite or PostgreSQL; texts only where they are asked for."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persona_plug.data.history import HistoryItem, items_of
from persona_plug.data.moments import in_time
from persona_plug.errors import ConfigError, DataError
from persona_plug.store import answers, words
from persona_plug.store.database import StoreUnavailable, transaction
from persona_plug.store.deleting import ErasableStore
from persona_plug.store.format import ForgetResult, ImportResult, StoredHistory, UserRow
from persona_plug.store.reading import ReadableStore
from persona_plug.store.rows import Entry, check_id, entries, exported_row, rows, with_id
from persona_plug.store.tables import Forgotten, HistoryFull, User

if TYPE_CHECKING:
    import os

    from sqlalchemy import Connection

__all__ = [
    "ForgetResult", "Forgotten", "HistoryFull", "HistoryStore", "ImportResult", "StoreUnavailable", "StoredHistory",
    "UserRow",
]  # fmt: skip

CHUNK = 512  # records of a file that are encoded and committed at a time


@dataclass(frozen=True, slots=True)
class Missing:
    """Items that a user does not have yet, and the store's `moment` then."""

    items: list[HistoryItem]
    moment: int


class HistoryStore(ErasableStore):
    """Users' histories in a database: per item two vectors, its id and time, and its texts if `keep_text`.

    Items have the order of their times, or without times the order they were added; adding one whose id the user has
    already changes nothing. Fields of records other than input, output, timestamp and id are not stored. Vectors depend
    on the encoder: another encoder than the store was made with is refused whenever it is opened. Threads and processes
    may share a store.

    What is begun before a user or an item is deleted is not stored afterwards, whoever stores it: it carries the
    `moment` of its beginning, and the deletion's is known for a day.

    Attributes:
        fingerprint: Identity of the encoder whose vectors are stored.
        dim: Width d of the vectors.
        keep_text: Whether texts are stored.
        vectors: How vectors are stored, `fp16` or `int8`.
    """

    def append(
        self,
        user: str,
        items: Sequence[HistoryItem | Mapping[str, Any] | str],
        moment: int | None = None,
        limit: int | None = None,
    ) -> int:
        """Add items to a user's history in one transaction, and return how many are new.

        Args:
            user: The user's id, any text without a NUL character.
            items: Items as in `history=`. One without an id gets one of its content, so that a call that is made again
                adds nothing; equal items of one call differ by their number. One whose id is there is left as it is.
            moment: `moment()` when this was begun; default now.
            limit: Items that the user may have at most.

        Raises:
            DataError: An id or an item cannot be used.
            Forgotten: The user, or such an item, was deleted after the moment.
            HistoryFull: There would be more than `limit` items.
            ConfigError: The store was opened without its encoder.
        """
        missing = self.missing(user, items, limit)
        if moment is None:
            moment = missing.moment
        return self.insert(user, self.encode(missing.items), moment, limit)

    def missing(
        self, user: str, items: Sequence[HistoryItem | Mapping[str, Any] | str], limit: int | None = None
    ) -> Missing:
        """Return those items, with ids and in the order of their times, that the user does not have yet.

        Raises:
            DataError: An id or an item cannot be used.
            HistoryFull: There would be more than `limit` items.
        """
        if isinstance(items, str | Mapping):
            raise DataError("items must be a list; put a single item into a list")
        seen: Counter[bytes] = Counter()
        named = [with_id(item, seen) for item in items_of(items)]
        check_id("user id", user)
        for item in named:
            check_id("item id", item.id)
        once = {str(item.id): item for item in reversed(named)}  # of two with one id the first
        ordered = in_time([once[name] for name in dict.fromkeys(str(item.id) for item in named)])
        with transaction(self._engine) as connection:
            moment = self._tables.moment(connection)
            found = self._tables.find(connection, user)
            known = set() if found is None else self._tables.known(connection, found.key, list(once))
        fresh = [item for item in ordered if item.id not in known]
        _check_room(found, len(fresh), limit)
        return Missing(fresh, moment)

    def encode(self, items: Sequence[HistoryItem]) -> list[dict[str, Any]]:
        """Return the rows of items with ids, for `insert`; nobody waits for it in the database.

        Raises:
            ConfigError: The store was opened without its encoder.
        """
        if not items:
            return []
        if self.encoder is None:
            raise ConfigError(f"{self.name} was opened without its encoder: pass encoder= to add items")
        return rows(items, self.encoder, self.vectors, self.keep_text)

    def insert(self, user: str, made: Sequence[Mapping[str, Any]], moment: int, limit: int | None = None) -> int:
        """Add encoded items in one transaction, and return how many are new; see `append`."""
        if not made:
            return 0
        with transaction(self._engine, writes=True) as connection:
            return self._insert(connection, user, made, moment, limit)

    def _insert(
        self,
        connection: Connection,
        user: str,
        made: Sequence[Mapping[str, Any]],
        moment: int,
        limit: int | None = None,
    ) -> int:
        found = self._tables.enter(connection, user)  # the user is locked: nobody else adds now
        names = [row["item_id"] for row in made]
        known = self._tables.known(connection, found.key, names)
        fresh = [row for row in made if row["item_id"] not in known]
        self._tables.refuse_deleted(connection, user, [row["item_id"] for row in fresh], moment)
        _check_room(found, len(fresh), limit)
        if fresh:
            self._tables.insert(connection, found, fresh)
        return len(fresh)

    def replace(self, user: str, item: HistoryItem) -> bool:
        """Put an item in the place of the user's item with its id, and return whether there was one.

        Raises:
            StoreUnavailable: Bytes are left in the database's files; replacing again finishes the work.
        """
        (row,) = self.encode([item])
        return self._replace(user, str(item.id), row)

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
        without an id get one from their content and from how often the same content came before in the file. What
        `export` gave is taken as it is, also without texts.

        Args:
            path: The file.
            skip_bad: Leave bad records out and list them in the result.
            progress: Show a progress bar; default only on a terminal.
            rename: What a record's user is called in the store; a gateway has names of its own for a tenant's users.
            columns: Field -> the file's own name of it, as `{"user_id": "agent"}`.

        Raises:
            DataError: The file or a record cannot be used; the records before it are stored.
            Forgotten: A user was deleted meanwhile; the records before are stored.
        """
        skipped: list[str] = []
        found = entries(Path(path), skipped if skip_bad else None, columns, self._exported)
        new, known = self._load_all((dataclasses.replace(e, user=rename(e.user)) for e in found), progress)
        return ImportResult(new, known, skipped)

    def load_store(self, source: ReadableStore, prefix: str = "", progress: bool | None = None) -> ImportResult:
        """Add the items of another store, encoded anew from their texts, a few hundred in a transaction.

        Ids, times and the times of adding stay. Running it again goes on where it broke off, and takes what has come
        meanwhile.

        Args:
            source: Where the texts are kept; it is only read, and may have another encoder.
            prefix: Only users whose ids begin so.
            progress: Show a progress bar; default only on a terminal.

        Raises:
            ConfigError: The source keeps no texts.
            Forgotten: A user was deleted here meanwhile; the items before are stored.
        """
        return ImportResult(*self._load_all(source.kept(prefix), progress), [])

    def _load_all(self, found: Iterator[Entry], progress: bool | None) -> tuple[int, int]:
        """Add entries chunk by chunk; return how many are new, and how many were known."""
        from tqdm.auto import tqdm

        if self.encoder is None:
            raise ConfigError(f"{self.name} was opened without its encoder: pass encoder= to add items")
        shows = progress if progress is not None else sys.stderr.isatty()
        read = new = 0
        begun = self.moment()
        with tqdm(desc="store", unit="event", disable=not shows) as bar:
            while chunk := list(islice(found, CHUNK)):
                read += len(chunk)
                new += self._load(chunk, begun)
                bar.update(len(chunk))
        return new, read - new

    def _exported(self, record: Mapping[str, Any], where: str) -> Entry:
        if self.keep_text:
            raise DataError(f"{where}: holds vectors without texts, and this store keeps texts; use another store")
        return exported_row(record, where, self.fingerprint, self.vectors, self.dim)

    def _load(self, found: Sequence[Entry], moment: int) -> int:
        """Encode and add those entries that are not there yet, and return their number."""
        users: dict[str, dict[str, Entry]] = {}
        for entry in found:
            users.setdefault(entry.user, {}).setdefault(str(entry.item.id), entry)
        # Numbers go by time: of one date, a list that runs from new to old is turned round, as it is in memory.
        wanted: list[Entry] = []
        with transaction(self._engine) as connection:
            for user, own in users.items():
                row = self._tables.find(connection, user)
                known = set() if row is None else self._tables.known(connection, row.key, list(own))
                ordered = in_time([entry.item for entry in own.values()])
                wanted += [own[str(item.id)] for item in ordered if item.id not in known]
        encoded = iter(self.encode([entry.item for entry in wanted if entry.row is None]))
        fresh: dict[str, list[Mapping[str, Any]]] = {}
        for entry in wanted:
            columns = next(encoded) if entry.row is None else entry.row
            added = {} if entry.added is None else {"added": entry.added}
            fresh.setdefault(entry.user, []).append({**columns, **added})
        if not fresh:
            return 0
        with transaction(self._engine, writes=True) as connection:
            # Always in the same order: two writers never wait for each other.
            return sum(self._insert(connection, user, fresh[user], moment) for user in sorted(fresh))

    # -- what heads keep of texts ------------------------------------------------------------------------------------

    def words(self, user: str, identity: str, items: Sequence[HistoryItem]) -> dict[str, bytes]:
        """Return what an identity's head keeps of a user's items, given with ids and texts: id -> bytes."""
        with transaction(self._engine) as connection:
            return words.find(connection, self._tables, user, identity, items)

    def keep_words(self, user: str, identity: str, made: Sequence[tuple[HistoryItem, bytes]], moment: int) -> None:
        """Keep what an identity's head made of a user's items. It goes with the item, or the user.

        Args:
            user: The user's id.
            identity: Of the head and all that it depends on; it replaces another's.
            made: Items with ids and texts, and the bytes to keep.
            moment: `moment()` when the texts were read.

        Raises:
            Forgotten: The user was deleted after the moment.
        """
        with transaction(self._engine, writes=True) as connection:
            words.keep(connection, self._tables, user, identity, made, moment)

    # -- answers that may be accepted ------------------------------------------------------------------------------

    def keep_answer(self, user: str, ident: str, request: str, answer: str, moment: int, seconds: float) -> None:
        """Keep an answer for `accept`, sealed: whoever has its id alone can read it.

        Raises:
            Forgotten: The user was deleted after the moment.
        """
        with transaction(self._engine, writes=True) as connection:
            answers.keep(connection, self._tables, user, ident, (request, answer), moment, seconds)

    def answer(self, user: str, ident: str, seconds: float) -> tuple[HistoryItem, int] | None:
        """Return an answer to a user that is not older than some seconds, as an item, and the moment it was begun."""
        with transaction(self._engine) as connection:
            found = answers.find(connection, self._tables, user, ident, seconds)
        return None if found is None else (HistoryItem(found[0], found[1], found[3], ident), found[2])

    def drop_answers(self, seconds: float) -> None:
        """Drop answers that are older than some seconds."""
        with transaction(self._engine, writes=True) as connection:
            answers.sweep(connection, seconds)


def _check_room(found: User | None, fresh: int, limit: int | None) -> None:
    held = 0 if found is None else found.items
    if limit is not None and fresh and held + fresh > limit:
        raise HistoryFull(f"the user has {held} events, and at most {limit} are kept; delete some first")
