"""The training itself: the answer head's start, the steps, the calibration."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainingArguments

from persona_plug.clock import Advance, phase
from persona_plug.config import PARTS
from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from persona_plug.dataset import PlugDataset, score_outputs
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.fit.answers import SAMPLES, fit_answers, folds_of
from persona_plug.fit.config import FitConfig
from persona_plug.fit.surroundings import undisturbed
from persona_plug.fit.trainer import PlugTrainer, is_whole, last_checkpoint, step_clock
from persona_plug.fit.work import affordable
from persona_plug.measure.stats import spread
from persona_plug.model import PlugModel

logger = logging.getLogger(__name__)

LOG = "log.jsonl"


@undisturbed()
def train(
    plug: PlugModel,
    data: FitData,
    config: FitConfig,
    folder: Path,
    resume: bool = False,
    what: str = "training the plug",
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
        what: What the progress calls it.
    """
    torch.manual_seed(config.seed)
    processes = PartialState(cpu=plug.llm.device.type == "cpu")
    checkpoint = last_checkpoint(folder) if resume else None
    processes.wait_for_everyone()  # all have looked
    if processes.is_main_process:
        _prepare_folder(folder, checkpoint)
    with processes.main_process_first():  # it encodes, the others read the cache
        train_set = PlugDataset(plug, data.train)
        looks = [data.valid[i] for i in spread(len(data.valid), config.eval_samples)]
        looks.sort(key=lambda e: len(plug.prompter.parts(e.input, e.prompt)))
        valid_set = PlugDataset(plug, looks)
    config = affordable(config, plug, train_set, processes.num_processes)
    drawn = config.steps * config.batch_size * config.gradient_accumulation * processes.num_processes
    lefts = [p.left for part in (train_set, valid_set) for p in part.parts]
    judged = min(SAMPLES, len(train_set)) if plug.answers is not None else 0
    reader = plug.splicer if plug.answers is None else plug.plain_splicer  # the head reads the LLM as it is
    reader.plan(lefts, drawn + len(valid_set) + judged)
    if train_set.cut and processes.is_main_process:
        logger.warning("%d of %d requests are longer than max_input_tokens and were cut", train_set.cut, len(train_set))
    passed = 0.0
    if plug.answers is not None:
        start = step_clock(plug)
        train_set.folds = start_answers(plug, data)
        passed = step_clock(plug) - start
    plug.embedder.set_dropout(config.history_dropout, config.empty_history, config.dropout)
    with phase(what, config.steps) as advance:
        trainer = _trainer(plug, train_set, valid_set, config, folder, advance, passed)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    plug.eval()
    if data.answers:
        _set_scale(plug, *_agreed(calibrate(plug, looks, config.batch_size)))
    processes.wait_for_everyone()
    return list(trainer.state.log_history)


def _trainer(
    plug: PlugModel,
    train_set: PlugDataset,
    valid_set: PlugDataset,
    config: FitConfig,
    folder: Path,
    advance: Advance,
    passed: float,
) -> PlugTrainer:
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
        disable_tqdm=True,
        dataloader_num_workers=0,
        restore_callback_states_from_checkpoint=True,  # patience counts on
    )
    if args.n_gpu > 1:  # without a launcher: transformers would copy the embedder, but not the LLM, to each of them
        args._n_gpu = 1
    try:
        return PlugTrainer(plug, args, train_set, valid_set, config, advance, passed)
    except RuntimeError as exc:  # transformers' way to say that a tracker is not installed
        if config.report_to == "none" or "installed" not in str(exc):
            raise
        raise ConfigError(f"report_to={config.report_to!r}: {exc}") from exc


def _prepare_folder(folder: Path, checkpoint: Path | None) -> None:
    """Leave of an earlier training what goes on: nothing, or what belongs to a checkpoint."""
    for old in folder.glob("checkpoint-*"):
        if checkpoint is None or not is_whole(old):
            shutil.rmtree(old)
    _cut_log(folder / LOG, int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    if checkpoint:
        # transformers names the best checkpoint by its whole path; the folder may have been moved.
        file = checkpoint / "trainer_state.json"
        state = json.loads(file.read_text(encoding="utf-8"))
        if best := state.get("best_model_checkpoint"):
            state["best_model_checkpoint"] = str(folder / Path(best).name)
            write_atomically(file, json.dumps(state, indent=2).encode())


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a training's log."""
    file = folder / LOG
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _cut_log(file: Path, step: int) -> None:
    """Keep a log's lines up to a step: what was logged later is trained, timed and logged once more."""
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_atomically(file, "".join(kept).encode())


def _agreed(found: Any) -> Any:  # noqa: ANN401
    """Return what the main process found: the last bit may differ between machines, and all must train one plug."""
    return broadcast_object_list([found])[0]


@torch.no_grad()
def start_answers(plug: PlugModel, data: FitData) -> Tensor:
    """Fit the answers head before the steps; return which of its folds (N,) has not seen each training sample's user.

    One process fits it, and all take what it found.
    """
    head = plug.answers
    assert head is not None  # noqa: S101 - the caller has looked
    if PartialState().is_main_process:
        with phase("fitting the answers head"):
            fit_answers(plug, data)
    state, crossed = _agreed((head.state_dict(), head.crossed))
    head.load_state_dict(state)
    head.crossed = crossed.to(head.offset.device)
    plug.embedder.set_population(head.population)
    return folds_of(data.train)


@torch.no_grad()
def calibrate(plug: PlugModel, samples: Sequence[Example], batch_size: int = 32) -> tuple[float, bool]:
    """Fit how scores become probabilities on held-back users, and set it.

    Returns:
        The temperature, by a line search on their NLL, and whether the LLM's log-likelihoods count: not where the
        answers head alone does no worse.
    """
    answers = list(plug.config.answers or ())
    gold = torch.tensor([answers.index(e.output.strip()) for e in samples])

    def search(parts: Collection[str]) -> tuple[float, float]:
        scores, grid = score_outputs(plug, samples, parts=parts, batch_size=batch_size), torch.logspace(-1, 1, 81)
        nll = torch.stack([torch.nn.functional.cross_entropy(scores / t, gold) for t in grid])
        return float(nll.min()), float(grid[int(nll.argmin())])

    loss, temperature = search(PARTS)
    alone = search(["answers"]) if plug.answers is not None else (float("inf"), 1.0)
    helps = loss < alone[0]
    if not helps:
        temperature = alone[1]
        logger.info("validation users do no better with the LLM's log-likelihoods: the answers head judges alone")
    _set_scale(plug, temperature, helps)
    return temperature, helps


def _set_scale(plug: PlugModel, temperature: float, llm_helps: bool) -> None:
    plug.embedder.score_temperature.fill_(temperature)
    if plug.answers is not None:
        plug.answers.llm_share.fill_(float(llm_helps))
