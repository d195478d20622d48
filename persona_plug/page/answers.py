"""One request answered in four ways: by the LLM alone, with retrieval, as another user, as this user."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import DataError
from persona_plug.retrieval import Retriever

if TYPE_CHECKING:
    from torch import Tensor

    from persona_plug.generation import Generation
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

Column = Literal["base", "rag", "other", "own"]
COLUMNS: tuple[Column, ...] = ("base", "rag", "other", "own")

RAG_ITEMS = 4
RAG_TEXT_TOKENS = 64  # of each item's input and output; longer ones are cut and counted
RAG_ROOM = RAG_ITEMS * (2 * RAG_TEXT_TOKENS + 16)  # tokens that the items may take in front of the request


@dataclass(frozen=True, slots=True)
class Answer:
    """One column of the comparison.

    Attributes:
        column: Which one.
        user: Whose items stand behind it, None for the LLM alone and where there is no other user.
        text: The generated text or the chosen label; None where there is no answer, and `notes` say why.
        prompt_tokens: Positions of the LLM's input, soft tokens included.
        answer_tokens: Tokens that the LLM wrote, its end token included; 0 for a label, which is scored.
        seconds: From the request to the answer, reading of the store included.
        probabilities: Label -> probability, in the plug's order; None for free text.
        weights: (item, weight), heaviest first; the rest of 1 is the null item's. None where there are no weights.
        notes: What was cut, left out or missing.
    """

    column: Column
    user: str | None
    text: str | None
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
        # Retrieval puts items in front of the request: the LLM gets so much more room for them.
        longer = plug.config.replace(max_input_tokens=plug.config.max_input_tokens + RAG_ROOM)
        self.reader = plug.twin(longer)
        self.alone = threading.Lock()

    def other(self, user: str) -> str | None:
        """Return the user with the most items besides this one, None if there is none; ties go to the first id."""
        rows = [row for row in self.store.users() if row.user_id != user and row.items]
        return min(rows, key=lambda row: (-row.items, row.user_id)).user_id if rows else None

    def answer(self, column: Column, user: str, request: str) -> Answer:
        """Answer a request in one of four ways.

        Args:
            column: `base`: the LLM alone. `rag`: the LLM alone behind the user's four nearest items by BM25. `other`:
                the plug with another user's items. `own`: the plug with this user's.
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
            if column == "rag":
                return self._retrieved(user, request)
            whose = user if column == "own" else self.other(user)
            if whose is None:
                return Answer(column, None, None, notes=["No other user is in the store yet."])
            answer = self._run(column, whose, self.plug, request, user=whose, store=self.store)
            if len(self.store.read(whose).ids):
                return answer
            new = "No items yet: this is how the plug answers somebody new."
            return replace(answer, weights=[], notes=[*answer.notes, new])

    def _retrieved(self, user: str, request: str) -> Answer:
        start = time.perf_counter()
        texts = self.store.read(user).texts
        if not texts:
            return Answer("rag", user, None, notes=["Nothing to retrieve: the user has no items yet."])
        found = [texts[i] for i in Retriever().rank("bm25", request, texts, RAG_ITEMS)]
        prompt, cut = self._with_items(found, request)
        seconds = time.perf_counter() - start
        answer = self._run("rag", user, self.reader, Example("", request, "", prompt=prompt), personal=False)
        notes = [*answer.notes, f"{len(found)} of {len(texts)} items read."]
        if cut:
            notes.append(f"{cut} texts of items cut to {RAG_TEXT_TOKENS} tokens.")
        return replace(answer, seconds=answer.seconds + seconds, weights=None, notes=notes)

    def _with_items(self, items: Sequence[HistoryItem], request: str) -> tuple[str, int]:
        """Return the prompt with items in front of the filled template, and how many of their texts were cut."""
        cut = 0

        def short(text: str) -> str:
            nonlocal cut
            ids = self.plug.prompter.ids(text)
            cut += len(ids) > RAG_TEXT_TOKENS
            return text if len(ids) <= RAG_TEXT_TOKENS else self.plug.tokenizer.decode(ids[:RAG_TEXT_TOKENS])

        lines = [f'"{short(i.output)}" is the answer for "{short(i.input)}".' for i in items]
        over = self.plug.prompter.parts(request).cut  # the other columns do not read these tokens either
        kept = self.plug.tokenizer.decode(self.plug.prompter.ids(request)[:-over]) if over else request
        return "\n".join([*lines, self.plug.config.template.replace("{input}", kept)]), cut

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
    if made.items_dropped:
        notes.append(f"{made.items_dropped} older items left out: the plug reads the newest.")
    weights = made.weights or None
    return Answer(column, user, text, made.prompt_tokens, seconds=seconds, weights=weights, notes=notes, **more)
