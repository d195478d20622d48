"""From events and items to the rows of a store."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_plug.data.history import HistoryItem, events_of
from persona_plug.data.labels import label_of
from persona_plug.data.rows import read_rows
from persona_plug.errors import DataError
from persona_plug.store.format import HASH, VectorFormat, layout, pack, to_bytes

if TYPE_CHECKING:
    from persona_plug.models.encoder import HistoryEncoder

LONGEST_ID = 1000  # bytes; an entry of PostgreSQL's indexes is limited to 2.7 kB


def events(
    path: Path, skipped: list[str] | None, columns: Mapping[str, str] | None = None
) -> Iterator[tuple[str, HistoryItem]]:
    """Yield (user, item with id) of a file; bad records raise, or go to `skipped`.

    A record without an id gets one from its content and from how often the same content came before: the same again
    when the file is read again, also when it has grown at its end. `columns` are those of `rows.read_rows`.

    Raises:
        DataError: The file cannot be read or a record is bad.
    """
    seen: Counter[bytes] = Counter()
    for where, record in read_rows(path, columns):
        try:
            if isinstance(record, DataError):
                raise record
            fresh = [(event.user_id, _with_id(event.user_id, event.item, seen)) for event in events_of(record, where)]
            for user, item in fresh:
                check_id(f"{where}: user id", user)
                check_id(f"{where}: id", item.id)
        except DataError as exc:
            if skipped is None:
                raise
            skipped.append(str(exc))
        else:
            yield from fresh


def _with_id(user: str, item: HistoryItem, seen: Counter[bytes]) -> HistoryItem:
    """Return the item with an id, made of its content where it has none."""
    if item.id is not None:
        return item
    content = repr((user, item.input, item.output, item.timestamp))
    digest = hashlib.sha256(content.encode()).digest()[:12]
    seen[digest] += 1
    return dataclasses.replace(item, id=f"{digest.hex()}-{seen[digest]}")


def check_id(what: str, value: object) -> None:
    """Refuse what one of the databases cannot hold; anything else is plain data, whatever it looks like.

    Raises:
        DataError: The message says what is wrong, without the id itself.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise DataError(f"{what} must be a text that is not blank and holds no NUL character")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as exc:
        raise DataError(f"{what} holds half a character (a lone surrogate); repair it") from exc
    if size > LONGEST_ID:
        raise DataError(f"{what} is {size} bytes long, {LONGEST_ID} are allowed; shorten or hash it")


def rows(
    items: Sequence[HistoryItem], encoder: HistoryEncoder, kind: VectorFormat, keep_text: bool
) -> list[dict[str, Any]]:
    """Encode items and return the columns of each: id, time, hashes, vectors, and texts if they are kept."""
    vectors = encoder.encode([i.input for i in items] + [i.output for i in items], progress=False).numpy()
    packed = pack(vectors[: len(items)], vectors[len(items) :], kind)
    return [
        {
            "item_id": item.id,
            "at": item.timestamp,
            "hashes": b"".join(text_hash(t) for t in (item.input, item.output, label_of(item.output))),
            "vectors": blob,
            "input": to_bytes(item.input) if keep_text else None,
            "output": to_bytes(item.output) if keep_text else None,
        }
        for item, blob in zip(items, packed, strict=True)
    ]


def as_base64(data: bytes) -> str:
    """Return bytes as base64 text."""
    return base64.b64encode(data).decode()


def vector_fields(blob: bytes, vectors: VectorFormat, dim: int) -> dict[str, str]:
    """Return an item's stored vectors as an export shows them: their format, and the bytes of each part in base64."""
    row = np.frombuffer(blob, dtype=layout(vectors, dim))[0]
    return {"vector_format": vectors} | {f"{p}_bytes": as_base64(row[p].tobytes()) for p in row.dtype.names or ()}


def text_hash(text: str) -> bytes:
    """Return the first bytes of the key under which the encoder's cache holds a text's vector."""
    return hashlib.sha256(to_bytes(text)).digest()[:HASH]
