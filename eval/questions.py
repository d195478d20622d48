"""The questions of a comparison, beside what is trained on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from eval.settings import ComparisonSettings
from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from training.data import read_part
from training.tasks import Task

logger = logging.getLogger(__name__)


def with_questions(data: FitData, settings: ComparisonSettings, task: Task) -> FitData:
    """Return training data together with the questions of the split, as what is held out.

    Raises:
        DataError: A file of the split is missing or not LaMP-shaped.
    """
    split = read_part(settings.data, settings.split, task, data.template).examples
    known = {e.user_id for e in (*data.train, *data.valid)}
    if shared := known & {e.user_id for e in split}:
        logger.warning("%d users are in train and in %s", len(shared), settings.split)
    questions = sample_questions(split, settings.questions)
    note = f"{len(questions)} of {len(split)} {settings.split} questions asked"
    return replace(data, held_out=questions, notes=[*data.notes, note])


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
