"""A comparison's rows: each method's values with their intervals, seed by seed, and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics.calibration import expected_calibration_error
from eval.metrics.lamp import QUESTION_RULES, SET_RULES
from eval.outcomes import Outcome
from eval.prompts.lamp import find_query
from eval.questions import Questions
from eval.report.results import interval_row
from persona_plug.measure.contrasts import estimate
from persona_plug.measure.facts import text_values
from persona_plug.measure.metrics import find_metric
from persona_plug.measure.stats import set_bootstrap

Means = dict[str, np.ndarray]  # metric -> (N,) means over seeds

# Cost in a row of results.json -> attribute of `Costs`.
COSTS = {
    "prompt_tokens_mean": "prompt_tokens",
    "generated_tokens_mean": "generated_tokens",
    "trainable_params": "trainable_params",
    "fit_seconds": "fit_seconds",
    "seconds_per_query": "seconds",
    "flops_per_query": "flops",
    "prompts_cut": "cut",
    "outside_llm": "outside_llm",
    "lr": "lr",
}


def add_text_values(outcome: Outcome, questions: Questions) -> None:
    """Add values per question of free text that need its texts and no model: of facts, and of the official rules."""
    texts = outcome.answers.texts
    if texts is None or questions.data.answers:
        return
    asked = [questions.data.held_out[i] for i in questions.texts]
    queries = [find_query(questions.task, e.input) or e.input for e in asked]
    outputs = [[item.output for item in e.history] for e in asked]
    for metric, row in text_values(texts, questions.references, queries, outputs).items():
        outcome.answers.values[metric] = np.full(len(questions.data.held_out), np.nan)
        outcome.answers.values[metric][list(questions.texts)] = row
    for metric in questions.task.metrics:
        if metric in QUESTION_RULES:
            values = np.full(len(questions.data.held_out), np.nan)
            values[list(questions.texts)] = QUESTION_RULES[metric](texts, questions.references, ())
            outcome.answers.values[metric] = values


def mean_values(outcomes: Sequence[Outcome]) -> Means:
    """Return the mean over seeds of each question's value in each metric."""
    runs = [outcome.answers.values for outcome in outcomes]
    return {metric: np.mean([run[metric] for run in runs], axis=0) for metric in runs[0]}


def method_row(means: Means, outcomes: Sequence[Outcome], questions: Questions) -> dict[str, Any]:
    """Return a method's row of results.json.

    Args:
        means: Its means over seeds.
        outcomes: One per seed.
        questions: What was asked.
    """
    users = questions.users
    intervals = {metric: estimate(values, users, metric) for metric, values in means.items()}
    owners = [users[i] for i in questions.texts]
    intervals |= {m: set_bootstrap(rule, owners) for m, rule in _set_rules(outcomes, questions).items()}
    costs = {key: _mean([getattr(o.costs, name) for o in outcomes]) for key, name in COSTS.items()}
    return {
        "metrics": {metric: interval_row(interval) for metric, interval in intervals.items()},
        "per_seed": [_seed_row(outcome, list(means)) for outcome in outcomes],
        **costs,
        "curve": outcomes[0].costs.curve,
    }


def details(
    means: Mapping[str, Means], outcomes: Mapping[str, Sequence[Outcome]], questions: Questions
) -> dict[str, Any]:
    """Return what the page draws beside the results; the first seed's texts are shown."""
    texts = {name: runs[0].answers.texts for name, runs in outcomes.items()}
    held_out = questions.data.held_out
    examples = []
    for at, i in enumerate(questions.texts):
        answers = {name: of_one[at] for name, of_one in texts.items() if of_one is not None}
        examples.append({"input": held_out[i].input, "reference": held_out[i].output, "answers": answers})
    return {
        "users": questions.users,
        "history_lengths": [len(e.history) for e in held_out],
        "values": means,
        "examples": examples,
    }


# From the indices of questions, among those with texts, to a metric's mean over seeds.
SetRule = Callable[[np.ndarray], float]


def _set_rules(outcomes: Sequence[Outcome], questions: Questions) -> dict[str, SetRule]:
    """Return the metrics that are no means over questions."""
    texts = [o.answers.texts for o in outcomes if o.answers.texts]
    tables = [o.answers.probabilities for o in outcomes if o.answers.probabilities is not None]
    answers = questions.data.answers or ()
    rules: dict[str, SetRule] = {}
    if len(texts) == len(outcomes):
        for name in questions.task.metrics:
            if name in SET_RULES:
                rules[name] = _text_rule(name, texts, questions.references, answers)
    if answers and len(tables) == len(outcomes):
        gold = np.array([answers.index(text) for text in questions.references])
        rules["ece"] = lambda rows: _over_seeds(expected_calibration_error(table[rows], gold[rows]) for table in tables)
    return rules


def _text_rule(name: str, runs: Sequence[Sequence[str]], references: Sequence[str], answers: Sequence[str]) -> SetRule:
    def measure(rows: np.ndarray) -> float:
        gold = [references[i] for i in rows]
        return _over_seeds(SET_RULES[name]([run[i] for i in rows], gold, answers) for run in runs)

    return measure


def _over_seeds(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _seed_row(outcome: Outcome, metrics: Sequence[str]) -> dict[str, float]:
    values = outcome.answers.values
    return {m: float(find_metric(m).transform(np.nanmean(values[m]))) for m in metrics}


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return _over_seeds(numbers) if numbers else None
