"""HistoryEncoder: text -> unit vectors by a frozen sentence encoder, each text encoded once, ever."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from persona_plug.clock import clock, phase, unshown
from persona_plug.errors import ConfigError, DataError
from persona_plug.models import zoo
from persona_plug.models.fingerprint import weights_digest
from persona_plug.models.llm import pick_device
from persona_plug.models.loading import load, load_weights
from persona_plug.models.sentence import POOLINGS, SentenceSettings, Unit, pool, read_settings
from persona_plug.models.vector_cache import VectorCache

logger = logging.getLogger(__name__)

SAME = 1e-3  # how far a vector may move when its text is padded: the order of sums differs


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
        cache_path: Where they are, or where others on this machine keep them.
    """

    def __init__(
        self,
        name: str,
        *,
        pooling: str | None = None,
        max_length: int | None = None,
        prefix: str | None = None,
        batch_size: int = 32,
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        use_cache: bool = True,
    ) -> None:
        """Load the encoder.

        A sentence-transformers folder says itself how it pools, how long a text may be, what stands in front of it and
        which dense layers follow; what is given here wins. Vectors have unit length whatever it says.

        Args:
            name: Short name, folder or Hub id.
            pooling: `mean` (default), `cls`, `max`, `mean_sqrt_len`, `weighted_mean`, `last`, or several joined by "+".
            max_length: Tokens per text, 256 by default; longer texts are cut and counted in `stats.truncated`.
            prefix: Text put in front of every text.
            batch_size: Texts per forward pass; they are sorted by length first.
            device: Torch device; default CUDA if there is one, else CPU.
            cache_dir: Folder of the vector cache; default `<cache>/vectors`.
            use_cache: Keep vectors on disk; without it they live for one call only.

        Raises:
            ModelUnavailable: The weights cannot be had, or not all of them.
            ConfigError: A value is out of range, or the folder has a part that is not built here.
        """
        from transformers import AutoModel, AutoTokenizer

        self.name, self.device, self.batch_size = name, pick_device(device), batch_size
        folder = zoo.resolve(name)
        own = None if name in zoo.ENTRIES else read_settings(folder)
        settings = own or SentenceSettings(max_length=256)
        self.pooling = settings.pooling if pooling is None else pooling
        self.prefix = settings.prefix if prefix is None else prefix
        self._lower, self._strips, self._skips_prefix = settings.lower, own is not None, settings.skips_prefix
        if not set(self.pooling.split("+")) <= set(POOLINGS):
            raise ConfigError(f"pooling={self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if settings.body and Path(folder).is_dir():
            folder = str(Path(folder) / settings.body)
        self.tokenizer = load(AutoTokenizer, folder, name)
        model = load_weights(AutoModel, folder, name, unused="pooler", dtype=torch.float32)
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        _check_vocabulary(name, model, self.tokenizer)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.layers = nn.Sequential(*settings.layers).to(self.device).eval().requires_grad_(False)
        self.max_length = self._length(settings.max_length if max_length is None else max_length)
        with torch.inference_mode():
            width = int(self.model.config.hidden_size) * len(self.pooling.split("+"))
            self.dim = int(self.layers(torch.zeros(1, width, device=self.device)).shape[1])
        identity: tuple[object, ...] = (weights_digest(self.model), _tokenizer_digest(self.tokenizer))
        identity += (self.pooling, self.max_length, self.prefix)
        parts = [weights_digest(layer) for layer in settings.layers if not isinstance(layer, Unit)]
        if parts or self._lower or (self._skips_prefix and self.prefix):
            identity += (parts, repr(self.layers), self._lower, self._skips_prefix)
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
        self.pads = self._bears_padding()
        self.stats = EncodeStats()
        root = Path(cache_dir) if cache_dir is not None else zoo.cache_dir() / "vectors"
        self.cache_path = root / f"{self.fingerprint}.sqlite"
        self.cache: VectorCache | None = VectorCache(self.cache_path, self.dim) if use_cache else None

    def sibling(self) -> Self:
        """Return the same frozen encoder for another thread: tokenizers bear one thread each."""
        made = copy.copy(self)
        made.tokenizer, made.stats = copy.deepcopy(self.tokenizer), EncodeStats()
        return made

    def _length(self, wanted: int | None) -> int:
        """Return how many tokens are read of a text, within what the model has positions for."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        table = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        if limit is not None and padding is not None:
            limit -= padding + 1  # RoBERTa's positions start behind the padding's
        if wanted is None:
            wanted = min(limit or 1 << 20, self.tokenizer.model_max_length)
        if wanted < 3 or self.batch_size < 1:
            raise ConfigError(f"max_length={wanted} must be at least 3 and batch_size={self.batch_size} at least 1")
        if limit is not None and wanted > limit:
            raise ConfigError(f"max_length={wanted} is above the {limit} positions of encoder {self.name}")
        return wanted

    def _bears_padding(self) -> bool:
        """Whether a text's vector stays the same beside a longer text; if not, texts of one length run together."""
        self.pads = True
        short, long = (self.ids(text)[: self.max_length] for text in ("one", "one two three four five six seven"))
        if not short or len(short) == len(long):
            return True
        gap = (self.forward([short, long])[0] - self.forward([short])[0]).abs().max()
        return float(gap) <= SAME

    def encode(self, texts: Sequence[str], progress: bool | None = None) -> Tensor:
        """Return unit vectors of texts, float32 (n, d) on the CPU, in the order given.

        Args:
            texts: The texts; repeated ones are encoded once.
            progress: Show the progress; default for more than one batch.

        Raises:
            DataError: `texts` is no list of texts; or a vector is not finite, and its text is named.
        """
        if isinstance(texts, str) or not isinstance(texts, Iterable):
            what = f"the text {texts!r:.60}" if isinstance(texts, str) else f"{texts!r:.60}"
            raise DataError(f"texts must be a list of texts, not {what}; put it into a list")
        texts = list(texts)
        if other := [text for text in texts if not isinstance(text, str)]:
            raise DataError(f"texts must be texts, not {other[0]!r:.60}; write it as one")
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
        ids = self._probe(texts)
        cut = [i for i, row in enumerate(ids) if len(row) > self.max_length]
        if cut:
            long = [self._text(texts[i]) for i in cut]
            short = self.tokenizer(long, truncation=True, max_length=self.max_length, verbose=False)["input_ids"]
            for i, row in zip(cut, short, strict=True):
                ids[i] = row
        order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))  # longest first: memory peaks at once
        shown = progress if progress is not None else len(order) > self.batch_size
        fresh: dict[bytes, np.ndarray] = {}
        with (
            nullcontext() if shown else unshown(),
            phase("encoding texts", len(order), "text", announced=False) as advance,
        ):
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
                advance(len(fresh))
        self.stats.encoded += len(texts)
        self.stats.truncated += len(cut)
        if cut:
            logger.info("%d of %d texts were cut to %d encoder tokens", len(cut), len(ids), self.max_length)
        return fresh

    @torch.inference_mode()
    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Run the model on tokenised texts: returns unit vectors, float32 (n, d) on the encoder's device."""
        if not self.pads and len({len(row) for row in ids}) > 1:
            return torch.cat([self.forward([row]) for row in ids])
        width, pad = max(len(row) for row in ids), _pad_token(self.model, self.tokenizer)
        padded = torch.full((len(ids), width), pad, dtype=torch.long)
        mask = torch.zeros_like(padded)
        for i, row in enumerate(
            ids
        ):  # behind the text, whatever side the tokenizer pads: positions count from the left
            padded[i, : len(row)] = torch.tensor(list(row), dtype=torch.long)
            mask[i, : len(row)] = 1
        return _vectors(self.model, self.layers, padded.to(self.device), mask.to(self.device), self.pooling, self._skip)

    @property
    def _skip(self) -> int:
        """Tokens of the prompt that are left out of the pooling."""
        if not (self._skips_prefix and self.prefix):
            return 0
        ids = list(self.tokenizer(self.prefix)["input_ids"])
        return len(ids) - (ids[-1:] != [] and ids[-1] in self.tokenizer.all_special_ids)

    def _text(self, text: str) -> str:
        text = self.prefix + text
        text = text.strip() if self._strips else text
        return text.lower() if self._lower else text

    @torch.inference_mode()
    def token_states(self, text: str) -> tuple[list[tuple[int, int]], Tensor]:
        """Return the characters (start, end) of each token that the model reads of a text, and its states (n, d).

        Special tokens and those of the prefix are left out. States are float32, on the CPU.
        """
        options = {"truncation": True, "max_length": self.max_length, "verbose": False, "return_offsets_mapping": True}
        row = self.tokenizer(self.prefix + text, return_tensors="pt", **options)
        offsets = row.pop("offset_mapping")[0].tolist()
        states = self.model(**row.to(self.device)).last_hidden_state[0].float().cpu()
        skip = len(self.prefix)
        inside = [i for i, (start, end) in enumerate(offsets) if end > start >= skip]
        return [(offsets[i][0] - skip, offsets[i][1] - skip) for i in inside], states[inside]

    def count_cut(self, texts: Sequence[str]) -> int:
        """Return how many texts are longer than what the model reads of them."""
        return sum(len(row) > self.max_length for row in self._probe(texts))

    def _probe(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ids, one more than is read where there are more: that tells a cut text from one that just fits."""
        options = {"truncation": True, "max_length": self.max_length + 1, "verbose": False}
        return list(self.tokenizer([self._text(text) for text in texts], **options)["input_ids"])

    def ids(self, text: str) -> list[int]:
        """Return the ids that the model reads of a text, prefix and special tokens included."""
        options = {"truncation": True, "max_length": self.max_length, "verbose": False}
        return list(self.tokenizer(self._text(text), **options)["input_ids"])


class RequestEncoder(nn.Module):
    """A copy of an encoder's model that is trained: PPlug reads requests with one (section 3, Enc_input)."""

    def __init__(self, encoder: HistoryEncoder) -> None:
        """Copy the model; the encoder itself stays frozen."""
        super().__init__()
        if not encoder.pads:
            raise ConfigError(f"train_request=True needs an encoder that can be padded, {encoder.name} cannot")
        self.body = copy.deepcopy(encoder.model).requires_grad_(True)
        self.layers = copy.deepcopy(encoder.layers)
        self.pooling, self.skip = encoder.pooling, encoder._skip

    def forward(self, ids: Tensor) -> Tensor:
        """Return unit vectors (B, d), float32, of ids (B, L), -1 beyond each row's end."""
        return _vectors(self.body, self.layers, ids.clamp(min=0), (ids >= 0).long(), self.pooling, self.skip)


def _vectors(model: nn.Module, layers: nn.Module, ids: Tensor, mask: Tensor, pooling: str, skip: int) -> Tensor:
    hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    if skip:
        mask = mask.clone()
        mask[:, :skip] = 0
    return nn.functional.normalize(layers(pool(hidden, mask, pooling)), dim=-1)


def _check_vocabulary(name: str, model: nn.Module, tokenizer: Any) -> None:  # noqa: ANN401
    """Refuse a tokenizer that writes tokens which the encoder has no embedding of."""
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    unwritten = set(tokenizer.all_special_ids) - {tokenizer.cls_token_id, tokenizer.sep_token_id}
    if beyond := [(token, i) for token, i in tokenizer.get_vocab().items() if i >= rows and i not in unwritten]:
        token, i = min(beyond, key=lambda pair: pair[1])
        raise ConfigError(
            f"encoder {name}: its tokenizer writes {token!r:.40} as {i}, but it has {rows} embeddings; "
            "use a complete folder of it"
        )


def _pad_token(model: nn.Module, tokenizer: Any) -> int:  # noqa: ANN401
    known = (tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None))
    return next((int(token) for token in known if token is not None and token >= 0), 0)


def _key(text: str) -> bytes:
    try:
        return hashlib.sha256(text.encode()).digest()
    except UnicodeEncodeError as exc:
        raise DataError(f"the text {text!r:.60} holds half a character (a lone surrogate); repair it") from exc


def _tokenizer_digest(tokenizer: object) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are set anew at every call and are no part of the identity.
        import json

        state = json.loads(backend.to_str())
        state.pop("truncation", None), state.pop("padding", None)
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()  # type: ignore[attr-defined]
