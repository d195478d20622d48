"""Taking what was deleted out of the database's files as well."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from persona_plug.models.vector_cache import scrub
from persona_plug.store.database import StoreUnavailable, cause_of, shown, sql
from persona_plug.store.marks import PARTS

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

# Transactions that may still see what was deleted: `VACUUM` keeps it for them.
_OLDER = """
    SELECT count(*) FROM (
        SELECT backend_xmin AS xmin FROM pg_stat_activity WHERE pid <> pg_backend_pid()
            AND backend_type <> 'autovacuum worker' AND (datname = current_database() OR datname IS NULL)
        UNION ALL SELECT xmin FROM pg_replication_slots
        UNION ALL SELECT transaction FROM pg_prepared_xacts WHERE database = current_database()
    ) AS open WHERE xmin IS NOT NULL AND age(xmin) >= age(CAST(CAST(:deletion AS text) AS xid))
"""


class Eraser:
    """Empties SQLite's log, or rewrites those parts of PostgreSQL's tables that deleted rows were in.

    Deletions that come while one is erased are erased together afterwards.
    """

    def __init__(self, engine: Engine, wait: float) -> None:
        """Bind it to a database; `wait` seconds are given to whoever reads an old state."""
        self.engine, self.wait = engine, wait
        self._lock, self._noting = threading.Lock(), threading.Lock()
        self._waiting: dict[str, int] = {}  # table -> the latest transaction that deleted from it

    def number(self, connection: Connection) -> int:
        """Return PostgreSQL's number of the transaction that deletes."""
        if self.engine.dialect.name == "sqlite":
            return 0
        return int(connection.execute(sql("SELECT CAST(pg_current_xact_id() AS text)")).scalar_one())

    def erase(self, keys: Iterable[int], deletion: int) -> None:
        """Take what was deleted of users out of the files.

        Args:
            keys: The users.
            deletion: `number` of the transaction that did it.

        Raises:
            StoreUnavailable: Bytes are left; the message says why and what to do.
        """
        if self.engine.dialect.name == "sqlite":
            try:
                scrub(Path(str(self.engine.url.database)), self.wait)
            except sqlite3.OperationalError as exc:
                raise self._left(str(exc)) from exc
            return
        tables = {"persona_names", *(f"persona_items_{key % PARTS}" for key in keys)}
        with self._noting:
            self._waiting |= dict.fromkeys(tables, deletion)
        with self._lock:
            with self._noting:
                waiting = {t: self._waiting[t] for t in self._waiting}
            if not waiting.keys() & tables:
                return  # another thread did it
            self._rewrite(waiting)
            with self._noting:
                self._waiting = {t: d for t, d in self._waiting.items() if waiting.get(t) != d}

    def _rewrite(self, waiting: dict[str, int]) -> None:
        from sqlalchemy.exc import DBAPIError

        try:
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                self._wait_for_readers(connection, max(waiting.values()))
                connection.execute(sql("SET statement_timeout = 0"))
                with _warnings(connection) as warned:
                    for table in sorted(waiting):
                        connection.execute(sql(f"VACUUM (FULL) {table}"))
                connection.execute(sql("RESET statement_timeout"))
        except DBAPIError as exc:
            raise self._left(cause_of(self.engine, exc.orig or exc)) from exc
        if warned:
            raise self._left(f"{warned[0]}; let the role own the tables")

    def _wait_for_readers(self, connection: Connection, deletion: int) -> None:
        deadline = time.monotonic() + self.wait
        while connection.execute(sql(_OLDER), {"deletion": deletion % (1 << 32)}).scalar_one():
            if time.monotonic() > deadline:
                raise self._left("a transaction that began before goes on reading them")
            time.sleep(0.1)

    def _left(self, why: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"{shown(self.engine)}: deleted, but bytes are left in the database's files ({why}); forget once more"
        )


@contextmanager
def _warnings(connection: Connection) -> Iterator[list[str]]:
    """Collect what PostgreSQL warns of: it skips what it may not vacuum, and says no more."""
    raw = connection.connection.driver_connection
    found: list[str] = []

    def note(notice: object) -> None:
        if getattr(notice, "severity_nonlocalized", None) == "WARNING":
            found.append(" ".join(str(getattr(notice, "message_primary", "")).split()))

    if raw is None:
        yield found
        return
    raw.add_notice_handler(note)
    try:
        yield found
    finally:
        raw.remove_notice_handler(note)
