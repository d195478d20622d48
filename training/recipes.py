"""What can be trained, by name, on the same samples and for the same steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file, save

from persona_plug.clock import clock
from persona_plug.config import PlugConfig
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.fit.config import FitConfig
from persona_plug.fit.run import train_parts
from persona_plug.persistence import apply_weights, state_of
from persona_plug.plug import PersonaPlug
from training.lora import with_lora
from training.prefix import with_prefix

WEIGHTS, FACTS, LOG = "fitted.safetensors", "fitted.json", "log.jsonl"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a method is trained.

    Attributes:
        plug: Fields of `PlugConfig` and the recipe's name under `recipe`; None trains no soft tokens.
        adapter: Whether LoRA adapters in the LLM are trained.
        prefix: Whether keys and values in front of every prompt are trained; no soft tokens then.
    """

    plug: Mapping[str, Any] | None = field(default_factory=dict)
    adapter: bool = False
    prefix: bool = False


RECIPES: dict[str, Recipe] = {
    "task_prompt": Recipe({"user_tokens": 0, "task_tokens": "all"}),
    "prefix_tuning": Recipe(None, prefix=True),
    "plug": Recipe(),
    "plug_mean": Recipe({"recipe": "mean"}),
    "plug_paper": Recipe({"recipe": "paper"}),
    "plug_paper_full": Recipe({"recipe": "paper", "train_request": True}),
    "uem": Recipe({"recipe": "uem"}),
    "persoma": Recipe({"recipe": "persoma"}),
    "persoma_mlp": Recipe({"recipe": "persoma_mlp"}),
    "persoma_transformer": Recipe({"recipe": "persoma_transformer"}),
    "persoma_lora": Recipe({"recipe": "persoma"}, adapter=True),
    "lora": Recipe(None, adapter=True),
    "plug_lora": Recipe(adapter=True),
    "words": Recipe({"recipe": "words"}),
    "words_lora": Recipe({"recipe": "words"}, adapter=True),
}


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained plug with what its training took.

    Attributes:
        plug: The plug.
        seconds: Of all optimiser steps and of fitting a words memory, see `persona_plug.clock.clock`.
        steps: Optimiser steps.
        parameters: How many parameters are trained.
        lr: Peak learning rate.
        curve: (step, seconds so far, validation loss) at each look.
    """

    plug: PersonaPlug
    seconds: float
    steps: int
    parameters: int
    lr: float
    curve: tuple[tuple[int, float, float], ...]


def fit(
    name: str, base: PersonaPlug, settings: Mapping[str, Any], data: FitData, config: FitConfig, folder: Path
) -> Fitted:
    """Train a recipe, or read it back from `folder` if it was trained there; an interrupted training goes on.

    Args:
        name: A name in `RECIPES`.
        base: Gives the frozen LLM, its cached states and the encoder; its config holds template and answers.
        settings: Fields of `PlugConfig` given by the user; a recipe's own choices win over them.
        data: Samples.
        config: Training settings, the seed among them.
        folder: Checkpoints, log and the result.

    Raises:
        ConfigError: There is no such recipe.
    """
    plug = make(name, base, settings, config.seed)
    file = folder / FACTS
    if file.is_file():
        apply_weights(plug.parts(), load_file(folder / WEIGHTS), folder)
    else:
        start = clock(plug.llm)
        train_parts(plug, data, config, folder, resume=True)
        passed = clock(plug.llm) - start
        lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
        looks = {
            line["step"]: (line["step"], line["seconds"], line["eval_loss"]) for line in lines if "eval_loss" in line
        }
        result = {
            "seconds": passed if plug.config.remembers else lines[-1]["seconds"],
            "steps": lines[-1]["step"],
            "lr": config.lr,
            "curve": [*looks.values()],
        }
        processes = PartialState()
        if processes.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / WEIGHTS, save({k: v.clone() for k, v in state_of(plug.parts()).items()}))
            write_atomically(file, (json.dumps(result) + "\n").encode())
        processes.wait_for_everyone()
    recorded = json.loads(file.read_text(encoding="utf-8"))
    count = sum(p.numel() for p in plug.embedder.parameters() if p.requires_grad)
    curve = tuple((int(step), float(seconds), float(loss)) for step, seconds, loss in recorded["curve"])
    return Fitted(plug, recorded["seconds"], recorded["steps"], count, recorded["lr"], curve)


def choose_lr(
    name: str,
    base: PersonaPlug,
    settings: Mapping[str, Any],
    data: FitData,
    config: FitConfig,
    folder: Path,
    grid: Sequence[float],
    steps: int,
) -> float:
    """Return the learning rate of a grid with the lowest validation loss after a short training each.

    Args:
        name: See `fit`, also for the next five arguments; each trial is kept in a folder of its own under `folder`.
        base: See above.
        settings: See above.
        data: See above.
        config: See above; its learning rate is returned if the grid is empty.
        folder: See above.
        grid: Peak learning rates to try.
        steps: Optimiser steps of a trial.
    """
    losses = {}
    for lr in grid:
        trial = dataclasses.replace(config, lr=lr, steps=steps, eval_every=steps)
        losses[lr] = fit(name, base, settings, data, trial, folder / f"lr-{lr:g}").curve[-1][2]
    return min(losses, key=losses.__getitem__, default=config.lr)


def make(name: str, base: PersonaPlug, settings: Mapping[str, Any], seed: int) -> PersonaPlug:
    """Return an untrained plug of a recipe. Without adapters it shares the frozen LLM and its cached states."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; known are {', '.join(RECIPES)}")
    recipe, known = RECIPES[name], base.config
    fields = {**settings, **(recipe.plug or {})}
    if fields.get("task_tokens") == "all":  # as many soft tokens as the plug has
        fields["task_tokens"] = known.soft_tokens
    config = PlugConfig.create(known.llm, known.encoder, fields.pop("recipe", known.recipe), **fields).replace(
        llm_width=known.llm_width,
        encoder_dim=known.encoder_dim,
        llm_fingerprint=known.llm_fingerprint,
        encoder_fingerprint=known.encoder_fingerprint,
        template=known.template,
        answers=known.answers,
        chat_template_args=known.chat_template_args,
        template_day=known.template_day,
    )
    plug = base.twin(config, seed=seed)
    if recipe.prefix:
        return with_prefix(plug)
    if recipe.adapter:
        return with_lora(plug, soft=recipe.plug is not None)
    return plug
