"""Keyed hashes that stand for ids in indexes, and sealed texts that only the holder of an id can read."""

from __future__ import annotations

import hashlib
import hmac

PARTS = 32  # of the items' table on PostgreSQL, each of which can be rewritten without the others


def mark_of(secret: bytes, *names: str) -> bytes:
    """Return what stands for an id where the database moves rows about: without the store's secret it tells nothing."""
    text = "\0".join(names).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, key=secret, digest_size=16).digest()


def seal(ident: str, text: bytes) -> bytes:
    """Return a text that can be read with an id alone, which has 128 random bits and is used for one text."""
    stream = hashlib.shake_256(b"stream " + ident.encode()).digest(len(text))
    body = bytes(a ^ b for a, b in zip(text, stream, strict=True))
    return hashlib.blake2b(body, key=_tag_key(ident), digest_size=16).digest() + body


def unseal(ident: str, sealed: bytes) -> bytes | None:
    """Return what `seal` was given, or None where the id is another one."""
    tag, body = sealed[:16], sealed[16:]
    if not hmac.compare_digest(tag, hashlib.blake2b(body, key=_tag_key(ident), digest_size=16).digest()):
        return None
    stream = hashlib.shake_256(b"stream " + ident.encode()).digest(len(body))
    return bytes(a ^ b for a, b in zip(body, stream, strict=True))


def _tag_key(ident: str) -> bytes:
    return hashlib.sha256(b"tag " + ident.encode()).digest()
