"""HistoryEncoder: text -> unit vectors by a frozen sentence encoder, each text encoded once, ever."""

from __future__ import annotations

import copy
import hashlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from persona_plug.clock import clock
from persona_plug.errors import ConfigError, DataError
from persona_plug.models import zoo
from persona_plug.models.fingerprint import weights_digest
from persona_plug.models.llm import pick_device
from persona_plug.models.vector_cache import VectorCache

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "cls"]


@dataclass(slots=True)
class EncodeStats:
    """Counts since the encoder was made: texts asked for, encoded by the model, and cut at `max_length`.

    `seconds` went into encoding, see `persona_plug.splice.states.clock`.
    """

    requested: int = 0
    encoded: int = 0
    truncated: int = 0
    seconds: float = 0.0


class HistoryEncoder:
    """A frozen transformers sentence encoder with an on-disk vector cache.

    Vectors are rounded through fp16 whether they come from the model or from the cache, so that a second run sees the
    very numbers of the first. An empty text is the zero vector.

    Attributes:
        dim: Width d of the vectors.
        fingerprint: Identity of weights, tokenizer, pooling, maximum length and prefix (16 hex digits).
        stats: Counts of what was encoded and truncated.
        cache: Vectors on disk; None caches nothing.
    """

    def __init__(
        self,
        name: str,
        *,
        pooling: Pooling = "mean",
        max_length: int = 256,
        prefix: str = "",
        batch_size: int = 32,
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        use_cache: bool = True,
    ) -> None:
        """Load the encoder.

        Args:
            name: Short name, folder or Hub id.
            pooling: `mean` over the unmasked tokens, or the `cls` vector; L2-normalised either way.
            max_length: Tokens per text; longer texts are cut and counted in `stats.truncated`.
            prefix: Text put in front of every text.
            batch_size: Texts per forward pass; they are sorted by length first.
            device: Torch device; default CUDA if there is one, else CPU.
            cache_dir: Folder of the vector cache; default `<cache>/vectors`.
            use_cache: Keep vectors on disk; without it they live for one call only.

        Raises:
            ModelUnavailable: The weights cannot be had.
            ConfigError: A value is out of range.
        """
        from transformers import AutoModel, AutoTokenizer

        if pooling not in ("mean", "cls"):
            raise ConfigError(f"pooling={pooling!r} is not one of mean, cls")
        if max_length < 3 or batch_size < 1:
            raise ConfigError(f"max_length={max_length} must be at least 3 and batch_size={batch_size} at least 1")
        self.name = name
        self.pooling, self.max_length, self.prefix, self.batch_size = pooling, max_length, prefix, batch_size
        self.device = pick_device(device)
        folder = zoo.resolve(name)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as exc:
            raise zoo.load_error(name, exc) from exc
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.dim = int(self.model.config.hidden_size)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and max_length > limit:
            raise ConfigError(f"max_length={max_length} is above the {limit} positions of encoder {name}")
        identity = (weights_digest(self.model), _tokenizer_digest(self.tokenizer), pooling, max_length, prefix)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.stats = EncodeStats()
        self.cache: VectorCache | None = None
        if use_cache:
            root = Path(cache_dir) if cache_dir is not None else zoo.cache_dir() / "vectors"
            self.cache = VectorCache(root / f"{self.fingerprint}.sqlite", self.dim)

    def encode(self, texts: Sequence[str], progress: bool | None = None) -> Tensor:
        """Return unit vectors of texts, float32 (n, d) on the CPU, in the order given.

        Args:
            texts: The texts; repeated ones are encoded once.
            progress: Show a progress bar; default only on a terminal and for more than one batch.

        Raises:
            DataError: The encoder gave a vector that is not finite; the text is named.
        """
        self.stats.requested += len(texts)
        wanted = {t: _key(t) for t in dict.fromkeys(texts) if t.strip()}
        known = self.cache.get(list(wanted.values())) if self.cache is not None else {}
        missing = [t for t, key in wanted.items() if key not in known]
        start = clock(self)
        known.update(self._encode_missing(missing, wanted, progress))
        self.stats.seconds += clock(self) - start
        zero = np.zeros(self.dim, dtype=np.float16)
        rows = [known[wanted[t]] if t in wanted else zero for t in texts]
        stacked = np.stack(rows) if rows else np.zeros((0, self.dim), dtype=np.float16)
        return torch.from_numpy(stacked).float()

    def _encode_missing(
        self, texts: list[str], keys: dict[str, bytes], progress: bool | None
    ) -> dict[bytes, np.ndarray]:
        if not texts:
            return {}
        from tqdm.auto import tqdm

        ids = self._probe(texts)
        cut = [i for i, row in enumerate(ids) if len(row) > self.max_length]
        if cut:
            long = [self.prefix + texts[i] for i in cut]
            short = self.tokenizer(long, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
            for i, row in zip(cut, short, strict=True):
                ids[i] = row
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # longest first: memory peaks at once
        shown = progress if progress is not None else sys.stderr.isatty() and len(order) > self.batch_size
        fresh: dict[bytes, np.ndarray] = {}
        with tqdm(total=len(order), desc="encode", unit="text", disable=not shown) as bar:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                vectors = self.forward([ids[i] for i in batch]).cpu()
                if not bool(torch.isfinite(vectors).all()):
                    bad = batch[int((~torch.isfinite(vectors)).any(1).nonzero()[0])]
                    raise DataError(f"encoder {self.name} gave a non-finite vector for the text {texts[bad]!r:.60}")
                done = {keys[texts[i]]: v for i, v in zip(batch, vectors.numpy().astype(np.float16), strict=True)}
                if self.cache is not None:
                    self.cache.put(done)
                fresh.update(done)
                bar.update(len(batch))
        self.stats.encoded += len(texts)
        self.stats.truncated += len(cut)
        if cut:
            logger.info("%d of %d texts were cut to %d encoder tokens", len(cut), len(ids), self.max_length)
        return fresh

    @torch.inference_mode()
    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Run the model on tokenised texts: returns unit vectors, float32 (n, d) on the encoder's device."""
        padded = self.tokenizer.pad({"input_ids": [list(i) for i in ids]}, padding=True, return_tensors="pt").to(
            self.device
        )
        return _vectors(self.model, padded["input_ids"], padded["attention_mask"], self.pooling)

    def count_cut(self, texts: Sequence[str]) -> int:
        """Return how many texts are longer than what the model reads of them."""
        return sum(len(row) > self.max_length for row in self._probe(texts))

    def _probe(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, one more than is read where there are more: that tells a cut text from one that just fits."""
        options = {"truncation": True, "max_length": self.max_length + 1, "verbose": False}
        return list(self.tokenizer([self.prefix + text for text in texts], **options)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Return the ids that the model reads of a text, prefix and special tokens included."""
        options = {"truncation": True, "max_length": self.max_length, "verbose": False}
        return list(self.tokenizer(self.prefix + text, **options)["input_ids"])


class RequestEncoder(nn.Module):
    """A copy of an encoder's model that is trained: PPlug reads requests with one (section 3, Enc_input)."""

    def __init__(self, encoder: HistoryEncoder) -> None:
        """Copy the model; the encoder itself stays frozen."""
        super().__init__()
        self.body = copy.deepcopy(encoder.model).requires_grad_(True)
        self.pooling: Pooling = encoder.pooling

    def forward(self, ids: Tensor) -> Tensor:
        """Return unit vectors (B, d), float32, of ids (B, L), -1 beyond each row's end."""
        return _vectors(self.body, ids.clamp(min=0), (ids >= 0).long(), self.pooling)


def _vectors(model: nn.Module, ids: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        wide = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * wide).sum(1) / wide.sum(1)
    return nn.functional.normalize(pooled.float(), dim=-1)


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _tokenizer_digest(tokenizer: object) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are set anew at every call and are no part of the identity.
        import json

        state = json.loads(backend.to_str())
        state.pop("truncation", None), state.pop("padding", None)
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()  # type: ignore[attr-defined]
