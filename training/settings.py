"""What a training needs to know, as frozen, validated settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from persona_plug.config import SETTABLE, PlugConfig
from persona_plug.errors import ConfigError, unknown_setting
from persona_plug.fit.config import FitConfig
from training.config import Settings, describe

# What `plug` may set: adapters and items in the prompt are methods of their own, whatever the others are.
PLUG_FIELDS = tuple(name for name in SETTABLE if name not in ("lora", "retrieve"))


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Settings of `python -m training.run [CONFIG] [key=value ...]`; fit.steps=40 changes one entry of a mapping.

    Attributes:
        data: Folder with `train_questions.json` and `train_outputs.json`, in a comparison also the split's; or a file
            of events. Needed.
        task: Name of a task in `configs/tasks`, or path of a YAML file; null takes the name of the data.
        out: Folder of results; a run that was stopped goes on there.
        llm: Short name, folder or Hub id of the frozen LLM.
        encoder: Short name, folder or Hub id of the frozen sentence encoder.
        dtype: Dtype of the LLM; null takes bfloat16 where a GPU has it, else float32. `auto` measures which is faster.
        quantization: `int8` or `nf4` for the LLM's matrices, by bitsandbytes; null for none.
        recipes: What `training.run` trains, names in `training.recipes`.
        seeds: Seeds of weights, order and dropout; every method is trained once per seed.
        plug: Fields of `PlugConfig`, listed in docs/settings.md; a recipe's own choices win over them.
        fit: Fields of `FitConfig`, listed in docs/settings.md: how everything is trained.
        lr_grid: Learning rates to try with the first seed; the one with the lowest validation loss serves every seed.
            Empty takes `fit.lr`.
        lr_steps: Optimiser steps of each trial of `lr_grid`.
        valid: Share of the training users held back for early stopping and calibration, in (0, 1); at least one user.
        profile_targets: Items of training profiles that become training targets, at most; null takes all.
        augment: Copies of each training sample that see only parts of its history.
        threads: CPU threads of torch; null leaves the number to torch.
        state_gigabytes: Memory for frozen states of prompts that are kept across epochs, in GiB.
    """

    data: str = ""
    task: str | None = None
    out: str = "runs/compare"
    llm: str = "smollm2-135m"
    encoder: str = "minilm-l6"
    dtype: Literal["auto", "bfloat16", "float16", "float32", "float64"] | None = None
    quantization: Literal["int8", "nf4"] | None = None
    recipes: tuple[str, ...] = ("plug",)
    seeds: tuple[int, ...] = (0,)
    plug: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    lr_grid: tuple[float, ...] = ()
    lr_steps: int = 10
    valid: float = 0.15
    profile_targets: int | None = None
    augment: int = 0
    threads: int | None = None
    state_gigabytes: float = 4

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        if not self.data:
            raise ConfigError(
                "data=DIR is missing: a folder with train_questions.json, train_outputs.json and the split's, or a file"
                " of events"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ConfigError(f"seeds={list(self.seeds)} must be one or more different numbers from 0 up")
        self.require_at_least(0, "profile_targets", "augment", "state_gigabytes")
        self.require_at_least(1, "lr_steps", "threads")
        if not 0 < self.valid < 1:
            raise ConfigError(f"valid={self.valid!r} must be in (0, 1), such as valid=0.15")
        if any(lr <= 0 for lr in self.lr_grid):
            raise ConfigError(f"lr_grid={list(self.lr_grid)} must hold positive numbers")
        self._check_mappings()

    @classmethod
    def entries(cls) -> dict[str, list[tuple[str, str, str]]]:
        """Return the entries of `plug` and `fit`."""
        plug = [row for row in describe(PlugConfig) if row[0] in SETTABLE]
        return {"plug": plug, "fit": [row for row in describe(FitConfig) if row[0] != "seed"]}

    def _check_mappings(self) -> None:
        if "seed" in self.fit:
            raise ConfigError("fit.seed is not read by a run; give seeds=[0, 1]")
        if unknown := [name for name in self.plug if name not in PLUG_FIELDS]:
            raise ConfigError(f"plug: {unknown_setting(unknown[0], PLUG_FIELDS)}")
        try:
            name = "fit"
            FitConfig.of(dict(self.fit))
            name = "plug"
            PlugConfig.create(self.llm, self.encoder, **self.plug)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None

    @property
    def task_name(self) -> str:
        """Name or path of the task."""
        return self.task or Path(self.data).name.partition(".")[0]

    def fit_config(self, seed: int) -> FitConfig:
        """Return how to train with a seed."""
        return FitConfig.of({**self.fit, "seed": seed})
