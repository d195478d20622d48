"""What held-out users' answers look like, beside what they really wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from persona_plug.data.history import Example, longest_by_user
from persona_plug.generation import write_texts
from persona_plug.measure.answers import Answers
from persona_plug.measure.stats import spread
from persona_plug.pairing import nearest

if TYPE_CHECKING:
    from persona_plug.model import PlugModel

TURNS = 4  # items shown as chat turns, the nearest to the request


def side_by_side(
    plug: PlugModel, questions: Sequence[Example], answers: dict[str, Answers], count: int
) -> list[dict[str, Any]]:
    """Return `count` held-out answers of the controls and the plug beside what the person wrote, with item weights."""
    texts = {name: a.texts for name, a in answers.items()}
    columns = {"no user": "plug_empty", "another user": "plug_shuffled", "this user": "plug"}
    if any(texts.get(m) is None for m in columns.values()):
        return []
    some = range(len(questions)) if plug.config.answers else spread(len(questions), len(texts["plug"] or ()))
    users: set[str] = set()
    rows: list[dict[str, Any]] = []
    for at, i in enumerate(some):
        example = questions[i]
        written = {label: (texts[m] or [])[at] for label, m in columns.items()}
        if len(rows) == count or example.user_id in users or len(example.history) < 3:
            continue
        users.add(example.user_id)
        detail = plug.generate(example.input, example.history, return_details=True, max_new_tokens=1)
        weights = [{"input": i.input, "output": i.output, "weight": round(w, 4)} for i, w in detail.weights[:3]]
        rows.append({"input": example.input, **written, "really wrote": example.output, "weights": weights})
    return rows


def one_request(plug: PlugModel, questions: Sequence[Example], count: int) -> dict[str, Any] | None:
    """Return one request as the plug answers it for `count` users, beside the plain LLM and few-shot chat turns.

    Returns:
        {"input", "plain", "users": [{"wrote", "turns", "plug"}]}: `wrote` is a text of the user's, `turns` the plain
        LLM's answer behind the user's nearest items, None without a chat template. None for labels, and without users.
    """
    histories = {user: history for user, history in longest_by_user(questions).items() if history}
    if plug.config.answers or not count or not histories:
        return None
    request = questions[0].input
    rows = [Example(user, request, "", history) for user, history in list(histories.items())[:count]]
    texts = plug.generate(rows)
    turns = few_shot(plug, rows)
    users = [
        {"wrote": row.history[-1].output, "turns": turn, "plug": text}
        for row, turn, text in zip(rows, turns, texts, strict=True)
    ]
    return {"input": request, "plain": plug.generate(request, personal=False), "users": users}


@torch.no_grad()
def few_shot(plug: PlugModel, rows: Sequence[Example]) -> list[str] | list[None]:
    """Return the plain LLM's answers behind each user's nearest items as chat turns; None without a chat template."""
    if not plug.prompter.chats:
        return [None] * len(rows)
    shown = nearest(plug.encoder, rows, TURNS, plug.config.max_history)
    parts = [plug.prompter.parts(row.input, shown=turns) for row, turns in zip(rows, shown, strict=True)]
    written = write_texts(plug.plain_splicer, plug.prompter, parts, plug.embed(None, len(rows)).soft, None, {})
    return [text for (text,) in written]
