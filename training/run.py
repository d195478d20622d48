"""`python -m training.run CONFIG [key=value ...]`: train recipes on a LaMP-shaped folder and keep what was learned.

Takes the settings of a comparison (`python -m eval.run`), so that one config serves both, and `recipes=[NAME, ...]`.
Each is written to `out/seed-S/fitted/NAME`, where a comparison with the same `out` finds it; one of soft tokens alone
also to `out/NAME-S` as a plug that `PersonaPlug.from_pretrained` reads. `accelerate launch -m training.run ...` trains
on several devices (configs/accelerate).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from persona_plug.errors import ConfigError, PersonaPlugError
from training.claim import claim
from training.config import load
from training.data import load_data
from training.tasks import Task, load_task

DEFAULTS: dict[str, Any] = {
    "data": None,
    "task": None,
    "split": "dev",
    "methods": ["none", "task_prompt", "plug", "plug_shuffled", "plug_empty", "user_prior"],
    "recipes": ["plug"],
    "seeds": [0],
    "one_seed": [],
    "pairs": [],
    "out": "runs/compare",
    "llm": "smollm2-135m",
    "encoder": "minilm-l6",
    "dtype": None,
    "quantization": None,
    "plug": {},
    "fit": {},
    "lr_grid": [],
    "lr_steps": 10,
    "user_steps": 8,
    "valid": 0.15,
    "profile_targets": None,
    "augment": 0,
    "questions": None,
    "generated": 200,
    "generator": "transformers",
    "vllm": {},
    "beams": 1,
    "threads": None,
    "state_gigabytes": 4,
}

# What trained numbers depend on, the data and the seed aside.
TRAINED = (
    *("llm", "encoder", "dtype", "quantization", "plug", "fit", "lr_grid", "lr_steps"),
    *("valid", "profile_targets", "augment"),
)


def settle(arguments: Sequence[str]) -> dict[str, Any]:
    """Read settings from the command line, and set the number of threads.

    Raises:
        ConfigError: A setting is unknown, or no data is given.
    """
    settings = load(arguments, DEFAULTS)
    if not settings["data"]:
        raise ConfigError("data=DIR is missing: a folder with train_questions.json, train_outputs.json and the split's")
    if settings["threads"]:
        import torch

        torch.set_num_threads(int(settings["threads"]))
    return settings


def prepare(settings: Mapping[str, Any]) -> tuple[Task, Any, Any, dict[str, Any]]:
    """Return the task, its data, an untrained plug for it, and the plug's settings."""
    from persona_plug.plug import PersonaPlug

    task = load_task(settings["task"] or Path(settings["data"]).name)
    data = load_data(settings, task)
    lengths = {"max_answer_tokens": task.max_answer_tokens, "max_input_tokens": task.max_input_tokens}
    chosen = {**lengths, **settings["plug"]}
    how = {"dtype": settings["dtype"], "quantization": settings["quantization"]}
    budget = int(settings["state_gigabytes"] * 2**30)
    base = PersonaPlug.build(settings["llm"], settings["encoder"], state_budget=budget, **how, **chosen)
    base.reset(base.config.replace(template=data.template, answers=data.answers))
    base.llm.generation_config.num_beams = settings["beams"]
    return task, data, base, chosen


def main(arguments: Sequence[str]) -> None:
    """Train from the command line."""
    import torch
    from accelerate import PartialState

    from persona_plug.fit.config import FitConfig
    from training.recipes import RECIPES, choose_lr, fit

    settings = settle(arguments)
    # Binds each of several processes to its device before anything is loaded there. They wait for the main one while it
    # encodes, which may take hours.
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    task, data, base, chosen = prepare(settings)
    out = Path(settings["out"])
    with processes.main_process_first():
        claim(out, settings, TRAINED, task, ("train",))
    for name in settings["recipes"]:
        first = FitConfig.of({**settings["fit"], "seed": settings["seeds"][0]})
        grid, steps = settings["lr_grid"], settings["lr_steps"]
        lr = choose_lr(name, base, chosen, data, first, out / "lr" / name, grid, steps)
        for seed in settings["seeds"]:
            config = FitConfig.of({**settings["fit"], "seed": seed, "lr": lr})
            fitted = fit(name, base, chosen, data, config, out / f"seed-{seed}" / "fitted" / name)
            line = f"{name}, seed {seed}: {fitted.steps} steps, {fitted.seconds:.0f} s, {fitted.parameters:,} numbers"
            line += f", learning rate {fitted.lr:g}"
            if processes.is_main_process:
                if not (RECIPES[name].adapter or RECIPES[name].prefix):
                    line += f", {fitted.plug.save_pretrained(out / f'{name}-{seed}')}"
                sys.stdout.write(line + "\n")
    processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except PersonaPlugError as error:
        sys.exit(f"error: {error}")
