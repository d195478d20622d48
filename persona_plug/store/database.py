"""What the store needs of a database: opening, migrations, transactions."""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from persona_plug.errors import ConfigError, CorruptFileError, DataError, MismatchError, PersonaPlugError
from persona_plug.models.vector_cache import make_private

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine, TextClause

HEAD = "0003"
MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "persona_version"
WAIT = 60.0  # seconds for another writer to finish, or for the database to answer
PAGE = 8192  # bytes: a page holds several items, their vectors included
LOCK = 0x7065726E  # PostgreSQL's advisory locks have numbers for names


class StoreUnavailable(PersonaPlugError):
    """The store's database cannot be reached, is locked, or cannot be written."""


def open_engine(url: str, create: bool, wait: float = WAIT) -> Engine:
    """Return an engine for a URL; a missing SQLite file is made, readable by its owner alone, or refused.

    Args:
        url: The URL.
        create: Whether a missing file is made.
        wait: Seconds to wait for a lock or an answer.

    Raises:
        ConfigError: The URL cannot be used, or its driver is not installed.
        DataError: The file does not exist, and `create` is off.
        CorruptFileError: The file is no SQLite database.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, create, wait)
    if parsed.get_backend_name() == "postgresql":
        return _open_postgres(parsed, wait)
    raise ConfigError(f"a store lives in sqlite or postgresql, not in {parsed.drivername!r:.40}")


def shown_url(url: str) -> str:
    """Return a URL without anything secret: a password may stand in its query, too.

    Raises:
        ConfigError: It cannot be read.
    """
    return str(_parsed(url).set(query={}).render_as_string(hide_password=True))


def _parsed(url: str) -> URL:
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # the message would quote the URL
        raise ConfigError(
            "the store's URL cannot be read; write sqlite:///users.db or postgresql://user:password@host/database"
        ) from None


def _open_sqlite(url: URL, create: bool, wait: float) -> Engine:
    from sqlalchemy import create_engine, event

    if url.database in (None, "", ":memory:"):
        raise ConfigError("a store needs a file, as in sqlite:///users.db")
    path = Path(str(url.database))
    if not create and not path.is_file():
        raise DataError(f"{path}: no such store; `persona-plug users add` makes one")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: cannot be opened (no folder {path.parent}); make it, or choose another place")
    try:
        with FileLock(f"{path}.lock", mode=0o600):
            make_private(path)
            with closing(sqlite3.connect(path, timeout=wait)) as db:
                db.execute(f"PRAGMA page_size={PAGE}")
                db.execute("PRAGMA journal_mode=WAL")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be opened ({exc.strerror or exc}); choose another place") from exc
    except sqlite3.OperationalError as exc:
        raise StoreUnavailable(f"{path}: {exc}") from exc
    except sqlite3.DatabaseError as exc:
        raise CorruptFileError(f"{path}: no SQLite database, or damaged ({exc}); restore it or choose another") from exc
    engine = create_engine(url, connect_args={"timeout": wait}, hide_parameters=True, pool_timeout=wait)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:  # noqa: ANN401
        connection.isolation_level = None  # transactions begin below, not where the driver thinks fit
        connection.execute("PRAGMA secure_delete=ON")
        connection.execute("PRAGMA synchronous=FULL")  # what was acknowledged also outlives a loss of power
        connection.execute("PRAGMA cache_spill=OFF")  # what is rolled back must not have reached the log
        connection.execute("PRAGMA temp_store=MEMORY")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer waits for its turn at the start: one that has already read would be refused.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get("writes") else "BEGIN")

    return engine


def _open_postgres(url: URL, wait: float) -> Engine:
    from sqlalchemy import create_engine
    from sqlalchemy.exc import ArgumentError

    if url.drivername == "postgresql":
        url = url.set(drivername="postgresql+psycopg")
    milliseconds = int(1000 * wait)
    # A server that hangs must not hold up those who ask it for ever; its network may be gone, too.
    limits = {
        "connect_timeout": max(2, int(wait)),
        "options": f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds}",
        "keepalives_idle": max(1, int(wait / 2)),
        "keepalives_interval": max(1, int(wait / 6)),
        "tcp_user_timeout": milliseconds,
    }
    own = {name: value for name, value in limits.items() if name not in url.query}
    try:
        return create_engine(
            url, hide_parameters=True, pool_pre_ping=True, pool_timeout=wait, connect_args=own, pool_size=8
        )
    except ModuleNotFoundError as exc:
        raise ConfigError(f"{exc.name} is missing: pip install 'persona-plug[postgres]'") from exc
    except (ArgumentError, TypeError, ValueError):
        raise ConfigError("the store's URL names an unknown driver or option; write postgresql://...") from None


@functools.cache
def sql(statement: str) -> TextClause:
    """Return a statement, parsed once."""
    from sqlalchemy import text

    return text(statement)


def shown(engine: Engine) -> str:
    """Return the URL without anything secret."""
    return engine.url.set(query={}).render_as_string(hide_password=True)


def cause_of(engine: Engine, exc: BaseException) -> str:
    """Return what a database said, on one line, without values of rows and without passwords."""
    said = getattr(getattr(exc, "diag", None), "message_primary", None) or str(exc)
    line = " ".join(str(said).split())
    secrets = [engine.url.password, *(value for name, value in engine.url.query.items() if "pass" in name)]
    for secret in filter(None, secrets):
        line = line.replace(str(secret), "***")
    return line[:200]


@contextmanager
def transaction(engine: Engine, writes: bool = False) -> Iterator[Connection]:
    """Run statements in one transaction; what the database refuses becomes an error of one line.

    Raises:
        StoreUnavailable: The database cannot be reached, is locked or full.
        CorruptFileError: The database's file is damaged.
    """
    from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    try:
        with engine.connect().execution_options(writes=writes) as connection, connection.begin():
            yield connection
    except DBAPIError as exc:
        line = cause_of(engine, exc.orig or exc)
        if engine.dialect.name == "sqlite" and isinstance(exc, DatabaseError) and not isinstance(exc, OperationalError):
            raise CorruptFileError(f"{shown(engine)}: damaged ({line}); restore it from a copy") from exc
        raise StoreUnavailable(f"{shown(engine)}: {line}; try again when the database is there") from exc
    except PoolTimeout as exc:
        raise StoreUnavailable(f"{shown(engine)}: all connections are in use; try again") from exc


@contextmanager
def alone(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other process can be in at the same time: tables are made and changed by one."""
    if engine.dialect.name == "sqlite":
        with FileLock(f"{engine.url.database}.lock", mode=0o600), transaction(engine, writes=True) as connection:
            yield connection
        return
    with transaction(engine, writes=True) as connection:
        connection.execute(sql("SET LOCAL statement_timeout = 0"))  # a large store takes long to migrate
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
