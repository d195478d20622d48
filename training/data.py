"""A LaMP-shaped folder as samples for training and validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persona_plug.data.history import Example
from persona_plug.data.lamp import LampData, leave_one_out_profiles, read_lamp
from persona_plug.data.splits import FitData, augment
from training.settings import RunSettings
from training.tasks import Task


def load_data(settings: RunSettings, task: Task) -> FitData:
    """Read the training questions, and leave-one-out samples of their profiles; nothing is held out.

    Args:
        settings: The run's.
        task: Gives answer space and profile fields.

    Raises:
        DataError: A file is missing or not LaMP-shaped.
    """
    train = read_part(settings.data, "train", task)
    possible = leave_one_out_profiles(train.examples)
    targets = _draw(possible, settings.profile_targets)
    everything, notes = _usable([*train.examples, *targets], task.answers)
    users = sorted({e.user_id for e in train.examples})
    count = max(1, round(settings.valid * len(users)))
    valid = {str(u) for u in np.random.default_rng(0).choice(users, count, replace=False)}
    learned = [e for e in everything if e.user_id not in valid]
    validation = [e for e in everything if e.user_id in valid]
    sizes = f"{len(learned)} training samples of {len(users) - len(valid)} users, {len(validation)} of {len(valid)}"
    notes.append(f"{sizes} users held back, {len(targets)} of {len(possible)} profile items are targets")
    return FitData(augment(learned, settings.augment), validation, [], train.template, task.answers, notes=notes)


def read_part(folder: str, part: str, task: Task, template: str | None = None) -> LampData:
    """Read one part of a LaMP-shaped folder.

    Args:
        folder: Holds `{part}_questions.json` and `{part}_outputs.json`.
        part: `train` or a split.
        task: Gives the profile fields.
        template: The instruction of the questions; None finds it.

    Raises:
        DataError: A file is missing or not LaMP-shaped.
    """
    questions, outputs = (Path(folder) / f"{part}_{kind}.json" for kind in ("questions", "outputs"))
    fields = task.fields if task.fields != ("input", "output") else None
    return read_lamp(questions, outputs, template, fields)


def _draw(samples: list[Example], limit: int | None) -> list[Example]:
    """Return at most `limit` samples in their order, the same ones in every run."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(0).choice(len(samples), limit, replace=False)
    return [samples[i] for i in sorted(chosen)]


def _usable(samples: list[Example], answers: Sequence[str] | None) -> tuple[list[Example], list[str]]:
    """Return the samples whose output is one of the answers, and a note of how many are not."""
    usable = samples if not answers else [e for e in samples if e.output.strip() in answers]
    foreign = len(samples) - len(usable)
    note = f"{foreign} training samples left out: their output is none of the task's answers"
    return usable, [note] if foreign else []
