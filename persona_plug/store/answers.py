"""Answers that may still be accepted: sealed in the store, so that every gateway on it finds them."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from persona_plug.store.database import sql
from persona_plug.store.marks import mark_of, seal, unseal
from persona_plug.store.tables import Tables

if TYPE_CHECKING:
    from sqlalchemy import Connection


def keep(
    connection: Connection, tables: Tables, user: str, ident: str, texts: tuple[str, str], moment: int, seconds: float
) -> None:
    """Keep request and answer for some seconds, readable by whoever has the answer's id alone.

    Raises:
        Forgotten: The user was deleted after the answer was begun.
    """
    sweep(connection, seconds)
    tables.refuse_deleted(connection, user, [], moment)
    row = {
        "id": mark_of(tables.secret, "answer", ident),
        "owner": mark_of(tables.secret, user),
        "number": moment,
        "now": time.time(),
        "sealed": seal(ident, json.dumps(texts).encode()),
    }
    insert = "INSERT INTO persona_answers (id, owner, number, at, sealed) VALUES (:id, :owner, :number, :now, :sealed)"
    connection.execute(sql(insert), row)


def find(
    connection: Connection, tables: Tables, user: str, ident: str, seconds: float
) -> tuple[str, str, int, float] | None:
    """Return request, answer, the moment it was begun, and its time; or None where it is no answer to this user."""
    question = sql("SELECT sealed, number, at FROM persona_answers WHERE id = :id AND owner = :owner AND at >= :then")
    whose = {"id": mark_of(tables.secret, "answer", ident), "owner": mark_of(tables.secret, user)}
    row = connection.execute(question, {**whose, "then": time.time() - seconds}).one_or_none()
    texts = None if row is None else unseal(ident, bytes(row[0]))
    return None if row is None or texts is None else (*json.loads(texts), row[1], row[2])


def forget(connection: Connection, tables: Tables, user: str) -> None:
    """Drop a user's answers."""
    connection.execute(sql("DELETE FROM persona_answers WHERE owner = :owner"), {"owner": mark_of(tables.secret, user)})


def sweep(connection: Connection, seconds: float) -> None:
    """Drop answers that are too old to be accepted."""
    connection.execute(sql("DELETE FROM persona_answers WHERE at < :then"), {"then": time.time() - seconds})
