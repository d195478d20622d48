"""Training a plug: the answer head, the steps, the calibration, and `fit`, which does all and reports."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainingArguments

from persona_plug.baselines import fit_label_model
from persona_plug.errors import ConfigError
from persona_plug.evaluation import prompt_length, score_samples, spread
from persona_plug.history import Example
from persona_plug.model import PersonaPlug
from persona_plug.persistence import write_atomically
from persona_plug.report import FitReport, make_report
from persona_plug.trainer import FitConfig, PlugDataset, PlugTrainer, is_whole, last_checkpoint
from persona_plug.training_data import FitData, prepare

logger = logging.getLogger(__name__)


def train(
    plug: PersonaPlug, data: FitData, config: FitConfig, folder: Path, resume: bool = False
) -> list[dict[str, float]]:
    """Train the plug's embedder in place and calibrate its scores; returns the Trainer's log.

    Several processes (`accelerate launch`) train one plug: each calls this with the same arguments and gets the same
    plug. The main process alone writes to `folder`, which all must see.

    Args:
        plug: The plug; its config must already hold the data's template and answers.
        data: Samples; only `train` and `valid` are read.
        config: Settings.
        folder: Checkpoints and `log.jsonl` go here.
        resume: Go on from the newest whole checkpoint there, if any; the result is that of an uninterrupted run.
    """
    torch.manual_seed(config.seed)
    processes = PartialState(cpu=plug.llm.device.type == "cpu")
    checkpoint = last_checkpoint(folder) if resume else None
    processes.wait_for_everyone()  # all have looked
    if processes.is_main_process:
        for old in folder.glob("checkpoint-*"):
            if checkpoint is None or not is_whole(old):
                shutil.rmtree(old)
        _cut_log(folder / "log.jsonl", int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    with processes.main_process_first():  # it encodes, the others read the cache
        train_set = PlugDataset(plug, data.train)
        looked_at = sorted(_spread(data.valid, config.eval_samples), key=lambda e: prompt_length(plug, e))
        valid_set = PlugDataset(plug, looked_at)
    drawn = config.steps * config.batch_size * config.gradient_accumulation * processes.num_processes
    lefts = [p.left for part in (train_set, valid_set) for p in part.parts]
    plug.splicer.plan(lefts, drawn + len(valid_set))
    if train_set.cut and processes.is_main_process:
        logger.warning("%d of %d requests are longer than max_input_tokens and were cut", train_set.cut, len(train_set))
    if plug.embedder.has_answer_head:
        train_set.offsets = _agreed(start_answer_head(plug, data))
    plug.embedder.history_dropout, plug.embedder.empty_history = config.history_dropout, config.empty_history
    if plug.config.user_tokens:
        plug.embedder.dropout.p = config.dropout
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.lr,
        warmup_steps=int(config.warmup * config.steps),
        weight_decay=config.weight_decay,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=config.eval_every,
        save_steps=config.eval_every,
        logging_steps=max(1, config.eval_every // 4),
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        bf16=config.bf16,
        seed=config.seed,
        report_to=config.report_to,
        remove_unused_columns=False,
        use_cpu=plug.llm.device.type == "cpu",
        disable_tqdm=not os.isatty(2),
        dataloader_num_workers=0,
        restore_callback_states_from_checkpoint=True,  # patience counts on
    )
    try:
        trainer = PlugTrainer(plug, args, train_set, valid_set, config)
    except RuntimeError as exc:  # transformers' way to say that a tracker is not installed
        if config.report_to == "none" or "installed" not in str(exc):
            raise
        raise ConfigError(f"report_to={config.report_to!r}: {exc}") from exc
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    plug.eval()
    if data.answers:
        plug.embedder.score_temperature.fill_(_agreed(calibrate(plug, valid_set, config.batch_size)))
    processes.wait_for_everyone()
    return list(trainer.state.log_history)


def _cut_log(file: Path, step: int) -> None:
    """Keep a log's lines up to a step: what was logged later is trained, timed and logged once more."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(file, "".join(kept).encode())


def _agreed(found: Any) -> Any:  # noqa: ANN401
    """Return what the main process found: the last bit may differ between machines, and all must train one plug."""
    return broadcast_object_list([found])[0]


def task_prompt(plug: PersonaPlug, seed: int) -> PersonaPlug:
    """Return an untrained twin with as many soft tokens as the plug has, none of which knows the user."""
    config = plug.config.replace(user_tokens=0, task_tokens=plug.config.soft_tokens)
    twin = type(plug)(config, plug.llm, plug.tokenizer, plug.encoder, seed)
    twin.splicer = plug.splicer  # the frozen states are the same
    return twin


@torch.no_grad()
def start_answer_head(plug: PersonaPlug, data: FitData) -> Tensor:
    """Set the answer head to the best LLM-free product of classifier and user frequencies (a convex fit, seconds).

    Trained jointly, the frequencies explain most answers before the request's words are learned, which ends worse on
    few users. Fitted first, it leaves to the LLM what the LLM adds. Returned are the scores (N, C) of the training
    samples by heads that did not see their users: the head's own, seen ones would leave too little to learn.
    """
    found = fit_label_model(data.train, data.valid, plug.config.answers or (), plug.encoder)
    embedder = plug.embedder
    embedder.null_answers.copy_(torch.from_numpy(found.population).log())
    embedder.population.copy_(torch.from_numpy(found.population))
    embedder.answer_head.weight.copy_(torch.from_numpy(found.weight))
    embedder.answer_head.bias.copy_(torch.from_numpy(found.bias))
    embedder.frequency_weight.fill_(found.power)
    return torch.from_numpy(found.crossed)


@torch.no_grad()
def calibrate(plug: PersonaPlug, samples: PlugDataset, batch_size: int = 32) -> float:
    """Fit the temperature of candidate scores on held-back users by a line search on their NLL, and return it."""
    scores, gold = score_samples(plug, samples, batch_size)
    grid = torch.logspace(-1, 1, 81)
    nll = torch.stack([torch.nn.functional.cross_entropy(scores / t, gold) for t in grid])
    best = grid[int(nll.argmin())]
    plug.embedder.score_temperature.fill_(float(best))
    return float(best)


def _capped(data: FitData, limit: int) -> FitData:
    """Keep `limit` held-out questions at most, and say so."""
    held = _spread(data.held_out, limit)
    if len(held) == len(data.held_out):
        return data
    note = f"{len(data.held_out) - len(held)} held-out questions left out of the report (report_samples={limit})"
    return dataclasses.replace(data, held_out=held, notes=[*data.notes, note])


def _spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """Return at most `limit` examples, evenly spread over the list."""
    return [examples[i] for i in spread(len(examples), limit)]


def fit(
    plug: PersonaPlug,
    data: Any,  # noqa: ANN401
    *,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    samples: str = "auto",
    valid: float = 0.1,
    held_out: float = 0.2,
    targets_per_user: int = 32,
    template: str | None = None,
    answers: Sequence[str] | str | None = "auto",
    skip_bad: bool = False,
    report: bool = True,
    report_samples: int = 400,
    generated: int = 48,
    examples: int = 3,
    **settings: Any,  # noqa: ANN401
) -> FitReport:
    """Train, calibrate, and tell on held-out users whether the output became theirs.

    Args:
        plug: The plug; it is trained from its untrained state.
        data: See `persona_plug.training_data.prepare`, also for the next seven arguments.
        samples: `auto`, `leave_one_out` or `time`.
        valid: Share of users for early stopping and calibration.
        held_out: Share of users for the report.
        targets_per_user: At most so many targets of one user.
        template: The LLM's instruction with `{input}`.
        answers: Answer space, `auto`, or None for free text.
        skip_bad: Skip and count bad records.
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
            seed=config.seed,
        )
    )
    made = _capped(made, report_samples)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(output_dir) if output_dir is not None else Path(scratch)
        plug.seed = config.seed
        plug.reset(plug.config.replace(template=made.template, answers=made.answers))
        log = train(plug, made, config, folder / "plug", resume)
        twin = task_prompt(plug, config.seed) if report and made.held_out else None
        if twin is not None:
            train(twin, made, config, folder / "task_prompt", resume)
        result = make_report(plug, twin, made, config, log, folder, generated=generated, examples=examples)
        object.__setattr__(plug, "fit_report", result)
        return result
