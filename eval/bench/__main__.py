"""`python -m eval.bench [key=value ...]`: the LLM's passes, history encoding, file size, import time.

One thread, CPU time of the process, ABBA order; FLOPs by torch's counter, which knows no noise.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from eval.bench.settings import BenchSettings
from training.config import load, run_command


def main(arguments: Sequence[str]) -> None:
    """Run all benchmarks and show one table."""
    settings = load(arguments, BenchSettings)
    import torch

    from eval.bench.parts import encoding, imports, sizes
    from eval.bench.steps import rows, steps
    from eval.bench.timing import Ratio

    torch.set_num_threads(1)
    measured = {**imports(), **sizes(settings), **encoding(settings), **steps(settings), **rows(settings)}
    lines = [
        f"{datetime.datetime.now(datetime.UTC).date()}, {platform.machine()}, {os.cpu_count()} cores, one thread, "
        f"torch {torch.__version__}, LLM {settings.llm}, encoder {settings.encoder}, batch {settings.batch}, "
        f"{settings.input_tokens} input, {settings.answer_tokens} answer tokens, median of {settings.pairs} "
        "interleaved pairs [min, max].",
        "",
        "| what | measured |",
        "|---|---|",
    ]
    lines += [f"| {k} | {v if isinstance(v, Ratio | int) else f'{v:.3f}'} |" for k, v in measured.items()]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if settings.out:
        Path(settings.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(main, BenchSettings)
