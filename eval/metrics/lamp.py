"""The official metrics of LaMP (arXiv 2304.11406) and LongLaMP (arXiv 2407.11016), as their own scripts compute them.

The official ROUGE reads the letters a to z and digits alone, so it has names of its own (`lamp-rouge-1`). `rouge-1`,
`rouge-L` and `chrf` read every script.

`score` takes predictions and references as lists or in LaMP's file shape. The functions below it are the rules
themselves. `QUESTION_RULES` and `SET_RULES` name them; `persona_plug.measure.metrics` says which direction is better;
`eval.metrics.classes` wraps them as an `evaluate.Metric`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from persona_plug.errors import DataError
from persona_plug.measure.metrics import METRICS
from persona_plug.measure.overlap import chrf, rouge
from training.tasks import Task, load_task

OFFICIAL_ROUGE = "lamp-rouge"
RESAMPLES = 1000  # of the bootstrap in rouge_score, whose middle value `evaluate` reports
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def score(
    task: str | Task, predictions: object, references: object, official_rouge: bool = False, seed: int = 0
) -> dict[str, float]:
    """Return a task's metrics.

    Args:
        task: A name in configs/tasks such as "LaMP_3", the path of a YAML file, or a task.
        predictions: A list of texts in order, a mapping of id to text, or LaMP's {"golds": [{"id", "output"}]}.
        references: The same; both lists, or both with ids.
        official_rouge: Report LaMP's ROUGE as the middle of a bootstrap, see `bootstrap_median`, instead of the plain
            mean.
        seed: Of that bootstrap.

    Returns:
        The task's metrics by name, out of `QUESTION_RULES` and `SET_RULES`. BLEU and chrF run from 0 to 100, as
        sacreBLEU prints them; all others from 0 to 1, or are errors in points of the scale.

    Raises:
        ConfigError: There is no such task.
        DataError: Ids differ (the first odd one is named), nothing is to be scored, or a reference is no answer of the
            task.
    """
    task, outputs, gold = _prepare(task, predictions, references)
    resample = seed if official_rouge else None
    return {name: compute(name, outputs, gold, task.answers or (), resample) for name in task.metrics}


def compute(
    name: str,
    predictions: Sequence[str],
    references: Sequence[str],
    answers: Sequence[str] = (),
    seed: int | None = None,
) -> float:
    """Return one metric.

    Args:
        name: One of `training.tasks.METRICS`.
        predictions: (N,) texts.
        references: (N,) texts, answers of the task if it has any.
        answers: The answer space, for "f1", "mae" and "rmse".
        seed: If given, LaMP's ROUGE is a bootstrap's middle instead of the mean.
    """
    if name in SET_RULES:
        return SET_RULES[name](predictions, references, answers)
    each = QUESTION_RULES[name](predictions, references, answers)
    if name.startswith(OFFICIAL_ROUGE) and seed is not None:
        return bootstrap_median(each, seed)
    return float(METRICS[name].transform(each.mean()))


# The rules. Texts are stripped first, as the official code does.


def hits(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return (N,) 1.0 where a stripped prediction is the stripped reference letter by letter, else 0.0."""
    return np.array([p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)], dtype=float)


def macro_f1(predictions: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> float:
    """Return the mean F1 over all `answers`; one that is neither predicted nor true counts as 0.

    Predictions outside the answers are wrong and belong to no class.
    """
    place = {answer: i for i, answer in enumerate(answers)}
    other = len(answers)
    guess, gold = (
        np.array([place.get(t.strip(), other) for t in texts], dtype=int) for texts in (predictions, references)
    )
    right = np.bincount(gold[guess == gold], minlength=other + 1)[:other]
    either = np.bincount(guess, minlength=other + 1)[:other] + np.bincount(gold, minlength=other + 1)[:other]
    return float((2 * right / np.maximum(either, 1)).mean())


def rating_errors(predictions: Sequence[str], references: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Return (N,) predicted minus true rating.

    A prediction counts as whatever number `float` reads, in the scale or not. Anything else counts as the end of the
    scale that is farther from the truth, the upper one where both are equally far. So do "nan" and "inf", which
    `float` reads but which leave the official code without a result.
    """
    levels = [float(a) for a in answers]
    low, high = min(levels), max(levels)
    errors = []
    for prediction, reference in zip(predictions, references, strict=True):
        truth = float(reference)
        value = _number(prediction)
        if value is None:
            value = low if abs(low - truth) > abs(high - truth) else high
        errors.append(value - truth)
    return np.array(errors, dtype=float)


def official_rouge(name: str, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return (N,) F-measures of "lamp-rouge-1" or "lamp-rouge-L" by rouge_score: its own tokens, no stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    key = name.removeprefix("lamp-").replace("-", "")
    scorer = RougeScorer([key], use_stemmer=False)
    pairs = zip(predictions, references, strict=True)
    return np.array([scorer.score(r.strip(), p.strip())[key].fmeasure for p, r in pairs], dtype=float)


def bootstrap_median(values: np.ndarray, seed: int) -> float:
    """Return the median of resampled means, which is what LaMP's own script reports for ROUGE.

    The script leaves the draws unseeded, so its fourth decimal changes from run to run.

    Args:
        values: (N,) one value a question.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)]
    return float(np.median(means))


class _NoSynonyms:
    """Stands in for WordNet and knows no word."""

    def synsets(self, _word: str) -> list[Any]:
        """Return no synonyms."""
        return []


def meteor(predictions: Sequence[str], references: Sequence[str], wordnet: object = None) -> np.ndarray:
    """Return (N,) METEOR scores by nltk (alpha 0.9, beta 3, gamma 0.5) **without synonyms**.

    Words match if they are equal or have one Porter stem. The official code also matches synonyms from WordNet, which
    nltk downloads: its scores are somewhat higher, so compare these among themselves alone. Sentences are split after
    ., ! and ? instead of by nltk's downloaded model, which tells abbreviations apart.

    Args:
        predictions: (N,) texts.
        references: (N,) texts.
        wordnet: A reader such as `nltk.corpus.wordnet`, to match synonyms as well.
    """
    from nltk.translate.meteor_score import single_meteor_score

    synonyms = _NoSynonyms() if wordnet is None else wordnet
    return np.array(
        [
            single_meteor_score(_words(r), _words(p), wordnet=synonyms)
            for p, r in zip(predictions, references, strict=True)
        ],
        dtype=float,
    )


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return sacreBLEU's corpus BLEU with its defaults, from 0 to 100."""
    import sacrebleu

    texts = [p.strip() for p in predictions]
    return float(sacrebleu.corpus_bleu(texts, [[r.strip() for r in references]]).score)


def _words(text: str) -> list[str]:
    from nltk.tokenize import word_tokenize

    # Whole lines need no downloaded model.
    return [w for s in SENTENCE_END.split(text.strip()) for w in word_tokenize(s, preserve_line=True)]


def _number(text: str) -> float | None:
    try:
        value = float(text.strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# A rule takes predictions (N,), references (N,) and the answer space.
Texts = Sequence[str]


def _absolute_errors(predictions: Texts, references: Texts, answers: Texts) -> np.ndarray:
    return np.abs(rating_errors(predictions, references, answers))


def _squared_errors(predictions: Texts, references: Texts, answers: Texts) -> np.ndarray:
    with np.errstate(over="ignore"):  # 1e300 is an answer too, and its square infinite
        return rating_errors(predictions, references, answers) ** 2


# Metric -> (N,) values whose mean, transformed, it is.
QUESTION_RULES: dict[str, Callable[[Texts, Texts, Texts], np.ndarray]] = {
    "accuracy": lambda predictions, references, _: hits(predictions, references),
    "mae": _absolute_errors,
    "rmse": _squared_errors,
    "rouge-1": lambda predictions, references, _: rouge(predictions, references)["rouge-1"],
    "rouge-L": lambda predictions, references, _: rouge(predictions, references)["rouge-L"],
    "chrf": lambda predictions, references, _: chrf(predictions, references),
    "lamp-rouge-1": lambda predictions, references, _: official_rouge("lamp-rouge-1", predictions, references),
    "lamp-rouge-L": lambda predictions, references, _: official_rouge("lamp-rouge-L", predictions, references),
    "meteor": lambda predictions, references, _: meteor(predictions, references),
}
# Metric -> its value of a whole set, which is no mean over questions.
SET_RULES: dict[str, Callable[[Texts, Texts, Texts], float]] = {
    "f1": macro_f1,
    "bleu": lambda predictions, references, _: bleu(predictions, references),
}


# What is scored against what.


def align(predictions: object, references: object) -> tuple[list[str], list[str], list[str]]:
    """Return names of the questions, their predictions and their references, in the references' order.

    Args:
        predictions: A list of texts, a mapping of id to text, or LaMP's file shape.
        references: The same; both lists, or both with ids.

    Returns:
        Three lists of equal length: ids ("place 0" and so on for lists), predictions, references.

    Raises:
        DataError: The two do not belong together, or one is of another shape or empty.
    """
    outputs, gold = _texts(predictions, "predictions"), _texts(references, "references")
    if isinstance(outputs, dict) and isinstance(gold, dict):
        if odd := sorted(set(outputs) ^ set(gold)):
            side = "predictions" if odd[0] in outputs else "references"
            raise DataError(
                f"ids of predictions and references differ in {len(odd)} place(s), first {odd[0]!r}, only in {side}"
            )
        return list(gold), [outputs[i] for i in gold], list(gold.values())
    if isinstance(outputs, list) and isinstance(gold, list):
        if len(outputs) != len(gold):
            raise DataError(f"{len(outputs)} predictions for {len(gold)} references; give one for each, in order")
        return [f"place {i}" for i in range(len(gold))], outputs, gold
    raise DataError("only one of predictions and references has ids; give both as lists, or both with ids")


def _prepare(task: str | Task, predictions: object, references: object) -> tuple[Task, list[str], list[str]]:
    """Return the task, predictions and references, which are all answers of the task."""
    task = task if isinstance(task, Task) else load_task(task)
    ids, outputs, gold = align(predictions, references)
    for ident, text in zip(ids, gold, strict=True):
        if task.kind == "label" and text.strip() not in (task.answers or ()):
            known = ", ".join(task.answers or ())
            raise DataError(f"references: {ident}: {text!r:.60} is no answer of {task.name}; its answers are {known}")
        if task.kind == "rating" and _number(text) is None:
            raise DataError(f"references: {ident}: {text!r:.60} is no number; {task.name} rates with numbers")
    return task, outputs, gold


def _texts(given: object, what: str) -> dict[str, str] | list[str]:
    """Return texts by id, or in order."""
    if isinstance(given, Mapping):
        pairs = _golds(given["golds"], what) if isinstance(given.get("golds"), list) else list(given.items())
        named: dict[str, str] = {}
        for ident, value in pairs:
            if str(ident) in named:
                raise DataError(f"{what}: id {str(ident)!r} stands there twice; keep one")
            named[str(ident)] = _text(value, f"{what}: {ident}")
        texts: dict[str, str] | list[str] = named
    elif isinstance(given, Sequence) and not isinstance(given, str | bytes):
        texts = [_text(value, f"{what}: place {i}") for i, value in enumerate(given)]
    else:
        raise DataError(f"{what}: give a list of texts, a mapping of id to text, or LaMP's file shape")
    if not texts:
        raise DataError(f"{what}: there are none; give at least one")
    return texts


def _golds(entries: list[Any], what: str) -> list[tuple[object, object]]:
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping) or not {"id", "output"} <= set(entry):
            raise DataError(f"{what}: entry {number} of 'golds' lacks 'id' or 'output'; give both")
    return [(entry["id"], entry["output"]) for entry in entries]


def _text(value: object, where: str) -> str:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: {type(value).__name__} is no text; give strings")
