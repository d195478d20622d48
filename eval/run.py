"""`python -m eval.run CONFIG [key=value ...]`: fit on train, compare on dev or test, with intervals over users.

Reads a LaMP-shaped folder and runs every method for every seed. Writes `results.json`, `report.md`, `report.html` and
`predictions/METHOD.json` (LaMP's own shape). A value is the mean over seeds; intervals are bootstraps over users of the
per-question values averaged over seeds, and differences are paired. A run that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.methods import by_training, find_method
from eval.questions import Questions
from eval.report.page import html, markdown
from eval.report.results import contrast_row, portable, to_json
from eval.settings import ComparisonSettings
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.measure.contrasts import contrasts, usual_pairs
from persona_plug.measure.truncation import truncation_notes
from training.claim import claim
from training.config import load, run_command
from training.data import load_data
from training.run import TRAINED, build_plug
from training.tasks import load_task

if TYPE_CHECKING:
    from eval.outcomes import Outcome
    from persona_plug.plug import PersonaPlug

# What finished outcomes depend on; methods, seeds and threads may change from run to run in one folder.
FIXED = (*TRAINED, "split", "user_steps", "beams", "questions", "generated", "generator")


def main(arguments: Sequence[str]) -> None:
    """Run a comparison from the command line."""
    settings = load(arguments, ComparisonSettings)
    out = Path(settings.out)
    results, details = compare(settings)
    results["command"] = shlex.join(["python", "-m", "eval.run", *portable(arguments)])
    report = markdown(results)
    files = {"results.json": to_json(results), "report.md": report, "report.html": html(results, details)}
    for name, text in files.items():
        write_atomically(out / name, text.encode())
    sys.stdout.write(report)


def prepare(settings: ComparisonSettings) -> tuple[Questions, PersonaPlug]:
    """Claim the run's folder; return what is asked, with what is trained on, and an untrained plug."""
    task = load_task(settings.task_name)
    if settings.generator == "vllm" and task.no_repeat_ngram:
        raise ConfigError(f"generator=vllm writes greedily: it knows no no_repeat_ngram, which {task.name} asks for")
    data = load_data(settings, task, settings.split, settings.questions)
    claim(settings, FIXED, task, ("train", settings.split))  # before the models are loaded, which may take minutes
    base = build_plug(settings, task, data)
    base.llm.generation_config.num_beams = settings.beams
    return Questions(task, data, settings.generated), base


def compare(settings: ComparisonSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run every method for every seed; what is finished is read back from `out`, not computed again."""
    from eval.decision import decide
    from eval.rows import add_text_values, details, mean_values, method_row
    from eval.session import Session

    git = _git()  # before, not after: sources may change while it runs
    questions, base = prepare(settings)
    task, data, users = questions.task, questions.data, questions.users
    repeats = {} if data.answers else {name: why for name in settings.methods if (why := find_method(name).repeats)}
    notes = [f"{name} not run: for free text {why}" for name, why in repeats.items()]
    names = [name for name in settings.methods if name not in repeats]
    if not names:
        raise ConfigError("; ".join(notes))
    runs: dict[str, list[Outcome]] = {}
    with closing(Session(questions, base, settings)) as session:
        for name in by_training(names):
            for seed in settings.seeds[: 1 if name in settings.one_seed else None]:
                for row, outcome in session.outcomes(name, seed).items():
                    add_text_values(outcome, questions)
                    runs.setdefault(row, []).append(outcome)
        losses = session.validation_losses() if {settings.subject, f"{settings.subject}_shuffled"} <= set(runs) else {}
    order = [*(name for name in names if name in runs), *runs]  # the prior's rows last
    runs = {name: runs[name] for name in order}
    means = {name: mean_values(outcomes) for name, outcomes in runs.items()}
    for name, outcomes in runs.items():
        _write_predictions(Path(settings.out) / "predictions", name, outcomes[0], questions)
    tokens = {name: outcomes[0].costs.prompt_tokens or 0.0 for name, outcomes in runs.items()}
    pairs = dict.fromkeys([*usual_pairs(means), *settings.pairs])
    results = {
        "task": task.name,
        "task_version": task.version,
        "split": settings.split,
        "n": len(users),
        "n_users": len(set(users)),
        "llm": f"{portable(settings.llm)} {base.config.llm_fingerprint}",
        "encoder": f"{portable(settings.encoder)} {base.config.encoder_fingerprint}",
        "seeds": list(settings.seeds),
        "git": git,
        "versions": _versions(),
        "settings": portable(dataclasses.asdict(settings)),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()}",
        "data_notes": [*data.notes, *truncation_notes(base, data), *notes],
        "notes": {name: outcomes[0].notes for name, outcomes in runs.items() if outcomes[0].notes},
        "methods": {name: method_row(means[name], outcomes, questions) for name, outcomes in runs.items()},
        "decision": decide(settings.subject, means, users, losses, tokens) if losses else None,
        "contrasts": [contrast_row(row) for row in contrasts(means, users, pairs)],
    }
    return results, details(means, runs, questions)


def _write_predictions(folder: Path, name: str, outcome: Outcome, questions: Questions) -> None:
    """Write the first seed's answers in LaMP's shape; for ratings also the distribution's means, which RMSE is of."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace(": ", "=").replace("/", "_")
    data, answers = questions.data, outcome.answers

    def write(file: str, outputs: Sequence[str]) -> None:
        golds = [{"id": data.held_out[i].id, "output": o} for i, o in zip(questions.texts, outputs, strict=True)]
        text = json.dumps({"task": questions.task.name, "golds": golds}, ensure_ascii=False, indent=1)
        write_atomically(folder / file, (text + "\n").encode())

    if answers.texts is not None:
        write(f"{stem}.json", answers.texts)
    if answers.probabilities is not None and "rmse" in answers.values:
        means = answers.probabilities @ np.array([float(a) for a in data.answers or ()])
        write(f"{stem}.mean.json", [repr(float(m)) for m in means])


def _git() -> str:
    try:
        call = ["git", "describe", "--always", "--dirty"]  # git is found on PATH on purpose
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    names = ("persona-plug", "torch", "transformers", "peft", "numpy", "scikit-learn")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    run_command(main, ComparisonSettings, resumes=True)
