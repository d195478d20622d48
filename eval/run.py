"""`python -m eval.run CONFIG [key=value ...]`: fit on train, compare on dev or test, with intervals over users.

Reads a LaMP-shaped folder, fits the plug and the task prompt for every seed, and writes `results.json`, `report.md` and
`predictions/METHOD.json` (LaMP's own shape). A value is the mean over seeds; intervals are bootstraps over users of the
per-question values averaged over seeds, and differences are paired.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from eval.config import load
from persona_plug.errors import ConfigError, PersonaPlugError
from persona_plug.lamp import leave_one_out_profiles, read_lamp
from persona_plug.persistence import write_atomically
from persona_plug.report import METRICS, Answers, contrasts, run_methods
from persona_plug.stats import user_bootstrap
from persona_plug.training_data import FitData

logger = logging.getLogger("eval.run")

DEFAULTS: dict[str, Any] = {
    "data": None,
    "task": None,
    "split": "dev",
    "methods": ["none", "task_prompt", "plug", "plug_shuffled", "plug_empty", "user_prior"],
    "seeds": [0],
    "out": "runs/compare",
    "llm": "smollm2-135m",
    "encoder": "minilm-l6",
    "plug": {},
    "fit": {},
    "valid": 0.15,
    "profile_targets": None,
    "generated": 200,
    "threads": None,
    "state_gigabytes": 4,
}
TASKS = Path(__file__).parent.parent / "configs" / "tasks"


def main(arguments: Sequence[str]) -> None:
    """Run a comparison from the command line."""
    settings = load(arguments, DEFAULTS)
    if not settings["data"]:
        raise ConfigError("data=DIR is missing: a folder with train_questions.json, train_outputs.json and the split's")
    if settings["threads"]:
        import torch

        torch.set_num_threads(int(settings["threads"]))
    out = Path(settings["out"])
    out.mkdir(parents=True, exist_ok=True)
    results = compare(settings, out)
    write_atomically(out / "results.json", (json.dumps(results, indent=2) + "\n").encode())
    report = markdown(results, " ".join(["python -m eval.run", *arguments]))
    write_atomically(out / "report.md", report.encode())
    sys.stdout.write(report)


def load_data(settings: dict[str, Any]) -> FitData:
    """Read train (its questions, and leave-one-out samples of its profiles) and the split to report on."""
    folder, split = Path(settings["data"]), settings["split"]
    task = _task(settings)
    train = read_lamp(folder / "train_questions.json", folder / "train_outputs.json")
    held = read_lamp(folder / f"{split}_questions.json", folder / f"{split}_outputs.json", train.template)
    samples = leave_one_out_profiles(train.examples)
    limit = settings["profile_targets"]
    if limit is not None and limit < len(samples):
        chosen = np.random.default_rng(0).choice(len(samples), limit, replace=False)
        samples = [samples[i] for i in sorted(chosen)]
    users = sorted({e.user_id for e in train.examples})
    if shared := set(users) & {e.user_id for e in held.examples}:
        logger.warning("%d users are in train and in %s", len(shared), split)
    count = max(1, round(settings["valid"] * len(users)))
    valid = {str(u) for u in np.random.default_rng(0).choice(users, count, replace=False)}
    everything = [*train.examples, *samples]
    answers = tuple(str(a) for a in task["answers"]) if task.get("answers") else None
    if answers:
        everything = [e for e in everything if e.output.strip() in answers]
    return FitData(
        [e for e in everything if e.user_id not in valid],
        [e for e in everything if e.user_id in valid],
        held.examples,
        train.template,
        answers,
    )


def compare(settings: dict[str, Any], out: Path) -> dict[str, Any]:
    """Fit and evaluate every method for every seed; a finished seed is read back from `out`, not computed again."""
    from persona_plug import model
    from persona_plug.fit import FitConfig, train

    model.STATE_BUDGET = int(settings["state_gigabytes"] * 2**30)
    data = load_data(settings)
    plug = model.PersonaPlug.build(settings["llm"], settings["encoder"], **settings["plug"])
    runs: list[dict[str, Answers]] = []
    timings = []
    for seed in settings["seeds"]:
        file = out / f"seed-{seed}.npz"
        if not file.exists():
            config = FitConfig.of({**settings["fit"], "seed": seed})
            plug.seed = seed
            plug.reset(plug.config.replace(template=data.template, answers=data.answers))
            start = time.perf_counter()
            log = train(plug, data, config, out / f"seed-{seed}" / "plug", resume=True)
            seconds = time.perf_counter() - start
            plug.save_pretrained(out / f"seed-{seed}" / "plug")
            wanted = [m for m in settings["methods"] if m not in ("plug", "user_prior")]
            found = run_methods(plug, data, config, out / f"seed-{seed}", True, wanted, settings["generated"])
            _save_answers(file, found, {"fit_seconds": seconds, "steps": max(r.get("step", 0) for r in log)})
        answers, facts = _load_answers(file)
        runs.append(answers)
        timings.append(facts)
    users = [e.user_id for e in data.held_out]
    merged = {
        name: Answers({m: np.mean([r[name].values[m] for r in runs], axis=0) for m in runs[0][name].values})
        for name in runs[0]
    }
    return {
        "task": settings["task"] or Path(settings["data"]).name,
        "split": settings["split"],
        "n": len(users),
        "n_users": len(set(users)),
        "llm": f"{settings['llm']} {plug.config.llm_fingerprint}",
        "encoder": f"{settings['encoder']} {plug.config.encoder_fingerprint}",
        "seeds": list(settings["seeds"]),
        "git": _git(),
        "versions": _versions(),
        "settings": settings,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_implementation()}",
        "methods": {name: _row(name, merged[name], runs, users) for name in merged},
        "fits": timings,
        "contrasts": contrasts(merged, users),
    }


def _row(name: str, merged: Answers, runs: list[dict[str, Answers]], users: Sequence[str]) -> dict[str, Any]:
    metrics, per_seed = {}, []
    for metric, values in merged.values.items():
        transform = METRICS[metric][1]
        some = ~np.isnan(values)
        found = user_bootstrap(values[some], [u for u, s in zip(users, some, strict=True) if s], transform=transform)
        metrics[metric] = {"value": found.value, "ci95": [found.low, found.high]}
    for run in runs:
        per_seed.append({m: float(METRICS[m][1](np.nanmean(v))) for m, v in run[name].values.items()})
    return {"metrics": metrics, "per_seed": per_seed}


def markdown(results: dict[str, Any], command: str) -> str:
    """Return the report: tables of values and of paired differences, and how to repeat them."""
    names = [m for m in METRICS if any(m in row["metrics"] for row in results["methods"].values())]
    lines = [
        f"# {results['task']}, {results['split']}",
        "",
        f"{results['n']} questions of {results['n_users']} users; seeds {results['seeds']}; LLM {results['llm']}; "
        f"encoder {results['encoder']}; {results['date']}; {results['machine']}; git {results['git']}.",
        "Mean over seeds, 95% intervals from a bootstrap over users.",
        "",
        f"`{command}`",
        "",
        "| method | " + " | ".join(f"{m} {'↓' if METRICS[m][0] else '↑'}" for m in names) + " | per seed |",
        "|---" * (len(names) + 2) + "|",
    ]
    for method, row in results["methods"].items():
        cells = []
        for metric in names:
            found = row["metrics"].get(metric)
            cells.append(f"{found['value']:.3f} [{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]" if found else "–")
        seeds = "; ".join(f"{s[names[0]]:.3f}" for s in row["per_seed"] if names[0] in s)
        lines.append(f"| {method} | " + " | ".join(cells) + f" | {names[0]}: {seeds} |")
    lines += ["", "| difference (positive: the first is better) | metric | delta [95% interval] |", "|---|---|---|"]
    for c in results["contrasts"]:
        mark = "" if c["low"] > 0 or c["high"] < 0 else " includes 0"
        lines.append(
            f"| {c['a']} − {c['b']} | {c['metric']} | {c['delta']:+.3f} [{c['low']:+.3f}, {c['high']:+.3f}]{mark} |"
        )
    return "\n".join(lines) + "\n"


def _task(settings: dict[str, Any]) -> dict[str, Any]:
    name = settings["task"] or Path(settings["data"]).name
    path = TASKS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in TASKS.glob("*.yaml")))
        raise ConfigError(f"no task {name!r} in configs/tasks; known are {known}")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dict(found or {})


def _save_answers(file: Path, answers: dict[str, Answers], facts: dict[str, float]) -> None:
    arrays = {f"{name}|{metric}": v for name, a in answers.items() for metric, v in a.values.items()}
    scratch = file.with_suffix(".tmp.npz")
    np.savez(scratch, **arrays, **{f"fact|{k}": np.array(v) for k, v in facts.items()})
    scratch.replace(file)


def _load_answers(file: Path) -> tuple[dict[str, Answers], dict[str, float]]:
    values: dict[str, dict[str, np.ndarray]] = {}
    facts = {}
    with np.load(file, allow_pickle=False) as stored:
        for key in stored.files:
            name, _, metric = key.partition("|")
            if name == "fact":
                facts[metric] = float(stored[key])
            else:
                values.setdefault(name, {})[metric] = stored[key]
    return {name: Answers(v) for name, v in values.items()}, facts


def _git() -> str:
    try:
        call = ["git", "describe", "--always", "--dirty"]  # git is found on PATH on purpose
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> dict[str, str]:
    names = ("persona-plug", "torch", "transformers", "numpy", "scikit-learn")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    try:
        main(sys.argv[1:])
    except PersonaPlugError as error:
        sys.exit(f"error: {error}")
