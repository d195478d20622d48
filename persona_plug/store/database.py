"""What the store needs of a database: opening, migrations, transactions, and deleting for good.

SQLite's `secure_delete` overwrites deleted rows, but copies that it made while balancing pages stay behind in unused
parts of pages, and the write-ahead log holds older pages. So forgetting ends with a rewrite of the file.
"""

from __future__ import annotations

import functools
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from persona_plug.errors import ConfigError, CorruptFileError, DataError, MismatchError, PersonaPlugError
from persona_plug.models.vector_cache import scrub

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine, TextClause

HEAD = "0001"
MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "persona_version"
WAIT = 60  # seconds for another writer to finish
PAGE = 8192  # bytes: a page holds several items, their vectors included
LOCK = 0x7065726E  # PostgreSQL's advisory locks have numbers for names


class StoreUnavailable(PersonaPlugError):
    """The store's database cannot be reached, is locked, or cannot be written."""


def open_engine(url: str, create: bool) -> Engine:
    """Return an engine for a URL; a missing SQLite file is made, readable by its owner alone, or refused.

    Raises:
        ConfigError: The URL cannot be used, or its driver is not installed.
        DataError: The file does not exist, and `create` is off.
        CorruptFileError: The file is no SQLite database.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(
            "the store's URL cannot be read; write sqlite:///users.db or postgresql://user:password@host/database"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, create)
    if parsed.get_backend_name() == "postgresql":
        return _open_postgres(parsed)
    raise ConfigError(f"a store lives in sqlite or postgresql, not in {parsed.drivername!r:.40}")


def _open_sqlite(url: URL, create: bool) -> Engine:
    from sqlalchemy import create_engine, event

    if url.database in (None, "", ":memory:"):
        raise ConfigError("a store needs a file, as in sqlite:///users.db")
    path = Path(str(url.database))
    if not create and not path.is_file():
        raise DataError(f"{path}: no such store; `persona-plug users add` makes one")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: cannot be opened (no folder {path.parent}); make it, or choose another place")
    try:
        with FileLock(f"{path}.lock"):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            with closing(sqlite3.connect(path, timeout=WAIT)) as db:
                db.execute(f"PRAGMA page_size={PAGE}")
                db.execute("PRAGMA journal_mode=WAL")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be opened ({exc.strerror or exc}); choose another place") from exc
    except sqlite3.OperationalError as exc:
        raise StoreUnavailable(f"{path}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise CorruptFileError(f"{path}: no SQLite database, or damaged ({exc}); restore it or choose another") from exc
    engine = create_engine(url, connect_args={"timeout": WAIT}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:  # noqa: ANN401
        connection.isolation_level = None  # transactions begin below, not where the driver thinks fit
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA synchronous=FULL")  # what was acknowledged also outlives a loss of power

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer waits for its turn at the start: one that has already read would be refused.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    return engine


def _open_postgres(url: URL) -> Engine:
    from sqlalchemy import create_engine

    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    try:
        return create_engine(url, hide_parameters=True, pool_pre_ping=True)
    except ModuleNotFoundError as exc:
        raise ConfigError(f"{exc.name} is missing: pip install 'persona-plug[postgres]'") from exc


@functools.cache
def sql(statement: str) -> TextClause:
    """Return a statement, parsed once."""
    from sqlalchemy import text

    return text(statement)


def shown(engine: Engine) -> str:
    """Return the URL without its password."""
    return engine.url.render_as_string(hide_password=True)


@contextmanager
def transaction(engine: Engine, writes: bool = False) -> Iterator[Connection]:
    """Run statements in one transaction; what the database refuses becomes an error of one line.

    Raises:
        StoreUnavailable: The database cannot be reached, is locked or full.
        CorruptFileError: The database's file is damaged.
    """
    from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError

    try:
        with engine.connect().execution_options(writes=writes) as connection, connection.begin():
            yield connection
    except DBAPIError as exc:
        line = " ".join(str(exc.orig).split())[:200]
        if engine.dialect.name == "sqlite" and isinstance(exc, DatabaseError) and not isinstance(exc, OperationalError):
            raise CorruptFileError(f"{shown(engine)}: damaged ({line}); restore it from a copy") from exc
        raise StoreUnavailable(f"{shown(engine)}: {line}; try again when the database is there") from exc


@contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other process can be in at the same time: tables are made and changed by one."""
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock"), transaction(engine, writes=True) as connection:
            yield connection
        return
    with transaction(engine, writes=True) as connection:
        connection.execute(sql("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        yield connection


def migrate(connection: Connection) -> None:
    """Bring the tables to this version's schema, from nothing or from an older one.

    Raises:
        MismatchError: The schema is newer than this version of persona_plug.
    """
    from sqlalchemy import inspect

    found = None
    if inspect(connection).has_table(VERSION_TABLE):
        found = connection.execute(sql(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608
    if found == HEAD:
        return
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise MismatchError(
            f"the store has schema {found}, this persona_plug knows {HEAD}: install a newer persona_plug"
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def erase(engine: Engine, rewrite: bool) -> None:
    """Take what was deleted out of the files as well.

    SQLite: the log is emptied, and with `rewrite` the file is written anew without unused bytes. PostgreSQL: the
    tables are vacuumed if `rewrite`, else autovacuum does it in its time; its own log is the server's affair.

    Raises:
        StoreUnavailable: Another process kept reading an old state for a minute, or the disk is full.
    """
    if engine.dialect.name == "sqlite":
        try:
            scrub(Path(str(engine.url.database)), rewrite)
        except sqlite3.OperationalError as exc:
            raise StoreUnavailable(
                f"{shown(engine)}: deleted, but bytes are left in its files ({exc}); forget once more"
            ) from exc
    elif rewrite:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(sql("VACUUM persona_users, persona_items"))
