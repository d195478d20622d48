"""Learned tensors as a safetensors file with a checksum in its header."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from persona_plug.errors import CorruptFileError
from persona_plug.files import write_atomically


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, shapes, dtypes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors atomically, their digest beside what else the header is to hold."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, save(plain, {"format": "pt", "sha256": state_digest(plain), **metadata}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and what their file's header says of them.

    Raises:
        CorruptFileError: The file is damaged, does not match its own checksum, or a number is not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    raw = path.read_bytes()
    try:
        state = load(raw)
        size = int.from_bytes(raw[:8], "little")
        metadata = json.loads(raw[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError) as exc:
        raise CorruptFileError(f"{path} is damaged ({str(exc)[:120]}); copy or save the plug again") from exc
    if metadata.get("sha256") != state_digest(state):
        raise CorruptFileError(f"{path} does not match its checksum: it was altered or damaged; copy the plug again")
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CorruptFileError(f"{path}: {name} holds numbers that are not finite; save it again")
    return state, metadata
