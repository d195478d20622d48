"""Task definitions: what a LaMP-shaped data set asks, how its history reads in a prompt, and how it is scored.

A task is one YAML file in configs/tasks, or any YAML file given by its path; no code.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from persona_plug.errors import ConfigError

TASKS = Path(__file__).parent.parent / "configs" / "tasks"
KINDS = ("label", "rating", "text")


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: The YAML file's name.
        version: Raised whenever a change of the definition changes results.
        kind: `label` (accuracy, macro-F1), `rating` (MAE, RMSE) or `text` (ROUGE).
        answers: The answer space of a label or rating task; ratings in rising order.
        metrics: What is reported, names of `eval.metrics`.
        fields: Fields of a profile item that become a history item's input and output; an empty input name means that
            the user's text answers nothing. Several fields joined by "+" are joined by a space.
        query: Regular expression on a question's input; its group 1 (or groups, joined by a space) is what retrieval
            looks for. Without a match the whole input is used, and counted.
        item: One history item in a prompt, with {input} and {output}.
        join: What stands between items.
        prompt: The prompt with items, with {items} and {input} (the question's whole input).
        max_input_tokens: Tokens of the prompt, items included, in LaMP's own budget rule.
        max_answer_tokens: Tokens of a generated answer.
        source: Where the definition comes from, for the report.
    """

    name: str
    version: int
    kind: str
    answers: tuple[str, ...] | None = None
    metrics: tuple[str, ...] = ()
    fields: tuple[str, str] = ("input", "output")
    query: str = ""
    item: str = '"{output}" is the answer for "{input}"'
    join: str = ", and "
    prompt: str = "{items}. {input}"
    max_input_tokens: int = 256
    max_answer_tokens: int = 64
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a definition that cannot work, naming task and field."""
        if self.kind not in KINDS:
            raise ConfigError(f"task {self.name}: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if (self.kind == "text") != (self.answers is None):
            raise ConfigError(f"task {self.name}: label and rating tasks have answers, text tasks none")
        for field, needed in (("prompt", ("{items}", "{input}")), ("item", ("{output}",))):
            for part in needed:
                if part not in getattr(self, field):
                    raise ConfigError(f"task {self.name}: {field} must contain {part}")
        try:
            re.compile(self.query)
        except re.error as exc:
            raise ConfigError(f"task {self.name}: query is no regular expression: {exc}") from exc

    def find_query(self, text: str) -> str | None:
        """Return what retrieval looks for in a question's whole input, or None where `query` does not match."""
        if not self.query:
            return text
        found = re.search(self.query, text, re.DOTALL)
        return " ".join(g for g in found.groups() if g is not None) if found else None


def load_task(name: str) -> Task:
    """Read a task by its name in configs/tasks, or by the path of a YAML file.

    Raises:
        ConfigError: There is no such task (the known ones are named), or a field is unknown or wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TASKS.glob("*.yaml")))
        raise ConfigError(f"no task {name!r}; known are {known}; or give the path of a YAML file")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a task is a mapping of its fields")
    return _from_mapping(path, raw)


def _from_mapping(path: Path, raw: dict[str, Any]) -> Task:
    fields = {f.name for f in dataclasses.fields(Task)} - {"name"}
    if unknown := sorted(set(raw) - fields):
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    if missing := sorted({"version", "kind"} - set(raw)):
        raise ConfigError(f"{path}: field {missing[0]!r} is missing")
    values = {k: tuple(str(x) for x in v) if isinstance(v, list) else v for k, v in raw.items()}
    return Task(name=path.stem, **values)
