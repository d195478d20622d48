"""What a request's body may hold, found before it is parsed: parsing builds an object for each value."""

from __future__ import annotations

import asyncio
import re

from persona_plug.serving.errors import ApiError

MAX_VALUES = 5000  # values of all lists and objects together
MAX_DEPTH = 32
SMALL = 16_384  # bytes that are looked at at once

_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


async def check_body(body: bytes) -> None:
    """Refuse a body with too many values, or nested too deep.

    Raises:
        ApiError: 400.
    """
    if len(body) <= SMALL:
        _check(body)
    else:
        await asyncio.to_thread(_check, body)


def _check(body: bytes) -> None:
    if b"\0" in body[:4] or body[:2] in (b"\xff\xfe", b"\xfe\xff"):  # what Python would read as UTF-16 or UTF-32
        raise ApiError(400, "the body is not UTF-8; send JSON in UTF-8", "invalid_json")
    bare = _TEXT.sub(b"", body)
    values = bare.count(b",") + bare.count(b"[") + bare.count(b"{")
    if values > MAX_VALUES:
        raise ApiError(400, f"the body holds more than {MAX_VALUES} values; send fewer at a time", "body_too_complex")
    depth = 0
    for bracket in _BRACKETS.findall(bare):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested deeper than {MAX_DEPTH}; send it flatter", "body_too_complex")
