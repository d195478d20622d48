"""One comparison: its data, its frozen models, and each method's outcome, computed once and kept in its folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.clock import LLMClock, reading_seconds
from eval.methods import METHODS, PRIOR, Method, method
from eval.outcomes import Costs, Outcome, read_outcome, write_outcome
from eval.prompts.lamp import render
from eval.prompts.summaries import Summaries, fitting, profile_text, with_profile
from eval.settings import ComparisonSettings
from persona_plug.data.history import Example, HistoryItem, longest_by_user
from persona_plug.data.splits import FitData
from persona_plug.fit.config import FitConfig
from persona_plug.measure.answers import Answers, evaluate, prior_answers, spread, with_other_history
from persona_plug.model import PlugModel
from persona_plug.models.caching import uncached
from persona_plug.plug import PersonaPlug
from persona_plug.retrieval import Retriever, neighbours
from training.lora import for_each_user
from training.recipes import Fitted, choose_lr, fit
from training.tasks import Task

logger = logging.getLogger(__name__)

NEIGHBOURS = 4  # users whose items help out where the own history is short


class Session:
    """Runs methods; what is finished is read back from the folder, and models are shared between methods."""

    def __init__(self, task: Task, data: FitData, base: PersonaPlug, settings: ComparisonSettings, out: Path) -> None:
        """Join the parts.

        Args:
            task: The task's definition.
            data: Train, validation, and the questions as `held_out`.
            base: An untrained plug with the data's template and answers: gives LLM, encoder and kept states.
            settings: The run's; `plug` with the task's lengths.
            out: The run's folder.
        """
        self.task, self.data, self.base, self.settings, self.out = task, data, base, settings, out
        self.texts = expected_texts(data.held_out, data.answers, settings.generated)
        """Indices of the questions whose answers are written or chosen."""
        self.notes: dict[str, int] = {}
        self._fitted: tuple[tuple[Any, ...], Fitted] | None = None  # the last one: methods are ordered by it
        self._summaries: Summaries | None = None
        self._vllm: Any = None

    def outcomes(self, name: str, seed: int) -> dict[str, Outcome]:
        """Return the outcome of a method (of each of the family for `user_prior`) with a seed."""
        if name == PRIOR:
            return self._priors()
        chosen = method(name)
        # Without training and without drawing nothing depends on the seed.
        seed = seed if chosen.recipe or chosen.prompt == "random" else 0
        stem = self.out / f"seed-{seed}" / name
        outcome = read_outcome(stem)
        if outcome is None:
            outcome = self._run(chosen, seed)
            write_outcome(stem, outcome)
        return {name: outcome}

    def _priors(self) -> dict[str, Outcome]:
        folder = self.out / "seed-0"
        done = folder / f"{PRIOR}.done"
        if done.is_file():
            stored = {p.stem: read_outcome(p.with_suffix("")) for p in sorted(folder.glob(f"{PRIOR}=*.npz"))}
            return {name.replace("=", ": "): outcome for name, outcome in stored.items() if outcome is not None}
        with LLMClock(self.base) as watch:
            answers = prior_answers(self.base, self.data, self.settings.generated)
        seconds = watch.cost()[0]  # of the whole family, which is fitted together
        costs = Costs(prompt_tokens=0.0, generated_tokens=0.0, fit_seconds=seconds)
        outcomes = {f"{PRIOR}: {name}": Outcome(a, costs) for name, a in answers.items()}
        for name, outcome in outcomes.items():
            write_outcome(folder / name.replace(": ", "="), outcome)
        done.touch()
        return outcomes

    def _run(self, chosen: Method, seed: int) -> Outcome:
        self.notes = {}
        config = self.settings.fit_config(seed)
        fitted = self._fit(chosen, config) if chosen.recipe else None
        plug = fitted.plug if fitted else self.base
        held: list[Example] = list(self.data.held_out)
        if chosen.history == "other":
            held = with_other_history(held, seed)
        elif chosen.history == "none":
            held = [replace(e, history=()) for e in held]
        reading = self._reading if _reads_request(chosen, plug) else 0.0
        with LLMClock(plug) as watch:
            held = self._prompted(chosen, held, seed)
            if chosen.user_adapter:
                answers = self._by_user(plug, held, config)
            elif chosen.prompt and chosen.recipe is None:
                with uncached():  # each prompt is read once
                    answers = self._answers(plug, held, personal=False)
            else:
                answers = self._answers(plug, held, personal=chosen.recipe is not None, head=chosen.head)
        seconds, outside = watch.cost(reading)
        if chosen.prompt == "summary" and self._summaries:  # what another method had written before counts, too
            seconds += self._summaries.owed - self._summaries.spent
        parts = [plug.prompter.parts(e.input, e.prompt) for e in held]
        soft = float(np.mean([plug.embedder.soft_count(len(e.history)) for e in held])) if fitted else 0.0
        prefix = plug.splicer.prefix_length  # trained keys and values: positions that nothing runs over
        if plug.config.max_history < self.base.config.max_history and soft + prefix:
            beyond = sum(max(0, len(e.history) - plug.config.max_history) for e in held)
            self._count(f"history items beyond max_history={plug.config.max_history}", beyond)
        prompt = float(np.mean([len(p.left) + len(p.right) for p in parts])) + soft + prefix
        written = [] if plug.config.answers else [len(plug.prompter.ids(t)) for t in answers.texts or ()]
        generated = float(np.mean(written)) if written else 0.0
        costs = Costs(
            prompt_tokens=prompt,
            generated_tokens=generated,
            trainable_params=float(fitted.parameters) if fitted else 0.0,
            fit_seconds=fitted.seconds if fitted else 0.0,
            seconds=seconds / len(held),
            outside_llm=None if chosen.user_adapter else outside,  # its seconds are those of training, too
            lr=fitted.lr if fitted else None,
            curve=fitted.curve if fitted else None,
            cut=float(sum(p.cut > 0 for p in parts)),
            # Of one answer: twice the weights for each position that runs, the embedding table aside.
            flops=2.0 * _running_weights(plug) * (prompt - prefix + generated),
        )
        return Outcome(answers, costs, self.notes)

    def _fit(self, chosen: Method, config: FitConfig) -> Fitted:
        prompt = chosen.prompt if chosen.train_prompt else None
        name = str(chosen.recipe) + (f"+{prompt}-{chosen.items}" if prompt else "")
        key = (name, config.seed)
        if self._fitted is None or self._fitted[0] != key:
            self._fitted = None  # frees an LLM with adapters before the next one is loaded
            data = self.data
            if prompt:
                parts = [self._prompted(chosen, part, config.seed) for part in (data.train, data.valid)]
                data = replace(data, train=parts[0], valid=parts[1])
                self.notes = {f"training: {what}": count for what, count in self.notes.items()}
            common = str(chosen.recipe), self.base, self.settings.plug, data
            first = replace(config, seed=self.settings.seeds[0])  # every seed learns at the same rate
            grid, steps = self.settings.lr_grid, self.settings.lr_steps
            lr = choose_lr(*common, first, self.out / "lr" / name, grid, steps)
            folder = self.out / f"seed-{config.seed}" / "fitted" / name
            found = fit(*common, replace(config, lr=lr), folder)
            self._fitted = key, found
        return self._fitted[1]

    def _answers(self, plug: PersonaPlug, held: Sequence[Example], personal: bool, head: bool = True) -> Answers:
        return evaluate(plug, held, self.settings.generated, personal, head, self._write)

    def _write(self, plug: PlugModel, examples: Sequence[Example], personal: bool) -> list[str]:
        """Write answers by the generator of the settings; what is trained inside the LLM only transformers can run."""
        plain = plug.llm is self.base.llm and not plug.splicer.prefix_length
        if self.settings.generator == "vllm" and plain:
            if self._vllm is None:
                from persona_plug.serving.offline import VllmOffline

                self._vllm = VllmOffline(self.settings.llm, **self.settings.vllm)
            return self._vllm.answer(plug, examples, personal=personal)
        size = self.task.no_repeat_ngram
        options: dict[str, Any] = {"no_repeat_ngram_size": size} if size else {}
        return plug.generate(examples, personal=personal, **options)

    def close(self) -> None:
        """End what the session has started."""
        if self._vllm is not None:
            self._vllm.close()

    def _by_user(self, plug: PersonaPlug, held: Sequence[Example], config: FitConfig) -> Answers:
        """Ask each user's questions of the adapter trained further on that user's history."""
        merged: dict[str, np.ndarray] = {}
        texts: dict[int, str] = {}
        rows: dict[int, np.ndarray] = {}
        budget = set(self.texts)
        for indices, own in for_each_user(plug, held, config, self.settings.user_steps):
            asked = [at for at, i in enumerate(indices) if i in budget]
            found = evaluate(own, [held[i] for i in indices], asked, write=self._write)
            for metric, values in found.values.items():
                merged.setdefault(metric, np.full(len(held), np.nan))[indices] = values
            texts |= zip([indices[at] for at in asked], found.texts or (), strict=True)
            if found.probabilities is not None:
                rows |= zip(indices, found.probabilities, strict=True)
        table = np.stack([rows[i] for i in range(len(held))]) if rows else None
        return Answers(merged, [texts[i] for i in sorted(texts)], table)

    def _prompted(self, chosen: Method, examples: Sequence[Example], seed: int) -> list[Example]:
        """Write history items, or a profile and items, into each question's prompt."""
        if chosen.prompt is None:
            return list(examples)
        template = self.base.config.template
        whole = [template.replace("{input}", e.input) for e in examples]
        queries = [self.task.find_query(text) for text in whole]
        self._count("questions whose query was not found: the whole input is used", sum(q is None for q in queries))
        asked = [q if q is not None else text for q, text in zip(queries, whole, strict=True)]
        shown = self._shown(chosen, examples, asked, seed)
        profiles = [""] * len(examples)
        if chosen.prompt == "profile":
            profiles = [profile_text(e.history) for e in examples]
        elif chosen.prompt == "summary":
            self._summaries = Summaries(self.base, self.out)
            profiles = self._summaries.of_many(self.task, [e.history for e in examples])
        limit, tokenizer = self.base.config.max_input_tokens, self.base.tokenizer
        result, cut, left_out, shortened = [], 0, 0, 0
        for example, text, items, written in zip(examples, whole, shown, profiles, strict=True):
            profile = fitting(written, text, tokenizer, limit)
            shortened += profile != written
            room = limit - len(tokenizer(with_profile(profile, "-"))["input_ids"])
            made = render(self.task, text, items, tokenizer, room)
            cut, left_out = cut + (made.items_cut > 0), left_out + len(items) - made.items_used
            result.append(replace(example, prompt=with_profile(profile, made.text)))
        self._count("profiles that were cut to leave room for the question", shortened)
        self._count("prompts with an item that was cut", cut)
        self._count("items that found no room in a prompt", left_out)
        return result

    def _shown(
        self, chosen: Method, examples: Sequence[Example], queries: Sequence[str], seed: int
    ) -> list[list[HistoryItem]]:
        histories = [e.history for e in examples]
        # LaMP leaves labels and scores out of what is matched; outputs that are texts (titles in LaMP-1) stay in.
        labels = set(self.data.answers or ())
        outputs = not any(i.output.strip() in labels for h in histories for i in h)
        retriever = Retriever(self.base.encoder, seed, outputs=outputs)
        if chosen.prompt != "graph":
            ranking = "bm25" if chosen.prompt in ("summary", "profile") else str(chosen.prompt)
            ranked = retriever.rank_many(ranking, queries, histories, chosen.items)
            return [[h[i] for i in best] for h, best in zip(histories, ranked, strict=True)]
        # Only training users lend items: held-out ones stay apart.
        pool = list(longest_by_user(self.data.train).values())
        vectors = retriever.user_vectors([*histories, *pool])
        others = _nearest(vectors[: len(histories)], vectors[len(histories) :])
        return [
            retriever.graph(q, h, [pool[i] for i in near], chosen.items)
            for q, h, near in zip(queries, histories, others, strict=True)
        ]

    @cached_property
    def _reading(self) -> float:
        return reading_seconds(self.base.encoder, [e.input for e in self.data.held_out])

    def _count(self, what: str, how_many: int) -> None:
        if how_many:
            self.notes[what] = self.notes.get(what, 0) + how_many


def ordered(names: Sequence[str]) -> list[str]:
    """Return method names so that those that share a training stand together."""
    known = list(METHODS)

    def place(name: str) -> tuple[int, int]:
        if name == PRIOR:
            return len(known), 0
        chosen = method(name)
        first = next(i for i, n in enumerate(known) if METHODS[n].recipe == chosen.recipe)
        return first, 1 if chosen.prompt else 0

    return sorted(names, key=place)


def expected_texts(held: Sequence[Example], answers: Sequence[str] | None, generated: int) -> list[int]:
    """Return the questions whose texts an outcome holds: all of a labelling task, else those that were generated."""
    return list(range(len(held))) if answers else spread(len(held), generated)


def _nearest(wanted: np.ndarray, pool: np.ndarray) -> list[list[int]]:
    both = np.concatenate([wanted, pool])
    found = neighbours(both, range(len(wanted)), len(both))
    return [[i - len(wanted) for i in near if i >= len(wanted)][:NEIGHBOURS] for near in found]


def _reads_request(chosen: Method, plug: PersonaPlug) -> bool:
    """Return whether a method needs the history encoder's vector of the request: a plug, or retrieval by nearness."""
    retrieves = chosen.prompt in ("dense", "rrf", "graph")
    return retrieves or (chosen.recipe is not None and plug.embedder.reads_request)


def _running_weights(plug: PersonaPlug) -> float:
    table = plug.llm.get_input_embeddings().weight
    return float(sum(p.numel() for p in plug.llm.parameters()) - table.numel())
