"""Fetch a large file over HTTP so that a broken connection costs nothing that has arrived."""

from __future__ import annotations

import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

from persona_plug.errors import DataError

TIMEOUT = 30.0  # seconds without a byte
TRIES = 3  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the next try, doubled each time
CHUNK = 1 << 18


class NotThere(DataError):
    """The server has no such file."""


class _Broken(Exception):
    """The connection failed or ended early; another try may help."""


def fetch(url: str, part: Path) -> None:
    """Fetch `url` into the file `part`, going on where an earlier fetch of it broke off.

    What `part` already holds is not asked for again, unless the server's file is newer or shorter. A progress bar is
    shown on a terminal.

    Raises:
        NotThere: The server says so, or answers with a web page, as some do for any address.
        DataError: The server cannot be reached, refuses, or keeps sending less than it announces.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url}: not an http or https address; correct --base")
    idle, most = 0, _size(part)
    while True:
        try:
            _go_on(url, part)
            return
        except _Broken as exc:
            idle = 0 if _size(part) > most else idle + 1
            most = max(most, _size(part))
            if idle == TRIES:
                kept = f"; {_size(part):,} bytes are kept for the next run" if _size(part) else ""
                raise DataError(
                    f"{url}: {exc}{kept}; check the network, or name a mirror or a local copy by --base"
                ) from exc
            time.sleep(PAUSE * 2**idle)


def _go_on(url: str, part: Path) -> None:
    """Ask for what is missing and append it; `_Broken` unless the file is then complete."""
    have = _size(part)
    headers = {"User-Agent": "persona-plug", "Accept-Encoding": "identity"}
    if have:
        since = formatdate(part.stat().st_mtime, usegmt=True)  # a file changed since then must not be joined to
        headers |= {"Range": f"bytes={have}-", "If-Unmodified-Since": since}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - fetch has looked at the scheme
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)  # noqa: S310
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code == 416 and (exc.headers.get("Content-Range") or "").endswith(f"/{have}"):
            return  # the earlier fetch had it all
        if exc.code in (412, 416):
            part.unlink(missing_ok=True)
            raise _Broken("the server's file has changed") from exc
        if exc.code in (404, 410):
            raise NotThere(f"{url}: no such file on the server ({exc.code}); check --base") from exc
        if exc.code == 429 or exc.code >= 500:
            raise _Broken(f"the server answers {exc.code} {exc.reason}") from exc
        raise DataError(f"{url}: the server refuses it ({exc.code} {exc.reason}); name a mirror by --base") from exc
    except (OSError, http.client.HTTPException) as exc:
        raise _Broken(f"cannot be reached ({getattr(exc, 'reason', None) or exc})") from exc
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise NotThere(f"{url}: no such file on the server, it answers with a web page; check --base")
        total = _total(answer, have)
        if answer.status != 206:  # the server cannot go on in the middle
            have = 0
        _append(answer, part, have, total)
    if total is not None and _size(part) != total:
        raise _Broken(f"{_size(part):,} of {total:,} bytes arrived")


def _append(answer: Any, part: Path, have: int, total: int | None) -> None:  # noqa: ANN401
    from tqdm.auto import tqdm

    name = part.name.removesuffix(".part")
    with (
        part.open("ab" if have else "wb") as file,
        tqdm(total=total, initial=have, desc=name, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for chunk in _chunks(answer):
            file.write(chunk)
            bar.update(len(chunk))


def _chunks(answer: Any) -> Iterator[bytes]:  # noqa: ANN401
    """Yield what arrives; only reading from the network is another try's matter, not writing to the disk."""
    while True:
        try:
            chunk = answer.read1(CHUNK)  # what is there, so that a break loses nothing
        except (OSError, http.client.HTTPException) as exc:
            raise _Broken(f"the connection broke ({exc})") from exc
        if not chunk:
            return
        yield chunk


def _total(answer: Any, have: int) -> int | None:  # noqa: ANN401
    """Return the whole file's size, or None where the server does not tell it."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range") or "")
        if found is None or int(found[1]) != have:
            raise DataError(f"{answer.url}: the server answers another part than was asked; name a mirror by --base")
        return int(found[2])
    length = answer.headers.get("Content-Length")
    return None if length is None else int(length)


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
