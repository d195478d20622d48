"""E-mails of the Avocado Research Email Collection (LDC2015T03), which the LDC licenses.

Written after what LaMP's authors say of its layout, and tried on made-up mail only: it has never run on the corpus.
"""

from __future__ import annotations

import email
import email.policy
import os
import zipfile
from collections.abc import Collection, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import NamedTuple

from persona_plug.errors import DataError


class Mail(NamedTuple):
    """What the tasks need of an e-mail."""

    subject: str
    body: str


def read_mails(folder: Path, wanted: Collection[str]) -> dict[str, Mail]:
    """Read the wanted e-mails of a folder that holds zip archives of them (`data/text`), or the extracted files.

    Args:
        folder: The folder.
        wanted: File names without folders, which serve as ids.

    Returns:
        What was found, by file name.

    Raises:
        DataError: The folder is missing, or an archive in it is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the Avocado corpus's data/text folder by --avocado")
    return {name: _parse(content) for name, content in _files(folder, frozenset(wanted))}


def _files(folder: Path, wanted: frozenset[str]) -> Iterator[tuple[str, bytes]]:
    from tqdm.auto import tqdm

    places = sorted(p for p in folder.rglob("*") if p.is_file())
    for place in tqdm(places, desc="mail", unit="file", disable=None):
        if place.suffix.lower() != ".zip":
            if place.name in wanted:
                yield place.name, place.read_bytes()
            continue
        try:
            with zipfile.ZipFile(place) as archive:
                for inner in archive.namelist():
                    if (name := os.path.basename(inner)) in wanted:
                        yield name, archive.read(inner)
        except zipfile.BadZipFile as exc:
            raise DataError(f"{place}: a damaged zip archive ({exc}); copy it from the corpus again") from exc


def _parse(content: bytes) -> Mail:
    message = email.message_from_bytes(content, policy=email.policy.default)
    assert isinstance(message, EmailMessage)  # noqa: S101 - what the policy makes, for the type checker
    part = message.get_body(("plain", "html"))
    raw = part.get_payload(decode=True) if part is not None else b""
    text = raw if isinstance(raw, bytes) else b""
    charset = (part.get_content_charset() if part is not None else None) or "utf-8"
    try:
        body = text.decode(charset, "replace")
    except LookupError:  # a charset that nobody knows
        body = text.decode("utf-8", "replace")
    return Mail(" ".join(str(message["subject"] or "").split()), body.strip())
