"""Identities of models: short digests that tell whether two sets of weights are the same."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SAMPLES = 512


def weights_digest(model: nn.Module, only: str = "all") -> str:
    """Return 16 hex digits over name, shape and evenly spaced samples of the floating-point parameters.

    Samples are rounded to bfloat16 first, so the same checkpoint loaded in fp32 and bf16 has one digest. Sampling keeps
    this under a second for any model; a change by training touches every parameter and is seen.

    Args:
        model: The model.
        only: `all` parameters, those of at most one dimension and embeddings (`dense`, which quantisation leaves
            alone), or the rest (`linear`).
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        dense = parameter.dim() < 2 or id(parameter) in embeddings
        if (only == "dense" and not dense) or (only == "linear" and dense):
            continue
        shape = tuple(parameter.shape)
        digest.update(f"{name}{shape}".encode())
        digest.update(_sample(parameter))
    return digest.hexdigest()[:16]


def full_digest(model: nn.Module) -> str:
    """Return the sha256 over every byte of every parameter and buffer: the proof that nothing changed."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def llm_fingerprint(model: nn.Module, quantization: str | None) -> str:
    """Return `dense-linear`: digests of embeddings with norms, and of the matrices (or the quantisation's name)."""
    linear = quantization or weights_digest(model, "linear")
    return f"{weights_digest(model, 'dense')}-{linear}"


def same_llm(saved: str, present: str) -> bool:
    """Whether two LLM fingerprints agree; matrices are compared only if neither side was quantised."""
    saved_dense, _, saved_linear = saved.partition("-")
    dense, _, linear = present.partition("-")
    quantised = {"int8", "nf4"} & {saved_linear, linear}
    return saved_dense == dense and (saved_linear == linear or bool(quantised))


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step].to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
