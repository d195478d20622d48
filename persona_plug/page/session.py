"""What the page does, without a page: users, their items and manner, answers side by side, the plug's report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from persona_plug.data.history import Event, HistoryItem, by_user, parse_event, read_events
from persona_plug.errors import ConfigError, CorruptFileError, DataError
from persona_plug.fit.report import FitReport
from persona_plug.page.answers import Comparison
from persona_plug.persistence import REPORT_NAME
from persona_plug.store.style import read_style

if TYPE_CHECKING:
    from persona_plug.data.style import Style
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import ForgetResult, HistoryStore, UserRow

SELF = "you"  # the user whose messages are pasted for a try
EXAMPLES = 3  # requests that are offered
ARROW = " -> "  # between input and output in a pasted line, as the command line prints items


class Session:
    """A plug and a store, and what a page asks of them.

    Attributes:
        comparison: Answers requests.
    """

    def __init__(
        self, plug: PersonaPlug, store: HistoryStore, folder: Path | None = None, held_out: Sequence[str] = ()
    ) -> None:
        """Join a plug and a store.

        Args:
            plug: The plug.
            store: Its store, opened with `keep_text=True`.
            folder: The plug's folder, where its report lies.
            held_out: Users that the plug was not trained on: the page begins with one of these.

        Raises:
            ConfigError: The store keeps no text.
        """
        if not store.keep_text:
            raise ConfigError("this store keeps vectors without text, and items cannot be shown: use another store")
        self.plug, self.store, self.folder, self.held_out = plug, store, folder, held_out
        self.comparison = Comparison(plug, store)

    def users(self) -> list[UserRow]:
        """Return the users, by id."""
        return sorted(self.store.users(), key=lambda row: row.user_id)

    def first(self) -> str | None:
        """Return the user that the page begins with: a held-out one, or else the one with the most items."""
        rows = [row for row in self.store.users() if row.items]
        known = [row for row in rows if row.user_id in self.held_out] or rows
        return min(known, key=lambda row: (-row.items, row.user_id)).user_id if known else None

    def examples(self, user: str | None) -> list[str]:
        """Return requests to try, each of another user's newest items; this user has not answered them."""
        own = {item.input.strip() for item in self.items(user)} if user else set()
        found: dict[str, None] = {}
        for row in self.users():
            if row.user_id == user or len(found) == EXAMPLES:
                continue
            asked = [item.input.strip() for item in reversed(self.store.read(row.user_id, EXAMPLES).texts or ())]
            found |= dict.fromkeys([text for text in asked if text and text not in own and text not in found][:1])
        return list(found)

    def style(self, user: str) -> Style | None:
        """Return the user's manner beside that of other users; None without items."""
        return read_style(self.store, user) if self.items(user) else None

    def take(self, pasted: str) -> int:
        """Make pasted messages the items of the user `SELF`, in place of earlier ones; return how many they are.

        Raises:
            DataError: There is no message.
        """
        events = [parse_event({"user_id": SELF, "input": "", "output": text}, "message") for text in messages(pasted)]
        if not events:
            raise DataError("no message is pasted: paste some of your own, with an empty line between two")
        self.store.forget(SELF)
        with self.comparison.alone:
            return self.store.append(SELF, [event.item for event in events])

    def items(self, user: str) -> list[HistoryItem]:
        """Return a user's items, newest first; an unknown user has none."""
        return list(reversed(self.store.read(named(user)).texts or ()))

    def item(self, user: str, ident: str | None) -> HistoryItem:
        """Return one item of a user.

        Raises:
            DataError: There is none with this id.
        """
        for item in self.items(user):
            if item.id == ident:
                return item
        raise DataError("no item is picked: choose one from the list first")

    def add(self, user: str, pasted: str = "", file: Path | None = None) -> dict[str, int]:
        """Read pasted lines and a file, then store them; a bad record stores nothing.

        Args:
            user: Whose the records are that name nobody.
            pasted: Lines: JSON with `input` and `output`, or `input -> output`, or what the user wrote.
            file: JSONL or Parquet; its records may name their users.

        Returns:
            New items of each user; items that were there already do not count.

        Raises:
            DataError: There is nothing to add, or a record is bad: file, line and field are named.
        """
        events = parse_pasted(named(user), pasted)
        if file is not None:
            try:
                events += read_events(file, owner=named(user)).events
            except DataError as exc:
                raise DataError(str(exc).replace(str(file), file.name)) from exc
        if not events:
            raise DataError("nothing to add: paste lines or choose a file")
        with self.comparison.alone:
            return {owner: self.store.append(owner, items) for owner, items in by_user(events).items()}

    def edit(self, user: str, ident: str | None, input: str, output: str) -> None:
        """Replace an item by a new one of the same time; the old one goes once the new one is stored.

        Raises:
            DataError: There is no such item, or the new text is none.
        """
        item = self.item(user, ident)
        record = {"user_id": user, "input": input.strip(), "output": output.strip(), "timestamp": item.timestamp}
        new = parse_event(record, "edited item").item
        if (new.input, new.output) == (item.input, item.output):
            return
        with self.comparison.alone:
            self.store.append(user, [new])
        self.delete(user, ident)

    def delete(self, user: str, ident: str | None) -> None:
        """Delete one item.

        Raises:
            DataError: There is no such item.
        """
        if ident is None or not self.store.delete(user, ident):
            raise DataError("no item is picked, or it is gone: choose one from the list first")

    def forget(self, user: str) -> tuple[ForgetResult, int]:
        """Delete everything about a user; return what went, and how many items are left of them (none)."""
        gone = self.store.forget(user)
        return gone, len(self.store.read(user).ids)

    def report(self) -> tuple[FitReport, list[Path]] | None:
        """Return the plug's report and its plots, or None where the folder holds none.

        Raises:
            CorruptFileError: The report cannot be read.
        """
        path = self.folder / REPORT_NAME if self.folder else None
        if path is None or not path.is_file():
            return None
        try:
            report = FitReport.from_json(path.read_text(encoding="utf-8"))
        except ValueError as exc:
            raise CorruptFileError(f"{path.name} is no report ({exc!s:.80}); fit the plug again") from exc
        plots = [path.with_name(name) for name in ("loss.png", "lift.png")]
        return report, [plot for plot in plots if plot.is_file()]


def named(user: str | None) -> str:
    """Return a user's id without the space around it.

    Raises:
        DataError: There is none.
    """
    if user is None or not user.strip():
        raise DataError("no user is chosen: choose one, or type a new id")
    return user.strip()


def messages(text: str) -> list[str]:
    """Return pasted messages: parted by empty lines, or one a line where there are none."""
    parts = re.split(r"\n\s*\n", text.strip())
    parts = parts if len(parts) > 1 else text.splitlines()
    return [part.strip() for part in parts if part.strip()]


def parse_pasted(user: str, text: str) -> list[Event]:
    """Read pasted lines: JSON objects, `input -> output`, or plain text, which is an output.

    Raises:
        DataError: A line is bad; the message names line and field.
    """
    events = []
    for number, line in enumerate(text.splitlines(), 1):
        where, line = f"pasted text, line {number}", line.strip()
        if line.startswith("{"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise DataError(f"{where}: not JSON ({exc!s:.60}); one object a line, with input and output") from exc
            events.append(parse_event({"user_id": user, "input": "", **record}, where))
        elif line:
            input, arrow, output = f"{line} ".partition(ARROW)
            record = {"input": input.strip(), "output": output.strip()} if arrow else {"input": "", "output": line}
            events.append(parse_event({"user_id": user, **record}, where))
    return events
