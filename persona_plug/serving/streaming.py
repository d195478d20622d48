"""Answers in pieces, to clients that may stop reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.types import Send

STALL = 30.0  # seconds in which a client must take a piece


async def send_pieces(send: Send, pieces: AsyncIterator[bytes], media_type: str, stall: float = STALL) -> None:
    """Send pieces as they come.

    Args:
        send: Where to.
        pieces: The body.
        media_type: Of the body.
        stall: Seconds in which the client must take a piece.

    Raises:
        TimeoutError: The client takes none; what is held for it can go.
    """
    piece: bytes | None = await anext(pieces, b"")  # before the status is sent: reading may fail
    headers = [(b"content-type", media_type.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while piece is not None:
        async with asyncio.timeout(stall):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        piece = await anext(pieces, None)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def send_json(send: Send, content: bytes) -> None:
    """Send a JSON body."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": content})
