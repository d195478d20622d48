"""A LaMP-shaped folder or a file of events as training samples, and as the questions of a comparison."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persona_plug.data.history import Example
from persona_plug.data.lamp import LampData, leave_one_out_profiles, read_lamp
from persona_plug.data.splits import FitData
from persona_plug.errors import DataError
from training.events import read_file
from training.settings import RunSettings
from training.tasks import Task

logger = logging.getLogger(__name__)


def load_data(settings: RunSettings, task: Task, split: str = "", questions: int | None = None) -> FitData:
    """Read training samples, and hold out the questions of a split.

    Of a LaMP-shaped folder these are its questions, and leave-one-out samples of their profiles. See
    `training.events.read_file` for a file of events.

    Args:
        settings: The run's.
        task: Gives answer space and profile fields.
        split: Whose questions are held out; without a name none are.
        questions: See `sample_questions`.

    Raises:
        DataError: A file is missing or not LaMP-shaped, or the task lacks an answer of the split.
    """
    if Path(settings.data).is_file():
        return _of_events(settings, task, split, questions)
    train = _read(settings.data, "train", task)
    possible = leave_one_out_profiles(train.examples)
    targets = _draw(possible, settings.profile_targets)
    usable, notes = _usable([*train.examples, *targets], task.answers)
    users = sorted({e.user_id for e in train.examples})
    count = max(1, round(settings.valid * len(users)))
    valid = {str(u) for u in np.random.default_rng(0).choice(users, count, replace=False)}
    learned = [e for e in usable if e.user_id not in valid]
    validation = [e for e in usable if e.user_id in valid]
    if not learned or not validation:
        raise DataError(
            f"{settings.data}: {len(learned)} training and {len(validation)} validation samples have an answer of task "
            f"{task.name}, at least one of each is needed; check its answers, or valid={settings.valid}"
        )
    sizes = f"{len(learned)} training samples of {len(users) - len(valid)} users, {len(validation)} of {len(valid)}"
    notes.append(f"{sizes} users held back, {len(targets)} of {len(possible)} profile items are targets")
    asked = _read(settings.data, split, task, train.template).examples if split else []
    _check_answers(asked, task, Path(settings.data) / f"{split}_outputs.json")
    held_out = sample_questions(asked, questions)
    if shared := {*users} & {e.user_id for e in asked}:
        logger.warning("%d users are in train and in %s", len(shared), split)
    if split:
        notes.append(f"{len(held_out)} of {len(asked)} {split} questions asked")
    return FitData(augment(learned, settings.augment), validation, held_out, train.template, task.answers, notes)


def _of_events(settings: RunSettings, task: Task, split: str, questions: int | None) -> FitData:
    data, leaks = read_file(Path(settings.data), task, split, settings.valid, settings.profile_targets)
    held_out = sample_questions(data.held_out, questions)
    notes = [*data.notes, *([leaks] if leaks else []), f"{len(held_out)} {split} questions asked"]
    train = augment(data.train, settings.augment)
    return dataclasses.replace(data, train=train, held_out=held_out, notes=notes)


def augment(examples: Sequence[Example], times: int, seed: int = 0) -> list[Example]:
    """Follow each sample of more than two history items by copies with random parts of its history.

    A copy leaves out a share of the items drawn from [0, 0.5), and one item more; the others keep their order. PPlug's
    released code does so ten times, which its paper does not mention: an epoch is then eleven times as long.
    `FitConfig.history_dropout` draws such parts anew at each step instead.

    Args:
        examples: Training samples.
        times: Copies of a sample; 0 for none.
        seed: Seed of the draws.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for example in examples:
        samples.append(example)
        size = len(example.history)
        for _ in range(times if size > 2 else 0):
            kept = size - int(rng.uniform(0, 0.5) * size) - 1
            chosen = sorted(rng.choice(size, kept, replace=False))
            samples.append(dataclasses.replace(example, history=tuple(example.history[i] for i in chosen)))
    return samples


def sample_questions(examples: Sequence[Example], limit: int | None) -> list[Example]:
    """Return a fixed sample of about `limit` questions that keeps every user, in their order; None keeps all."""
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


def _read(folder: str, part: str, task: Task, template: str | None = None) -> LampData:
    """Read `train` or a split, whose questions have the template of `train`."""
    questions, outputs = (Path(folder) / f"{part}_{kind}.json" for kind in ("questions", "outputs"))
    return read_lamp(questions, outputs, template, task.fields if task.fields != ("input", "output") else None)


def _draw(samples: list[Example], limit: int | None) -> list[Example]:
    """Return at most `limit` samples in their order, the same ones in every run."""
    if limit is None or limit >= len(samples):
        return samples
    chosen = np.random.default_rng(0).choice(len(samples), limit, replace=False)
    return [samples[i] for i in sorted(chosen)]


def _check_answers(asked: Sequence[Example], task: Task, file: Path) -> None:
    """Refuse questions that no answer of the task is right for."""
    for example in asked if task.answers else ():
        if example.output.strip() not in (task.answers or ()):
            raise DataError(
                f"{file}: question {example.id!r}: {example.output!r:.60} is no answer of task {task.name}, "
                f"whose answers are {', '.join(task.answers or ())}; add it to the task's YAML file"
            )


def _usable(samples: list[Example], answers: Sequence[str] | None) -> tuple[list[Example], list[str]]:
    """Return the samples whose output is one of the answers, and a note of how many are not."""
    usable = samples if not answers else [e for e in samples if e.output.strip() in answers]
    foreign = len(samples) - len(usable)
    note = f"{foreign} training samples left out: their output is none of the task's answers"
    return usable, [note] if foreign else []
