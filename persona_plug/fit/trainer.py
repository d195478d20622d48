"""The training loop's parts: settings, samples as batches, and PlugTrainer on transformers.Trainer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from persona_plug.clock import Advance, clock
from persona_plug.dataset import Batch, PlugDataset
from persona_plug.fit.config import FitConfig
from persona_plug.model import PlugModel

COMPLETE = "complete"
NEEDED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")
FEW, FEW_LR = 32, 10.0  # parameters of at most so many numbers learn so much faster


class _Trained(nn.Module):
    """What the Trainer sees: embedder, answers head, adapters. It would write into `model.config`, here a PlugConfig.

    Its forward gives the loss, so that whatever wraps it for several processes sees every trained number in use.
    """

    def __init__(self, plug: PlugModel) -> None:
        super().__init__()
        self.embedder = plug.embedder
        self.answers, self.adapters = plug.answers, plug.adapters
        object.__setattr__(self, "plug", plug)

    plug: PlugModel

    def forward(self, token_weight: float, tokens: Tensor | None, batch: Batch) -> Tensor:
        output = self.plug(batch.history, batch.parts, batch.trees, folds=batch.folds)
        return batch.loss(output, self.answers, token_weight, tokens)


class PlugTrainer(Trainer):
    """transformers.Trainer for a plug: its loss, its validation, checkpoints that are whole or ignored."""

    def __init__(
        self,
        plug: PlugModel,
        args: TrainingArguments,
        train: PlugDataset,
        valid: PlugDataset,
        config: FitConfig,
        advance: Advance = lambda done, remark="": None,
        passed: float = 0.0,
    ) -> None:
        """Create the trainer; the LLM is no part of the model the Trainer sees.

        `advance` hears of every step; `passed` seconds went into what was fitted before the first.
        """
        self.fit_config = config
        callbacks = [
            EarlyStoppingCallback(config.patience),
            _JsonLog(Path(str(args.output_dir)) / "log.jsonl", plug, passed),
            _MarkComplete(),
            _DrawApart(),
            _Tell(advance),
        ]
        super().__init__(
            model=_Trained(plug),
            args=args,
            train_dataset=train,
            eval_dataset=valid,
            data_collator=_collator(train),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # log.jsonl has it all
        self.valid = valid

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ANN401
        """AdamW; single numbers (gains, temperatures, weights) take larger steps, and only matrices decay."""
        trained: Any = model if model is not None else self.model
        named = [(n, p) for n, p in trained.named_parameters() if p.requires_grad]
        few = [p for _, p in named if p.numel() <= FEW]
        flat = [p for _, p in named if p.numel() > FEW and p.dim() < 2]
        wide = [p for _, p in named if p.numel() > FEW and p.dim() >= 2]
        lr, decay = self.args.learning_rate, self.args.weight_decay
        groups = [
            {"params": few, "lr": lr * FEW_LR, "weight_decay": 0.0},
            {"params": flat, "lr": lr, "weight_decay": 0.0},
            {"params": wide, "lr": lr, "weight_decay": decay},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]])
        return self.optimizer

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:  # noqa: ANN401
        """Collate validation batches from the validation set's own tables."""
        usual, self.data_collator = self.data_collator, _collator(self.valid)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = usual

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Candidate loss plus weighted token loss; for free text the token loss alone."""
        weight = self.fit_config.token_weight if model.training else 0.0
        tokens = None
        if self.accelerator.num_processes > 1:
            # Averaged over the processes, the loss is then that of one process with all rows.
            count = inputs["batch"].lengths.sum().float().to(self.args.device)
            tokens = self.accelerator.reduce(count, "mean")
        loss = model(weight, tokens, inputs["batch"])
        return (loss, None) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:  # noqa: ANN401
        """Return the validation loss of a batch."""
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


def _collator(samples: PlugDataset) -> Callable[[Sequence[int]], dict[str, Batch]]:
    """Return what makes the Trainer's inputs: it looks for names in them, and moves what has a `to`."""
    return lambda indices: {"batch": samples.collate(indices)}


class _JsonLog(TrainerCallback):
    """Append every log line to a JSONL file, with the seconds that the answers head and the steps so far took.

    Looks at the validation users do not count; see `step_clock`.
    """

    def __init__(self, path: Path, plug: PlugModel, passed: float) -> None:
        self.path, self.plug = path, plug
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        self.seconds: float = json.loads(lines[-1]).get("seconds", 0.0) if lines else passed
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self.began = step_clock(self.plug)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self.seconds += step_clock(self.plug) - self.began

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = {"step": state.global_step, "seconds": round(self.seconds, 3), **(logs or {})}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class _MarkComplete(TrainerCallback):
    """Mark a checkpoint as whole once all processes have written their part; `resume` takes no other."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            mark = Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE
            mark.write_text(f"{processes.num_processes}\n", encoding="utf-8")
        processes.wait_for_everyone()


class _DrawApart(TrainerCallback):
    """Give each process random numbers of its own, which the Trainer does not: dropout would repeat itself."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        if args.process_index:  # the first draws as one process alone does
            torch.manual_seed(args.seed + (args.process_index << 32))


class _Tell(TrainerCallback):
    """Tell the progress of each step, with the newest losses."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.losses: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ANN401
        names = {"loss": "loss", "eval_loss": "validation loss"}
        self.losses |= {names[key]: f"{names[key]} {value:.3f}" for key, value in (logs or {}).items() if key in names}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        self.advance(state.global_step, ", ".join(self.losses.values()))


def step_clock(plug: PlugModel) -> float:
    """Return the seconds of `clock`, as if this training alone had computed the frozen states that it used."""
    bill = plug.plain_splicer.bill
    return clock(plug.llm) - bill.spent + bill.owed


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end (a kill while it is being deleted leaves its mark on a torso)."""
    if not (checkpoint / COMPLETE).is_file():
        return False
    processes = int((checkpoint / COMPLETE).read_text(encoding="utf-8") or 1)
    draws = ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    return all((checkpoint / name).is_file() for name in [*NEEDED, *draws])


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, or None."""
    whole = [p for p in folder.glob("checkpoint-*") if is_whole(p)]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)
