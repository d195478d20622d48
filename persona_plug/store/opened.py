"""A store that is open: what it was made with, and its tables."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.store.database import WAIT, alone, migrate, open_engine, shown, sql, transaction
from persona_plug.store.erasing import Eraser
from persona_plug.store.format import FORMATS, VectorFormat
from persona_plug.store.marks import mark_of
from persona_plug.store.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from persona_plug.models.encoder import HistoryEncoder

logger = logging.getLogger(__name__)


class _MadeWith(NamedTuple):
    encoder: str
    dim: int
    vectors: VectorFormat
    keep_text: bool
    secret: bytes


class OpenStore:
    """Opens a store's database and knows what it was made with; see `HistoryStore`."""

    def __init__(
        self,
        url: str,
        encoder: HistoryEncoder | None = None,
        keep_text: bool | None = None,
        vectors: VectorFormat | None = None,
        wait: float = WAIT,
    ) -> None:
        """Open a store, or make one; an older schema is migrated.

        Args:
            url: `sqlite:///users.db` or `postgresql://user:password@host/database`.
            encoder: The history encoder. Without it an existing store can be looked at and deleted from.
            keep_text: Keep texts beside their vectors; default what the store was made with, False for a new one.
            vectors: `fp16` (exactly what the encoder gives) or `int8` (half the bytes, rounded); default what the
                store was made with, `fp16` for a new one.
            wait: Seconds to wait for other writers, or for the database to answer.

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
        self._engine = open_engine(url, create=encoder is not None, wait=wait)
        self.name = shown(self._engine)
        self._missing_texts_logged = False
        with alone(self._engine) as connection:
            migrate(connection)
            made = self._settings(connection, keep_text, vectors)
        self.fingerprint, self.dim, self.vectors, self.keep_text = made.encoder, made.dim, made.vectors, made.keep_text
        self._tables = Tables(made.secret, self._engine.dialect.name == "sqlite")
        self._eraser = Eraser(self._engine, wait)
        wanted = {"encoder": (None if encoder is None else encoder.fingerprint, self.fingerprint),
                  "vectors": (vectors, self.vectors), "keep_text": (keep_text, self.keep_text)}  # fmt: skip
        for name, (asked, present) in wanted.items():
            if asked is not None and asked != present:
                self.close()
                raise MismatchError(
                    f"{self.name} was made with {name} {present}, not {asked}: open it so, or make another store"
                )

    def _settings(self, connection: Connection, keep_text: bool | None, vectors: VectorFormat | None) -> _MadeWith:
        """Return what the store was made with; a new store is made with what was asked."""
        question = sql("SELECT encoder, dim, vectors, keep_text, secret FROM persona_store")
        row = connection.execute(question).one_or_none()
        if row is None:
            if self.encoder is None:
                raise DataError(f"{self.name} holds no store yet; `persona-plug users add` makes one")
            insert = "INSERT INTO persona_store (id, encoder, dim, vectors, keep_text, secret, forgets, floor)"
            asked: dict[str, Any] = {
                "e": self.encoder.fingerprint,
                "d": self.encoder.dim,
                "v": vectors or "fp16",
                "k": bool(keep_text),
            }
            asked["s"] = secrets.token_bytes(32)
            connection.execute(sql(f"{insert} VALUES (1, :e, :d, :v, :k, :s, 0, 0)"), asked)
            row = connection.execute(question).one()
        return _MadeWith(row[0], row[1], row[2], bool(row[3]), bytes(row[4]))

    def moment(self) -> int:
        """Return how many deletions the store has seen, for what is begun now and stored later."""
        with transaction(self._engine) as connection:
            return self._tables.moment(connection)

    def deleted_since(self, users: Iterable[str], moment: int) -> list[str]:
        """Return which of these users were deleted after a moment."""
        with transaction(self._engine) as connection:
            marks = self._tables.deleted_since(connection, moment)
        return [user for user in users if mark_of(self._tables.secret, user) in marks] if marks else []

    def log_missing_texts(self) -> None:
        """Warn, once for each store that is open, that a plug which reads users' words finds no texts here."""
        if not self._missing_texts_logged:
            self._missing_texts_logged = True
            logger.warning(
                "%s keeps no texts: this plug reads users' own words, and does without for items out of it; "
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
