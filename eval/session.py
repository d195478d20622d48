"""One comparison: its questions, its frozen models, and each method's outcome, computed once and kept in its folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.clock import LLMClock, reading_seconds
from eval.decision import RIVAL, validation_losses
from eval.methods import PRIOR, TURNS, Method, find_method
from eval.outcomes import Costs, Outcome, read_outcomes, write_outcomes
from eval.prompts.history import PromptWriter
from eval.questions import Questions
from eval.settings import ComparisonSettings
from persona_plug.config import TURNS_ALONE
from persona_plug.data.history import Example
from persona_plug.files import write_atomically
from persona_plug.fit.config import FitConfig
from persona_plug.measure.answers import Answers, evaluate, prior_answers, with_other_history
from persona_plug.model import PlugModel
from persona_plug.models.caching import uncached
from persona_plug.plug import PersonaPlug
from training.lora import for_each_user
from training.recipes import Training, fit


class Session:
    """Runs methods; what is finished is read back from the folder, and models are shared between methods."""

    def __init__(self, questions: Questions, base: PersonaPlug, settings: ComparisonSettings) -> None:
        """Join the parts.

        Args:
            questions: What is asked, and what is trained on.
            base: An untrained plug with the data's template and answers: gives LLM, encoder and kept states.
            settings: The run's.
        """
        self.questions, self.base, self.settings = questions, base, settings
        self.writer = PromptWriter(questions, base, Path(settings.out))
        # The last training and its notes: methods that share one come one after the other.
        self._last: tuple[tuple[str, int], Training, Counter[str]] | None = None
        self._vllm: Any = None

    def outcomes(self, name: str, seed: int) -> dict[str, Outcome]:
        """Return the outcome of a method (of each of the family for `user_prior`) with a seed."""
        method = find_method(name)
        # Without training and without drawing nothing depends on the seed.
        seed = seed if method.recipe or method.prompt == "random" else 0
        folder = Path(self.settings.out) / f"seed-{seed}"
        rows = read_outcomes(folder, name)
        if not rows:
            rows = {name: self._run(method, seed)} if method.llm else self._priors()
            write_outcomes(folder, name, rows)
        return rows

    def _priors(self) -> dict[str, Outcome]:
        with LLMClock(self.base) as watch:
            answers = prior_answers(self.base, self.questions.data, self.questions.generated)
        seconds = watch.cost()[0]  # of the whole family, which is fitted together
        costs = Costs(prompt_tokens=0.0, generated_tokens=0.0, fit_seconds=seconds)
        return {f"{PRIOR}: {name}": Outcome(of_one, costs) for name, of_one in answers.items()}

    def _run(self, method: Method, seed: int) -> Outcome:
        training, notes = self._fit(method, seed) if method.recipe else (None, Counter[str]())
        plug = training.plug if training else self._untrained(method)
        examples: list[Example] = list(self.questions.data.held_out)
        if method.history == "other":
            examples = with_other_history(examples, seed)
        elif method.history == "none":
            examples = [replace(e, history=()) for e in examples]
        reading = self._reading if _reads_request(method, plug) else 0.0
        with LLMClock(plug) as watch:
            prompts = self.writer.write_prompts(method, examples, seed)
            answers = self._answers(method, plug, prompts.examples, self.settings.fit_config(seed))
        seconds, outside = watch.cost(reading)
        if plug.config.max_history < self.base.config.max_history:
            beyond = sum(max(0, len(e.history) - plug.config.max_history) for e in examples)
            notes = notes + Counter({f"history items beyond max_history={plug.config.max_history}": beyond})
        costs = replace(
            _costs(plug, training, prompts.examples, answers, method.personal),
            seconds=(seconds + prompts.debt) / len(examples),  # what another method has left written counts, too
            outside_llm=None if method.user_adapter else outside,  # its seconds are those of training, too
        )
        return Outcome(answers, costs, dict(notes + prompts.notes))

    def _untrained(self, method: Method) -> PersonaPlug:
        """Return the plug of a method without training: chat turns alone, or nothing."""
        if method.prompt != TURNS:
            return self.base
        return self.base.twin(self.base.config.replace(**TURNS_ALONE, retrieve=method.items))

    def _fit(self, method: Method, seed: int) -> tuple[Training, Counter[str]]:
        """Train what a method needs, and say what was cut from the prompts that training sees."""
        key = method.training, seed
        if self._last is None or self._last[0] != key:
            self._last = None  # frees an LLM with adapters before the next one is loaded
            data, notes = self.questions.data, Counter[str]()
            if method.train_prompt:
                train, valid = (self.writer.write_prompts(method, part, seed) for part in (data.train, data.valid))
                data = replace(data, train=train.examples, valid=valid.examples)
                notes.update({f"training: {what}": count for what, count in (train.notes + valid.notes).items()})
            training = fit(str(method.recipe), self.base, data, self.settings, seed, method.training)
            self._last = key, training, notes
        return self._last[1:]

    def _answers(self, method: Method, plug: PersonaPlug, examples: Sequence[Example], config: FitConfig) -> Answers:
        if method.user_adapter:
            return self._by_user(plug, examples, config)
        personal = method.personal
        with uncached() if method.prompt and not method.recipe else nullcontext():  # each such prompt is read once
            return evaluate(plug, examples, self.questions.generated, personal, method.parts, self._write)

    def _by_user(self, plug: PersonaPlug, examples: Sequence[Example], config: FitConfig) -> Answers:
        """Ask each user's questions of the adapter trained further on that user's history."""
        metrics: dict[str, np.ndarray] = {}
        texts: dict[int, str] = {}
        rows: dict[int, np.ndarray] = {}
        budget = set(self.questions.texts)
        for indices, own in for_each_user(plug, examples, config, self.settings.user_steps):
            of_text = [at for at, i in enumerate(indices) if i in budget]
            answers = evaluate(own, [examples[i] for i in indices], of_text, write=self._write)
            for metric, values in answers.values.items():
                metrics.setdefault(metric, np.full(len(examples), np.nan))[indices] = values
            texts |= zip([indices[at] for at in of_text], answers.texts or (), strict=True)
            if answers.probabilities is not None:
                rows |= zip(indices, answers.probabilities, strict=True)
        table = np.stack([rows[i] for i in range(len(examples))]) if rows else None
        return Answers(metrics, [texts[i] for i in sorted(texts)], table)

    def _write(self, plug: PlugModel, examples: Sequence[Example], personal: bool) -> list[str]:
        """Write answers by the generator of the settings, which has neither trained parts in the LLM nor memories."""
        plain = plug.llm is self.base.llm and not plug.splicer.prefix_length
        plain = plain and not (personal and plug.config.remembers)
        if self.settings.generator == "vllm" and plain:
            if self._vllm is None:
                from persona_plug.serving.offline import VllmOffline

                self._vllm = VllmOffline(self.settings.llm, **self.settings.vllm)
            return self._vllm.answer(plug, examples, personal=personal)
        size = self.questions.task.no_repeat_ngram
        options: dict[str, Any] = {"no_repeat_ngram_size": size} if size else {}
        return plug.generate(examples, personal=personal, **options)

    def validation_losses(self) -> dict[str, float]:
        """Return the validation losses that choose the subject's rival, computed once."""
        seed = self.settings.seeds[0]
        file = Path(self.settings.out) / f"seed-{seed}" / "validation.json"
        if not file.is_file():
            rival = self._fit(find_method(RIVAL), seed)[0].plug if RIVAL in self.settings.methods else None
            losses = validation_losses(rival, self.base, self.questions)
            write_atomically(file, (json.dumps(losses) + "\n").encode())
        return dict(json.loads(file.read_text(encoding="utf-8")))

    def close(self) -> None:
        """End what the session has started."""
        if self._vllm is not None:
            self._vllm.close()

    @cached_property
    def _reading(self) -> float:
        return reading_seconds(self.base.encoder, [e.input for e in self.questions.data.held_out])


def _costs(
    plug: PersonaPlug, training: Training | None, examples: Sequence[Example], answers: Answers, personal: bool
) -> Costs:
    """Return what a method cost, the seconds of its answers aside."""
    parts = plug.prompts(examples, personal)
    soft = float(np.mean([plug.embedder.soft_count(len(e.history)) for e in examples])) if training else 0.0
    prefix = plug.splicer.prefix_length  # trained keys and values: positions that nothing runs over
    prompt = float(np.mean([len(p) for p in parts])) + soft + prefix
    texts = [] if plug.config.answers else answers.texts or []
    generated = float(np.mean([len(plug.prompter.ids(text)) for text in texts])) if texts else 0.0
    table = plug.llm.get_input_embeddings().weight
    weights = sum(p.numel() for p in plug.llm.parameters()) - table.numel()
    return Costs(
        prompt_tokens=prompt,
        generated_tokens=generated,
        trainable_params=float(training.parameters) if training else 0.0,
        fit_seconds=training.seconds if training else 0.0,
        lr=training.lr if training else None,
        curve=training.curve if training else None,
        cut=float(sum(p.cut > 0 for p in parts)),
        # Of one answer: twice the weights for each position that runs, the embedding table aside.
        flops=2.0 * float(weights) * (prompt - prefix + generated),
    )


def _reads_request(method: Method, plug: PersonaPlug) -> bool:
    """Return whether a method needs the history encoder's vector of the request: a plug, or retrieval by nearness."""
    retrieves = method.prompt in ("dense", "rrf", "graph", TURNS) or plug.config.retrieve > 0
    return retrieves or (method.recipe is not None and (plug.embedder.reads_request or plug.answers is not None))
