"""A file of events as samples for training and validation, and as the questions of a comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from persona_plug.data.history import Example
from persona_plug.data.splits import FitData, prepare, read_sidecar
from persona_plug.errors import ConfigError
from persona_plug.measure.overlap import words
from training.tasks import Task

SPLITS = ("dev", "test")  # the users who are held out are halved, one half each
HELD_OUT = 0.3  # of the users, where the file's sidecar names none
QUESTIONS = 4  # of a held-out user, the last ones


def read_file(file: Path, task: Task, split: str, valid: float, targets: int | None) -> tuple[FitData, str]:
    """Return samples of a file of events, and a note of what was left out as leaks.

    Users who are held out for `dev` and for `test` are different people, the same ones in every run. A sample's history
    are earlier items where all items have times, else the user's others.

    Args:
        file: The events.
        task: Gives the answer space, and when an item is a leak.
        split: Whose questions are held out: `dev` or `test`; "" for none.
        valid: Share of the users for validation.
        targets: Training samples at most; None for all.

    Raises:
        DataError: The file cannot be read, or has too few users.
        ConfigError: There is no such split.
    """
    if split not in ("", *SPLITS):
        raise ConfigError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    named = read_sidecar(file).held_out
    data = prepare(file, valid=valid, held_out=named or HELD_OUT, answers=task.answers, seed=0)
    users = sorted({e.user_id for e in data.held_out})
    order = np.random.default_rng(0).permutation(len(users))
    asked = {users[i] for i in order[SPLITS.index(split) :: 2]} if split else set()
    questions = [e for user in sorted(asked) for e in [e for e in data.held_out if e.user_id == user][-QUESTIONS:]]
    train = data.train
    if targets is not None and targets < len(train):
        train = [train[i] for i in sorted(np.random.default_rng(0).choice(len(train), targets, replace=False))]
    count = 0
    parts = []
    for part in (train, data.valid, questions):
        clean, leaks = without_leaks(part, task.leak)
        count += leaks
        parts.append(clean)
    note = f"{count} history items left out: more than {task.leak:.0%} of their words stand in the sample"
    return dataclasses.replace(data, train=parts[0], valid=parts[1], held_out=parts[2]), note if count else ""


def without_leaks(samples: Sequence[Example], share: float) -> tuple[list[Example], int]:
    """Return samples without the history items that give them away, and how many items were left out.

    Args:
        samples: The samples.
        share: An item leaves where more than this share of its words stands in the sample's input or output.
    """
    if share >= 1:
        return list(samples), 0
    known: dict[str, frozenset[str]] = {}

    def of(text: str) -> frozenset[str]:
        if text not in known:
            known[text] = frozenset(words(text))
        return known[text]

    count, clean = 0, []
    for sample in samples:
        target = of(sample.input) | of(sample.output)
        kept = tuple(
            item
            for item in sample.history
            if len((own := of(item.input) | of(item.output)) & target) <= share * len(own)
        )
        count += len(sample.history) - len(kept)
        clean.append(dataclasses.replace(sample, history=kept))
    return clean, count
