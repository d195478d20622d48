"""What a comparison was made to decide: two contrasts that are fixed beforehand, and what a reader should use.

The lift is the subject against itself with another user's history. The gain is the subject against the best that knows
no LLM or no user. Validation users of train choose that best, so that the questions choose nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.methods import PRIOR
from eval.questions import Questions
from eval.report.results import DECIDING, contrast_row
from persona_plug.measure.answers import evaluate, prior_answers
from persona_plug.measure.contrasts import MethodValues, contrasts, difference
from persona_plug.plug import PersonaPlug

RIVAL = "task_prompt"  # what is trained and knows no user; the others of the gain's rivals use no LLM


def decide(
    subject: str,
    values: MethodValues,
    users: Sequence[str],
    losses: Mapping[str, float],
    tokens: Mapping[str, float],
) -> dict[str, Any]:
    """Return the two contrasts, and which method a reader should use.

    Args:
        subject: The method that is decided on.
        values: See `MethodValues`.
        users: (N,) the owner of each question.
        losses: Validation loss of each rival of the gain.
        tokens: Prompt tokens of each method; 0 without an LLM.
    """
    pairs = {"lift": (subject, f"{subject}_shuffled")}
    if rivals := {name: loss for name, loss in losses.items() if DECIDING in values.get(name, {})}:
        pairs["gain"] = (subject, min(rivals, key=lambda name: rivals[name]))
    pairs = {name: pair for name, pair in pairs.items() if set(pair) <= set(values)}
    rows = contrasts(values, users, pairs.values(), test=True)
    of_pair = {row.pair: contrast_row(row) for row in rows if row.metric == DECIDING}
    decided = {name: of_pair[pair] for name, pair in pairs.items()}
    return {"subject": subject, "validation": dict(losses), **decided, **_advice(values, users, tokens)}


def _advice(values: MethodValues, users: Sequence[str], tokens: Mapping[str, float]) -> dict[str, str]:
    """Return the best method, and the one with the fewest prompt tokens that is not worse beyond chance."""
    own = {n: row[DECIDING] for n, row in values.items() if DECIDING in row and not n.endswith(("_shuffled", "_empty"))}
    if not own:
        return {}
    best = min(own, key=lambda name: float(np.nanmean(np.asarray(own[name], dtype=float))))
    alike = [n for n in own if n == best or difference(own[best], own[n], users, DECIDING).low <= 0]
    return {"best": best, "advice": min(alike, key=lambda name: (tokens.get(name, 0.0), list(own).index(name)))}


def validation_losses(rival: PersonaPlug | None, base: PersonaPlug, questions: Questions) -> dict[str, float]:
    """Return the validation loss of each rival of the gain.

    Args:
        rival: The trained task prompt, if it is compared.
        base: Gives the encoder.
        questions: Give the validation users.
    """
    data = dataclasses.replace(questions.data, held_out=questions.data.valid)
    answers = {f"{PRIOR}: {name}": of_one for name, of_one in prior_answers(base, data, 0).items()}
    if rival is not None:
        answers[RIVAL] = evaluate(rival, data.valid, 0)
    return {
        name: float(of_one.values[DECIDING].mean()) for name, of_one in answers.items() if DECIDING in of_one.values
    }
