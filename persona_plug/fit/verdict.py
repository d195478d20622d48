"""What a report comes to: does the plug know its users, is it worth its LLM, do its answers change, and what to use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from persona_plug.measure.contrasts import LIFT, Contrast
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import interval_text

if TYPE_CHECKING:
    from persona_plug.data.history import Example
    from persona_plug.model import PlugModel

TURNS, WORDLESS, PRIOR = "turns", "plug: without words", "user_prior: "  # rows of a report
_NAMES = {
    "none": "the plain LLM",
    "task_prompt": "the task prompt",
    TURNS: "chat turns alone",
    WORDLESS: "the plug without its words memory",
    "plug": "the plug",
    f"{PRIOR}nearest_own_output": "copying the user's nearest output",
    f"{PRIOR}whole_request": "copying the request",
    f"{PRIOR}first_words": "the request's first words",
}

Metrics = Mapping[str, Mapping[str, Interval]]


def judge(
    metrics: Metrics, contrasts: Sequence[Contrast], changed: float | None, tokens: Mapping[str, float]
) -> list[str]:
    """Return the sentences that can be said.

    Args:
        metrics: Method -> metric -> value.
        contrasts: Paired differences.
        changed: Share of answers that another user's history would change, None where none were written.
        tokens: Method -> tokens that it adds to a request in the mean; methods that may be recommended.
    """
    lift = next((row for row in contrasts if row.pair == LIFT), None)
    if lift is None:
        return ["Knows the user: not measured."]
    prior = _best_prior(metrics, contrasts)
    lines = [_known(lift), _worth(prior), _texts(changed, contrasts), _recommended(metrics, lift, prior, tokens)]
    return [line for line in lines if line]


def token_costs(plug: PlugModel, task_prompt: PlugModel | None, questions: Sequence[Example]) -> dict[str, float]:
    """Return how many tokens each method that may be used adds to a request in the mean.

    Args:
        plug: The plug: its soft tokens, and the items that it shows.
        task_prompt: Its twin that knows no user, the plug itself, or None.
        questions: The requests.
    """
    plain, shown = (
        float(np.mean([len(p.left) + len(p.right) for p in plug.prompts(questions, personal)]))
        for personal in (False, True)
    )
    soft = float(np.mean([plug.embedder.soft_count(len(e.history)) for e in questions]))
    costs = {"none": 0.0, "plug": shown - plain + soft}
    if plug.config.retrieve:
        costs[TURNS] = shown - plain
    if task_prompt is not None:
        costs["task_prompt"] = float(task_prompt.embedder.soft_count(0))
    return {**costs, WORDLESS: costs["plug"]}


def _known(lift: Contrast) -> str:
    what = f"{_shown(lift)} over another user's history"
    if lift.low > 0:
        return f"Knows the user: yes, {what}."
    if lift.high < 0:
        return f"Knows the user: harm, {what}; do not use this plug."
    return f"Knows the user: not shown, {what}; more users, longer histories or more steps may show it."


def _best_prior(metrics: Metrics, contrasts: Sequence[Contrast]) -> Contrast | None:
    """Return the contrast of the plug with the best of what needs no LLM, in loss, or for texts in words shared."""
    rows = [row for row in contrasts if row.a == "plug" and row.b.startswith(PRIOR)]
    losses = [row for row in rows if row.metric == "nll"]
    if losses:
        return min(losses, key=lambda row: metrics[row.b]["nll"].value)
    shared = [row for row in rows if row.metric == "rouge-1"]
    return max(shared, key=lambda row: metrics[row.b]["rouge-1"].value, default=None)


def _worth(prior: Contrast | None) -> str:
    if prior is None:
        return ""
    what = f"{_shown(prior)} against {_name(prior.b)}"
    found = "yes" if prior.low > 0 else "no" if prior.high < 0 else "not shown"
    return f"Better than without an LLM: {found}, {what}."


def _texts(changed: float | None, contrasts: Sequence[Contrast]) -> str:
    if changed is None:
        return ""
    rows = [row for row in contrasts if row.pair == LIFT and row.metric in ("rouge-1", "accuracy")]
    lift = f", {_shown(rows[0])}" if rows else ""
    return f"Answers change with another user's history: {changed:.0%} of them{lift}."


def _recommended(metrics: Metrics, lift: Contrast, prior: Contrast | None, tokens: Mapping[str, float]) -> str:
    """Return what to use: the lowest loss of what may be used, and what it costs."""
    if prior is not None and prior.metric != "nll" and prior.high < 0:
        return f"Recommended: nothing yet; {_name(prior.b)} is nearer to what users wrote, so train longer."
    asked = {name: cost for name, cost in tokens.items() if "nll" in metrics.get(name, {})}
    if lift.high < 0:
        asked = {name: cost for name, cost in asked.items() if name in ("none", "task_prompt")}
    losses = {name: (metrics[name]["nll"].value, cost) for name, cost in asked.items()}
    if prior is not None and prior.metric == "nll":
        losses[prior.b] = metrics[prior.b]["nll"].value, -1.0
    if not losses:
        return ""
    best = min(losses, key=losses.__getitem__)
    cost = "it needs no LLM" if best.startswith(PRIOR) else f"it adds {losses[best][1]:.0f} tokens to a request"
    return f"Recommended: {_name(best)}, the lowest loss of {len(losses)}; {cost}."


def _name(method: str) -> str:
    return _NAMES.get(method, method)


def _shown(row: Contrast) -> str:
    return f"{row.metric} {interval_text(Interval(row.delta, row.low, row.high), '+.3f')}"
