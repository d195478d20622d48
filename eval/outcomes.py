"""What one method gave with one seed, and its two files in the run's folder."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from persona_plug.files import write_atomically
from persona_plug.measure.answers import Answers

# Looks at the validation loss: (step, seconds so far, loss) each.
Curve = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Costs:
    """What a method cost; None where it was not measured.

    Attributes:
        prompt_tokens: Mean positions of a prompt, soft tokens included.
        generated_tokens: Mean tokens of a written answer.
        trainable_params: Trained parameters.
        fit_seconds: Seconds of training.
        seconds: Seconds per question.
        outside_llm: Share of them that the LLM does not run.
        lr: Learning rate that was chosen.
        curve: Looks at the validation loss during training.
        cut: Questions that were cut to fit the prompt.
        flops: Floating point operations of one prompt and its answer.
    """

    prompt_tokens: float | None = None
    generated_tokens: float | None = None
    trainable_params: float | None = None
    fit_seconds: float | None = None
    seconds: float | None = None
    outside_llm: float | None = None
    lr: float | None = None
    curve: Curve | None = None
    cut: float | None = None
    flops: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one method gave with one seed: values and texts, what it cost, and how often something was cut."""

    answers: Answers
    costs: Costs = field(default_factory=Costs)
    notes: dict[str, int] = field(default_factory=dict)


def write_outcome(stem: Path, outcome: Outcome) -> None:
    """Write STEM.json (texts, costs, notes), then STEM.npz (values, probabilities), which says that both are there."""
    arrays = {f"value|{metric}": values for metric, values in outcome.answers.values.items()}
    if outcome.answers.probabilities is not None:
        arrays["probabilities"] = outcome.answers.probabilities
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays' names for its options
    stem.parent.mkdir(parents=True, exist_ok=True)
    texts = {"texts": outcome.answers.texts, "costs": asdict(outcome.costs), "notes": outcome.notes}
    write_atomically(stem.with_name(stem.name + ".json"), (json.dumps(texts, ensure_ascii=False) + "\n").encode())
    write_atomically(stem.with_name(stem.name + ".npz"), buffer.getvalue())


def read_outcome(stem: Path) -> Outcome | None:
    """Return the outcome that `write_outcome` left, or None."""
    file = stem.with_name(stem.name + ".npz")
    if not file.is_file():
        return None
    texts = json.loads(stem.with_name(stem.name + ".json").read_text(encoding="utf-8"))
    with np.load(file, allow_pickle=False) as arrays:
        values = {key.partition("|")[2]: arrays[key] for key in arrays.files if key.startswith("value|")}
        probabilities = arrays["probabilities"] if "probabilities" in arrays.files else None
    return Outcome(Answers(values, texts["texts"], probabilities), Costs(**texts["costs"]), texts.get("notes", {}))


def write_outcomes(folder: Path, name: str, outcomes: Mapping[str, Outcome]) -> None:
    """Keep a method's outcome, or those of a family's rows `NAME: ROW` with a mark that none is missing."""
    for row, outcome in outcomes.items():
        write_outcome(folder / row.replace(": ", "="), outcome)
    if name not in outcomes:
        (folder / f"{name}.done").touch()


def read_outcomes(folder: Path, name: str) -> dict[str, Outcome]:
    """Return what `write_outcomes` left, or nothing."""
    is_family = (folder / f"{name}.done").is_file()
    names = [file.stem for file in sorted(folder.glob(f"{name}=*.npz"))] if is_family else [name]
    outcomes = {stem.replace("=", ": "): read_outcome(folder / stem) for stem in names}
    return {row: outcome for row, outcome in outcomes.items() if outcome is not None}
