"""On-disk cache of encoded texts: one SQLite file per encoder fingerprint, safe under several processes."""

from __future__ import annotations

import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from filelock import FileLock

from persona_plug.caching import caching

logger = logging.getLogger(__name__)

_CHUNK = 500  # SQLite's limit on bound parameters is 999 in old builds


def scrub(path: Path, rewrite: bool) -> None:
    """Take deleted rows out of an SQLite file's log and, with `rewrite`, out of unused parts of its pages.

    `secure_delete` alone is not enough: balancing pages leaves copies of rows behind that are not overwritten.

    Raises:
        sqlite3.OperationalError: Somebody went on reading or writing an old state for a minute.
    """
    with closing(sqlite3.connect(path, timeout=60, isolation_level=None)) as db:
        if rewrite:
            db.execute("VACUUM")
        if db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            raise sqlite3.OperationalError("the log is still being read")


class VectorCache:
    """Vectors in fp16, keyed by the hash of their text; a damaged file or row is dropped with a notice and re-made.

    Only hashes and vectors are stored, never text. SQLite's write-ahead log makes every `put` atomic, also when the
    process is killed, and lets several processes share the file.
    """

    def __init__(self, path: Path, dim: int) -> None:
        """Open or create the cache file for vectors of width `dim`."""
        self.path, self.dim = path, dim
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            try:
                self._create()
            except sqlite3.DatabaseError as exc:
                self._rebuild(exc)

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
        rows = [(k, zlib.crc32(b := v.astype(np.float16).tobytes()), b) for k, v in vectors.items()]
        with closing(self._connect()) as db, db:
            db.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    def delete(self, prefixes: Iterable[bytes], rewrite: bool = True) -> int:
        """Delete the vectors whose keys begin with one of these bytes, and return how many there were.

        Files set aside as damaged cannot be searched and go whole. With `rewrite` the file holds no byte of the
        deleted afterwards; that takes as long as copying it.

        Raises:
            sqlite3.OperationalError: Another process kept the file busy for a minute; deleting again finishes it.
        """
        bounds = [(p, p + b"\xff" * 32) for p in prefixes]
        with closing(self._connect()) as db, db:
            db.execute("PRAGMA secure_delete=ON")
            found = db.executemany("DELETE FROM vectors WHERE key BETWEEN ? AND ?", bounds).rowcount if bounds else 0
        for aside in self.path.parent.glob(f"{self.path.stem}.damaged-*"):
            aside.unlink(missing_ok=True)
        scrub(self.path, rewrite)
        return int(found)

    def __len__(self) -> int:
        """Return the number of stored vectors."""
        with closing(self._connect()) as db:
            return int(db.execute("SELECT count(*) FROM vectors").fetchone()[0])

    def _connect(self) -> sqlite3.Connection:
        # A connection per call: cheap beside an encoder pass, and safe across threads and forks.
        return sqlite3.connect(self.path, timeout=60)

    def _alone(self) -> FileLock:
        """Keep other processes from creating or rebuilding the file.

        SQLite switches to the write-ahead log without waiting for others who try the same: one of them would fail.
        """
        return FileLock(f"{self.path}.lock")

    def _create(self) -> None:
        with closing(self._connect()) as db, db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            db.execute(
                "CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, crc INTEGER, vector BLOB) WITHOUT ROWID"
            )

    def _read(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        damaged = 0
        with closing(self._connect()) as db:
            for start in range(0, len(keys), _CHUNK):
                part = list(keys[start : start + _CHUNK])
                marks = ",".join("?" * len(part))
                for key, crc, blob in db.execute(f"SELECT key, crc, vector FROM vectors WHERE key IN ({marks})", part):  # noqa: S608
                    if len(blob) == 2 * self.dim and zlib.crc32(blob) == crc:
                        found[key] = np.frombuffer(blob, dtype=np.float16)
                    else:
                        damaged += 1
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
