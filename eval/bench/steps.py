"""Benchmarks of the LLM's passes: training steps by placement, rows of unlike length, prompts that are read once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.bench.settings import BenchSettings
from eval.bench.timing import paired
from persona_plug.data.history import Example, HistoryItem
from persona_plug.models.caching import uncached
from persona_plug.plug import PersonaPlug
from persona_plug.splice.prompts import AnswerTree, PromptParts

# Answers of a batch as rewritten e-mails have them: the median is 40 tokens, the longest four times that.
UNLIKE = (12, 20, 28, 36, 44, 60, 96, 176)


def steps(settings: BenchSettings) -> dict[str, Any]:
    """Compare training steps: suffix to prefix, and prefix to the bare frozen forward and input-backward."""
    plugs = {
        place: PersonaPlug.build(settings.llm, settings.encoder, placement=place, max_input_tokens=1024)
        for place in ("suffix", "prefix")
    }
    generator = torch.Generator().manual_seed(0)
    bodies = [_ids(plugs["suffix"], settings.input_tokens, generator) for _ in range(settings.batch)]
    tree = _answer(plugs["suffix"], settings.answer_tokens, generator)
    items = tuple(HistoryItem(f"an earlier text number {i}", f"an answer {i}") for i in range(32))
    examples = [Example("u", f"request {i}", "", items) for i in range(settings.batch)]

    def stepper(place: str, keep: bool) -> Any:  # noqa: ANN401
        plug = plugs[place].train()
        batch = plug.table(examples).batch(examples)
        before, after = tuple(plug.prompter.before), tuple(plug.prompter.after)
        parts = [
            PromptParts((*before, *body), after) if place == "suffix" else PromptParts(before, (*body, *after))
            for body in bodies
        ]
        plug.splicer.begin_with(before)

        def step() -> None:
            if not keep:
                plug.splicer.cache.clear()
            plug.zero_grad()
            loglik, end, _ = plug(batch, parts, [tree] * len(parts))
            (-(loglik.sum() + end.sum())).backward()

        return step

    llm = plugs["prefix"].llm
    before, after = plugs["prefix"].prompter.before, plugs["prefix"].prompter.after
    soft = plugs["prefix"].config.soft_tokens
    length = len(before) + soft + settings.input_tokens + len(after) + settings.answer_tokens - 1
    embeds = torch.randn(settings.batch, length, plugs["prefix"].config.llm_width)

    def floor() -> None:
        """Bare model on the same number of positions, with the gradient to its inputs."""
        inputs = embeds.clone().requires_grad_()
        logits = llm(inputs_embeds=inputs, logits_to_keep=settings.answer_tokens).logits
        logits.logsumexp(-1).sum().backward()

    suffix, suffix_first, prefix = stepper("suffix", True), stepper("suffix", False), stepper("prefix", True)
    figures: dict[str, Any] = {
        "suffix step, states kept / prefix step": paired(suffix, prefix, settings.pairs),
        "suffix step, first epoch / prefix step": paired(suffix_first, prefix, settings.pairs),
        "prefix step / bare forward + input-backward": paired(prefix, floor, settings.pairs),
    }
    flops = {name: _flops(f) for name, f in (("suffix", suffix), ("prefix", prefix), ("floor", floor))}
    figures["FLOPs: suffix step, states kept / prefix step"] = flops["suffix"] / flops["prefix"]
    figures["FLOPs: prefix step / floor"] = flops["prefix"] / flops["floor"]
    return figures


def rows(settings: BenchSettings) -> dict[str, Any]:
    """Compare rows run apart with one padded pass, and reading a prompt once with computing its states ahead."""
    plug = PersonaPlug.build(settings.llm, settings.encoder, max_input_tokens=1024)
    generator = torch.Generator().manual_seed(0)
    left = [_ids(plug, settings.input_tokens, generator) for _ in UNLIKE]
    trees = [_answer(plug, count, generator) for count in UNLIKE]
    parts = [PromptParts(ids, tuple(plug.prompter.after)) for ids in left]
    start = torch.randn(len(parts), plug.config.soft_tokens, plug.config.llm_width, generator=generator)

    def step(score: Any) -> Any:  # noqa: ANN401
        def call() -> None:
            soft = start.clone().requires_grad_()
            loglik, end = score(parts, soft, trees)
            (-(loglik.sum() + end.sum())).backward()

        return call

    apart, together = step(plug.splicer.loglik), step(plug.splicer.in_one_pass)

    def reader(context: Callable[[], AbstractContextManager[None]]) -> Callable[[], None]:
        alike = [_answer(plug, settings.answer_tokens, generator)] * len(parts)

        def call() -> None:
            plug.splicer.cache.clear()
            with torch.no_grad(), context():
                plug(None, parts, alike)

        return call

    return {
        "step on answers of unlike length, rows apart / one pass": paired(apart, together, settings.pairs),
        "FLOPs: rows apart / one pass": _flops(apart) / _flops(together),
        "prompts read once, one pass / states ahead": paired(reader(uncached), reader(nullcontext), settings.pairs),
    }


def _ids(plug: PersonaPlug, count: int, generator: torch.Generator) -> tuple[int, ...]:
    size = plug.llm.get_input_embeddings().weight.shape[0]
    return tuple(torch.randint(10, size, (count,), generator=generator).tolist())


def _answer(plug: PersonaPlug, count: int, generator: torch.Generator) -> AnswerTree:
    """Return a free text of `count` tokens, its end token included."""
    return AnswerTree.build([_ids(plug, count - 1, generator)], plug.prompter.eos)


def _flops(call: Any) -> int:  # noqa: ANN401
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()
