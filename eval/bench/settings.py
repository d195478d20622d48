"""Settings of the benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from persona_plug.errors import ConfigError
from training.config import Settings


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Settings):
    """Settings of `python -m eval.bench [key=value ...]`.

    Attributes:
        llm: Short name, folder or Hub id of the frozen LLM.
        encoder: Short name, folder or Hub id of the frozen sentence encoder.
        batch: Prompts of a training step.
        input_tokens: Tokens of a prompt's input.
        answer_tokens: Tokens of an answer, its end included.
        pairs: Interleaved pairs of measurements.
        texts: Texts that are encoded.
        out: File for the table; null only prints it.
    """

    llm: str = "smollm2-135m"
    encoder: str = "minilm-l6"
    batch: int = 4
    input_tokens: int = 256
    answer_tokens: int = 8
    pairs: int = 7
    texts: int = 96
    out: str | None = None

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        self.require_at_least(1, "batch", "input_tokens", "pairs", "texts")
        self.require_at_least(2, "answer_tokens")


@dataclass(frozen=True, kw_only=True)
class LoadSettings(Settings):
    """Settings of `python -m eval.bench.load [key=value ...]`.

    Attributes:
        llm: Short name, folder or Hub id of the frozen LLM.
        encoder: Short name, folder or Hub id of the frozen sentence encoder.
        requests: Requests in all.
        connections: Connections that ask at once.
        users: Users, mixed among the requests.
        items: Items of each user's history.
        tokens: Tokens of an answer at most.
        pending: Answers that the server writes or keeps waiting, at most.
        max_batch: Rows of the server's batches, at most.
        overhead: Whether HTTP is compared with direct calls of the engine, in place of the load.
        pairs: Rounds of that comparison.
        out: File for the figures; null only prints them.
    """

    llm: str = "tiny-llama"
    encoder: str = "tiny-encoder"
    requests: int = 10_000
    connections: int = 32
    users: int = 20
    items: int = 8
    tokens: int = 8
    pending: int = 64
    max_batch: int = 16
    overhead: bool = False
    pairs: int = 15
    out: str | None = None

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        counts = ("requests", "connections", "users", "items", "tokens", "pending", "max_batch", "pairs")
        self.require_at_least(1, *counts)


@dataclass(frozen=True, kw_only=True)
class ServingSettings(Settings):
    """Settings of `python -m eval.bench.serving [key=value ...]`.

    Attributes:
        llm: Short name, folder or Hub id of the frozen LLM.
        encoder: Short name, folder or Hub id of the frozen sentence encoder.
        prompts: Prompts of the batch, each of another user.
        new_tokens: Tokens of an answer.
        input_tokens: Tokens of a prompt without soft tokens, chat header included.
        item_tokens: Tokens of a retrieved item in a prompt.
        items: Items of each user's history.
        retrieved: Items in a prompt with retrieval.
        pairs: Interleaved pairs of measurements.
        dtype: Dtype of the LLM in vLLM.
        max_model_len: Tokens of prompt and answer, at most.
    """

    llm: str = "smollm2-135m"
    encoder: str = "minilm-l6"
    prompts: int = 32
    new_tokens: int = 16
    input_tokens: int = 64
    item_tokens: int = 64
    items: int = 32
    retrieved: int = 4
    pairs: int = 5
    dtype: str = "float32"
    max_model_len: int = 1024

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        counts = ("prompts", "new_tokens", "input_tokens", "items", "retrieved", "pairs", "max_model_len")
        self.require_at_least(1, *counts)
        self.require_at_least(4, "item_tokens")


@dataclass(frozen=True, kw_only=True)
class StoreSettings(Settings):
    """Settings of `python -m eval.bench.store [key=value ...]`.

    Attributes:
        url: URL of the store; null takes an SQLite file in a temporary folder.
        encoder: Short name, folder or Hub id of the frozen sentence encoder; `random` draws vectors.
        llm: Short name, folder or Hub id of an LLM for which soft tokens are made; null for none.
        vectors: How vectors are stored, `fp16` or `int8`.
        keep_text: Whether the store keeps texts.
        users: Users of the generated events.
        events: Generated events.
        reads: Users read, drawn at random.
        appends: Single events appended.
        forgets: Users forgotten.
        history: Items of the user whose soft tokens are made.
        threads: CPU threads of torch.
        plug: Saved plug with which the cost of int8 in quality is measured instead; null for none.
        data: File of events for that; needed with `plug`.
        samples: Users whose last output is scored for that.
    """

    url: str | None = None
    encoder: str = "tiny-encoder"
    llm: str | None = None
    vectors: Literal["fp16", "int8"] = "fp16"
    keep_text: bool = False
    users: int = 1000
    events: int = 20_000
    reads: int = 2000
    appends: int = 50
    forgets: int = 3
    history: int = 500
    threads: int = 1
    plug: str | None = None
    data: str | None = None
    samples: int = 100

    def check(self) -> None:
        """Refuse values that cannot work, naming the field."""
        counts = ("users", "events", "reads", "appends", "history", "threads", "samples")
        self.require_at_least(1, *counts)
        self.require_at_least(0, "forgets")
        if (self.plug is None) != (self.data is None):
            raise ConfigError("plug=FOLDER and data=FILE go together: the cost of int8 is measured with both")
