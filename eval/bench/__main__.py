"""`python -m eval.bench [key=value ...]`: training step, history encoding, file size, import time.

One thread, CPU time of the process, ABBA order; FLOPs by torch's counter, which knows no noise.
"""

from __future__ import annotations

import datetime
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eval.bench.timing import Ratio, paired
from persona_plug.encoder import HistoryEncoder
from persona_plug.errors import PersonaPlugError
from persona_plug.history import Example, HistoryItem
from persona_plug.model import PersonaPlug
from persona_plug.prompts import AnswerTree, PromptParts
from training.config import load

DEFAULTS: dict[str, Any] = {
    "llm": "smollm2-135m",
    "encoder": "minilm-l6",
    "batch": 4,
    "input_tokens": 256,
    "answer_tokens": 8,
    "pairs": 7,
    "texts": 96,
    "out": None,
}


def steps(settings: dict[str, Any]) -> dict[str, Any]:
    """Compare training steps: suffix to prefix, and prefix to the bare frozen forward and input-backward."""
    plugs = {
        place: PersonaPlug.build(settings["llm"], settings["encoder"], placement=place, max_input_tokens=1024)
        for place in ("suffix", "prefix")
    }
    generator = torch.Generator().manual_seed(0)
    size = plugs["suffix"].llm.get_input_embeddings().weight.shape[0]

    def random_ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, size, (count,), generator=generator).tolist())

    bodies = [random_ids(settings["input_tokens"]) for _ in range(settings["batch"])]
    tree = AnswerTree.build([random_ids(settings["answer_tokens"] - 1)], plugs["suffix"].prompter.eos)
    items = tuple(HistoryItem(f"an earlier text number {i}", f"an answer {i}") for i in range(32))
    examples = [Example("u", f"request {i}", "", items) for i in range(settings["batch"])]

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
    length = len(before) + soft + settings["input_tokens"] + len(after) + settings["answer_tokens"] - 1
    embeds = torch.randn(settings["batch"], length, plugs["prefix"].config.llm_width)

    def floor() -> None:
        """Bare model on the same number of positions, with the gradient to its inputs."""
        inputs = embeds.clone().requires_grad_()
        logits = llm(inputs_embeds=inputs, logits_to_keep=settings["answer_tokens"]).logits
        logits.logsumexp(-1).sum().backward()

    suffix, suffix_first, prefix = stepper("suffix", True), stepper("suffix", False), stepper("prefix", True)
    found: dict[str, Any] = {
        "suffix step, states kept / prefix step": paired(suffix, prefix, settings["pairs"]),
        "suffix step, first epoch / prefix step": paired(suffix_first, prefix, settings["pairs"]),
        "prefix step / bare forward + input-backward": paired(prefix, floor, settings["pairs"]),
    }
    flops = {name: _flops(f) for name, f in (("suffix", suffix), ("prefix", prefix), ("floor", floor))}
    found["FLOPs: suffix step, states kept / prefix step"] = flops["suffix"] / flops["prefix"]
    found["FLOPs: prefix step / floor"] = flops["prefix"] / flops["floor"]
    return found


def encoding(settings: dict[str, Any]) -> dict[str, Any]:
    """Compare the encoder with a bare forward over the same pre-tokenised, length-sorted batches."""
    words = ["quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "roofs"]
    texts = [
        " ".join(words[(i + j) % len(words)] for j in range(5 + (i * 37) % 120)) + f" {i}"
        for i in range(settings["texts"])
    ]
    encoder = HistoryEncoder(settings["encoder"], use_cache=False)
    ids = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_length)["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    size = encoder.batch_size
    batches = [
        encoder.tokenizer.pad({"input_ids": [ids[i] for i in order[s : s + size]]}, return_tensors="pt")
        for s in range(0, len(order), size)
    ]

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    with tempfile.TemporaryDirectory() as folder:
        cached = HistoryEncoder(settings["encoder"], cache_dir=folder)
        cached.encode(texts)
        again = HistoryEncoder(settings["encoder"], cache_dir=folder)
        again.encode(texts)
    return {
        "bare forward / encode (throughput share)": paired(bare, lambda: encoder.encode(texts), settings["pairs"]),
        "texts encoded by a second run": again.stats.encoded,
    }


def sizes(settings: dict[str, Any]) -> dict[str, Any]:
    """Compare the saved file with what is trained."""
    plug = PersonaPlug.build(settings["llm"], settings["encoder"])
    with tempfile.TemporaryDirectory() as folder:
        written = (plug.save_pretrained(folder) / "model.safetensors").stat().st_size
    return {
        "saved bytes / trainable bytes": written / sum(p.numel() * p.element_size() for p in plug.parameters()),
        "trained parameters": sum(p.numel() for p in plug.parameters() if p.requires_grad),
    }


def imports() -> dict[str, Any]:
    """Measure CPU seconds of `import persona_plug` beyond Python's own start, and of `persona-plug --help`."""

    def seconds(*arguments: str) -> float:
        best = float("inf")
        for _ in range(5):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return best

    python = seconds("-c", "pass")
    return {
        "import persona_plug beyond Python, CPU s": seconds("-c", "import persona_plug") - python,
        "persona-plug --help, CPU s": seconds("-c", "from persona_plug.cli import app; app(['--help'])"),
    }


def _flops(call: Any) -> int:  # noqa: ANN401
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main() -> None:
    """Run all benchmarks and show one table."""
    settings = load(sys.argv[1:], DEFAULTS)
    torch.set_num_threads(1)
    found = {**imports(), **sizes(settings), **encoding(settings), **steps(settings)}
    lines = [
        f"{datetime.datetime.now(datetime.UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, one thread, "
        f"torch {torch.__version__}, LLM {settings['llm']}, encoder {settings['encoder']}, batch {settings['batch']}, "
        f"{settings['input_tokens']} input, {settings['answer_tokens']} answer tokens, median of {settings['pairs']} "
        "interleaved pairs [min, max].",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    lines += [f"| {k} | {v if isinstance(v, Ratio | int) else f'{v:.3f}'} |" for k, v in found.items()]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if settings["out"]:
        Path(settings["out"]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except PersonaPlugError as error:
        sys.exit(f"error: {error}")
