"""Training a plug: the answer head, the steps, the calibration, and `fit`, which does all and reports."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from persona_plug.data.splits import FitData, prepare
from persona_plug.fit.config import FitConfig
from persona_plug.fit.loop import train
from persona_plug.fit.report import FitReport, make_report
from persona_plug.fit.words import fit_words, split_users
from persona_plug.measure.stats import spread
from persona_plug.model import PlugModel


def task_prompt(plug: PlugModel, seed: int) -> PlugModel:
    """Return an untrained twin with as many soft tokens as the plug has, none of which knows the user."""
    config = plug.config.replace(user_tokens=0, task_tokens=plug.config.soft_tokens, words=False)
    return plug.twin(config, seed=seed)


def _capped(data: FitData, limit: int) -> FitData:
    """Keep `limit` held-out questions at most, and say so."""
    held = [data.held_out[i] for i in spread(len(data.held_out), limit)]
    if len(held) == len(data.held_out):
        return data
    note = f"{len(data.held_out) - len(held)} held-out questions left out of the report (report_samples={limit})"
    return dataclasses.replace(data, held_out=held, notes=[*data.notes, note])


def train_parts(
    plug: PlugModel, data: FitData, config: FitConfig, folder: Path, resume: bool = False
) -> list[dict[str, float]]:
    """Train the soft tokens, then the words head on users of its own; for the arguments see `fit.loop.train`."""
    if not plug.config.remembers:
        return train(plug, data, config, folder, resume)
    soft, gate = split_users(data, config.seed)
    log = train(plug, dataclasses.replace(data, train=soft), config, folder, resume)
    fit_words(plug, gate, data.valid, config.seed)
    return log


def _trained_task_prompt(plug: PlugModel, data: FitData, config: FitConfig, folder: Path, resume: bool) -> PlugModel:
    """Return the task prompt to compare with: the plug itself where none of its soft tokens knows the user."""
    if plug.config.remembers and not plug.config.user_tokens:
        return plug
    twin = task_prompt(plug, config.seed)
    train(twin, data, config, folder, resume)
    return twin


def fit(
    plug: PlugModel,
    data: Any,  # noqa: ANN401
    *,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    samples: str = "auto",
    valid: float = 0.1,
    held_out: float | None = None,
    targets_per_user: int = 32,
    template: str | None = None,
    answers: Sequence[str] | str | None = "auto",
    skip_bad: bool = False,
    columns: Mapping[str, str] | None = None,
    report: bool = True,
    report_samples: int = 400,
    generated: int = 48,
    examples: int = 3,
    **settings: Any,  # noqa: ANN401
) -> FitReport:
    """Train, calibrate, and tell on held-out users whether the output became theirs.

    Args:
        plug: The plug; it is trained from its untrained state.
        data: See `persona_plug.data.splits.prepare`, also for the next eight arguments.
        samples: `auto`, `leave_one_out` or `time`.
        valid: Share of users for early stopping and calibration.
        held_out: Share of users for the report; default the users that the data's sidecar names, else 0.2.
        targets_per_user: At most so many targets of one user.
        template: The LLM's instruction with `{input}`.
        answers: Answer space, `auto`, or None for free text.
        skip_bad: Skip and count bad records.
        columns: Field -> the data's own name of it.
        output_dir: Checkpoints, log, plots and report; default a temporary folder that is removed.
        resume: Go on with an interrupted run in `output_dir`.
        report: Also train the task prompt and compare on held-out users.
        report_samples: Held-out questions at most, evenly spread over the users.
        generated: Free text: answers generated a method for ROUGE.
        examples: Held-out answers shown side by side.
        settings: Fields of `FitConfig`.

    Raises:
        DataError: The data cannot be used; file, line and field are named.
        ConfigError: A setting is unknown or out of range.
    """
    config = FitConfig.of(settings)
    made = (
        data
        if isinstance(data, FitData)
        else prepare(
            data,
            samples=samples,
            valid=valid,
            held_out=held_out if report else 0.0,
            targets_per_user=targets_per_user,
            template=template,
            answers=answers,
            skip_bad=skip_bad,
            columns=columns,
            seed=config.seed,
        )
    )
    made = _capped(made, report_samples)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output_dir) if output_dir is not None else Path(scratch)
        plug.seed = config.seed
        plug.reset(plug.config.replace(template=made.template, answers=made.answers))
        log = train_parts(plug, made, config, folder / "plug", resume)
        twin = None
        if report and made.held_out:
            twin = _trained_task_prompt(plug, made, config, folder / "task_prompt", resume)
        return make_report(plug, twin, made, config, log, folder, generated=generated, examples=examples)
