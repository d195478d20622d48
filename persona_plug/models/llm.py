"""Loading the frozen LLM: dtype, device, quantisation; nothing in here ever changes a weight."""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from persona_plug.errors import ConfigError
from persona_plug.models import zoo
from persona_plug.models.loading import load, load_weights
from persona_plug.models.sentence import read_json

logger = logging.getLogger(__name__)

Quantization = Literal["int8", "nf4"]
TOKENS = tuple(f"{name}_token_id" for name in ("bos", "eos", "pad", "decoder_start", "forced_bos", "forced_eos"))
"""What of an LLM's generation settings counts: its special tokens."""


def load_llm(
    name: str,
    *,
    dtype: torch.dtype | str | None = None,
    quantization: Quantization | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a frozen LLM in eval mode with its tokenizer.

    Args:
        name: Short name, folder or Hub id.
        dtype: Weights' dtype; default bfloat16 on a GPU that has it, else float32. `auto` takes what a measurement
            says is faster, which on a CPU is not the same for all.
        quantization: `int8` or `nf4` by bitsandbytes.
        device: Torch device; default CUDA or Apple's GPU (MPS) if there is one, else CPU.

    Raises:
        ModelUnavailable: The weights cannot be had, or not all of them.
        CorruptFileError: A weight file is damaged.
        ConfigError: The quantisation is unknown or bitsandbytes is missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

    place = pick_device(device)
    if dtype == "auto":
        dtype = faster_dtype() if place.type == "cpu" else None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError("dtype must be auto, or name a torch dtype such as float32 or bfloat16")
    if dtype is None:
        # bfloat16 is emulated on many CPUs: several times slower than float32.
        dtype = torch.bfloat16 if place.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    kwargs: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        kwargs |= {"quantization_config": _bitsandbytes(quantization, dtype), "device_map": {"": place}}
    folder = zoo.resolve(name)
    config = load(AutoConfig, folder, name)
    tokenizer = load(AutoTokenizer, folder, name)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if (known := _special_tokens(folder)) is not None:  # else transformers checks habits that nobody follows here
        kwargs["generation_config"] = GenerationConfig(**known)
    llm: Any = load_weights(loader, folder, name, **kwargs)
    if quantization is None:
        llm.to(place)
    for module in llm.modules():
        # bitsandbytes repacks 4-bit weights on some CPUs at the first pass without a graph, for a kernel that has no
        # backward: later passes would give soft tokens no gradient, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return freeze(llm), tokenizer


def _special_tokens(folder: str) -> dict[str, Any] | None:
    """Return the special tokens that a generation config names, or a config without one beside it; None without any."""
    for file in ("generation_config.json", "config.json"):
        try:
            settings = read_json(folder, file)
        except ConfigError:
            settings = None
        if isinstance(settings, dict):
            known = {name: settings[name] for name in TOKENS if settings.get(name) is not None}
            return known if known or file.startswith("generation") else None
    return None


@functools.cache
def faster_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies matrices in it 1.5 times as fast as in float32, else float32.

    Both are measured in turn, some tens of milliseconds in all; one line of the log says the result.
    """
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    factors = {dtype: (torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)) for dtype in best}
    for _ in range(4):
        for dtype, (left, right) in factors.items():
            start = time.perf_counter()
            left @ right
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    ratio = best[torch.float32] / best[torch.bfloat16]
    chosen = torch.bfloat16 if ratio >= 1.5 else torch.float32
    logger.info("dtype %s: products in bfloat16 are %.1f times as fast as in float32 here", chosen, ratio)
    return chosen


def loaded_as(llm: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the keywords of `load_llm` that load another copy of an LLM as this one was loaded."""
    kinds: dict[str, Quantization] = {"is_loaded_in_8bit": "int8", "is_loaded_in_4bit": "nf4"}
    found = [kind for flag, kind in kinds.items() if getattr(llm, flag, False)]
    return {"dtype": llm.dtype, "quantization": found[0] if found else None, "device": llm.device}


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return the device; by default CUDA or Apple's GPU (MPS) if there is one, else the CPU.

    Raises:
        ConfigError: Torch knows no such device, or this machine has none.
    """
    try:
        place = torch.device(device or _default_device())
    except RuntimeError as exc:
        raise ConfigError(f"device={device!r} is not one torch knows, such as cpu or cuda:0") from exc
    try:
        torch.zeros(1, device=place)
    except Exception as exc:  # each backend raises its own
        raise ConfigError(f"device={str(place)!r} is not on this machine; leave it out, or use cpu") from exc
    if place.type == "meta":
        raise ConfigError("device='meta' holds no numbers; leave it out, or use cpu")
    return place


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@dataclass(frozen=True, slots=True)
class Limits:
    """What an LLM can read: token ids below `rows`, and `positions` of them (None: as many as memory holds)."""

    rows: int
    positions: int | None

    @classmethod
    def of(cls, llm: Any) -> Limits:  # noqa: ANN401
        """Return the limits of an LLM."""
        config = llm.config.get_text_config(decoder=True)
        positions = getattr(config, "max_position_embeddings", None)
        return cls(int(llm.get_input_embeddings().weight.shape[0]), positions if positions and positions > 0 else None)


def freeze(llm: Any) -> Any:  # noqa: ANN401
    """Put an LLM in eval mode and take gradients off all its parameters."""
    return llm.eval().requires_grad_(False)


def embedding_norm(llm: Any) -> float:  # noqa: ANN401
    """Return the mean L2 norm of the LLM's input embeddings, as its layers see them (Gemma scales its table)."""
    return float(sample_embeddings(llm, 2048).norm(dim=-1).mean())


@torch.no_grad()
def sample_embeddings(llm: Any, count: int, seed: int = 0) -> torch.Tensor:  # noqa: ANN401
    """Return the float32 embeddings (count, H) of randomly drawn vocabulary entries."""
    table = llm.get_input_embeddings()
    size = table.weight.shape[0]
    ids = torch.randint(0, size, (count,), generator=torch.Generator().manual_seed(seed))
    return table(ids.to(table.weight.device)).float().cpu() * embedding_scale(llm)


def embedding_scale(llm: Any) -> float:  # noqa: ANN401
    """Return what the LLM multiplies its embeddings by outside of their table: Pegasus and Marian do, for ids only."""
    stack = llm.get_encoder() if llm.config.is_encoder_decoder else llm.base_model
    if hasattr(llm.get_input_embeddings(), "embed_scale"):  # the table does it by itself
        return 1.0
    scale = getattr(stack, "embed_scale", 1.0)
    return float(scale) if isinstance(scale, int | float) else 1.0


def _bitsandbytes(kind: str, dtype: torch.dtype) -> Any:  # noqa: ANN401
    from importlib.util import find_spec

    if kind not in ("int8", "nf4"):
        raise ConfigError(f"quantization={kind!r} is not one of int8, nf4")
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization={kind!r} needs bitsandbytes: pip install 'persona-plug[quant]'")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
