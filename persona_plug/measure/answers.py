"""What a method answers on held-out questions, and each question's value of each metric."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from persona_plug.config import PARTS
from persona_plug.data.history import Example, longest_by_user
from persona_plug.data.labels import levels_of
from persona_plug.dataset import score_outputs
from persona_plug.measure.overlap import overlaps
from persona_plug.measure.priors import label_priors, rating_priors, text_priors
from persona_plug.measure.stats import derangement, spread

if TYPE_CHECKING:
    from persona_plug.data.splits import FitData
    from persona_plug.model import PlugModel

# Writes the answers to examples: (plug, examples, whether with its soft tokens) -> texts.
Writer = Callable[["PlugModel", Sequence[Example], bool], list[str]]


@dataclass(frozen=True, slots=True)
class Answers:
    """What one method gave on the held-out questions.

    Attributes:
        values: Metric -> (N,) per-question values.
        texts: Answers: of free text those that were generated; else the likeliest label, for ratings the median.
        probabilities: (N, C) of the answers of a labelling task.
    """

    values: dict[str, np.ndarray]
    texts: list[str] | None = None
    probabilities: np.ndarray | None = None


def evaluate(
    plug: PlugModel,
    questions: Sequence[Example],
    generated: int | Sequence[int] = 48,
    personal: bool = True,
    parts: Collection[str] = PARTS,
    write: Writer | None = None,
) -> Answers:
    """Return one method's values on each question.

    Questions of like length run together: a batch is as wide as its longest row.

    Args:
        plug: The method.
        questions: The N questions.
        generated: Most answers of free text that are written, evenly spread; or the indices of the questions to answer.
        personal: Whether with soft tokens.
        parts: What of the plug counts for labels, see `PlugModel.score`.
        write: Writes texts; default the plug's own `generate`.
    """
    order = np.argsort([len(plug.prompter.parts(e.input, e.prompt)) for e in questions], kind="stable")
    back = np.argsort(order)
    queue = [questions[i] for i in order]
    scores = score_outputs(plug, queue, personal, parts)[back]
    if plug.config.answers:
        # The temperature was fitted for the plug's scores, not for those of a part.
        temperature = plug.embedder.score_temperature.cpu() if personal and set(parts) == set(PARTS) else 1.0
        return label_answers((scores / temperature).softmax(-1).double().numpy(), questions, plug.config.answers)
    lengths = np.array([len(plug.prompter.answer(e.output)) + 1 for e in questions])  # the end token counts
    values = {"nll": -scores[:, 0].double().numpy() / lengths}
    some = spread(len(questions), generated) if isinstance(generated, int) else list(generated)
    in_order = sorted(some, key=lambda i: int(back[i]))
    outputs = (write or _generate)(plug, [questions[i] for i in in_order], personal) if some else []
    texts = dict(zip(in_order, outputs, strict=True))
    return _with_overlaps(values, [texts[i] for i in some], questions, some) if some else Answers(values)


def _generate(plug: PlugModel, examples: Sequence[Example], personal: bool) -> list[str]:
    return plug.generate(examples, personal=personal)


def label_answers(probabilities: np.ndarray, questions: Sequence[Example], answers: Sequence[str]) -> Answers:
    """Return values of a method that gives probabilities (N, C).

    For ratings, MAE is of the median and RMSE of the mean of the distribution: each metric's own best decision.
    """
    gold = np.array([list(answers).index(e.output.strip()) for e in questions])
    rows = np.arange(len(gold))
    values = {
        "nll": -np.log(np.maximum(probabilities[rows, gold], 1e-12)),
        "accuracy": (probabilities.argmax(1) == gold).astype(float),
    }
    if numbers := levels_of(answers):
        levels = np.array(numbers)
        order = np.argsort(levels)
        cumulative = probabilities[:, order].cumsum(1)
        median = levels[order][(cumulative >= 0.5 - 1e-9).argmax(1)]
        values |= rating_errors(levels[gold], median, probabilities @ levels)
        decision = order[(cumulative >= 0.5 - 1e-9).argmax(1)]
    else:
        decision = probabilities.argmax(1)
    return Answers(values, [answers[i] for i in decision], probabilities)


def rating_errors(gold: np.ndarray, median: np.ndarray, mean: np.ndarray) -> dict[str, np.ndarray]:
    """Return absolute errors of one prediction and squared errors of another, (N,) each."""
    return {"mae": np.abs(gold - median), "rmse": (gold - mean) ** 2}


def prior_answers(plug: PlugModel, data: FitData, generated: int) -> dict[str, Answers]:
    """Return the LLM-free family's values on the held-out users."""
    questions = data.held_out
    if data.answers:
        table = label_priors(data.train, data.valid, questions, data.answers, plug.encoder)
        result = {name: label_answers(p, questions, data.answers) for name, p in table.items()}
        if levels_of(data.answers):
            gold = np.array([float(e.output) for e in questions])
            for name, prediction in rating_priors(data.train, data.valid, questions, plug.encoder).items():
                result[name] = Answers(rating_errors(gold, prediction, prediction))
        return result
    some = spread(len(questions), generated)
    if not some:
        return {}
    priors = text_priors([questions[i] for i in some], plug.encoder)
    return {name: _with_overlaps({}, texts, questions, some) for name, texts in priors.items()}


def _with_overlaps(
    values: dict[str, np.ndarray], texts: list[str], questions: Sequence[Example], some: Sequence[int]
) -> Answers:
    """Return values and texts with what the texts share with the user's; NaN where none was written."""
    found = {}
    for name, shared in overlaps(texts, [questions[i].output for i in some]).items():
        found[name] = np.full(len(questions), np.nan)
        found[name][list(some)] = shared
    return Answers({**values, **found}, texts)


def with_other_history(questions: Sequence[Example], seed: int = 0) -> list[Example]:
    """Return the questions with the longest history of another held-out user each, the same one for all of a user's."""
    other = derangement([e.user_id for e in questions], seed)
    histories = longest_by_user(questions)
    return [replace(e, history=histories.get(other[e.user_id], ())) for e in questions]
