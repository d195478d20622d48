"""Benchmarks of the library's parts: history encoding, file size, import time."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from typing import Any

import torch

from eval.bench.settings import BenchSettings
from eval.bench.timing import paired
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.plug import PersonaPlug


def encoding(settings: BenchSettings) -> dict[str, Any]:
    """Compare the encoder with a bare forward over the same pre-tokenised, length-sorted batches."""
    words = ["quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rain", "falls", "on", "roofs"]
    texts = [
        " ".join(words[(i + j) % len(words)] for j in range(5 + (i * 37) % 120)) + f" {i}"
        for i in range(settings.texts)
    ]
    encoder = HistoryEncoder(settings.encoder, use_cache=False)
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
        cached = HistoryEncoder(settings.encoder, cache_dir=folder)
        cached.encode(texts)
        again = HistoryEncoder(settings.encoder, cache_dir=folder)
        again.encode(texts)
    return {
        "bare forward / encode (throughput share)": paired(bare, lambda: encoder.encode(texts), settings.pairs),
        "texts encoded by a second run": again.stats.encoded,
    }


def sizes(settings: BenchSettings) -> dict[str, Any]:
    """Compare the saved file with what is trained."""
    plug = PersonaPlug.build(settings.llm, settings.encoder)
    with tempfile.TemporaryDirectory() as folder:
        size = (plug.save_pretrained(folder) / "model.safetensors").stat().st_size
    return {
        "saved bytes / trainable bytes": size / sum(p.numel() * p.element_size() for p in plug.parameters()),
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
