"""Users' histories through the gateway: adding, listing, exporting, deleting."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from persona_plug.data.history import HistoryItem
from persona_plug.data.rows import json_line
from persona_plug.serving.errors import ApiError
from persona_plug.serving.gateway import Gateway
from persona_plug.store.format import StoredHistory
from persona_plug.store.history_store import Forgotten, HistoryFull

PAGE = 25  # events in memory at a time for one listing or export
TOGETHER = 8  # events that are encoded before others get their turn


async def add(gateway: Gateway, key: str, items: Sequence[Mapping[str, Any]], moment: int | None = None) -> int:
    """Append events to a user's history, and return how many are new.

    An event without an id gets one from its content: sent again, it is known. Encoding goes on in small parts, so that
    it ends when the client goes away.

    Args:
        gateway: The gateway.
        key: The user's name in the store.
        items: The events.
        moment: The store's when the request was begun; default now.

    Raises:
        ApiError: An event is too long, the user has too many, or was forgotten meanwhile.
        DataError: An event is malformed.
    """
    store, limits, threads = gateway.backend.store, gateway.limits, gateway.threads
    _check_length(gateway, items)
    if moment is None:
        moment = await threads.run("read", store.moment)
    try:
        missing = await threads.run("read", store.missing, key, items, limits.events)
        made: list[Any] = []
        for start in range(0, len(missing.items), TOGETHER):
            made += await threads.run("encode", store.encode, missing.items[start : start + TOGETHER])
        added = int(await threads.run("write", store.insert, key, made, moment, limits.events))
    except HistoryFull as exc:
        raise ApiError(409, str(exc), "history_full") from exc
    except Forgotten as exc:
        raise ApiError(409, str(exc), "deleted_meanwhile") from exc
    gateway.metrics.events.labels("added").inc(added)
    return added


def _check_length(gateway: Gateway, items: Sequence[Mapping[str, Any]]) -> None:
    longest = gateway.limits.event_characters
    if any(len(item.get("input", "")) + len(item["output"]) > longest for item in items):
        raise ApiError(400, f"an event has more than {longest} characters; send a shorter one", "event_too_long")


async def accept(gateway: Gateway, key: str, ident: str) -> int:
    """Add an answer that the user took to their history, and return how many events are new: one, or none if known.

    Raises:
        ApiError: There is no such answer to this user, or the user was forgotten after it was begun.
    """
    store, seconds = gateway.backend.store, gateway.limits.remember_seconds
    found = await gateway.threads.run("read", store.answer, key, ident, seconds)
    if found is None:
        probe = await gateway.threads.run("read", store.missing, key, [HistoryItem("", "-", None, ident)])
        if not probe.items:  # accepted before
            return 0
        message = f"no such completion of this user; one is remembered for {seconds:g} s"
        raise ApiError(404, message, "completion_not_found", "accept")
    item, moment = found
    event = {"input": item.input, "output": item.output, "id": ident, "timestamp": time.time()}
    return await add(gateway, key, [event], moment)


async def replace(gateway: Gateway, key: str, ident: str, item: Mapping[str, Any]) -> None:
    """Put a corrected event in the place of an event.

    Raises:
        ApiError: There is no such event, or the new one cannot be stored.
    """
    _check_length(gateway, [item])
    new = HistoryItem.of({**item, "id": ident})
    if not await gateway.threads.run("encode", gateway.backend.store.replace, key, new):
        raise ApiError(404, "this user has no such event", "event_not_found")


async def delete(gateway: Gateway, key: str, ident: str) -> bool:
    """Delete one event of a user, and return whether it was there."""
    gone = bool(await gateway.threads.run("erase", gateway.backend.store.delete, key, ident))
    gateway.metrics.events.labels("deleted").inc(int(gone))
    return gone


async def forget(gateway: Gateway, key: str) -> int:
    """Forget a user with all that could still be accepted, and return how many events there were."""
    gone = await gateway.threads.run("erase", gateway.backend.store.forget, key)
    gateway.metrics.events.labels("deleted").inc(gone.items)
    return int(gone.items)


async def listed(gateway: Gateway, key: str, limit: int) -> AsyncIterator[bytes]:
    """Give the JSON list of a user's newest events, oldest first, read and written in pages."""
    pages = gateway.backend.store.pages(key, limit, PAGE)
    total, first = 0, True
    while (page := await gateway.threads.run("read", _next_page, pages)) is not None:
        total, text = page
        yield (b'{"object":"list","data":[' if first else b"," if text else b"") + text
        first = False
    yield b'],"total":' + str(total).encode() + b"}"


async def exported(gateway: Gateway, key: str, user: str) -> AsyncIterator[bytes]:
    """Give everything that is held about a user, as JSON lines, read and written in pages."""
    records = gateway.backend.store.export(key, PAGE)

    def page() -> bytes:
        rows = [row for _, row in zip(range(PAGE), records, strict=False)]
        return "".join(json_line({**row, "user_id": user}) + "\n" for row in rows).encode()

    while text := await gateway.threads.run("read", page):
        yield text


def _next_page(pages: Iterator[StoredHistory]) -> tuple[int, bytes] | None:
    held = next(pages, None)
    if held is None:
        return None
    texts, rows = held.texts, []
    for at, (ident, moment) in enumerate(zip(held.ids, held.timestamps, strict=True)):
        known = {} if texts is None else {"input": texts[at].input, "output": texts[at].output}
        rows.append(json.dumps({"object": "user.event", "id": ident, "timestamp": moment, **known}))
    return held.total, ",".join(rows).encode()
