"""Task definitions: what a LaMP-shaped data set asks, how its history reads in a prompt, and how it is scored.

A task is one YAML file in configs/tasks, or any YAML file given by its path; no code.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

from persona_plug.errors import ConfigError, nearest
from training.config import yaml_problem

TASKS = Path(__file__).parent.parent / "configs" / "tasks"
KINDS = ("label", "rating", "text")
# Kind -> metrics that are defined for it; a task that names none reports the first two.
METRICS = {
    "label": ("accuracy", "f1"),
    "rating": ("mae", "rmse", "accuracy", "f1"),
    "text": ("rouge-1", "rouge-L", "chrf", "lamp-rouge-1", "lamp-rouge-L", "meteor", "bleu"),
}


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: The YAML file's name.
        version: Raised whenever a change of the definition changes results.
        kind: `label` (accuracy, macro-F1), `rating` (MAE, RMSE) or `text` (ROUGE).
        answers: The answer space of a label or rating task; ratings in rising order.
        metrics: What is reported, out of the kind's `METRICS`; left empty, the first two of them.
        fields: Fields of a profile item that become a history item's input and output; an empty input name means that
            the user's text answers nothing. Several fields joined by "+" are joined by a space. For `read_lamp`.
        query: Regular expression on a question's input; its group 1 (or groups, joined by a space) is what retrieval
            looks for. Without a match the whole input is used, and counted.
        item: One history item in a prompt, with {input} and {output}.
        join: What stands between items.
        prompt: The prompt with items, with {items} and {input} (the question's whole input).
        insert_after: If given, `prompt` holds {items} alone and is put into the input, right behind the first
            occurrence of this text.
        max_input_tokens: Tokens of the prompt, items included, in LaMP's own budget rule.
        max_answer_tokens: Tokens of a generated answer.
        no_repeat_ngram: No run of this many tokens occurs twice in a generated answer; 0 allows any. Long answers
            decoded greedily fall into loops without it.
        leak: A history item leaves a sample where more than this share of its words stands in the sample's input or
            output; 1 lets all stay. For files of events.
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
    insert_after: str = ""
    max_input_tokens: int = 256
    max_answer_tokens: int = 64
    no_repeat_ngram: int = 0
    leak: float = 1.0
    source: str = ""

    def __post_init__(self) -> None:
        """Refuse a definition that cannot work, naming task and field."""
        if self.kind not in KINDS:
            raise ConfigError(f"task {self.name}: kind={self.kind!r} is not one of {', '.join(KINDS)}")
        if (self.kind == "text") != (self.answers is None):
            raise ConfigError(f"task {self.name}: label and rating tasks have answers, text tasks none")
        if self.kind == "rating":
            try:
                levels = [float(a) for a in self.answers or ()]
            except ValueError as exc:
                raise ConfigError(f"task {self.name}: a rating task's answers are numbers: {exc}") from exc
            if levels != sorted(set(levels)):
                raise ConfigError(f"task {self.name}: a rating task's answers stand in rising order, each once")
        if self.answers is not None and len(set(self.answers)) < 2:
            raise ConfigError(f"task {self.name}: answers must be two or more")
        if len(self.fields) != 2 or not self.fields[1]:
            raise ConfigError(f"task {self.name}: fields must be a pair of names, the second not empty")
        if unknown := sorted(set(self.metrics) - set(METRICS[self.kind])):
            known = ", ".join(METRICS[self.kind])
            raise ConfigError(f"task {self.name}: metric {unknown[0]!r} is none of a {self.kind} task's: {known}")
        object.__setattr__(self, "metrics", self.metrics or METRICS[self.kind][:2])
        self._check_placeholders("item", {"input", "output"}, {"output"})
        both = {"items"} if self.insert_after else {"items", "input"}
        self._check_placeholders("prompt", both, both)
        for field in ("max_input_tokens", "max_answer_tokens"):
            if getattr(self, field) < 1:
                raise ConfigError(f"task {self.name}: {field} must be at least 1")
        if self.no_repeat_ngram < 0:
            raise ConfigError(f"task {self.name}: no_repeat_ngram must be 0 or more")
        if not 0 < self.leak <= 1:
            raise ConfigError(f"task {self.name}: leak={self.leak:g} must be a share above 0 and up to 1")
        try:
            re.compile(self.query)
        except re.error as exc:
            raise ConfigError(f"task {self.name}: query is no regular expression: {exc}") from exc

    def _check_placeholders(self, field: str, allowed: set[str], needed: set[str]) -> None:
        try:
            found = {name for _, name, _, _ in Formatter().parse(getattr(self, field)) if name is not None}
        except ValueError as exc:
            raise ConfigError(f"task {self.name}: {field}: {exc}; write a literal brace twice") from exc
        if missing := sorted(needed - found):
            raise ConfigError(f"task {self.name}: {field} must contain {{{missing[0]}}}")
        if odd := sorted(found - allowed):
            raise ConfigError(f"task {self.name}: {field} cannot contain {{{odd[0]}}}; write a literal brace twice")


def load_task(name: str) -> Task:
    """Read a task by its name in configs/tasks, or by the path of a YAML file.

    Raises:
        ConfigError: There is no such task (the known ones are named), or a field is unknown or wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in TASKS.glob("*.yaml"))
        hint = nearest(name, known)
        raise ConfigError(
            f"no task {name!r}{hint or ';'} known are {', '.join(known)}; or give the path of a YAML file"
        )
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not YAML ({yaml_problem(exc)})") from exc
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: a task is a mapping of its fields")
    return _from_mapping(path, raw)


def _from_mapping(path: Path, raw: dict[str, Any]) -> Task:
    fields = {f.name: f for f in dataclasses.fields(Task) if f.name != "name"}
    if unknown := sorted(set(map(str, raw)) - set(fields)):
        raise ConfigError(f"{path}: unknown field {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    if missing := sorted({"version", "kind"} - set(raw)):
        raise ConfigError(f"{path}: field {missing[0]!r} is missing")
    words = {"int": "a whole number", "float": "a share such as 0.5", "str": "a text"}
    for name, value in raw.items():
        wanted = str(fields[name].type)  # annotations are kept as they are written
        if wanted in words:
            right = type(value).__name__ == wanted
        else:
            right = isinstance(value, list) or (value is None and wanted.endswith("None"))
        if not right:
            raise ConfigError(f"{path}: {name} must be {words.get(wanted, 'a list')}, not {value!r}")
    values: dict[str, Any] = {k: tuple(str(x) for x in v) if isinstance(v, list) else v for k, v in raw.items()}
    return Task(name=path.stem, **values)
