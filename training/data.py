"""A LaMP-shaped folder as samples of train, validation and the split that is asked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from persona_plug.data.history import Example
from persona_plug.data.lamp import leave_one_out_profiles, read_lamp
from persona_plug.data.splits import FitData, augment
from training.tasks import Task

logger = logging.getLogger(__name__)


def load_data(settings: Mapping[str, Any], task: Task) -> FitData:
    """Read train (its questions, and leave-one-out samples of its profiles) and the split to report on.

    Args:
        settings: `data` (the folder), `split`, `valid` (share of training users held back), `profile_targets` (so many
            leave-one-out samples at most), `augment` (copies of a training sample with parts of its history) and
            `questions` (about so many of the split, every user kept).
        task: Gives answer space and profile fields.

    Raises:
        DataError: A file is missing or not LaMP-shaped.
    """
    folder, split = Path(settings["data"]), settings["split"]
    fields = task.fields if task.fields != ("input", "output") else None
    train = read_lamp(folder / "train_questions.json", folder / "train_outputs.json", fields=fields)
    files = folder / f"{split}_questions.json", folder / f"{split}_outputs.json"
    held = read_lamp(*files, train.template, fields=fields)
    possible = leave_one_out_profiles(train.examples)
    targets = _draw(possible, settings["profile_targets"])
    everything, notes = _usable([*train.examples, *targets], task.answers)
    users = sorted({e.user_id for e in train.examples})
    if shared := set(users) & {e.user_id for e in held.examples}:
        logger.warning("%d users are in train and in %s", len(shared), split)
    count = max(1, round(settings["valid"] * len(users)))
    valid = {str(u) for u in np.random.default_rng(0).choice(users, count, replace=False)}
    learned = [e for e in everything if e.user_id not in valid]
    looked_at = [e for e in everything if e.user_id in valid]
    asked = sample_questions(held.examples, settings["questions"])
    sizes = f"{len(learned)} training samples of {len(users) - len(valid)} users, {len(looked_at)} of {len(valid)}"
    notes += [
        f"{sizes} users held back, {len(targets)} of {len(possible)} profile items are targets",
        f"{len(asked)} of {len(held.examples)} {split} questions asked",
    ]
    return FitData(augment(learned, settings["augment"]), looked_at, asked, train.template, task.answers, notes=notes)


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


def sample_questions(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return a fixed sample of about `limit` questions that keeps every user, in their order."""
    if limit is None or limit >= len(examples):
        return list(examples)
    order = np.random.default_rng(0).permutation(len(examples)).tolist()
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(examples[i].user_id, i)
    chosen = set(first.values())
    for i in order:
        if len(chosen) >= limit:
            break
        chosen.add(i)
    return [examples[i] for i in sorted(chosen)]
