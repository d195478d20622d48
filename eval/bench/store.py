"""`python -m eval.bench.store [key=value ...]`: what a store of histories costs in time and bytes.

Generated events go in by file, as `persona-plug users add` reads them; then users are read at random, single events
are appended, and users are forgotten. `encoder=random` draws vectors in place of encoding, so that a million events
show the database alone. With an LLM, a user's way to soft tokens is compared with the prefill of a prompt of 64 tokens.
With `plug=FOLDER data=FILE` it says instead what int8 vectors cost in quality: the log-likelihood of each user's last
output, their earlier items being read from a store of either kind.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.bench.settings import StoreSettings
from persona_plug import HistoryStore, PersonaPlug
from persona_plug.data.history import HistoryItem, by_user, read_events
from persona_plug.measure.stats import user_bootstrap
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.vector_cache import scrub
from persona_plug.store.batches import stored_examples
from training.config import load, run_command

WORDS = [f"word{i}" for i in range(2000)]


class RandomEncoder:
    """Draws unit vectors in place of encoding texts; keeps none."""

    fingerprint, dim, cache = "random", 384, None

    def __init__(self) -> None:
        """Fix the numbers."""
        self.draw = torch.Generator().manual_seed(0)

    def encode(self, texts: Sequence[str], progress: bool | None = None) -> torch.Tensor:
        """Return (n, d) unit vectors, rounded through fp16."""
        vectors = torch.randn(len(texts), self.dim, generator=self.draw)
        return torch.nn.functional.normalize(vectors, dim=-1).half().float()


def main(arguments: Sequence[str]) -> None:
    """Measure, and print one JSON object."""
    settings = load(arguments, StoreSettings)
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if settings.plug and settings.data:
            figures = rounding(settings.plug, Path(settings.data), settings.samples, Path(folder))
        else:
            figures = measure(settings, Path(folder))
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


def measure(settings: StoreSettings, folder: Path) -> dict[str, Any]:
    """Return the figures: seconds, milliseconds and bytes as their names say."""
    encoder: Any = RandomEncoder()
    if settings.encoder != "random":
        encoder = HistoryEncoder(settings.encoder, use_cache=False)
    watch = _watch(encoder)
    file = folder / "events.jsonl"
    _write(file, settings.users, settings.events)
    url = settings.url or f"sqlite:///{folder / 'users.db'}"
    figures: dict[str, Any] = {k: getattr(settings, k) for k in ("encoder", "vectors", "keep_text", "users", "events")}
    with HistoryStore(url, encoder, settings.keep_text, settings.vectors) as store:
        start = time.perf_counter()
        store.load_file(file, progress=False)
        seconds = time.perf_counter() - start
        figures |= {"import_s": seconds, "import_events_per_s": settings.events / seconds}
        figures["import_share_encoder"] = watch["seconds"] / seconds
        start = time.perf_counter()
        again = store.load_file(file, progress=False)
        figures |= {"import_again_s": time.perf_counter() - start, "import_again_new": again.new}
        if settings.url is None:
            scrub(folder / "users.db")  # what is still in the log comes into the file
            figures["bytes_per_event"] = (folder / "users.db").stat().st_size / settings.events
        rng = np.random.default_rng(0)
        names = [f"user-{i}" for i in rng.integers(settings.users, size=settings.reads)]
        figures["read_ms"] = _quantiles([_seconds(partial(store.read, name)) for name in names])
        figures |= _appends(store, encoder, settings.appends, names)
        if settings.llm:
            figures |= _soft(store, encoder, settings.llm, settings.history)
        figures["forget_s"] = [_seconds(partial(store.forget, f"user-{i}")) for i in range(settings.forgets)]
    return figures


def rounding(plug_folder: str, data: Path, samples: int, folder: Path) -> dict[str, Any]:
    """Return the mean log-likelihood with vectors of either kind, and the paired difference over users."""
    plug = PersonaPlug.from_pretrained(plug_folder)
    people = list(by_user(read_events(data).events).items())[:samples]
    logliks: dict[str, np.ndarray] = {}
    for kind in ("fp16", "int8"):
        rows = []
        with HistoryStore(f"sqlite:///{folder / kind}.db", plug.encoder, True, kind) as store:
            for user, items in people:
                store.append(user, items[:-1])
                last = items[-1]
                rows.append(float(plug.score(last.input, [last.output], user=user, store=store)[0, 0]))
        logliks[kind] = np.array(rows)
    gap = user_bootstrap(logliks["int8"] - logliks["fp16"], [user for user, _ in people])
    means = {kind: float(values.mean()) for kind, values in logliks.items()}
    return {"users": len(people), "loglik": means, "int8_minus_fp16": [gap.value, gap.low, gap.high]}


def _watch(encoder: Any) -> dict[str, float]:  # noqa: ANN401
    """Count the seconds that an encoder takes."""
    watch, real = {"seconds": 0.0}, encoder.encode

    def encode(*args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            watch["seconds"] += time.perf_counter() - start

    encoder.encode = encode
    return watch


def _write(file: Path, users: int, events: int) -> None:
    rng = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for i in range(events):
            words = rng.integers(len(WORDS), size=10)
            row = {"user_id": f"user-{i % users}", "input": _text(words[:7]), "output": _text(words[7:]), "id": str(i)}
            out.write(json.dumps(row) + "\n")


def _text(words: np.ndarray) -> str:
    return " ".join(WORDS[w] for w in words)


def _appends(store: HistoryStore, encoder: Any, count: int, names: Sequence[str]) -> dict[str, float]:  # noqa: ANN401
    """Append single events, and encode as many alike ones, in turn; the ratio is of the medians."""
    rng, ours, alone = np.random.default_rng(1), [], []
    for name in names[:count]:
        words = rng.integers(len(WORDS), size=20)
        item = HistoryItem(_text(words[:7]), _text(words[7:10]))
        ours.append(_seconds(partial(store.append, name, [item])))
        alone.append(_seconds(partial(encoder.encode, [_text(words[10:17]), _text(words[17:])], progress=False)))
    append, encode = float(np.median(ours)), float(np.median(alone))
    return {"append_ms": 1000 * append, "encode_ms": 1000 * encode, "append_over_encode": append / encode}


@torch.no_grad()
def _soft(store: HistoryStore, encoder: Any, llm: str, history: int) -> dict[str, float]:  # noqa: ANN401
    """Read, pool and project one user's history, against the prefill of 64 tokens; processor time."""
    plug = PersonaPlug.build(llm, encoder, answers=("1", "2", "3", "4", "5"))
    rng = np.random.default_rng(2)
    items = [HistoryItem(_text(rng.integers(len(WORDS), size=7)), str(1 + i % 5)) for i in range(history)]
    store.append("long", items)
    table = plug.table(stored_examples(plug.config, ["a request"], "long", store))  # the request's own encoding is not

    def way() -> None:
        plug.embed(table.batch(stored_examples(plug.config, ["a request"], "long", store)))

    ids = torch.randint(200, (1, 64), generator=torch.Generator().manual_seed(0))
    ours, prefill = [], []
    for _ in range(25):
        ours.append(_seconds(way, time.process_time))
        prefill.append(_seconds(lambda: plug.llm(ids, logits_to_keep=1), time.process_time))
    mine, whole = float(np.median(ours)), float(np.median(prefill))
    return {"soft_ms": 1000 * mine, "prefill_64_ms": 1000 * whole, "soft_over_prefill": mine / whole}


def _seconds(what: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    what()
    return clock() - start


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": 1000 * float(np.percentile(seconds, q)) for q in (50, 99)}


if __name__ == "__main__":
    run_command(main, StoreSettings)
