"""`persona-plug users`: histories in a store."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from persona_plug.cli.common import (
    RECORDS,
    Columns,
    Device,
    Encoder,
    Force,
    Json,
    Tenant,
    Url,
    columns_of,
    new_file,
    one_line_errors,
    quiet,
    say,
    say_json,
)

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

users_app: typer.Typer = typer.Typer(
    help="Users' histories in a store: add, look at, export, delete.", no_args_is_help=True
)

READABLE = ("user_id", "id", "input", "output", "timestamp", "last_update_of_user")  # of an exported record

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
User = Annotated[str, typer.Argument(metavar="ID", help="The user's id.")]
Users = Annotated[list[str], typer.Argument(metavar="ID...", help="Ids of users.")]


@users_app.command("add")
@one_line_errors
def add(
    file: Annotated[Path, typer.Argument(help=f"{RECORDS} events.")],
    store: Url,
    columns: Columns = None,
    encoder: Encoder = "minilm-l6",
    keep_text: Annotated[
        bool | None, typer.Option(help="Keep texts beside vectors; default as the store was made, at first not.")
    ] = None,
    vectors: Annotated[str | None, typer.Option(help="A new store's vectors: fp16 (default) or int8.")] = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip bad records and count them.")] = False,
    tenant: Tenant = "local",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Add a file's events, making the store if there is none; running it again goes on where it broke off."""
    from persona_plug.models.encoder import HistoryEncoder
    from persona_plug.store.history_store import HistoryStore

    quiet()
    names = columns_of(columns)
    made = HistoryEncoder(encoder, device=device)
    kind: Any = vectors  # the store checks it
    with HistoryStore(store, encoder=made, keep_text=keep_text, vectors=kind) as opened:
        result = opened.load_file(file, skip_bad, rename=lambda user: _name(user, tenant), columns=names)
    row = {"new": result.new, "known": result.known, "skipped": len(result.skipped), "truncated": made.stats.truncated}
    say(json.dumps(row) if as_json else ", ".join(f"{k}: {v}" for k, v in row.items()))
    for line in result.skipped[:5]:
        sys.stderr.write(f"skipped: {line}\n")


@users_app.command("remember")
@one_line_errors
def remember(
    plug: Annotated[Path, typer.Argument(help="Folder of a plug with a words memory.")],
    store: Url,
    prefix: Annotated[str, typer.Option(help="Only users whose ids begin so.")] = "",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Have the plug's LLM read the texts that it has not read yet: one pass an event, once for all gateways.

    Run it after `users add`, and again for another plug, LLM or chat template. It goes on where it broke off.
    """
    from persona_plug.errors import ConfigError
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

    quiet()
    made = PersonaPlug.from_pretrained(plug, device=device)
    if made.recollection is None:
        raise ConfigError(f"{plug} has no words memory; fit it with --words")
    start = time.monotonic()
    with HistoryStore(store, encoder=made.encoder) as opened:
        if not opened.keep_text:
            raise ConfigError(f"{opened.name} keeps no texts to read; make a store with --keep-text")
        read, known = _remember(made, opened, prefix)
    _say_work({"read": read, "known": known}, read, start, as_json)


@users_app.command("re-encode")
@one_line_errors
def re_encode(
    store: Url,
    into: Annotated[str, typer.Option(help="URL of the store that is made, or gone on with; it keeps texts, too.")],
    encoder: Annotated[str | None, typer.Option(help="The new sentence encoder: short name, folder or Hub id.")] = None,
    plug: Annotated[
        Path | None, typer.Option(help="Folder of a plug: its encoder, and its LLM reads the texts, as in remember.")
    ] = None,
    prefix: Annotated[str, typer.Option(help="Only users whose ids begin so.")] = "",
    vectors: Annotated[str | None, typer.Option(help="A new store's vectors: fp16 (default) or int8.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make another store from a store's texts, for another encoder or plug; the first store is only read.

    It goes on where it broke off. Run it again before you change over: it takes what has come meanwhile. What is
    deleted meanwhile is to be deleted in both.
    """
    from persona_plug.errors import ConfigError
    from persona_plug.models.encoder import HistoryEncoder
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

    quiet()
    if (encoder is None) == (plug is None):
        raise ConfigError("give --encoder or --plug: one of them says what the vectors are made by")
    with HistoryStore(store) as source:
        if not source.keep_text:
            raise ConfigError(f"{source.name} keeps no texts to make vectors from; add its events to a new store")
        made = None if plug is None else PersonaPlug.from_pretrained(plug, device=device)
        reader = HistoryEncoder(encoder or "", device=device) if made is None else made.encoder
        kind: Any = vectors  # the store checks it
        start = time.monotonic()
        with HistoryStore(into, encoder=reader, keep_text=True, vectors=kind) as target:
            result = target.load_store(source, prefix, progress=True)
            row = {"new": result.new, "known": result.known}
            _say_work(row, result.new, start, as_json)
            if made is not None and made.recollection is not None:
                start = time.monotonic()
                read, known = _remember(made, target, prefix)
                _say_work({"read": read, "known": known}, read, start, as_json)
            gone = {u.user_id for u in target.users(prefix)} - {u.user_id for u in source.users(prefix)}
            if gone:
                what = f"{target.name} holds {len(gone)} users that {source.name} does not hold"
                sys.stderr.write(f"note: {what}; `users forget` those that were forgotten there\n")


def _remember(plug: PersonaPlug, store: HistoryStore, prefix: str) -> tuple[int, int]:
    """Have a plug's LLM read the texts that it has not read; return how many it read, and how many it knew."""
    from tqdm.auto import tqdm

    read = known = 0
    if plug.recollection is None:
        return read, known
    with tqdm(desc="remember", unit="event") as bar:
        for user in store.users(prefix):
            words, fresh = plug.recollection.restore(store, store.read(user.user_id, plug.config.max_words))
            read, known = read + fresh, known + len(words) - fresh
            bar.update(len(words))
    return read, known


def _say_work(row: dict[str, Any], count: int, start: float, as_json: bool) -> None:
    """Say what was done, and how many events per second since `start`."""
    row = {**row, "events_per_second": round(count / max(time.monotonic() - start, 1e-9), 1)}
    say(json.dumps(row) if as_json else ", ".join(f"{k.replace('_', ' ')}: {v}" for k, v in row.items()))


@users_app.command("list")
@one_line_errors
def list_users(
    store: Url,
    prefix: Annotated[str, typer.Option(help="Only ids that begin so.")] = "",
    as_json: Json = False,
) -> None:
    """Show who is in the store, with the number of items and the time of the last change."""
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        rows = opened.users(prefix)
        if as_json:
            say(json.dumps([dataclasses.asdict(row) for row in rows]))
            return
        for row in rows:
            say(f"{_plain(row.user_id)}  {row.items} items  {_moment(row.last_update)}")


@users_app.command("show")
@one_line_errors
def show(
    user: User,
    store: Url,
    limit: Annotated[int, typer.Option(min=1, help="Newest items at most.")] = 20,
    style: Annotated[
        bool, typer.Option("--style", help="Show the user's manner instead: what they do and others do not.")
    ] = False,
    tenant: Tenant = "local",
    as_json: Json = False,
) -> None:
    """Show a user's newest items, with texts if the store keeps them."""
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        if style:
            from persona_plug.store.style import read_style

            card = read_style(opened, _name(user, tenant), _name("", tenant))
            say_json(dataclasses.asdict(card)) if as_json else say(f"{_plain(user)}\n{_plain_lines(str(card))}")
            return
        history = opened.read(_name(user, tenant), limit)
        if not history.total:
            raise _unknown(opened.name)
    items = [dataclasses.asdict(item) for item in history.items]
    if history.texts is None:
        items = [{"id": item["id"], "timestamp": item["timestamp"]} for item in items]
    if as_json:
        say(json.dumps({"user_id": user, "items": history.total, "newest": items}))
        return
    say(f"{_plain(user)}: {history.total} items" + ("" if history.texts else ", kept without their texts"))
    for item in items:
        texts = f"  {_plain(item['input']):.60} -> {_plain(item['output']):.60}" if "input" in item else ""
        when = "" if item["timestamp"] is None else f"  {_moment(item['timestamp'])}"
        say(f"{_plain(str(item['id']))}{when}{texts}")


@users_app.command("export")
@one_line_errors
def export(
    user: User,
    store: Url,
    out: Annotated[
        Path | None, typer.Option(help="JSONL to write, for its owner alone; default standard output.")
    ] = None,
    vectors: Annotated[bool, typer.Option("--vectors", help="Write vectors and hashes of the texts, too.")] = False,
    force: Force = False,
    tenant: Tenant = "local",
) -> None:
    """Write what is held about a user, one JSON record an item, which `users add` can read again.

    --vectors adds what only machines read: vectors and hashes of the texts. Without texts they are always there.
    """
    from persona_plug.data.rows import json_line
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        name = _name(user, tenant)
        if not opened.read(name, 1).total:
            raise _unknown(opened.name)
        shown = None if vectors or not opened.keep_text else READABLE
        rows = ({**row, "user_id": user} for row in opened.export(name))
        records = ({k: row[k] for k in shown if k in row} if shown else row for row in rows)
        if out is None:
            for record in records:
                say_json(json_line(record))
            return
        path = new_file(out, force)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.writelines(json_line(record) + "\n" for record in records)
    say(f"written to {path}")


@users_app.command("delete")
@one_line_errors
def delete(
    user: User,
    item: Annotated[str, typer.Argument(metavar="ITEM", help="The item's id.")],
    store: Url,
    yes: Yes = False,
    tenant: Tenant = "local",
) -> None:
    """Delete one item of a user for good."""
    from persona_plug.errors import DataError
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        if not yes:
            typer.confirm(f"delete item {_plain(item)} of {_plain(user)} for good?", abort=True, err=True)
        if not opened.delete(_name(user, tenant), item):
            raise DataError(f"{opened.name} holds no such item of this user; `persona-plug users show` lists them")
    say("deleted")


@users_app.command("forget")
@one_line_errors
def forget(
    users: Users,
    store: Url,
    yes: Yes = False,
    tenant: Tenant = "local",
    as_json: Json = False,
) -> None:
    """Delete users for good: ids, texts and vectors, in the store's files and the encoder's cache."""
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        names = [_name(user, tenant) for user in users]
        if not yes:
            count = sum(opened.read(name, 1).total for name in names)
            typer.confirm(f"delete {count} items of {_plain(', '.join(users))} for good?", abort=True, err=True)
        result = opened.forget(*names)
    row = dataclasses.asdict(result)
    say(json.dumps(row) if as_json else f"deleted {result.items} items and {result.cached_vectors} cached vectors")


@users_app.command("expire")
@one_line_errors
def expire(
    store: Url,
    keep_days: Annotated[float, typer.Option(min=0, help="Items that were added earlier go.")],
    as_json: Json = False,
) -> None:
    """Delete the items of all users that were added too long ago."""
    from persona_plug.store.history_store import HistoryStore

    with HistoryStore(store) as opened:
        gone = opened.expire(keep_days)
    say(json.dumps({"items": gone}) if as_json else f"deleted {gone} items")


def _name(user: str, tenant: str) -> str:
    """Return what a user is called in the store."""
    from persona_plug.serving.auth import store_key

    return store_key(tenant, user)


def _unknown(store: str) -> Exception:
    from persona_plug.errors import DataError

    return DataError(f"{store} holds no such user; `persona-plug users list` shows who is there")


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # a number that is no date on this machine
        return str(seconds)


def _plain_lines(text: str) -> str:
    return "\n".join(map(_plain, text.splitlines()))


def _plain(text: str) -> str:
    """Return a text on one line: ids and texts may hold anything, a terminal's control characters included."""
    return "".join(c if c.isprintable() else " " for c in text)
