"""A real data set that any Debian machine can build: the titles that authors give to their RFCs.

The abstract is the input, the title the output, the first author the user, the month of publication the time. The
documents come from Debian's `doc-rfc` packages, which stand in its section `non-free`: their licence forbids changes,
not reading. Nothing of them is shipped. No author's name is kept: a user is a hash.

`assemble` works on descriptions and knows no network; `build` fetches the packages first.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from persona_plug.data._apt import download, unpack
from persona_plug.data.debian import cut_synopsis
from persona_plug.data.records import RecordSet, count_items
from persona_plug.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

TEMPLATE = "Write the title of this document, whose abstract follows. abstract: {input}"
_PARTS = ("experimental", "fyi-bcp", "informational", "misc", "old-std", "others", "std-proposed", "std")
PACKAGES = tuple(f"doc-rfc-{part}" for part in _PARTS)
SECTION = "non-free"
LICENCE = "the RFCs' own licence (Debian: non-free): to read, not to change; nothing of it is passed on"
MIN_WORDS = 5  # of an abstract, once the title is cut out

_STATUS = re.compile(r"\[[A-Z][A-Z -]+\]\s*$")  # [STANDARDS-TRACK]
_ROLE = re.compile(r",?\s*\(?\beds?\b\.?\)?$", re.IGNORECASE)


@dataclass(frozen=True)
class RFCSet(RecordSet):
    """Records of RFC authors; `meta` tells archive, parameters, counts and what was dropped."""


def assemble(
    documents: Iterable[Mapping[str, Any]],
    archive: Mapping[str, str],
    *,
    least: int = 5,
    max_users: int | None = None,
    max_per_user: int | None = 40,
) -> RFCSet:
    """Turn descriptions of RFCs into records; the same descriptions in any order give the same set.

    Args:
        documents: Descriptions with `doc_id`, `title`, `abstract`, `authors` and `pub_date`, as the packages hold them.
        archive: Facts of the packages, kept in `meta["archive"]`.
        least: A user with fewer records is dropped.
        max_users: Users at most, those with most records first; None for all.
        max_per_user: Records of a user at most, the latest; None for all.

    Returns:
        Records ordered by user and time.

    Raises:
        ConfigError: An argument is out of range.
        DataError: No author has enough documents.
    """
    if least < 2 or min(max_users or 1, max_per_user or least) < 1:
        raise ConfigError("least must be at least 2, max_users and max_per_user at least 1; raise them")
    dropped: Counter[str] = Counter()
    users: dict[str, dict[str, dict[str, Any]]] = {}
    for document in {str(d.get("doc_id")): d for d in documents}.values():
        row, reason = _record(document)
        if row is None:
            dropped[reason] += 1
            continue
        titles = users.setdefault(row["user_id"], {})
        dropped["duplicate_title"] += row["output"].casefold() in titles
        titles[row["output"].casefold()] = max(row, titles.get(row["output"].casefold(), row), key=_age)
    sizes = {user: len(rows) for user, rows in users.items() if len(rows) >= least}
    dropped["user_with_few_documents"] += sum(len(rows) for user, rows in users.items() if user not in sizes)
    chosen = sorted(sizes, key=lambda user: (-sizes[user], user))[:max_users]
    dropped["over_max_users"] += sum(sizes[user] for user in sizes if user not in chosen)
    records = []
    for user in sorted(chosen):
        rows = sorted(users[user].values(), key=_age)
        records += rows[-max_per_user:] if max_per_user else rows
        dropped["over_max_per_user"] += max(0, len(rows) - (max_per_user or len(rows)))
    if not records:
        raise DataError(f"no author has {least} usable documents in these packages; lower least")
    meta = {
        "data": "RFCs as Debian packages them",
        "archive": dict(archive),
        "parameters": {"least": least, "max_users": max_users, "max_per_user": max_per_user},
        "counts": count_items(records),
        "dropped": {reason: count for reason, count in sorted(dropped.items()) if count},
        "licence": LICENCE,
    }
    logger.info("RFCs: %d records of %d users", len(records), len(chosen))
    return RFCSet(records, TEMPLATE, meta)


def build(
    *, least: int = 5, max_users: int | None = None, max_per_user: int | None = 40, timeout: float = 600.0
) -> RFCSet:
    """Fetch Debian's packages of RFCs (270 MB) into a temporary folder and make records of them.

    A private source list names the section `non-free` of the Debian release that apt knows; the system's own lists stay
    as they are.

    Args:
        least: See `assemble`, like the next two.
        max_users: Users at most.
        max_per_user: Records of a user at most.
        timeout: Seconds that the download may take.

    Raises:
        ConfigError: An argument is out of range.
        DataError: No apt client, apt's sources unreachable or not Debian's, or no author with enough documents.
    """
    with download(PACKAGES, SECTION, timeout) as (files, archive):
        documents = [json.loads(text) for file in files for text in unpack(file, ".json")]
    return assemble(documents, archive, least=least, max_users=max_users, max_per_user=max_per_user)


def hash_author(author: str) -> str:
    """Return an author's user id: "rfc-" and 12 hex digits of the SHA-256 of the name, without "Ed." behind it."""
    name = " ".join(_ROLE.sub("", author.strip()).casefold().split())
    return "rfc-" + hashlib.sha256(name.encode()).hexdigest()[:12]


def _record(document: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Return the record of a description, or None and why there is none."""
    authors, title = document.get("authors") or [], " ".join(str(document.get("title", "")).split())
    abstract = " ".join(_STATUS.sub("", str(document.get("abstract") or "").strip()).split())
    text = cut_synopsis(abstract, title)
    date = _date(str(document.get("pub_date", "")))
    if not authors:
        return None, "no_author"
    if not title or len(text.split()) < MIN_WORDS:
        return None, "too_short"
    if title.casefold() in text.casefold():
        return None, "title_inside_a_word"
    if date is None:
        return None, "no_date"
    row = {"user_id": hash_author(str(authors[0])), "input": text, "output": title, "timestamp": date}
    return {**row, "id": str(document["doc_id"])}, ""


def _date(text: str) -> str | None:
    """Return "October 2008" or "1 April 2008" as 2008-10-01."""
    for form in ("%B %Y", "%d %B %Y"):
        try:
            return datetime.strptime(text.strip(), form).date().isoformat()
        except ValueError:
            continue
    return None


def _age(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["timestamp"], row["id"]
