"""What a folder's results were made with, so that nothing made with other settings or data is taken for them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from training.settings import RunSettings
from training.tasks import Task

FILE = "settings.json"


def claim(settings: RunSettings, keys: Sequence[str], task: Task, parts: Sequence[str]) -> None:
    """Write down what a folder's results depend on, or check that it is the same as when they were made.

    A training writes less than a comparison, which adds what it depends on besides.

    Args:
        settings: The run's; the folder `out` is made if it is not there.
        keys: Names of settings that matter.
        task: The task, which matters as a whole.
        parts: Parts of the data that matter, such as `train`.

    Raises:
        ConfigError: Something differs; the first difference is named.
    """
    mine: dict[str, Any] = {"task": dataclasses.asdict(task)}
    data = Path(settings.data)
    for part in parts:
        files = [data] if data.is_file() else [data / f"{part}_{kind}.json" for kind in ("questions", "outputs")]
        mine[f"data ({part})"] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    mine = json.loads(json.dumps({**mine, **{key: getattr(settings, key) for key in keys}}))
    out = Path(settings.out)
    file = out / FILE
    has_results = (out / "lr").is_dir() or any(out.glob("seed-*"))
    kept = json.loads(file.read_text(encoding="utf-8")) if has_results and file.is_file() else {}
    if "task" in kept:  # a field that came later had its default then
        kept["task"] = {**_defaults(), **kept["task"]}
    for key, value in mine.items():
        if kept.get(key, value) != value:
            raise ConfigError(f"{out} holds results made with another {key}; choose another out=, or delete the folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(file, (json.dumps({**kept, **mine}, indent=1) + "\n").encode())


def _defaults() -> dict[str, Any]:
    """Return the defaults of a task's fields, as JSON holds them."""
    fields = [f for f in dataclasses.fields(Task) if f.default is not dataclasses.MISSING]
    return dict(json.loads(json.dumps({f.name: f.default for f in fields})))
