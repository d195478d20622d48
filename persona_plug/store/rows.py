"""From events and items to the rows of a store."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_plug.data.history import HistoryItem, events_of, parse_event
from persona_plug.data.labels import label_of
from persona_plug.data.rows import read_rows
from persona_plug.errors import DataError
from persona_plug.store.format import FORMATS, HASH, VectorFormat, layout, pack, to_bytes, unpack

if TYPE_CHECKING:
    from persona_plug.models.encoder import HistoryEncoder

LONGEST_ID = 1000  # bytes; an entry of PostgreSQL's indexes is limited to 2.7 kB


@dataclass(frozen=True, slots=True)
class Entry:
    """An item on its way into a store.

    Attributes:
        user: Its owner.
        item: The item with its id.
        row: Its row, where it need not be encoded.
        added: When it was added to the store that it comes from, seconds since 1970; None for now.
    """

    user: str
    item: HistoryItem
    row: Mapping[str, Any] | None = None
    added: float | None = None


def entries(
    path: Path,
    skipped: list[str] | None,
    columns: Mapping[str, str] | None,
    take: Callable[[Mapping[str, Any], str], Entry],
) -> Iterator[Entry]:
    """Yield the items of a file; bad records raise, or go to `skipped`.

    A record without an id gets one from its content and from how often the same content came before: the same again
    when the file is read again, also when it has grown at its end.

    Args:
        path: The file.
        skipped: Takes a line for each bad record; None raises.
        columns: See `rows.read_rows`.
        take: Makes an entry of a record that a store without texts has exported.

    Raises:
        DataError: The file cannot be read or a record is bad.
    """
    seen: Counter[bytes] = Counter()
    for where, record in read_rows(path, columns):
        try:
            if isinstance(record, DataError):
                raise record
            if "vector_format" in record and "output" not in record:
                fresh = [take(record, where)]
            else:
                fresh = [Entry(e.user_id, with_id(e.item, seen, e.user_id)) for e in events_of(record, where)]
            for entry in fresh:
                check_id(f"{where}: user id", entry.user)
                check_id(f"{where}: id", entry.item.id)
        except DataError as exc:
            if skipped is None:
                raise
            skipped.append(str(exc))
        else:
            yield from fresh


def with_id(item: HistoryItem, seen: Counter[bytes], user: str = "") -> HistoryItem:
    """Return the item with an id, made of its content where it has none.

    Args:
        item: The item.
        seen: How often each content came before; of one content the first, second, ... item have ids of their own.
        user: Whose it is.
    """
    if item.id is not None:
        return item
    content = repr((item.input, item.output, item.timestamp))
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:12]
    owned = digest + user.encode("utf-8", "surrogatepass")
    seen[owned] += 1
    return dataclasses.replace(item, id=f"{digest.hex()}-{seen[owned]}")


def exported_row(record: Mapping[str, Any], where: str, encoder: str, kind: VectorFormat, dim: int) -> Entry:
    """Return what a store without texts has exported, as it was stored.

    Raises:
        DataError: The vectors are another encoder's, or the record is damaged.
    """
    if record.get("encoder") != encoder:
        raise DataError(
            f"{where}: vectors of encoder {record.get('encoder')!s:.40}, the store holds those of {encoder}; "
            "without texts they cannot be made anew"
        )
    if record["vector_format"] not in FORMATS:
        raise DataError(f"{where}: field 'vector_format' {record['vector_format']!r:.40} is unknown")
    made = parse_event({**record, "input": "", "output": "-"}, where)
    shape = layout(record["vector_format"], dim)
    try:
        blob = b"".join(base64.b64decode(record[f"{name}_bytes"], validate=True) for name in shape.names or ())
        hashes = base64.b64decode(record["text_hashes"], validate=True)
    except (KeyError, TypeError, ValueError) as exc:
        raise DataError(f"{where}: vectors or hashes are missing or damaged ({exc!s:.60}); export them again") from exc
    if len(blob) != shape.itemsize or len(hashes) != 3 * HASH:
        raise DataError(f"{where}: vectors are not {dim} wide, or hashes are cut; export them again")
    if record["vector_format"] != kind:
        blob = pack(*unpack([blob], record["vector_format"], dim), kind)[0]
    item = dataclasses.replace(made.item, output="")
    row = {"item_id": item.id, "at": item.timestamp, "hashes": hashes, "vectors": blob, "input": None, "output": None}
    return Entry(made.user_id, item, row)


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
