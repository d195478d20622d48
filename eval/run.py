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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.methods import PRIOR, method
from eval.metrics.lamp import CORPUS as SET_METRICS
from eval.metrics.lamp import compute, question_values
from eval.questions import with_questions
from eval.report.page import html, markdown
from eval.report.significance import contrasts, direction, usual_pairs
from eval.settings import ComparisonSettings
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.measure.stats import user_bootstrap
from persona_plug.measure.truncation import truncation_notes
from training.claim import claim
from training.config import load, run_command
from training.data import load_data
from training.run import TRAINED, build_plug
from training.tasks import Task, load_task

if TYPE_CHECKING:
    from eval.session import Outcome
    from persona_plug.plug import PersonaPlug

# What finished outcomes depend on; methods, seeds and threads may change from run to run in one folder.
FIXED = (*TRAINED, "split", "user_steps", "beams", "questions", "generated", "generator")
SET_DRAWS = 200  # of a metric that is computed anew for each draw of users


def main(arguments: Sequence[str]) -> None:
    """Run a comparison from the command line."""
    settings = load(arguments, ComparisonSettings)
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    results, details = compare(settings, out)
    command = shlex.join(["python", "-m", "eval.run", *arguments])
    write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    report = markdown(results, command)
    write_atomically(out / "report.md", report.encode())
    write_atomically(out / "report.html", html(results, command, details).encode())
    sys.stdout.write(report)


def prepare(settings: ComparisonSettings) -> tuple[Task, FitData, PersonaPlug, Mapping[str, Any]]:
    """Return the task, its data with the questions, an untrained plug, and the fields of plugs that share models."""
    task = load_task(settings.task_name)
    if settings.generator == "vllm" and task.no_repeat_ngram:
        raise ConfigError(f"generator=vllm writes greedily: it knows no no_repeat_ngram, which {task.name} asks for")
    data = with_questions(load_data(settings, task), settings, task)
    base, plug = build_plug(settings, task, data)
    base.llm.generation_config.num_beams = settings.beams
    return task, data, base, plug


def compare(settings: ComparisonSettings, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run every method for every seed; what is finished is read back from `out`, not computed again."""
    from eval.session import Session, expected_texts, ordered

    git = _git()  # before, not after: sources may change while it runs
    task, data, base, plug = prepare(settings)
    claim(out, settings, FIXED, task, ("train", settings.split))
    session = Session(task, data, base, dataclasses.replace(settings, plug=plug), out)
    found: dict[str, list[Outcome]] = {}
    repeats = {} if data.answers else {n: why for n in settings.methods if (why := _repeats(n))}
    notes = [f"{name} not run: for free text {why}" for name, why in repeats.items()]
    runnable = [n for n in settings.methods if n not in repeats]
    if not runnable:
        raise ConfigError("; ".join(notes))
    for name in ordered(runnable):
        for seed in settings.seeds[: 1 if name in settings.one_seed else None]:
            for row, outcome in session.outcomes(name, seed).items():
                found.setdefault(row, []).append(outcome)
    session.close()
    listed = [n for n in settings.methods if n in found] + [n for n in found if n not in settings.methods]
    found = {name: found[name] for name in listed}
    users = [e.user_id for e in data.held_out]
    texts = expected_texts(data.held_out, data.answers, settings.generated)
    for outcomes in found.values():
        for outcome in outcomes:
            _complete(outcome, task, data, texts)
    merged = {name: _mean_values([o.answers.values for o in outcomes]) for name, outcomes in found.items()}
    for name, outcomes in found.items():
        _write_predictions(out / "predictions", name, outcomes[0], task, data, texts)
    results = {
        "task": task.name,
        "task_version": task.version,
        "split": settings.split,
        "n": len(users),
        "n_users": len(set(users)),
        "llm": f"{settings.llm} {base.config.llm_fingerprint}",
        "encoder": f"{settings.encoder} {base.config.encoder_fingerprint}",
        "seeds": list(settings.seeds),
        "git": git,
        "versions": _versions(),
        "settings": dataclasses.asdict(settings),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()}",
        "data_notes": [*data.notes, *truncation_notes(base, data), *notes],
        "notes": {name: o[0].notes for name, o in found.items() if o[0].notes},
        "methods": {name: _row(merged[name], outcomes, task, data, texts, users) for name, outcomes in found.items()},
        "contrasts": contrasts(merged, users, dict.fromkeys([*usual_pairs(merged), *settings.pairs])),
    }
    return results, _details(merged, found, data, users, texts)


def _repeats(name: str) -> str | None:
    """Return why a method gives for free text just what another one gives, if it does."""
    if name == PRIOR:
        return None
    if not method(name).head:
        return "it is the plug itself, which has no answer head"
    return "it is summary, as there are no labels to count" if method(name).prompt == "profile" else None


def _complete(outcome: Outcome, task: Task, data: FitData, texts: Sequence[int]) -> None:
    """Add what is computed from stored texts and needs no model: the official rules' values per question."""
    values, answered = outcome.answers.values, outcome.answers.texts
    if answered is None or data.answers:
        return
    chosen = [data.held_out[i].output for i in texts]
    for metric, some in question_values(task, answered, chosen).items():
        whole = np.full(len(data.held_out), np.nan)
        whole[list(texts)] = some
        values[metric] = whole


def _mean_values(runs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {m: np.mean([r[m] for r in runs], axis=0) for m in runs[0]}


def _row(
    merged: Mapping[str, np.ndarray],
    outcomes: Sequence[Outcome],
    task: Task,
    data: FitData,
    texts: Sequence[int],
    users: Sequence[str],
) -> dict[str, Any]:
    from eval.metrics.classes import expected_calibration_error

    metrics: dict[str, Any] = {}
    per_seed: list[dict[str, float]] = [{} for _ in outcomes]
    for metric, values in merged.items():
        transform = direction(metric)[1]
        some = ~np.isnan(values)
        owners = [u for u, s in zip(users, some, strict=True) if s]
        interval = user_bootstrap(values[some], owners, transform=transform)
        metrics[metric] = {"value": interval.value, "ci95": [interval.low, interval.high]}
        for row, outcome in zip(per_seed, outcomes, strict=True):
            row[metric] = float(transform(np.nanmean(outcome.answers.values[metric])))
    gold = [data.held_out[i].output.strip() for i in texts]
    owners = [users[i] for i in texts]
    written = [o.answers.texts for o in outcomes]
    if all(written):
        runs = [list(w or ()) for w in written]
        for name in SET_METRICS:
            if name in task.metrics:
                metrics[name] = _over_users(
                    lambda rows, name=name: [
                        compute(name, [run[i] for i in rows], [gold[i] for i in rows], data.answers or ())
                        for run in runs
                    ],
                    owners,
                )
    if data.answers and all(o.answers.probabilities is not None for o in outcomes):
        index = np.array([data.answers.index(g) for g in gold])
        tables = [np.asarray(o.answers.probabilities) for o in outcomes]
        metrics["ece"] = _over_users(
            lambda rows: [expected_calibration_error(t[rows], index[rows]) for t in tables], owners
        )
    costs = {k: [o.costs.get(k) for o in outcomes] for k in outcomes[0].costs}

    def mean(name: str) -> float | None:
        known = [c for c in costs.get(name, []) if isinstance(c, float)]
        return float(np.mean(known)) if known else None

    return {
        "metrics": metrics,
        "per_seed": per_seed,
        "prompt_tokens_mean": mean("prompt_tokens"),
        "generated_tokens_mean": mean("generated_tokens"),
        "trainable_params": mean("trainable_params"),
        "fit_seconds": mean("fit_seconds"),
        "seconds_per_query": mean("seconds"),
        "flops_per_query": mean("flops"),
        "prompts_cut": mean("cut"),
        "outside_llm": mean("outside_llm"),
        "lr": mean("lr"),
        "curve": outcomes[0].costs.get("curve"),
    }


def _over_users(measure: Callable[[np.ndarray], list[float]], users: Sequence[str]) -> dict[str, Any]:
    """Return the mean over seeds of what `measure` says of rows, with the interval of drawing users anew."""
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    groups = [np.flatnonzero(owner == u) for u in range(len(names))]
    rng = np.random.default_rng(0)
    drawn = (np.concatenate([groups[u] for u in rng.integers(0, len(names), len(names))]) for _ in range(SET_DRAWS))
    low, high = np.percentile([np.mean(measure(rows)) for rows in drawn], [2.5, 97.5])
    return {"value": float(np.mean(measure(np.arange(len(users))))), "ci95": [float(low), float(high)]}


def _write_predictions(
    folder: Path, name: str, outcome: Outcome, task: Task, data: FitData, texts: Sequence[int]
) -> None:
    """Write the first seed's answers in LaMP's shape; for ratings also the distribution's means, which RMSE is of."""
    from persona_plug.measure.priors import is_rating

    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace(": ", "=").replace("/", "_")

    def write(file: str, answers: Sequence[str]) -> None:
        golds = [{"id": data.held_out[i].id, "output": a} for i, a in zip(texts, answers, strict=True)]
        text = json.dumps({"task": task.name, "golds": golds}, ensure_ascii=False, indent=1)
        write_atomically(folder / file, (text + "\n").encode())

    if outcome.answers.texts is not None:
        write(f"{stem}.json", outcome.answers.texts)
    if outcome.answers.probabilities is not None and is_rating(data.answers):
        means = outcome.answers.probabilities @ np.array([float(a) for a in data.answers or ()])
        write(f"{stem}.mean.json", [repr(float(m)) for m in means])


def _details(
    merged: Mapping[str, Mapping[str, np.ndarray]],
    found: Mapping[str, Sequence[Outcome]],
    data: FitData,
    users: Sequence[str],
    texts: Sequence[int],
) -> dict[str, Any]:
    examples = []
    for at, i in enumerate(texts):
        answers = {n: o[0].answers.texts[at] for n, o in found.items() if o[0].answers.texts is not None}
        examples.append({"input": data.held_out[i].input, "reference": data.held_out[i].output, "answers": answers})
    return {
        "users": list(users),
        "history_lengths": [len(e.history) for e in data.held_out],
        "values": {
            n: {m: [None if np.isnan(x) else float(x) for x in v] for m, v in values.items()}
            for n, values in merged.items()
        },
        "examples": examples,
    }


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
    run_command(main, ComparisonSettings)
