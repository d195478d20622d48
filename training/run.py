"""`python -m training.run CONFIG [key=value ...]`: train recipes on a LaMP-shaped folder and keep what was learned.

A config file may serve a comparison (`python -m eval.run`), too: its own settings are passed over. Each of `recipes` is
written to `out/seed-S/fitted/NAME`, where a comparison with the same `out` finds it. One of soft tokens alone is also
written to `out/NAME-S` as a plug that `PersonaPlug.from_pretrained` reads. `accelerate launch -m training.run ...`
trains on several devices (configs/accelerate).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError
from training.claim import claim
from training.config import load, run_command
from training.data import load_data
from training.settings import RunSettings
from training.tasks import Task, load_task

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug

# What trained numbers depend on, the data and the seed aside.
TRAINED = (
    *("llm", "encoder", "dtype", "quantization", "plug", "fit", "lr_grid", "lr_steps"),
    *("valid", "profile_targets", "augment"),
)


def build_plug(settings: RunSettings, task: Task, data: FitData) -> PersonaPlug:
    """Load the frozen models, and return an untrained plug for the data."""
    import torch

    from persona_plug.plug import PersonaPlug

    if settings.threads:
        torch.set_num_threads(settings.threads)
    lengths = {"max_answer_tokens": task.max_answer_tokens, "max_input_tokens": task.max_input_tokens}
    return PersonaPlug.build(
        settings.llm,
        settings.encoder,
        dtype=settings.dtype,
        quantization=settings.quantization,
        state_budget=int(settings.state_gigabytes * 2**30),
        template=data.template,
        answers=data.answers,
        **{**lengths, **settings.plug},
    )


def main(arguments: Sequence[str]) -> None:
    """Train from the command line."""
    settings = load(arguments, RunSettings, shared=True)
    import torch
    from accelerate import PartialState

    from training.recipes import RECIPES, fit

    if unknown := [name for name in settings.recipes if name not in RECIPES]:
        raise ConfigError(f"no recipe {unknown[0]!r}; known are {', '.join(RECIPES)}")
    # Binds each of several processes to its device before anything is loaded there. They wait for the main one while it
    # encodes, which may take hours.
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    task = load_task(settings.task_name)
    data = load_data(settings, task)
    with processes.main_process_first():
        claim(settings, TRAINED, task, ("train",))
    base = build_plug(settings, task, data)
    for name in settings.recipes:
        for seed in settings.seeds:
            training = fit(name, base, data, settings, seed)
            line = f"{name}, seed {seed}: {training.steps} steps, {training.seconds:.0f} s, "
            line += f"{training.parameters:,} numbers, learning rate {training.lr:g}"
            if processes.is_main_process:
                if not RECIPES[name].prefix:
                    line += f", {training.plug.save_pretrained(Path(settings.out) / f'{name}-{seed}')}"
                sys.stdout.write(line + "\n")
    processes.wait_for_everyone()
    processes.destroy_process_group()


if __name__ == "__main__":
    run_command(main, RunSettings, resumes=True)
