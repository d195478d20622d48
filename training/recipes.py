"""What can be trained, by name, on the same samples and for the same steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState

from persona_plug.clock import clock
from persona_plug.config import PlugConfig
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.fit.config import FitConfig
from persona_plug.fit.loop import LOG
from persona_plug.fit.run import read_back, train_parts
from persona_plug.plug import PersonaPlug
from training.lora import RANK
from training.prefix import with_prefix
from training.settings import RunSettings

# What every plug of a run has in common, whatever its recipe.
SHARED = (
    *("llm_width", "prompt_width", "llm_fingerprint", "encoder_dim", "encoder_fingerprint", "template", "answers"),
    *("max_input_tokens", "max_answer_tokens", "chat_template_args", "template_day"),
)
FACTS = "fitted.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a method is trained.

    Attributes:
        plug: Fields of `PlugConfig` and the recipe's name under `recipe`.
        prefix: Whether keys and values in front of every prompt are trained; no soft tokens then.
    """

    plug: Mapping[str, Any] = field(default_factory=dict)
    prefix: bool = False


LORA_ALONE = {"user_tokens": 0, "task_tokens": 0, "words": False, "answer_head": False, "lora": RANK}
WORDS = {"recipe": "words", "words": True}
TASK_PROMPT = {"user_tokens": 0, "task_tokens": "all", "words": False}
TURNS = 2  # items as chat turns in the prompts of a training
RECIPES: dict[str, Recipe] = {
    "task_prompt": Recipe(TASK_PROMPT),
    "prefix_tuning": Recipe(TASK_PROMPT, prefix=True),
    "plug": Recipe(),
    "plug_mean": Recipe({"recipe": "mean"}),
    "plug_paper": Recipe({"recipe": "paper"}),
    "plug_paper_full": Recipe({"recipe": "paper", "train_request": True}),
    "uem": Recipe({"recipe": "uem"}),
    "persoma": Recipe({"recipe": "persoma"}),
    "persoma_mlp": Recipe({"recipe": "persoma_mlp"}),
    "persoma_transformer": Recipe({"recipe": "persoma_transformer"}),
    "persoma_lora": Recipe({"recipe": "persoma", "lora": RANK}),
    "lora": Recipe(LORA_ALONE),
    "plug_lora": Recipe({"lora": RANK}),
    "lora_turns": Recipe({**LORA_ALONE, "retrieve": TURNS}),
    "words": Recipe(WORDS),
    "words_lora": Recipe({**WORDS, "lora": RANK}),
    "words_lora_turns": Recipe({**WORDS, "lora": RANK, "retrieve": TURNS}),
}


@dataclass(frozen=True, slots=True)
class Training:
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


def fit(recipe: str, base: PersonaPlug, data: FitData, settings: RunSettings, seed: int, name: str = "") -> Training:
    """Train a recipe with a seed, or read it back from the run's folder; an interrupted training goes on.

    Args:
        recipe: A name in `RECIPES`.
        base: Gives the frozen LLM, its cached states and the encoder; its config holds lengths, template and answers.
        data: Samples.
        settings: The run's.
        seed: Seed of weights, order and dropout.
        name: What the training is called in the run's folder; default the recipe's name.

    Raises:
        ConfigError: There is no such recipe.
    """
    name = name or recipe
    folder, config = Path(settings.out) / f"seed-{seed}" / "fitted" / name, settings.fit_config(seed)
    if not (folder / FACTS).is_file():
        config = dataclasses.replace(config, lr=choose_lr(recipe, base, data, settings, name))
    plug = make(recipe, base, settings.plug, seed)
    facts = _learn(plug, data, config, folder, name)
    count = sum(p.numel() for p in plug.parameters() if p.requires_grad)
    curve = tuple((int(step), float(seconds), float(loss)) for step, seconds, loss in facts["curve"])
    return Training(plug, facts["seconds"], facts["steps"], count, facts["lr"], curve)


def choose_lr(recipe: str, base: PersonaPlug, data: FitData, settings: RunSettings, name: str) -> float:
    """Return the rate of `lr_grid` with the least validation loss after a short training; without a grid that of `fit`.

    Trials have the first seed and are kept: every seed learns at the same rate. See `fit` for the arguments.
    """
    config = settings.fit_config(settings.seeds[0])
    losses = {}
    for lr in settings.lr_grid:
        trial = dataclasses.replace(config, lr=lr, steps=settings.lr_steps, eval_every=settings.lr_steps)
        plug = make(recipe, base, settings.plug, trial.seed)
        folder = Path(settings.out) / "lr" / name / f"lr-{lr:g}"
        losses[lr] = _learn(plug, data, trial, folder, f"{name} at rate {lr:g}")["curve"][-1][2]
    return min(losses, key=losses.__getitem__, default=config.lr)


def _learn(plug: PersonaPlug, data: FitData, config: FitConfig, folder: Path, name: str) -> dict[str, Any]:
    """Train a plug and keep what it learned, or read it back; return what the training took."""
    file = folder / FACTS
    if file.is_file():
        read_back(plug, folder)
        return dict(json.loads(file.read_text(encoding="utf-8")))
    start = clock(plug.llm)
    train_parts(plug, data, config, folder, resume=True, what=f"training {name}")
    passed = clock(plug.llm) - start
    lines = [json.loads(line) for line in (folder / LOG).read_text(encoding="utf-8").splitlines()]
    looks = {line["step"]: (line["step"], line["seconds"], line["eval_loss"]) for line in lines if "eval_loss" in line}
    seconds = passed if plug.config.remembers else lines[-1]["seconds"]
    facts = {"seconds": seconds, "steps": lines[-1]["step"], "lr": config.lr, "curve": [*looks.values()]}
    processes = PartialState()
    if processes.is_main_process:
        write_atomically(file, (json.dumps(facts) + "\n").encode())
    processes.wait_for_everyone()
    return facts


def make(name: str, base: PersonaPlug, settings: Mapping[str, Any], seed: int) -> PersonaPlug:
    """Return an untrained plug of a recipe on the same frozen LLM; without adapters it shares cached states, too."""
    if name not in RECIPES:
        raise ConfigError(f"no recipe {name!r}; known are {', '.join(RECIPES)}")
    recipe, known = RECIPES[name], base.config
    fields = {**{field: getattr(known, field) for field in SHARED}, **settings, **recipe.plug}
    if fields.get("task_tokens") == "all":  # as many soft tokens as the plug has
        fields["task_tokens"] = known.soft_tokens
    config = PlugConfig.create(known.llm, known.encoder, **{"recipe": known.recipe, **fields})
    plug = base.twin(config, seed=seed)
    return with_prefix(plug) if recipe.prefix else plug
