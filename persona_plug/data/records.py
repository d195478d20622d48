"""A set of records in memory and its atomic write to JSONL plus a JSON sidecar."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persona_plug.data.rows import local_path
from persona_plug.errors import DataError


def write_records(
    path: str | os.PathLike[str],
    records: Iterable[Mapping[str, Any]],
    template: str,
    meta: Mapping[str, Any],
    overwrite: bool = True,
) -> Path:
    """Write `records` as JSON lines, and template and meta to the sidecar `path.with_suffix(".meta.json")`.

    The sidecar holds `{"template", "meta", "sha256"}`; `sha256` is that of the JSONL file and tells whether
    the two belong together. Both files are written beside their targets, flushed to disk and renamed over
    them, so a reader sees an old file or a new one and never half of one.

    Args:
        path: Where the JSONL goes; missing parent folders are made.
        records: One mapping an event, JSON-serialisable.
        template: The prompt template, with "{input}" where the record's input goes.
        meta: Facts about the making of the records, JSON-serialisable.
        overwrite: Whether a file that holds something else is replaced.

    Returns:
        The path of the JSONL file.

    Raises:
        DataError: The files cannot be written or replaced, or something in them has no JSON form.
    """
    target = local_path(path)
    try:
        sidecar = target.with_suffix(".meta.json")
        lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) for record in records]
        body = "".join(line + "\n" for line in lines).encode()
        side = {"template": template, "meta": meta, "sha256": hashlib.sha256(body).hexdigest()}
        facts = json.dumps(side, ensure_ascii=False, allow_nan=False, indent=2) + "\n"
        contents = {sidecar: facts.encode(), target: body}
    except (
        TypeError,
        ValueError,
    ) as error:  # no file name, NaN, lone surrogates, an object without JSON form
        cause = f"cannot write records to {str(target)!r}: {error}"
        raise DataError(f"{cause}; give a file name and plain JSON values") from error
    if not overwrite:
        refuse_other(target, body)
    temporary = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in contents}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            with temporary[file].open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for file in contents:
            os.replace(temporary[file], file)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}; choose another file or folder") from error
    finally:
        for file in temporary.values():
            with contextlib.suppress(OSError):  # the folder itself may be missing
                file.unlink(missing_ok=True)
    return target


def refuse_other(file: Path, content: bytes) -> None:
    """Refuse to replace a file that holds something else than what is to be written.

    Raises:
        DataError: It does.
    """
    if file.exists() and not (file.is_file() and file.read_bytes() == content):
        raise DataError(f"{file} is there and holds something else; choose another place, or replace it with --force")


@dataclass(frozen=True)
class RecordSet:
    """Records with the template that turns them into prompts.

    Attributes:
        records: Events `{"user_id", "input", "output", "id"[, "timestamp"]}`, all values plain JSON.
        template: Prompt template; "{input}" stands for the record's input.
        meta: How the records were made: origin, parameters, counts, what was dropped and why.
    """

    records: list[dict[str, Any]] = field(repr=False)
    template: str
    meta: dict[str, Any]

    def write(self, path: str | os.PathLike[str], overwrite: bool = True) -> Path:
        """Write the records to `path` and template and meta to its sidecar; see `write_records`."""
        return write_records(path, self.records, self.template, self.meta, overwrite)


def count_items(records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Count users and records; give the smallest, median and largest number of records a user."""
    per_user: dict[str, int] = {}
    for record in records:
        per_user[record["user_id"]] = per_user.get(record["user_id"], 0) + 1
    sizes = sorted(per_user.values()) or [0]
    median = (sizes[(len(sizes) - 1) // 2] + sizes[len(sizes) // 2]) / 2
    return {
        "users": len(per_user),
        "records": sum(sizes),
        "items_per_user_min": sizes[0],
        "items_per_user_median": median,
        "items_per_user_max": sizes[-1],
    }
