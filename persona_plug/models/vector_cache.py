"""On-disk cache of encoded texts: one SQLite file per encoder fingerprint, safe under several processes.

A text's row stays where it was first written. SQLite copies rows to other pages while it balances its trees, and the
copies outlive the rows. Rows that are only added at the end and only overwritten in place are never copied, so what is
deleted leaves no byte, at the cost of what is deleted. What SQLite does move are keyed hashes and numbers.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock

from persona_plug.errors import ConfigError
from persona_plug.models.caching import caching

logger = logging.getLogger(__name__)

PREFIX = 8  # bytes of a text's hash that its row is found by
WAIT = 60  # seconds for another process
_CHUNK = 500  # SQLite's limit on bound parameters is 999 in old builds
# Of the same length, so that the row stays where it is and can be used again.
_EMPTY = (
    "UPDATE vectors SET key = zeroblob(length(key)), crc = zeroblob(length(crc)), vector = zeroblob(length(vector))"
    " WHERE id = ?"
)
_TABLES = (
    "CREATE TABLE IF NOT EXISTS salt (id INTEGER PRIMARY KEY, value BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, key BLOB, crc BLOB, vector BLOB)",
    "CREATE TABLE IF NOT EXISTS marks (mark BLOB PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS unused (id INTEGER PRIMARY KEY)",
)


def scrub(path: Path, wait: float = WAIT) -> None:
    """Bring an SQLite file's log into the file and empty it: the log holds pages as they were before a deletion.

    Writers are never held up for long: while somebody reads an old state, it asks again and again.

    Raises:
        sqlite3.OperationalError: Somebody went on reading an old state for `wait` seconds.
    """
    deadline = time.monotonic() + wait
    while True:
        with closing(sqlite3.connect(path, timeout=0.05, isolation_level=None)) as db:
            try:
                if not db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    return
            except sqlite3.OperationalError as exc:
                if "locked" not in str(exc):
                    raise
        if time.monotonic() > deadline:
            raise sqlite3.OperationalError("the log is still being read")
        time.sleep(0.05)


def make_private(path: Path) -> None:
    """Make a file, if it is not there, that its owner alone may read and write; SQLite's log takes its mode over."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


class VectorCache:
    """Vectors in fp16, keyed by the hash of their text; a damaged file or row is dropped with a notice and re-made.

    Only hashes and vectors are stored, never text. SQLite's write-ahead log makes every `put` atomic, also when the
    process is killed, and lets several processes share the file.
    """

    def __init__(self, path: Path, dim: int) -> None:
        """Open or create the cache file for vectors of width `dim`.

        Raises:
            ConfigError: The file cannot be made or written.
        """
        self.path, self.dim = path, dim
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                try:
                    self._create()
                except sqlite3.OperationalError:  # no right to write, or in use: not damaged
                    raise
                except sqlite3.DatabaseError as exc:
                    self._rebuild(exc)
        except (OSError, sqlite3.OperationalError) as exc:
            cause = getattr(exc, "strerror", None) or exc
            raise ConfigError(
                f"{path.parent}: vectors cannot be kept here ({cause}); set PERSONA_PLUG_CACHE to a folder that can be "
                "written, or pass use_cache=False"
            ) from exc

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """Return the fp16 vectors (d,) of those keys that are stored and whole."""
        try:
            return self._read(keys)
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as exc:
            with self._alone():
                self._rebuild(exc)
            return {}

    def put(self, vectors: Mapping[bytes, np.ndarray]) -> None:
        """Store vectors in one transaction; keys that are there already are overwritten. Nothing inside `uncached`."""
        if not caching():
            return
        with self._transaction() as db:
            marks = _marks(db, vectors)
            rows = {marks[k]: (k, *_packed(v)) for k, v in vectors.items()}
            known = dict(self._places(db, list(rows)))
            fresh = [mark for mark in rows if mark not in known]
            free = [row[0] for row in db.execute("SELECT id FROM unused LIMIT ?", [len(fresh)])]
            db.executemany("DELETE FROM unused WHERE id = ?", [(place,) for place in free])
            last = db.execute("SELECT coalesce(max(id), 0) FROM vectors").fetchone()[0]
            added = len(fresh) - len(free)
            at = dict(zip(fresh, [*free, *range(last + 1, last + 1 + added)], strict=True))
            again = {**known, **{mark: at[mark] for mark in fresh[: len(free)]}}
            step = "UPDATE vectors SET key = ?, crc = ?, vector = ? WHERE id = ?"
            db.executemany(step, [(*rows[mark], place) for mark, place in again.items()])
            ends = [(at[mark], *rows[mark]) for mark in fresh[len(free) :]]
            db.executemany("INSERT INTO vectors VALUES (?, ?, ?, ?)", ends)
            db.executemany("INSERT INTO marks VALUES (?, ?)", at.items())

    def delete(self, prefixes: Iterable[bytes], wait: float = WAIT) -> int:
        """Delete the vectors whose keys begin with one of these bytes, and return how many there were.

        The files hold no byte of them afterwards, at the cost of what is deleted. Files set aside as damaged cannot be
        searched and go whole.

        Raises:
            sqlite3.OperationalError: Another process kept the file busy; deleting again finishes it.
        """
        wanted = list(prefixes)
        found: list[tuple[bytes, int]] = []
        if wanted:
            with self._transaction() as db:
                found = list(self._places(db, list(_marks(db, wanted).values())))
                places = [(place,) for _, place in found]
                db.executemany(_EMPTY, places)
                db.executemany("INSERT INTO unused VALUES (?)", places)
                db.executemany("DELETE FROM marks WHERE mark = ?", [(mark,) for mark, _ in found])
        for aside in self.path.parent.glob(f"{self.path.stem}.damaged-*"):
            aside.unlink(missing_ok=True)
        scrub(self.path, wait)
        return len(found)

    def __len__(self) -> int:
        """Return the number of stored vectors."""
        with closing(self._connect()) as db:
            return int(db.execute("SELECT count(*) FROM marks").fetchone()[0])

    def _connect(self) -> sqlite3.Connection:
        # A connection per call: cheap beside an encoder pass, and safe across threads and forks.
        db = sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)
        db.execute("PRAGMA secure_delete=ON")
        return db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as db:
            db.execute("PRAGMA cache_spill=OFF")  # what is rolled back must not have reached the log
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def _alone(self) -> FileLock:
        """Keep other processes from creating or rebuilding the file.

        SQLite switches to the write-ahead log without waiting for others who try the same: one of them would fail.
        """
        return FileLock(f"{self.path}.lock", mode=0o600)

    def _create(self) -> None:
        make_private(self.path)
        with closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            columns = [row[1] for row in db.execute("PRAGMA table_info(vectors)")]
            if columns and "id" not in columns:  # the first format, whose rows were moved
                db.execute("ALTER TABLE vectors RENAME TO earlier")
            for table in _TABLES:
                db.execute(table)
            db.execute("INSERT OR IGNORE INTO salt VALUES (1, ?)", [secrets.token_bytes(32)])
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'earlier'").fetchone():
                rows = db.execute("SELECT key, vector FROM earlier").fetchall()
                self.put({key: np.frombuffer(vector, np.float16) for key, vector in rows})
                db.execute("DROP TABLE earlier")

    def _places(self, db: sqlite3.Connection, marks: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
        for start in range(0, len(marks), _CHUNK):
            part = marks[start : start + _CHUNK]
            yield from db.execute(f"SELECT mark, id FROM marks WHERE mark IN ({','.join('?' * len(part))})", part)  # noqa: S608

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        damaged = 0
        with closing(self._connect()) as db:
            wanted = {mark: key for key, mark in _marks(db, keys).items()}
            for start in range(0, len(wanted), _CHUNK):
                part = list(wanted)[start : start + _CHUNK]
                marks = ",".join("?" * len(part))
                question = f"SELECT mark, key, crc, vector FROM marks JOIN vectors USING (id) WHERE mark IN ({marks})"  # noqa: S608
                for mark, key, crc, blob in db.execute(question, part):
                    if len(blob) != 2 * self.dim or _crc(blob) != crc:
                        damaged += 1
                    elif key == wanted[mark]:
                        found[key] = np.frombuffer(blob, dtype=np.float16)
        if damaged:
            logger.warning("%s: %d damaged vectors are encoded again", self.path, damaged)
        return found

    def _rebuild(self, cause: Exception) -> None:
        if "locked" in str(cause):
            raise cause
        aside = self.path.with_suffix(f".damaged-{int(time.time())}")
        logger.warning("%s is damaged (%s): moved to %s and rebuilt", self.path, cause, aside.name)
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            Path(str(self.path) + suffix).unlink(missing_ok=True)
        self._create()


def _marks(db: sqlite3.Connection, keys: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return what each key's row is found by. SQLite may leave copies of it behind, which tell nothing of a text."""
    salt = db.execute("SELECT value FROM salt").fetchone()[0]
    return {key: hashlib.blake2b(key[:PREFIX], key=salt, digest_size=16).digest() for key in keys}


def _packed(vector: np.ndarray) -> tuple[bytes, bytes]:
    """Return the check sum and bytes of a vector; both have the same length for every vector of a cache."""
    data = vector.astype(np.float16).tobytes()
    return _crc(data), data


def _crc(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")
