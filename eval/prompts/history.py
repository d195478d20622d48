"""A user's history in the prompts of their questions, as a method of the comparison wants it there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from eval.methods import TURNS, Method
from eval.prompts.lamp import find_query, render
from eval.prompts.summaries import Summaries, fitting, profile_text, with_profile
from eval.questions import Questions
from persona_plug.data.history import Example, HistoryItem, longest_by_user
from persona_plug.plug import PersonaPlug
from persona_plug.retrieval import Retriever, neighbours

NEIGHBOURS = 4  # users whose items help out where the own history is short


@dataclass(frozen=True, slots=True)
class Prompts:
    """Questions with their prompts.

    Attributes:
        examples: The questions.
        notes: What was cut or left out, and how often.
        debt: Seconds of the LLM for summaries that had been written before.
    """

    examples: list[Example]
    notes: Counter[str] = field(default_factory=Counter)
    debt: float = 0.0


class PromptWriter:
    """Writes history items, or a profile and items, into the prompts of questions."""

    def __init__(self, questions: Questions, base: PersonaPlug, folder: Path) -> None:
        """Take the task with its data, the plug whose LLM and encoder are used, and the folder of summaries."""
        self.task, self.data, self.base, self.folder = questions.task, questions.data, base, folder

    def write_prompts(self, method: Method, examples: Sequence[Example], seed: int) -> Prompts:
        """Return questions with a method's prompts; they stay as they are where it has none, or the plug's."""
        if method.prompt in (None, TURNS):
            return Prompts(list(examples))
        config, tokenizer = self.base.config, self.base.tokenizer
        inputs = [config.template.replace("{input}", e.input) for e in examples]
        histories, profiles, debt = [e.history for e in examples], [""] * len(examples), 0.0
        if method.prompt == "profile":
            profiles = [profile_text(history) for history in histories]
        elif method.prompt == "summary":
            summaries = Summaries(self.base, self.folder)
            profiles = summaries.of(self.task, histories)
            debt = summaries.price - summaries.seconds
        matches = [find_query(self.task, text) for text in inputs]
        notes = Counter({"questions whose query was not found: the whole input is used": matches.count(None)})
        queries = [text if query is None else query for query, text in zip(matches, inputs, strict=True)]
        prompts = []
        items_of_each = self._items(method, queries, histories, seed)
        for example, text, items, profile in zip(examples, inputs, items_of_each, profiles, strict=True):
            beginning = fitting(profile, text, tokenizer, config.max_input_tokens)
            room = config.max_input_tokens - len(tokenizer(with_profile(beginning, "-"))["input_ids"])
            prompt = render(self.task, text, items, tokenizer, room)
            notes["profiles that were cut to leave room for the question"] += beginning != profile
            notes["prompts with an item that was cut"] += prompt.items_cut > 0
            notes["items that found no room in a prompt"] += len(items) - prompt.items_used
            prompts.append(replace(example, prompt=with_profile(beginning, prompt.text)))
        return Prompts(prompts, +notes, debt)

    def _items(
        self, method: Method, queries: Sequence[str], histories: Sequence[Sequence[HistoryItem]], seed: int
    ) -> list[list[HistoryItem]]:
        """Return the items that a method shows with each question, the best first."""
        # LaMP leaves labels and scores out of what is matched; outputs that are texts (titles in LaMP-1) stay in.
        labels = set(self.data.answers or ())
        outputs = not any(i.output.strip() in labels for h in histories for i in h)
        retriever = Retriever(self.base.encoder, seed, outputs=outputs)
        if method.prompt != "graph":
            ranking = "bm25" if method.prompt in ("summary", "profile") else str(method.prompt)
            ranks = retriever.rank_many(ranking, queries, histories, method.items)
            return [[h[i] for i in best] for h, best in zip(histories, ranks, strict=True)]
        # Only training users lend items: held-out ones stay apart.
        pool = list(longest_by_user(self.data.train).values())
        vectors = retriever.user_vectors([*histories, *pool])
        others = neighbours(vectors[: len(histories)], vectors[len(histories) :], NEIGHBOURS)
        return [
            retriever.graph(q, h, [pool[i] for i in near], method.items)
            for q, h, near in zip(queries, histories, others, strict=True)
        ]
