"""What a comparison needs to know beside its trainings; `python -m eval.settings > docs/settings.md` lists all."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval.methods import ALL, PRIOR, find_method
from persona_plug.config import PlugConfig
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from training.config import describe
from training.settings import PLUG_FIELDS, RunSettings


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(RunSettings):
    """Settings of `python -m eval.run [CONFIG] [key=value ...]`; fit.steps=40 changes one entry of a mapping.

    Attributes:
        split: Whose questions are asked: `dev` or `test`.
        methods: What is compared, names in docs/benchmark.md; `all` stands for every method with its controls.
        subject: Method whose two fixed contrasts decide: with another user's history, and against the best of the task
            prompt and what uses no LLM, which validation users choose. Both need `SUBJECT_shuffled`.
        one_seed: Methods that run with the first seed only, as they are expensive.
        pairs: Further contrasts, each between two methods: `[[lora, lora_user]]`.
        user_steps: Optimiser steps on each user's history for methods that train an adapter per user.
        questions: Questions asked, about so many and every user kept; null asks all.
        generated: Free-text questions that are answered in words, evenly spread; all are scored.
        beams: Beams of the search for an answer; 1 writes greedily.
        generator: What writes free text, `transformers` or `vllm`.
        vllm: Options of `vllm.LLM`.
    """

    split: Literal["dev", "test"] = "dev"
    methods: tuple[str, ...] = ("none", "task_prompt", "plug", "plug_shuffled", "plug_empty", "user_prior")
    subject: str = "plug"
    one_seed: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    user_steps: int = 8
    questions: int | None = None
    generated: int = 200
    beams: int = 1
    generator: Literal["transformers", "vllm"] = "transformers"
    vllm: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse values that cannot work, naming the field; write `all` out as the methods it stands for."""
        super().check()
        self.require_at_least(1, "user_steps", "questions", "generated", "beams")
        if not self.methods:
            raise ConfigError("methods=[] names none; give at least one, such as methods=[none, plug]")
        each = (name for entry in self.methods for name in (ALL if entry == "all" else (entry,)))
        object.__setattr__(self, "methods", tuple(dict.fromkeys(each)))
        for name in (*self.methods, *self.one_seed, self.subject):
            find_method(name)
        for name in (name for pair in self.pairs for name in pair):
            if name not in self.methods and not name.startswith(f"{PRIOR}: "):
                raise ConfigError(f"pairs: {name!r} is none of the methods compared; add it to methods=[...]")
        if self.generator == "vllm" and self.beams > 1:
            raise ConfigError(f"generator=vllm writes greedily: it knows no beams={self.beams}; give beams=1")


def page() -> str:
    """Return the page of the documentation that lists all settings of trainings and comparisons."""
    shared = describe(RunSettings)
    alone = [row for row in describe(ComparisonSettings) if row not in shared]
    plug = [row for row in describe(PlugConfig) if row[0] in PLUG_FIELDS]
    fit = [row for row in describe(FitConfig) if row[0] != "seed"]
    parts = [
        "# Settings",
        "`python -m training.run` and `python -m eval.run` take one YAML file and `key=value` arguments.",
        "- Arguments win over the file. Their values are YAML.\n"
        "- A name with a dot changes one entry of a mapping, in the file and as an argument: `fit.steps=40`. "
        "`fit={steps: 40}` replaces the whole mapping.\n"
        "- Unknown names and impossible values are refused before any work is done.\n"
        "- A file may serve both commands. A training passes over what is a comparison's alone, and says so.\n"
        "- `--help` lists the settings of a command.",
        "This page is written by `python -m eval.settings > docs/settings.md`.",
        *("## Training and comparison", _table(shared)),
        *("## Comparison alone", _table(alone)),
        *("## Entries of `fit`", _table(fit)),
        *("## Entries of `plug`", _table(plug)),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[tuple[str, str, str]]) -> str:
    cells = [[f"`{name}`", f"`{default}`", text] for name, default, text in rows]
    lines = [["setting", "default", "meaning"], ["---"] * 3, *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(page())
