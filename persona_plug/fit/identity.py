"""What a training is: its models, settings and data, written beside its checkpoints, so that no other goes on there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import CorruptFileError, MismatchError
from persona_plug.files import write_atomically
from persona_plug.fit.config import FitConfig
from persona_plug.model import PlugModel

FILE = "run.json"
# Names say where models were found; their fingerprints say which they are.
_PLACES = ("llm", "encoder", "recipe", "format_version")
_SHOWN = 3  # differences that a refusal names


def identity(plug: PlugModel, data: FitData, config: FitConfig, processes: int = 1, start: str = "") -> dict[str, Any]:
    """Return what decides the weights that a training ends with, as plain JSON.

    Args:
        plug: What is trained.
        data: Its samples.
        config: How it is trained.
        processes: How many processes train it.
        start: Digest of the weights that it begins with; "" for untrained ones.
    """
    fields = {name: value for name, value in asdict(plug.config).items() if name not in _PLACES}
    settings = {name: value for name, value in asdict(config).items() if name != "report_to"}
    run = {"llm_dtype": str(plug.llm.dtype).removeprefix("torch."), "processes": processes}
    run |= {"start": start} if start else {}
    samples = {"training samples": _digest(data.train), "validation samples": _digest(data.valid)}
    row: dict[str, Any] = json.loads(json.dumps({**fields, **settings, **run, **samples}))
    return row


def check_identity(folder: Path, present: Mapping[str, Any]) -> None:
    """Refuse to go on with a training that was another one.

    Raises:
        MismatchError: The folder's training differs; what differs is named.
        CorruptFileError: The folder does not say what was trained there.
    """
    file = folder / FILE
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(saved, dict):
            raise ValueError(saved)
    except (OSError, ValueError) as exc:
        raise CorruptFileError(
            f"{folder} holds checkpoints, but {FILE} beside them cannot be read: nothing says what was trained; "
            "start over without resume"
        ) from exc
    names = [name for name in {**saved, **present} if saved.get(name) != present.get(name)]
    if names:
        shown = "; ".join(_difference(name, saved.get(name), present.get(name)) for name in names[:_SHOWN])
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise MismatchError(
            f"{folder} holds another training: {shown}{more}; repeat its settings, or start over without resume"
        )


def write_identity(folder: Path, present: Mapping[str, Any]) -> None:
    """Write what is trained in a folder."""
    write_atomically(folder / FILE, (json.dumps(present, indent=1, ensure_ascii=False) + "\n").encode())


def _difference(name: str, saved: object, present: object) -> str:
    if name.endswith(" samples"):
        return f"other {name}"
    return f"{name.replace('_', ' ') if 'fingerprint' in name else name} {saved!r:.60} there, {present!r:.60} here"


def _digest(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    known: dict[HistoryItem, int] = {}  # histories share items, so each is read once
    for example in examples:
        for item in example.history:
            if item not in known:
                known[item] = len(known)
                digest.update(f"{item!r}\n".encode("utf-8", "surrogatepass"))
        places = [known[item] for item in example.history]
        row = (example.user_id, example.input, example.output, example.prompt, places)
        digest.update(f"{row!r}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
