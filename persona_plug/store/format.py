"""What a store holds of an item and what it answers: packed vectors, hashes of texts, and plain results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from persona_plug.data.history import HistoryItem
from persona_plug.errors import CorruptFileError

VectorFormat = Literal["fp16", "int8"]
FORMATS: tuple[VectorFormat, ...] = ("fp16", "int8")
HASH = 8  # bytes kept of a text's hash


@dataclass(frozen=True, slots=True)
class StoredHistory:
    """What a store holds of a user, oldest first; see `HistoryStore.read` for items without a time.

    Attributes:
        user: The user's id.
        ids: Ids of the n items.
        inputs: (n, d) float32, unit vectors of the items' inputs, zero where there is none.
        outputs: (n, d) float32, the same for the outputs.
        raw_texts: (input, output) of each item as stored bytes, or None where the store keeps no text.
        timestamps: Seconds since 1970, None where an item has no time.
        output_hashes: The first 8 bytes of the SHA-256 of each output, spelled as `labels.label_of` says.
        total: Items held of the user, those beyond the limit of the reading included.
        moment: How many deletions the store had seen: what is stored of an answer to this carries it.
    """

    user: str
    ids: list[str]
    inputs: np.ndarray
    outputs: np.ndarray
    raw_texts: list[tuple[bytes, bytes]] | None
    timestamps: list[float | None]
    output_hashes: list[bytes]
    total: int
    moment: int = 0

    @property
    def texts(self) -> list[HistoryItem] | None:
        """The items with their texts, or None where the store keeps no text."""
        return None if self.raw_texts is None else self.items

    @property
    def items(self) -> list[HistoryItem]:
        """The items; without kept texts these are empty, and ids and timestamps alone are there."""
        texts = [(b"", b"")] * len(self.ids) if self.raw_texts is None else self.raw_texts
        rows = zip(texts, self.timestamps, self.ids, strict=True)
        return [HistoryItem(to_text(given), to_text(answer), at, name) for (given, answer), at, name in rows]


@dataclass(frozen=True, slots=True)
class UserRow:
    """A user in the store: how many items there are, and when that changed last (seconds since 1970)."""

    user_id: str
    items: int
    last_update: float


@dataclass(frozen=True, slots=True)
class ImportResult:
    """What became of a file's records.

    Attributes:
        new: Items that were added.
        known: Records that the store had already.
        skipped: One line for each bad record that was left out.
    """

    new: int
    known: int
    skipped: list[str]


@dataclass(frozen=True, slots=True)
class ForgetResult:
    """What was deleted: a user's items, and vectors of their texts in the encoder's cache."""

    items: int
    cached_vectors: int


def layout(kind: VectorFormat, dim: int) -> np.dtype[Any]:
    """Return the bytes of an item's two vectors: fp16 numbers, or int8 ones with one scale a vector."""
    if kind == "fp16":
        return np.dtype([("input", "<f2", (dim,)), ("output", "<f2", (dim,))])
    return np.dtype(
        [("input_scale", "<f4"), ("input", "i1", (dim,)), ("output_scale", "<f4"), ("output", "i1", (dim,))]
    )


def pack(inputs: np.ndarray, outputs: np.ndarray, kind: VectorFormat) -> list[bytes]:
    """Return n items' vectors (n, d) each as the bytes of `layout`."""
    rows = np.zeros(len(inputs), dtype=layout(kind, inputs.shape[1]))
    for name, vectors in (("input", inputs), ("output", outputs)):
        if kind == "int8":
            scale = np.abs(vectors).max(1) / 127
            rows[f"{name}_scale"] = scale
            vectors = np.rint(vectors / np.where(scale > 0, scale, 1)[:, None])
        rows[name] = vectors
    return [row.tobytes() for row in rows]


def unpack(blobs: Sequence[bytes], kind: VectorFormat, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and outputs (n, d), float32.

    Raises:
        CorruptFileError: The bytes are not those of vectors of this width.
    """
    import torch  # converts fp16 seven times as fast as numpy

    shape, joined = layout(kind, dim), b"".join(blobs)
    if len(joined) != shape.itemsize * len(blobs):
        raise CorruptFileError(f"an item's {kind} vectors are not {dim} wide: the store is damaged, restore it")
    rows = np.frombuffer(joined, dtype=shape)
    if kind == "fp16":
        both = torch.from_numpy(rows.view("<f2").reshape(-1, 2, dim).copy()).float().numpy()
        return both[:, 0], both[:, 1]
    inputs, outputs = rows["input"].astype(np.float32), rows["output"].astype(np.float32)
    inputs *= rows["input_scale"][:, None]
    outputs *= rows["output_scale"][:, None]
    return inputs, outputs


def to_bytes(text: str) -> bytes:
    """Return a text as it is stored: bytes, since PostgreSQL's texts hold no NUL character."""
    return text.encode("utf-8", "surrogatepass")


def to_text(stored: bytes) -> str:
    """Return the text of stored bytes."""
    return stored.decode("utf-8", "surrogatepass")
