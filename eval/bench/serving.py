"""`python -m eval.bench.serving [key=value ...]`: what soft tokens cost in vLLM, which must be installed.

Two ratios of wall time, ABBA order, since vLLM works in processes of its own: a batch of mixed users' soft prompts
against plain prompts of the same lengths, and the first token with soft tokens against four retrieved items. Soft
tokens, retrieval and prompts are made inside the measured time, from cached vectors of the histories; each request is
encoded anew.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from eval.bench.settings import ServingSettings
from eval.bench.timing import Ratio, paired
from persona_plug.data.history import Example, HistoryItem
from persona_plug.plug import PersonaPlug
from persona_plug.retrieval import Retriever
from persona_plug.serving.offline import VllmOffline
from persona_plug.serving.vllm_request import Sampling, prompt_embeds
from training.config import load, run_command

WORDS = ["quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "roofs", "today"]


class Texts:
    """Texts of a wanted length in the LLM's tokens, none twice."""

    def __init__(self, plug: PersonaPlug) -> None:
        """Use a plug's tokenizer."""
        self.plug, self.count = plug, 0

    def of(self, tokens: int) -> str:
        """Return a new text of about so many tokens."""
        self.count += 1
        words = [WORDS[(self.count * 5 + i * (1 + self.count % 7)) % len(WORDS)] for i in range(tokens)]
        ids = self.plug.prompter.ids(f"{self.count} " + " ".join(words))[:tokens]
        return str(self.plug.tokenizer.decode(ids))

    def users(self, count: int, items: int, tokens: int) -> list[tuple[HistoryItem, ...]]:
        """Return histories whose items have about so many tokens, a quarter of them in the output."""
        each = tokens // 4
        return [
            tuple(HistoryItem(self.of(tokens - each), self.of(each)) for _ in range(items)) for _ in range(count)
        ]  # fmt: skip


def throughput(plug: PersonaPlug, engine: VllmOffline, texts: Texts, settings: ServingSettings) -> Ratio:
    """Compare seconds of plain prompts to those of as many soft prompts of the same lengths."""
    from vllm import SamplingParams

    histories = texts.users(settings.prompts, settings.items, settings.item_tokens)
    body = settings.input_tokens - len(plug.prompter.before) - len(plug.prompter.after)
    examples = [Example(str(i), texts.of(body - i % 8), "", items) for i, items in enumerate(histories)]
    parts = [plug.prompter.parts(e.input) for e in examples]
    sampling = SamplingParams(temperature=0, max_tokens=settings.new_tokens, ignore_eos=True)
    lengths = [len(p) + plug.config.soft_tokens for p in parts]
    noise = torch.Generator().manual_seed(0)
    plain = [{"prompt_token_ids": torch.randint(10, 40_000, (n,), generator=noise).tolist()} for n in lengths]

    def soft() -> None:
        with torch.no_grad():
            output = plug.embed(plug.table(examples).batch(examples))
        prompts = [{"prompt_embeds": e} for e in prompt_embeds(plug, parts, output.soft)]
        engine.llm.generate(prompts, sampling, use_tqdm=False)

    return paired(
        lambda: engine.llm.generate(plain, sampling, use_tqdm=False), soft, settings.pairs, clock=time.perf_counter
    )


def first_token(plug: PersonaPlug, engine: VllmOffline, texts: Texts, settings: ServingSettings) -> Ratio:
    """Compare seconds to the first token: retrieved items in the prompt to soft tokens, for new requests each time."""
    (items,) = texts.users(1, settings.items, settings.item_tokens)
    body = settings.input_tokens - len(plug.prompter.before) - len(plug.prompter.after)
    retriever, one = Retriever(plug.encoder), Sampling(1)
    retriever.rank("dense", texts.of(8), items, 1)  # vectors of the history are cached on both sides

    def soft() -> None:
        engine.answer(plug, [Example("u", texts.of(body), "", items)], one)

    def retrieval() -> None:
        request = texts.of(body)
        nearest = [items[i] for i in retriever.rank("dense", request, items, settings.retrieved)]
        prompt = "\n".join([*(f"{i.input} {i.output}" for i in nearest), request])
        engine.answer(plug, [Example("u", request, "", items, prompt=prompt)], one, personal=False)

    return paired(retrieval, soft, settings.pairs, clock=time.perf_counter)


def main(arguments: Sequence[str]) -> None:
    """Measure both and show a table."""
    settings = load(arguments, ServingSettings)
    plug = PersonaPlug.build(
        settings.llm, settings.encoder, words=False, task_tokens=12, max_input_tokens=settings.max_model_len
    )
    texts = Texts(plug)
    options: dict[str, Any] = {"dtype": settings.dtype, "max_model_len": settings.max_model_len, "enforce_eager": True}
    with VllmOffline(settings.llm, **options) as engine:
        batch = throughput(plug, engine, texts, settings)
        first = first_token(plug, engine, texts, settings)
    settings_text = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(settings).items())
    sys.stdout.write(
        f"{datetime.datetime.now(datetime.UTC).date()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}, "
        f"{settings_text}; median of pairs [min, max], wall time\n\n"
        "| what | ratio | plain or retrieved, s | soft, s |\n|---|---|---|---|\n"
        f"| throughput, soft / plain prompts | {batch} | {batch.a_seconds:.3f} | {batch.b_seconds:.3f} |\n"
        f"| first token, retrieved items / soft | {first} | {first.a_seconds:.3f} | {first.b_seconds:.3f} |\n"
    )


if __name__ == "__main__":
    run_command(main, ServingSettings)
