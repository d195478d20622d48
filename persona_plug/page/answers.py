"""One request answered in four ways: as this user, as another user, with few-shot turns, by the LLM alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from persona_plug.config import TURNS_ALONE
from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from persona_plug.generation import Generation
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

Column = Literal["own", "other", "turns", "base"]
COLUMNS: tuple[Column, ...] = ("own", "other", "turns", "base")

TURNS = 4  # items that the LLM is shown as chat turns


@dataclass(frozen=True, slots=True)
class Answer:
    """One column of the comparison.

    Attributes:
        column: Which one.
        user: Whose items stand behind it, None for the LLM alone and where there is no other user.
        text: The generated text or the chosen label; None where there is no answer, and `notes` say why.
        marks: (start, end) characters of the text that came from the user's own words.
        prompt_tokens: Positions of the LLM's input, soft tokens included.
        answer_tokens: Tokens that the LLM wrote, its end token included; 0 for a label, which is scored.
        seconds: From the request to the answer, reading of the store and marking included.
        probabilities: Label -> probability, in the plug's order; None for free text.
        weights: (item, weight), heaviest first; the rest of 1 is the null item's. None where there are no weights.
        notes: What was cut, left out or missing.
    """

    column: Column
    user: str | None
    text: str | None
    marks: Sequence[tuple[int, int]] = ()
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    probabilities: dict[str, float] | None = None
    weights: list[tuple[HistoryItem, float]] | None = None
    notes: list[str] = field(default_factory=list)


class Comparison:
    """Answers requests; one at a time, so that its seconds are of an answer that had the models to itself."""

    def __init__(self, plug: PersonaPlug, store: HistoryStore) -> None:
        """Take a plug and a store that keeps text."""
        self.plug, self.store = plug, store
        shown = plug.config.replace(**{**TURNS_ALONE, "retrieve": TURNS})
        self.turns = plug.twin(shown) if plug.prompter.chats else None
        self.alone = threading.Lock()

    def other(self, user: str) -> str | None:
        """Return the user with the most items besides this one, None if there is none; ties go to the first id."""
        rows = [row for row in self.store.users() if row.user_id != user and row.items]
        return min(rows, key=lambda row: (-row.items, row.user_id)).user_id if rows else None

    def answer(self, column: Column, user: str, request: str) -> Answer:
        """Answer a request in one of four ways.

        Args:
            column: `own`: the plug with this user's items. `other`: the plug with another user's. `turns`: the LLM
                alone, behind the user's four nearest items as chat turns. `base`: the LLM alone.
            user: The user; an unknown one has no items.
            request: What to answer.

        Raises:
            DataError: The request is empty.
        """
        if not request.strip():
            raise DataError("the request is empty: type what is to be answered")
        with self.alone:
            if column == "base":
                return self._run(column, None, self.plug, Example("", request, ""), personal=False)
            if column == "turns":
                return self._shown(user, request)
            whose = user if column == "own" else self.other(user)
            if whose is None:
                return Answer(column, None, None, notes=["No other user is in the store yet."])
            answer = self._run(column, whose, self.plug, request, user=whose, store=self.store)
            if len(self.store.read(whose).ids):
                return answer
            return replace(answer, weights=[], notes=[*answer.notes, "No items yet: a new user gets this answer."])

    def _shown(self, user: str, request: str) -> Answer:
        held = len(self.store.read(user).ids)
        if self.turns is None:
            return Answer("turns", user, None, notes=["This LLM has no chat template, and so no chat turns."])
        if not held:
            return Answer("turns", user, None, notes=["The user has no items to show yet."])
        try:
            answer = self._run("turns", user, self.turns, request, user=user, store=self.store)
        except DataError as exc:  # more turns than the LLM has positions for
            return Answer("turns", user, None, notes=[str(exc)])
        return replace(answer, weights=None, notes=[*answer.notes, f"{min(TURNS, held)} of {held} items shown."])

    def _run(
        self, column: Column, owner: str | None, plug: PersonaPlug, request: str | Example, **how: Any  # noqa: ANN401
    ) -> Answer:  # fmt: skip
        """Write free text, or choose a label, and time it."""
        start = time.perf_counter()
        one: Any = [request]
        made: Generation
        if plug.config.answers is None:
            count = _Count()
            made = plug.generate(one, return_details=True, streamer=count, **how)[0]
            return _answer(column, owner, made.text, made, time.perf_counter() - start, answer_tokens=count.tokens)
        if isinstance(request, Example):  # calibration is of the plug's scores, not of the LLM's
            chances = plug.score(one, **how)[0].softmax(-1)
        else:
            chances = plug.choose(one, **how)[1][0]
        seconds = time.perf_counter() - start
        shown = dict(zip(plug.config.answers, chances.tolist(), strict=True))
        # One more pass, not counted, tells the weights and what was cut.
        made = plug.generate(one, return_details=True, max_new_tokens=1, **how)[0]
        return _answer(column, owner, max(shown, key=lambda n: shown[n]), made, seconds, probabilities=shown)


class _Count:
    """Counts the tokens that the LLM writes; `generate` streams the prompt first, as rows."""

    tokens = 0

    def put(self, value: Tensor) -> None:
        if value.dim() == 1:
            self.tokens += len(value)

    def end(self) -> None:
        pass


def _answer(column: Column, user: str | None, text: str, made: Generation, seconds: float, **more: Any) -> Answer:  # noqa: ANN401
    notes = [f"{made.input_tokens_cut} tokens of the request cut."] if made.input_tokens_cut else []
    if made.items_dropped and column != "turns":
        notes.append(f"{made.items_dropped} older items left out: the plug reads the newest.")
    weights = made.weights or None
    return Answer(column, user, text, made.marks, made.prompt_tokens, seconds=seconds, weights=weights, notes=notes,
                  **more)  # fmt: skip
