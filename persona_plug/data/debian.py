"""A real data set that any Debian machine can build: how each maintainer words the packages they look after.

Task "synopsis": the long description is the input, the maintainer's one-line synopsis the output. Task
"section": the same input, the archive section that the maintainer (persons only) filed the package under.

Parsing and choosing (`parse_packages`, `assemble`) work on text and know no network; `build` fetches the
lists first. No name or address of a maintainer is kept: a user is a hash, and a text that names a maintainer
is dropped. Other names that a description tells (an upstream author's, say) stay as published. Descriptions
come under their package's licence.
"""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from persona_plug.data._apt import fetch
from persona_plug.data._deb822 import Package, parse_packages, pick_binaries
from persona_plug.data.records import RecordSet, count_items
from persona_plug.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

SYNOPSIS_TEMPLATE = "Write the one-line synopsis of this software package: {input}"
SECTION_TEMPLATE = (
    "Which archive section does this software package belong to? Answer with one of: {labels}. Package: {{input}}"
)
MIN_WORDS = 5
"""A description of fewer words, once the synopsis is cut out, says too little and is dropped."""

_TEAM_ADDRESS = re.compile(
    r"^packages@|^team\b|[-+._]teams?@|-maint(ainers?)?@|[@.](alioth-)?lists?\.|"
    r"@(tracker|packages)\.debian\.org$|@teams?\.|@googlegroups\."
)
_TEAM_NAME = re.compile(
    r"\b(teams?|maint(ainers)?|maintenance|groups?|developers|packagers|packaging|project|task force|"
    r"strike force|crew|community|mailing list)\b",
    re.IGNORECASE,
)
_ORPHANED = "packages@qa.debian.org"
_Users = dict[str, list[dict[str, Any]]]
_EDGE = " \t.,:;!-–—"


@dataclass(frozen=True)
class DebianSet(RecordSet):
    """Records of Debian maintainers; `meta` tells archive, parameters, counts and what was dropped."""


def split_maintainer(maintainer: str) -> tuple[str, str]:
    """Split "Name <address>" into the name ("" when only an address is given) and the lower-cased address."""
    name, bracket, rest = maintainer.partition("<")
    if not bracket:
        return "", name.strip().lower()
    return name.strip(' "'), rest.partition(">")[0].strip().lower()


def hash_user(address: str) -> str:
    """Return a maintainer's user id: "deb-" and 12 hex digits of the SHA-256 of the lower-cased address."""
    return "deb-" + hashlib.sha256(address.lower().encode()).hexdigest()[:12]


def is_team(maintainer: str) -> bool:
    """Tell whether "Name <address>" is a team, a mailing list or a role rather than a person."""
    name, address = split_maintainer(maintainer)
    return bool(_TEAM_ADDRESS.search(address) or _TEAM_NAME.search(name))


def cut_synopsis(text: str, synopsis: str) -> str:
    """Cut every verbatim occurrence of `synopsis` (whole words, any case) out of `text`.

    Returns:
        The rest, whitespace-normalised, without stray punctuation at its start.
    """
    text, synopsis = " ".join(text.split()), " ".join(synopsis.split())
    if not synopsis or synopsis.casefold() not in text.casefold():
        return text
    pattern = re.compile(rf"(?<!\w){re.escape(synopsis)}(?!\w)", re.IGNORECASE)
    while pattern.search(text):
        text = " ".join(pattern.sub(" ", text).split()).lstrip(_EDGE)
    return text


def assemble(
    packages: Iterable[Package],
    archive: Mapping[str, str],
    task: Literal["synopsis", "section"] = "synopsis",
    *,
    min_packages: int = 12,
    max_users: int | None = 150,
    max_per_user: int | None = 40,
    min_section: int = 30,
    seed: int = 0,
) -> DebianSet:
    """Turn parsed packages into records.

    Pure: the same packages, in any order, and the same arguments give the same set.

    Users and items over a limit are dropped by the order of a seeded hash of their id, so that a small
    change of the archive changes few records.

    Args:
        packages: Binary packages, as `parse_packages` returns them.
        archive: Facts of the release, kept in `meta["archive"]`.
        task: "synopsis" or "section" (persons only).
        min_packages: A user with fewer records is dropped.
        max_users: At most so many users; None for all.
        max_per_user: At most so many records a user; None for all.
        min_section: Task "section": sections of fewer records are dropped.
        seed: Chooses among users and items when there are more than the limits.

    Returns:
        Records ordered by user and id (the source package's name).

    Raises:
        ConfigError: An argument is unknown or out of range.
        DataError: No user has enough packages.
    """
    limits = _check(task, min_packages, max_users, max_per_user, min_section, seed)
    dropped: Counter[str] = Counter()
    altered: Counter[str] = Counter()
    everything = list(packages)
    chosen = pick_binaries(everything)
    users = _large(_records(chosen, task, altered, dropped), min_packages, dropped)
    kept = sorted(users, key=lambda user: _rank(seed, user))[:max_users]
    dropped["over_max_users"] += sum(len(rows) for user, rows in users.items() if user not in kept)
    for user in kept:
        rows = sorted(users[user], key=lambda row: _rank(seed, row["id"]))[:max_per_user]
        dropped["over_max_per_user"] += len(users[user]) - len(rows)
        users[user] = sorted(rows, key=lambda row: row["id"])
    users = {user: users[user] for user in sorted(kept)}
    while task == "section":
        sizes = Counter(row["output"] for rows in users.values() for row in rows)
        rare = {section for section, size in sizes.items() if size < min_section}
        if not rare:
            break
        dropped["rare_section"] += sum(sizes[section] for section in rare)
        users = {user: [row for row in rows if row["output"] not in rare] for user, rows in users.items()}
        users = _large(users, min_packages, dropped)
    records = [row for rows in users.values() for row in rows]
    if not records:
        raise DataError(
            f"no maintainer has {min_packages} usable packages in these lists; lower min_packages "
            f"{'or min_section ' if task == 'section' else ''}or take a larger release"
        )
    labels = sorted({row["output"] for row in records}) if task == "section" else []
    origin = {"binary_packages": len(everything), "source_packages": len(chosen), **altered}
    meta = {
        "data": "Debian package index",
        "archive": dict(archive),
        "parameters": limits,
        "counts": {**count_items(records), **origin},
        "dropped": {reason: dropped[reason] for reason in sorted(dropped) if dropped[reason]},
        "licence": "each text under the free licence of its package",
        **({"labels": labels} if labels else {}),
    }
    template = SECTION_TEMPLATE.format(labels=", ".join(labels)) if labels else SYNOPSIS_TEMPLATE
    logger.info("Debian %s: %d records of %d users", task, len(records), len(users))
    return DebianSet(records, template, meta)


def build(
    task: Literal["synopsis", "section"] = "synopsis",
    release: str | None = None,
    *,
    min_packages: int = 12,
    max_users: int | None = 150,
    max_per_user: int | None = 40,
    min_section: int = 30,
    seed: int = 0,
    timeout: float = 300.0,
) -> DebianSet:
    """Fetch Debian's package lists with a private `apt-get update` and make records of them.

    Deterministic for a given archive; `meta["archive"]["date"]` names the archive's state.

    Args:
        task: "synopsis" (write the one-line synopsis) or "section" (name the archive section; persons only).
        release: Suite ("stable") or codename among apt's configured sources; None for the largest of them.
        min_packages: See `assemble`, like the next four.
        max_users: At most so many users.
        max_per_user: At most so many records a user.
        min_section: Fewest records of a section.
        seed: Chooses among users and items.
        timeout: Seconds that the download may take.

    Returns:
        The records, their template and the facts of the archive.

    Raises:
        ConfigError: An argument is unknown or out of range.
        DataError: No apt client, apt's sources unreachable, no such release, or no user with enough packages.
    """
    limits = _check(task, min_packages, max_users, max_per_user, min_section, seed)
    lists = fetch(release, timeout)
    return assemble(parse_packages(lists.packages, lists.translations), lists.archive, **limits)


def _check(
    task: str, min_packages: int, max_users: int | None, max_per_user: int | None, min_section: int, seed: int
) -> dict[str, Any]:
    """Return the arguments by name; ConfigError when one cannot be used."""
    if task not in ("synopsis", "section"):
        raise ConfigError(f"unknown Debian task {task!r}; use 'synopsis' or 'section'")
    if min_packages < 1 or min_section < 1 or (max_users is not None and max_users < 1):
        raise ConfigError("min_packages, min_section and max_users must be at least 1; raise them")
    if max_per_user is not None and max_per_user < min_packages:
        raise ConfigError(f"max_per_user={max_per_user} is below min_packages={min_packages}; raise it")
    found = {"task": task, "min_packages": min_packages, "max_users": max_users, "max_per_user": max_per_user}
    return found | {"min_section": min_section, "seed": seed}


def _large(users: _Users, min_packages: int, dropped: Counter[str]) -> _Users:
    """Keep the users who have enough records."""
    small = {user for user, rows in users.items() if len(rows) < min_packages}
    dropped["user_with_few_packages"] += sum(len(users[user]) for user in small)
    return {user: rows for user, rows in users.items() if user not in small}


def _records(chosen: list[Package], task: str, counts: Counter[str], dropped: Counter[str]) -> _Users:
    """Make each user's records; tell in `dropped` which packages gave none, in `counts` what was altered."""
    persons = {split_maintainer(package.maintainer)[0] for package in chosen if not is_team(package.maintainer)}
    people = {name for name in (_words(person.partition("(")[0]) for person in persons) if len(name) > 1}
    users: _Users = {}
    seen: set[tuple[str, str]] = set()
    for package in chosen:
        address = split_maintainer(package.maintainer)[1]
        user = hash_user(address)
        synopsis = package.synopsis
        text = cut_synopsis(package.description, synopsis)
        output = synopsis if task == "synopsis" else package.section
        reason = None
        if not address or address == _ORPHANED:
            reason = "orphaned"
        elif task == "section" and is_team(package.maintainer):
            reason = "team"
        elif "transitional" in synopsis.lower():
            reason = "transitional"
        elif not output or len(text.split()) < MIN_WORDS:
            reason = "too_short"
        elif synopsis and synopsis.casefold() in text.casefold():
            reason = "synopsis_inside_a_word"
        elif _names_one_of(people, f"{text} {synopsis}"):
            reason = "names_a_maintainer"
        elif (user, text.casefold()) in seen:
            reason = "duplicate_description"
        if reason:
            dropped[reason] += 1
            continue
        counts["synopsis_cut_out_of"] += text != package.description
        seen.add((user, text.casefold()))
        record = {"user_id": user, "input": text, "output": output, "id": package.source}
        users.setdefault(user, []).append(record)
    return users


def _words(text: str) -> tuple[str, ...]:
    """Return the words of `text`, lower-cased, without punctuation."""
    return tuple(re.findall(r"\w+", text.casefold()))


def _names_one_of(people: set[tuple[str, ...]], text: str) -> bool:
    """Tell whether a name out of `people`, given as words, stands in `text`."""
    words = _words(text)
    lengths = {len(name) for name in people}
    return any(words[i : i + n] in people for n in lengths for i in range(len(words) - n + 1))


def _rank(seed: int, text: str) -> str:
    """Return a seeded hash to order by."""
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()
