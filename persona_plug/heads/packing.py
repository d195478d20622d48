"""A user's words as bytes: an item's for a store, a reader's memory for an engine in another process."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from persona_plug.errors import CorruptFileError
from persona_plug.heads.memory import CHAIN, ItemWords, SlotTokens, WordMemory

VERSION = 1
_HEADER = struct.Struct("<BBHHI")  # version, d, tokens, slots, bytes of the JSON part
_PLACES: Mapping[str, str] = {"tokens": "<i4", "items": "<i4", "before": "<i4", "whole": "<i4", "inside": "?",
                              "slots": "?", "fits": "<f4", "starts": "<f4", "finishes": "<f4"}  # fmt: skip


def pack_item(item: ItemWords) -> bytes:
    """Return an item's words as bytes: states as int8 with one scale for each vector, tokens as 32 bits.

    An answer of 20 tokens with three slots takes some 1.5 kB with d = 48.
    """
    extra = {
        "slots": [[s.begin, s.end, s.before, s.after, s.form] for s in item.slots],
        "facts": [list(fact) for fact in item.facts],
    }
    text = json.dumps(extra, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
    vectors = torch.stack([*item.states, item.topic, *(v for s in item.slots for v in (s.first, s.last))])
    size = vectors.shape[1]
    header = _HEADER.pack(VERSION, size, len(item.tokens), len(item.slots), len(text))
    return header + text + np.asarray(item.tokens, dtype="<u4").tobytes() + _pack_vectors(vectors)


def unpack_item(blob: bytes) -> ItemWords:
    """Return the words that `pack_item` made bytes of; vectors come back as fp16, rounded to int8.

    Raises:
        CorruptFileError: The bytes are none of these, or of another version.
    """
    try:
        version, size, tokens, slots, length = _HEADER.unpack_from(blob)
        if version != VERSION:
            raise ValueError(f"version {version}")
        at = _HEADER.size + length
        extra = json.loads(blob[_HEADER.size : at].decode("utf-8", "surrogatepass"))
        ids = np.frombuffer(blob, "<u4", tokens, at).tolist()
        vectors = _unpack_vectors(blob[at + 4 * tokens :], tokens + 1 + 2 * slots, size)
        pairs = vectors[tokens + 1 :].view(slots, 2, size)
        placed = tuple(SlotTokens(*row, *pair) for row, pair in zip(extra["slots"], pairs, strict=True))
        facts = tuple((int(token), str(word)) for token, word in extra["facts"])
        return ItemWords(tuple(ids), vectors[:tokens], vectors[tokens], placed, facts)
    except (struct.error, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise CorruptFileError(f"words of an item cannot be read ({exc}); remember them anew") from exc


def pack_memory(memory: WordMemory, request: Tensor, end: int, strength: float = 1.0) -> bytes:
    """Return what a reader needs besides the head: what one request reads, its tokens, the end token, its strength."""
    fields: dict[str, Any] = {"count": memory.count, "length": memory.length, "end": end, "places": len(memory.tokens)}
    fields |= {
        "strength": strength,
        "d": memory.states.shape[1],
        "request": request.tolist(),
        "nearness": memory.nearness.tolist(),
    }
    text = json.dumps(fields).encode()
    arrays = [getattr(memory, name).numpy().astype(kind).tobytes() for name, kind in _PLACES.items()]
    body = b"".join([struct.pack("<I", len(text)), text, *arrays, _pack_vectors(memory.states)])
    return zlib.compress(body, 1)


def unpack_memory(blob: bytes) -> tuple[WordMemory, Tensor, int, float]:
    """Return (memory, request, end, strength) that `pack_memory` made bytes of.

    Raises:
        CorruptFileError: The bytes are none of these.
    """
    try:
        body = zlib.decompress(blob)
        (length,) = struct.unpack_from("<I", body)
        fields, at = json.loads(body[4 : 4 + length]), 4 + length
        count, arrays = int(fields["places"]), {}
        for name, kind in _PLACES.items():
            shape = (count, CHAIN) if name in ("before", "whole") else (count,)
            values = np.frombuffer(body, kind, int(np.prod(shape)), at)
            at += values.nbytes
            arrays[name] = torch.from_numpy(values.astype("int64" if kind == "<i4" else values.dtype).reshape(shape))
        memory = WordMemory(
            states=_unpack_vectors(body[at:], count, int(fields["d"])).float(),
            nearness=torch.tensor(fields["nearness"], dtype=torch.float),
            count=int(fields["count"]),
            length=float(fields["length"]),
            **arrays,
        )
        request = torch.tensor(fields["request"], dtype=torch.long)
        return memory, request, int(fields["end"]), float(fields["strength"])
    except (zlib.error, struct.error, ValueError, KeyError, TypeError, RuntimeError) as exc:
        raise CorruptFileError(f"a memory of words cannot be read ({exc}); use one version on both sides") from exc


def _pack_vectors(vectors: Tensor) -> bytes:
    """Return vectors (n, d) as n scales in fp16 and n x d int8."""
    rows = vectors.float().numpy()
    scales = np.maximum(np.abs(rows).max(1, initial=0), 1e-4).astype("<f2")
    return bytes(
        scales.tobytes() + np.rint(rows / scales[:, None].astype("f4") * 127).clip(-127, 127).astype("i1").tobytes()
    )


def _unpack_vectors(blob: bytes, count: int, size: int) -> Tensor:
    scales = np.frombuffer(blob, "<f2", count).astype("f4")
    rows = np.frombuffer(blob, "i1", count * size, 2 * count).reshape(count, size)
    return torch.from_numpy(rows * scales[:, None] / 127).half()
