"""Read Debian's control files: paragraphs, Release files, and the packages that the lists tell of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_FIELDS = frozenset(
    {"package", "source", "maintainer", "original-maintainer", "section"}
    | {"description", "description-en", "description-md5"}
)
_CREDIT = re.compile(r"\s*(upstream[- ])?(authors?|maintainers?|copyright)\s*:", re.IGNORECASE)
_ADDRESS = re.compile(r"<?\b[\w.+-]+@[\w-]+(\.[\w-]+)+>?")
_SIBLING = re.compile(
    r"-(dev|docs?|dbg|dbgsym|data|common|bin|utils|tools|examples|headers|static|source|tests?|l10n|i18n|"
    r"locales?)(-\w+)?$"
)


@dataclass(frozen=True)
class Package:
    """What the lists say about one binary package.

    Attributes:
        name: The binary package.
        source: The source package that it is built from.
        maintainer: "Name <address>" as it stands in the list; on a derivative the original maintainer.
        section: The archive section, without a component prefix such as "contrib/".
        synopsis: The short description, on one line.
        description: The long description, on one line; "" where none was found.
    """

    name: str
    source: str
    maintainer: str
    section: str
    synopsis: str
    description: str


def parse_stanzas(text: str, fields: frozenset[str] | None = None) -> list[dict[str, str]]:
    r"""Read the paragraphs of a Debian control file.

    Args:
        text: Control data: "Field: value" lines, continued by lines that start with a blank, paragraphs
            parted by empty lines.
        fields: Names to keep, lower-cased; None keeps all.

    Returns:
        One dict a paragraph, field names lower-cased. A value keeps its continuation lines, parted by "\n"
        and without their leading blank. Lines that are neither a field nor a continuation (such as a
        signature's) are skipped.
    """
    stanzas: list[dict[str, str]] = []
    current: dict[str, str] = {}
    name = ""
    for line in text.split("\n"):
        if not line.strip():
            if current:
                stanzas.append(current)
                current = {}
            name = ""
        elif line[0] in " \t":
            if name:
                current[name] += "\n" + line[1:].rstrip()
        else:
            name, colon, value = line.partition(":")
            name = name.lower() if colon and (fields is None or name.lower() in fields) else ""
            if name:
                current[name] = value.strip()
    if current:
        stanzas.append(current)
    return stanzas


def parse_release(text: str) -> dict[str, str]:
    """Return what a Release or InRelease file states of origin, label, suite, codename, version and date."""
    wanted = ("origin", "label", "suite", "codename", "version", "date")
    first = next(iter(parse_stanzas(text, frozenset(wanted))), {})  # a signature comes after, its header has none
    return {name: first[name] for name in wanted if name in first}


def parse_packages(packages: str, translations: str = "") -> list[Package]:
    """Read Packages files and, for the long descriptions, Translation-en files.

    A long description that stands in the Packages file itself, as it did before 2012, is used when no
    translation has the same package name and description checksum.

    Args:
        packages: Text of one or more Packages files, parted by an empty line.
        translations: Text of one or more Translation-en files; may be empty.

    Returns:
        The binary packages in the order of the text. Addresses are cut out of both descriptions.
    """
    long: dict[tuple[str, str], str] = {}
    for stanza in parse_stanzas(translations, _FIELDS):
        body = stanza.get("description-en", "").partition("\n")[2]
        long[stanza.get("package", ""), stanza.get("description-md5", "")] = body
    found = []
    for stanza in parse_stanzas(packages, _FIELDS):
        name = stanza.get("package", "")
        synopsis, _, body = stanza.get("description", "").partition("\n")
        body = long.get((name, stanza.get("description-md5", "")), body)
        package = Package(
            name=name,
            source=(stanza.get("source", "").split() or [name])[0],
            maintainer=stanza.get("original-maintainer", stanza.get("maintainer", "")),
            section=stanza.get("section", "").rpartition("/")[2],
            synopsis=flatten_description(synopsis),
            description=flatten_description(body),
        )
        found.append(package)
    return found


def flatten_description(body: str) -> str:
    """Return `body` as one line, without paragraph marks (a lone "."), "Author: ..." lines and addresses."""
    lines = (line for line in body.split("\n") if line.strip() != "." and not _CREDIT.match(line))
    return " ".join(_ADDRESS.sub(" ", " ".join(lines)).split())


def pick_binaries(packages: Iterable[Package]) -> list[Package]:
    """Choose one binary package a source: its namesake, else the first by name that is no sibling.

    Siblings are what a source brings along: -dev, -doc, -data and the like, near-duplicates in their texts.

    Returns:
        The chosen packages, ordered by source name.
    """
    best: dict[str, tuple[tuple[bool | str, ...], Package]] = {}
    for package in packages:
        texts = (package.name, package.synopsis, package.description, package.section, package.maintainer)
        rank = (package.name != package.source, bool(_SIBLING.search(package.name)), *texts)
        if package.source not in best or rank < best[package.source][0]:
            best[package.source] = (rank, package)
    return [best[source][1] for source in sorted(best)]
