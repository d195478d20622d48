"""Training a plug: the answer head, the steps, the calibration, and `fit`, which does all and reports."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors.torch import load_file

from persona_plug import persistence
from persona_plug.clock import phase, tell
from persona_plug.config import TURNS_ALONE, PlugConfig
from persona_plug.data.rows import local_path
from persona_plug.data.splits import FitData, prepare
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.fit.identity import check_identity, identity, write_identity
from persona_plug.fit.loop import calibrate, read_log, train
from persona_plug.fit.report import FitReport, make_report, noted
from persona_plug.fit.surroundings import check_launcher, room_on_disk, undisturbed
from persona_plug.fit.trainer import last_checkpoint
from persona_plug.fit.words import TOKENS, fit_words, split_users
from persona_plug.fit.work import pass_flops
from persona_plug.measure.stats import spread
from persona_plug.model import PlugModel
from persona_plug.models.tensors import write_tensors

WEIGHTS = "fitted.safetensors"  # what a finished training learned, beside its log
ADAPT = ("train", "none")  # what makes a plug: a training, or nothing but chat turns
WORDS_SHARE = 0.4  # of `FitConfig.flops`, for fitting the words head
FEW_USERS = 10  # held-out users, below which a bootstrap over users says little


def task_prompt(plug: PlugModel, seed: int) -> PlugModel:
    """Return an untrained twin with as many soft tokens as the plug has, none of which knows the user."""
    config = plug.config.replace(user_tokens=0, task_tokens=plug.config.soft_tokens, words=False, retrieve=0)
    return plug.twin(config, seed=seed)


def _capped(data: FitData, limit: int) -> FitData:
    """Keep `limit` held-out questions at most, and say so."""
    held = [data.held_out[i] for i in spread(len(data.held_out), limit)]
    if len(held) == len(data.held_out):
        return data
    note = f"{len(data.held_out) - len(held)} held-out questions left out of the report (report_samples={limit})"
    return dataclasses.replace(data, held_out=held, notes=[*data.notes, note])


def _untrained(config: PlugConfig) -> bool:
    """Whether a plug has nothing that steps train: the user's items as chat turns are all it adds."""
    return not (config.soft_tokens or config.lora)


def _changes(plug: PlugModel, data: FitData, adapt: str, lora: int | None, retrieve: int | None) -> dict[str, Any]:
    """Return what the config of the plug becomes.

    Raises:
        ConfigError: `adapt` is unknown, or asks for no training beside what has to be trained.
    """
    asked = {"lora": lora, "retrieve": retrieve}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    changes |= {"template": data.template, "answers": data.answers}
    if adapt not in ADAPT:
        raise ConfigError(f"adapt={adapt!r} is not one of {', '.join(ADAPT)}")
    if adapt == "none":
        wanted = plug.config.replace(**changes)
        if wanted.lora:
            raise ConfigError(f"adapt='none' trains nothing, and lora={wanted.lora} is trained: leave one of them out")
        if not wanted.retrieve:
            raise ConfigError("adapt='none' leaves the user's items in the prompt alone: say how many, as retrieve=4")
        return {**changes, **TURNS_ALONE}
    if _untrained(plug.config.replace(**changes)):
        raise ConfigError("this plug has nothing to train: build it with soft tokens or lora, or fit with adapt='none'")
    return changes


def train_parts(
    plug: PlugModel,
    data: FitData,
    config: FitConfig,
    folder: Path,
    resume: bool = False,
    what: str = "training the plug",
    start: str = "",
) -> list[dict[str, float]]:
    """Train soft tokens and adapters, then the words head on users of its own; returns the Trainer's log.

    Args:
        plug: See `fit.loop.train`, also for the next two arguments.
        data: See above.
        config: See above.
        folder: Checkpoints, the log and what was learned go here, and what was trained (`run.json`).
        resume: Go on with an interrupted training of the same models, data and settings; read a finished one back.
        what: What the progress calls it.
        start: Digest of the weights that the plug has from another one.

    Raises:
        MismatchError: The training that is to go on is another one.
        ConfigError: A launcher's variables are left in the environment.
        PersonaPlugError: The disk is full.
    """
    check_launcher()
    processes = PartialState(cpu=plug.llm.device.type == "cpu")
    present = identity(plug, data, config, processes.num_processes, start)
    finished = resume and (folder / WEIGHTS).is_file()
    if finished or (resume and last_checkpoint(folder)):
        check_identity(folder, present)
    processes.wait_for_everyone()  # all have looked
    if finished:
        read_back(plug, folder)
        return read_log(folder)
    if processes.is_main_process:
        with room_on_disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WEIGHTS).unlink(missing_ok=True)
            write_identity(folder, present)
    soft, gate = split_users(data, config.seed) if plug.config.remembers else (data.train, [])
    steps = dataclasses.replace(config, flops=(1 - WORDS_SHARE) * config.flops) if plug.config.remembers else config
    with room_on_disk(folder):
        log = train(plug, dataclasses.replace(data, train=soft), steps, folder, resume, what)
        if plug.config.remembers:
            with phase("fitting the memory of users' words"):
                tokens = WORDS_SHARE * config.flops / pass_flops(plug) if config.flops else TOKENS
                fit_words(plug, gate, data.valid, config.seed, tokens)
        if processes.is_main_process:
            write_tensors(folder / WEIGHTS, persistence.state_of(plug.parts()), {})
    processes.wait_for_everyone()
    return log


def read_back(plug: PlugModel, folder: Path) -> None:
    """Load what a finished training learned."""
    persistence.apply_weights(plug.parts(), load_file(folder / WEIGHTS), folder)
    plug.eval()


def _trained_task_prompt(plug: PlugModel, data: FitData, config: FitConfig, folder: Path, resume: bool) -> PlugModel:
    """Return the task prompt to compare with: the plug itself where only its words know the user."""
    if plug.config.remembers and not (plug.config.user_tokens or plug.config.retrieve):
        return plug
    twin = task_prompt(plug, config.seed)
    train_parts(twin, data, config, folder, resume, "training the task prompt, a control that knows no user")
    return twin


@undisturbed()
def fit(
    plug: PlugModel,
    data: Any,  # noqa: ANN401
    *,
    output_dir: str | os.PathLike[str] | None = None,
    resume: bool = False,
    samples: str = "auto",
    valid: float | None = None,
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
    keep_texts: bool = False,
    adapt: str = "train",
    lora: int | None = None,
    retrieve: int | None = None,
    start: str | os.PathLike[str] | None = None,
    **settings: Any,  # noqa: ANN401
) -> FitReport:
    """Train, calibrate, and tell on held-out users whether the output became theirs.

    With `output_dir` the plug is saved there as soon as it is trained, and once more with its report. Progress is shown
    on standard error; the caller's random numbers stay as they are.

    Args:
        plug: The plug; it is trained from its untrained state, or from `start`.
        data: See `persona_plug.data.splits.prepare`, also for the next eight arguments.
        samples: `auto`, `leave_one_out` or `time`.
        valid: Share of users for early stopping and calibration [0.1].
        held_out: Share of users for the report; default the users that the data's sidecar names, else 0.2.
        targets_per_user: At most so many targets of one user.
        template: The LLM's instruction with `{input}`.
        answers: Answer space, `auto`, or None for free text.
        skip_bad: Skip and count bad records.
        columns: Field -> the data's own name of it.
        output_dir: The plug, its checkpoints, log, plots and report; default a temporary folder that is removed.
        resume: Go on with an interrupted run in `output_dir`; a finished one is only reported on. Model, data, settings
            and seed must be those of the run.
        report: Also train the task prompt and compare on held-out users.
        report_samples: Held-out questions at most, evenly spread over the users.
        generated: Free text: answers generated a method for ROUGE.
        examples: Held-out answers shown side by side.
        keep_texts: Write these answers, which are texts of users, into `output_dir` (`fit_examples.md`). The report
            there holds none.
        adapt: `train`, or `none`: the plug then is the user's nearest items as chat turns. Nothing is trained, so it
            has neither soft tokens nor a words memory.
        lora: Rank of LoRA adapters that are trained beside the soft tokens; default the plug's own setting.
        retrieve: The user's nearest items in the prompt, as chat turns; default the plug's own setting.
        start: Folder or Hub id of a saved plug of the same settings: its weights are trained further.
        settings: Fields of `FitConfig`.

    Raises:
        DataError: The data cannot be used; file, line and field are named.
        ConfigError: A setting is unknown or out of range, or variables of a launcher are left over.
        MismatchError: The run that is to go on was another one, or `start` is another plug.
    """
    config = FitConfig.of(settings, ARGUMENTS)
    if start is not None and adapt == "none":
        raise ConfigError("adapt='none' trains nothing: leave start out")
    if keep_texts and output_dir is None:
        raise ConfigError("keep_texts=True writes into output_dir; name that folder, too")
    if output_dir is not None:
        persistence.make_folder(local_path(output_dir))  # before work
    check_launcher()
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
    made = _told(_capped(made, report_samples))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if output_dir is None else local_path(output_dir)
        plug.seed = config.seed
        plug.reset(plug.config.replace(**_changes(plug, made, adapt, lora, retrieve)))
        log: list[dict[str, float]] = []
        if adapt == "train":
            begun = "" if start is None else persistence.begin_with(start, plug.config, plug.parts())
            log = train_parts(plug, made, config, folder / "plug", resume, start=begun)
        elif made.answers and made.valid:
            calibrate(plug, made.valid)
        with room_on_disk(folder):
            _save(plug, folder)  # before anything is reported: whatever fails there, the plug is kept
        twin = None
        if report and made.held_out and adapt == "train":
            twin = _trained_task_prompt(plug, made, config, folder / "task_prompt", resume)
        asked = made if report else dataclasses.replace(made, held_out=[])
        result = make_report(plug, twin, asked, config, log, folder, generated=generated, examples=examples)
        with noted(result.notes, "the report beside the plug"):
            if keep_texts:
                result.save_texts(folder)
            _save(plug, folder, result)
        return result


def _told(data: FitData) -> FitData:
    """Say what the data are and how they are split, before any work, and what cannot be told from them."""
    users = len({e.user_id for e in data.held_out})
    if 0 < users < FEW_USERS:
        note = f"{users} held-out users tell little, since intervals are over users; add users, or raise held_out"
        data = dataclasses.replace(data, notes=[*data.notes, note])
    for name, part in (("training", data.train), ("validation", data.valid), ("held out", data.held_out)):
        tell(f"{name}: {len(part)} samples of {len({e.user_id for e in part})} users")
    for note in data.notes:
        tell(f"note: {note}")
    return data


def _save(plug: PlugModel, folder: Path, report: FitReport | None = None) -> None:
    """Save a plug; several processes write it once."""
    if PartialState().is_main_process:
        persistence.save(folder, plug.config, plug.parts(), plug.encoder, report)


ARGUMENTS = tuple(name for name in inspect.signature(fit).parameters if name not in ("plug", "data", "settings"))
