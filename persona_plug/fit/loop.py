"""The training itself: the answer head's start, the steps, the calibration."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainingArguments

from persona_plug.clock import Advance, phase
from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from persona_plug.dataset import PlugDataset, score_outputs
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.fit.config import FitConfig
from persona_plug.fit.surroundings import undisturbed
from persona_plug.fit.trainer import PlugTrainer, is_whole, last_checkpoint
from persona_plug.measure.priors import fit_label_model
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
    drawn = config.steps * config.batch_size * config.gradient_accumulation * processes.num_processes
    lefts = [p.left for part in (train_set, valid_set) for p in part.parts]
    plug.splicer.plan(lefts, drawn + len(valid_set))
    if train_set.cut and processes.is_main_process:
        logger.warning("%d of %d requests are longer than max_input_tokens and were cut", train_set.cut, len(train_set))
    if plug.embedder.has_answer_head:
        train_set.offsets = _agreed(start_answer_head(plug, data))
    plug.embedder.set_dropout(config.history_dropout, config.empty_history, config.dropout)
    with phase(what, config.steps) as advance:
        trainer = _trainer(plug, train_set, valid_set, config, folder, advance)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    plug.eval()
    if data.answers:
        plug.embedder.score_temperature.fill_(_agreed(calibrate(plug, looks, config.batch_size)))
    processes.wait_for_everyone()
    return list(trainer.state.log_history)


def _trainer(
    plug: PlugModel,
    train_set: PlugDataset,
    valid_set: PlugDataset,
    config: FitConfig,
    folder: Path,
    advance: Advance,
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
        return PlugTrainer(plug, args, train_set, valid_set, config, advance)
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
def start_answer_head(plug: PlugModel, data: FitData) -> Tensor:
    """Set the answer head to the best LLM-free product of classifier and user frequencies (a convex fit, seconds).

    Trained jointly, the frequencies explain most answers before the request's words are learned, which ends worse on
    few users. Fitted first, it leaves to the LLM what the LLM adds. Returned are the scores (N, C) of the training
    samples by heads that did not see their users: the head's own, seen ones would leave too little to learn.
    """
    fitted = fit_label_model(data.train, data.valid, plug.config.answers or (), plug.encoder)
    weight, offset, population = (torch.from_numpy(a) for a in (fitted.weight, fitted.bias, fitted.population))
    plug.embedder.set_answer_head(weight, offset, fitted.power, population)
    return torch.from_numpy(fitted.crossed)


@torch.no_grad()
def calibrate(plug: PlugModel, samples: Sequence[Example], batch_size: int = 32) -> float:
    """Fit the temperature of candidate scores on held-back users by a line search on their NLL, and return it."""
    scores, answers = score_outputs(plug, samples, batch_size=batch_size), list(plug.config.answers or ())
    gold = torch.tensor([answers.index(e.output.strip()) for e in samples])
    grid = torch.logspace(-1, 1, 81)
    nll = torch.stack([torch.nn.functional.cross_entropy(scores / t, gold) for t in grid])
    best = grid[int(nll.argmin())]
    plug.embedder.score_temperature.fill_(float(best))
    return float(best)
