"""Fetch Debian's package lists through the ordinary apt client, without touching the system's own lists.

A private `apt-get update` runs in a temporary folder with the system's sources, keyrings and proxy settings;
the lists are read from there and the folder is removed. The system's hooks around an update are switched
off.
"""

import gzip
import logging
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from persona_plug.data._deb822 import parse_release, parse_stanzas
from persona_plug.errors import DataError

logger = logging.getLogger(__name__)

FREE_COMPONENTS = ("main", "contrib", "universe")
"""Archive components whose descriptions come under free licences; others are not read."""

Target = dict[str, str]
"""One paragraph of `apt-get indextargets`, field names lower-cased."""

_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")  # where Debian's own package puts them
_REMEDY = "use `persona-plug data synthetic` instead"
_PARTIAL_SUITE = re.compile(r"-(security|updates|backports|backports-sloppy|proposed(-updates)?|debug)$")
_CONFIG = r"""
#clear APT::Update;
#clear Acquire::Languages;
#clear Acquire::IndexTargets;
Acquire::IndexTargets::deb {
  Packages { MetaKey "$(COMPONENT)/binary-$(ARCHITECTURE)/Packages"; flatMetaKey "Packages";
    ShortDescription "Packages"; Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Packages";
    flatDescription "$(RELEASE) Packages"; Optional "0"; };
  Translations { MetaKey "$(COMPONENT)/i18n/Translation-$(LANGUAGE)"; flatMetaKey "$(LANGUAGE)";
    ShortDescription "Translation-$(LANGUAGE)"; Description "$(RELEASE)/$(COMPONENT) Translation-$(LANGUAGE)";
    flatDescription "$(RELEASE) Translation-$(LANGUAGE)"; };
};
Acquire::Languages { "en"; };
Acquire::GzipIndexes "false";
Acquire::Retries "1";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
"""


@dataclass(frozen=True)
class ArchiveText:
    """The package lists of one release.

    Attributes:
        packages: Text of the Packages files, joined.
        translations: Text of the English Translation files, joined; they hold the long descriptions. May be
            empty.
        archive: Facts of the release: origin, label, suite, codename, version, date, architecture,
            components.
    """

    packages: str
    translations: str
    archive: dict[str, str]


def choose_targets(targets: list[Target], release: str | None, architecture: str) -> list[Target]:
    """Choose the lists of one release out of what `apt-get indextargets` names.

    Args:
        targets: Paragraphs of `apt-get indextargets`, field names lower-cased; "bytes" holds the list's size
            in digits.
        release: A suite ("stable") or codename ("bookworm"); None takes the release with the most package
            data, updates and security overlays aside.
        architecture: The machine's own architecture; lists of other ones are left out.

    Returns:
        The release's Packages and Translations targets in free components, in the order of their names.

    Raises:
        DataError: No such release is among the targets.
    """
    keys = ("origin", "label", "codename", "suite", "release")
    groups: dict[tuple[str, ...], list[Target]] = {}
    for target in targets:
        if target.get("component") in FREE_COMPONENTS and target.get("architecture", architecture) == architecture:
            groups.setdefault(tuple(target.get(key, "") for key in keys), []).append(target)
    named = {key: group for key, group in groups.items() if any(t.get("created-by") == "Packages" for t in group)}
    if release is None:
        fit = {key: group for key, group in named.items() if not any(map(_PARTIAL_SUITE.search, key[2:]))}
    else:
        fit = {key: group for key, group in named.items() if release in key[2:]}
    if not fit:
        offered = ", ".join(sorted({"/".join(filter(None, key[2:4])) for key in named})) or "none"
        wanted = f"release {release!r}" if release else "a full release"
        raise DataError(
            f"{wanted} is not among apt's configured sources "
            f"(offered: {offered}); name an offered one, add it to apt's sources, or {_REMEDY}"
        )
    sizes = {key: sum(int(target.get("bytes", "0")) for target in group) for key, group in fit.items()}
    return sorted(fit[max(sorted(fit), key=lambda key: sizes[key])], key=lambda target: target["filename"])


@contextmanager
def _private() -> Iterator[tuple[Path, list[str]]]:
    """Yield a temporary folder, and the arguments that keep apt's state, cache and settings in it.

    Raises:
        DataError: No apt client.
    """
    if shutil.which("apt-get") is None or shutil.which("apt-config") is None:
        raise DataError(f"no apt client (apt-get) on this machine; run on Debian or a derivative, or {_REMEDY}")
    with tempfile.TemporaryDirectory(prefix="persona-plug-apt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # apt downloads as the user _apt when started by root
        for part in ("state/lists/partial", "cache/archives/partial"):
            (folder / part).mkdir(parents=True)
        config = folder / "apt.conf"
        lines = [f'Dir::State "{folder}/state";', f'Dir::Cache "{folder}/cache";']
        reachable = all(parent.stat().st_mode & 0o001 for parent in folder.resolve().parents)
        if os.geteuid() == 0 and not reachable:
            lines.append('APT::Sandbox::User "root";')  # _apt could not reach the folder
        config.write_text(_CONFIG + "\n".join(lines) + "\n", encoding="utf-8")
        yield folder, ["-c", str(config)]


def fetch(release: str | None = None, timeout: float = 300.0) -> ArchiveText:
    """Download the package lists of a release with a private `apt-get update`.

    Args:
        release: Suite or codename among apt's configured sources; None for the largest.
        timeout: Seconds that the whole download may take.

    Returns:
        The lists and the facts of the release.

    Raises:
        DataError: No apt client, nothing downloaded, no such release, or the time ran out.
    """
    with _private() as (folder, options):
        complaints = _run(["apt-get", *options, "-q", "update"], timeout)[1]
        listing = _run(["apt-get", *options, "indextargets"], 60.0)[0]
        architecture = _run(["apt-config", *options, "shell", "A", "APT::Architecture"], 60.0)[0]
        targets = [t for t in parse_stanzas(listing) if Path(t.get("filename", "")).is_file()]
        if not targets:
            raise DataError(
                f"apt-get update brought no package lists ({_cause(complaints)}): apt's sources are empty "
                f"or unreachable; check the network and apt's sources, or {_REMEDY}"
            )
        if "Failed to fetch" in complaints:
            logger.warning("apt-get update could not reach every configured source: %s", _cause(complaints))
        for target in targets:
            target["bytes"] = str(Path(target["filename"]).stat().st_size)
        native = architecture.partition("'")[2].partition("'")[0]
        chosen = choose_targets(targets, release, native)
        texts = {
            kind: "\n\n".join(_read(Path(t["filename"])) for t in chosen if t.get("created-by") == kind)
            for kind in ("Packages", "Translations")
        }
        stating = ("origin", "label", "suite", "codename")
        facts: dict[str, str] = {key: chosen[0][key] for key in stating if key in chosen[0]}
        for file in sorted((folder / "state/lists").glob("*Release")):
            stated = parse_release(file.read_text(encoding="utf-8", errors="replace"))
            if all(stated.get(key) == value for key, value in facts.items()):
                facts = stated
                break
    if not texts["Translations"]:
        logger.warning("the lists have no English Translation file; long descriptions may be missing")
    facts["architecture"] = native
    facts["components"] = " ".join(sorted({target["component"] for target in chosen}))
    logger.info("package lists of %s, %s", facts.get("codename", "?"), facts.get("date", "date unknown"))
    return ArchiveText(texts["Packages"], texts["Translations"], facts)


@contextmanager
def download(packages: Sequence[str], component: str, timeout: float) -> Iterator[tuple[list[Path], dict[str, str]]]:
    """Download packages of one component of the Debian release that apt knows, without touching the system.

    Args:
        packages: Their names.
        component: The component, such as `non-free`; apt's sources need not name it.
        timeout: Seconds that the download may take.

    Yields:
        The packages' files, which go with the block, and facts of the release.

    Raises:
        DataError: No apt client, no Debian release among apt's sources, or the download failed.
    """
    with _private() as (folder, options):
        _run(["apt-get", *options, "-q", "update"], timeout)
        targets = parse_stanzas(_run(["apt-get", *options, "indextargets"], 60.0)[0])
        sources = folder / "sources.list"
        sources.write_text(source_line(targets, component) + "\n", encoding="utf-8")
        options = [*options, "-o", f"Dir::Etc::sourcelist={sources}", "-o", "Dir::Etc::sourceparts=-"]
        _run(["apt-get", *options, "-q", "update"], timeout)
        files = folder / "packages"
        files.mkdir(mode=0o777)
        _run(["apt-get", *options, "-q", "download", *packages], timeout, files)
        states = sorted((folder / "state/lists").glob("*Release"))
        facts = parse_release(states[0].read_text(encoding="utf-8", errors="replace")) if states else {}
        debs = sorted(files.glob("*.deb"))
        yield debs, {**facts, "component": component, "packages": " ".join(file.stem for file in debs)}


def source_line(targets: Sequence[Target], component: str) -> str:
    """Return the line of a source list that names a component of the Debian release among configured lists.

    Args:
        targets: Paragraphs of `apt-get indextargets`, field names lower-cased.
        component: The component.

    Raises:
        DataError: No configured list is of a whole Debian release.
    """
    for target in targets:
        release = target.get("release", "")
        whole = target.get("origin") == "Debian" and release and not _PARTIAL_SUITE.search(release)
        if whole and target.get("component") == "main" and target.get("created-by") == "Packages":
            keys = f"[signed-by={_KEYS}] " if _KEYS.is_file() else ""
            return f"deb {keys}{target['repo-uri']} {release} {component}"
    raise DataError(f"apt's sources name no whole Debian release; run on Debian, or {_REMEDY}")


def unpack(file: Path, ending: str) -> Iterator[bytes]:
    """Yield the contents of a package's files with this ending, compressed by gzip or not.

    Raises:
        DataError: It is no Debian package.
    """
    command = [shutil.which("dpkg-deb") or "dpkg-deb", "--fsys-tarfile", str(file)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None and member.name.removesuffix(".gz").endswith(ending):
                    content = stream.read()
                    yield gzip.decompress(content) if member.name.endswith(".gz") else content
    except tarfile.TarError as error:
        raise DataError(f"{file.name}: no Debian package; download it again") from error
    finally:
        process.kill()
        process.communicate()


def _read(file: Path) -> str:
    """Read a list, compressed or not."""
    if not re.search(r"\.(gz|xz|bz2|lz4|lzma|zst)$", file.name):
        return file.read_text(encoding="utf-8", errors="replace")
    return _run(["/usr/lib/apt/apt-helper", "cat-file", str(file)], 120.0)[0]


def _cause(complaints: str) -> str:
    """Return apt's first complaint, without a user name or password in its addresses."""
    lines = [line for line in complaints.splitlines() if line.startswith(("E:", "Err:", "W:"))]
    return re.sub(r"://[^/@\s]*@", "://", lines[0])[:200] if lines else "it gave no reason"


def _run(command: list[str], timeout: float, folder: Path | None = None) -> tuple[str, str]:
    """Run `command` in a folder, return its output and complaints; DataError on failure or after `timeout` seconds."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            start_new_session=True,
            cwd=folder,
        )
    except OSError as error:
        raise DataError(f"cannot start {command[0]}: {error.strerror}; install apt, or {_REMEDY}") from error
    try:
        output, complaints = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the download helpers go with it
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise DataError(
                f"{command[0]} took more than {timeout:g} s; check the network and apt's sources, or {_REMEDY}"
            ) from error
        raise
    if process.returncode:
        raise DataError(
            f"{command[0]} failed ({_cause(complaints)}); check the network and apt's sources, or {_REMEDY}"
        )
    return output, complaints
