"""LoRA on an LLM (Hu et al., arXiv 2106.09685): adapters in a copy of it that shares every frozen tensor.

The LLM itself stays as it is: other plugs on it notice nothing, and its plain answers need no switch. On a quantised
LLM this is QLoRA (Dettmers et al., arXiv 2305.14314). Layers and files are PEFT's.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona_plug.errors import ConfigError, CorruptFileError, MismatchError
from persona_plug.files import write_atomically
from persona_plug.models.fingerprint import same_llm
from persona_plug.models.tensors import read_tensors, state_digest, write_tensors

SCALE = 4  # an update's weight, alpha / r: that of the LaMP authors' adapters (arXiv 2409.09510), r 8 and alpha 32
TARGETS = {"q_proj", "k_proj", "v_proj", "q", "k", "v", "c_attn", "qkv_proj", "query_key_value"}  # attention's inputs
ADAPTER = "adapter"  # their folder beside a plug's own files
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
FILES = (CONFIG, WEIGHTS)
_PREFIX, _NAME = "base_model.model.", ".default"  # what PEFT adds to a name when it saves, and when it loads
_FIELDS = ("peft_type", "r", "lora_alpha", "target_modules", "fan_in_fan_out")  # what decides on what weights do


class Adapters(nn.ParameterList):
    """Trained low-rank updates of an LLM's attention: their matrices, float32.

    Attributes:
        llm: The copy of the LLM that they work in; it is no submodule, so nothing that trains or moves them touches it.
        names: PEFT's name of each matrix.
    """

    def __init__(self, llm: Any, rank: int, seed: int = 0) -> None:  # noqa: ANN401
        """Adapt a copy of a frozen LLM; untrained adapters change nothing.

        Args:
            llm: The LLM; it is not changed.
            rank: r.
            seed: Of the untrained weights.

        Raises:
            ConfigError: peft is missing, or the LLM has no layer of a known name.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as exc:
            raise ConfigError("LoRA needs peft: pip install 'persona-plug[lora]'") from exc
        targets = sorted({name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()} & TARGETS)
        if not targets:
            family = llm.config.model_type
            raise ConfigError(f"LLMs of family {family} have none of the layers that LoRA adapts; use lora=0")
        adapted = _sharing_copy(llm)
        transposed = "c_attn" in targets and llm.config.model_type == "gpt2"
        self.settings = LoraConfig(
            r=rank, lora_alpha=SCALE * rank, target_modules=targets, fan_in_fan_out=transposed, inference_mode=True
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(self.settings, adapted)
        found = [(name, p) for name, p in adapted.requires_grad_(False).named_parameters() if "lora_" in name]
        for _, parameter in found:  # in an LLM of half precision small steps would be rounded away
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        super().__init__([parameter for _, parameter in found])
        object.__setattr__(self, "llm", adapted)
        self.names = [_PREFIX + name.replace(_NAME, "") for name, _ in found]

    llm: Any

    def named_weights(self) -> dict[str, Tensor]:
        """Return the matrices by PEFT's names, on the CPU."""
        return {n: p.detach().cpu().contiguous() for n, p in zip(self.names, self, strict=True)}

    @property
    def digest(self) -> str:
        """Identity of the weights as they are now."""
        return state_digest(self.named_weights())

    def save(self, folder: Path, llm: str, fingerprint: str) -> None:
        """Write PEFT's files, each atomically.

        Args:
            folder: Where to; it is made if it is not there.
            llm: What the LLM is called.
            fingerprint: Which LLM it is.
        """
        settings = {**self.settings.to_dict(), "base_model_name_or_path": llm}
        text = json.dumps(settings, indent=2, sort_keys=True, default=sorted)
        write_tensors(folder / WEIGHTS, self.named_weights(), {"llm_fingerprint": fingerprint})
        write_atomically(folder / CONFIG, f"{text}\n".encode())

    def load(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Take weights that `read_adapters` has checked.

        Raises:
            MismatchError: They are those of another LLM's layers, or of other settings.
        """
        shapes = {name: list(p.shape) for name, p in zip(self.names, self, strict=True)}
        for name in sorted(shapes.keys() | state.keys()):
            have, want = list(state[name].shape) if name in state else None, shapes.get(name)
            if have != want:
                raise MismatchError(f"{folder / WEIGHTS}: {name} is {have}, not {want}; copy the plug again")
        saved, own = read_settings(folder), json.loads(json.dumps(self.settings.to_dict(), default=sorted))
        for field in _FIELDS:
            if _ordered(saved.get(field)) != _ordered(own[field]):
                raise MismatchError(f"{folder / CONFIG}: {field} is {saved.get(field)!r:.60}, not {own[field]!r:.60}")
        with torch.no_grad():
            for name, parameter in zip(self.names, self, strict=True):
                parameter.copy_(state[name])


def read_settings(folder: Path) -> dict[str, Any]:
    """Return what an adapter's folder says of itself.

    Raises:
        CorruptFileError: The file is missing, or holds no JSON object.
    """
    path = folder / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptFileError(f"{path} is missing, and this plug has LoRA adapters; copy the whole plug") from None
    except ValueError as exc:
        raise CorruptFileError(f"{path} is not JSON ({exc}); copy the plug again") from exc
    if not isinstance(raw, dict):
        raise CorruptFileError(f"{path} holds no JSON object; copy the plug again")
    return raw


def read_adapters(folder: Path, fingerprint: str) -> dict[str, Tensor]:
    """Read an adapter's weights and check what can be told without its LLM.

    Args:
        folder: Where PEFT's files lie.
        fingerprint: The LLM that they must belong to.

    Raises:
        CorruptFileError: A file is missing, damaged or altered, or a number is not finite.
        MismatchError: They belong to another LLM, or are no float32.
    """
    read_settings(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        raise CorruptFileError(f"{path} is missing, and this plug has LoRA adapters; copy the whole plug")
    state, told = read_tensors(path)
    if not same_llm(told.get("llm_fingerprint", ""), fingerprint):
        raise MismatchError(
            f"{path} belongs to LLM {told.get('llm_fingerprint')}, the plug to {fingerprint}; copy the plug again"
        )
    if wrong := [name for name, tensor in state.items() if tensor.dtype != torch.float32]:
        raise MismatchError(f"{path}: {wrong[0]} is {state[wrong[0]].dtype}, not float32; copy the plug again")
    return state


def _ordered(value: object) -> object:
    return sorted(value) if isinstance(value, list) else value


def _sharing_copy(llm: Any) -> Any:  # noqa: ANN401
    """Return a copy of an LLM with modules and settings of its own, and the same tensors."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*llm.parameters(), *llm.buffers())}
    for module in llm.modules():
        # bitsandbytes keeps a matrix's scales beside it, in objects that must stay with the matrix.
        kept = [v for v in vars(module).values() if type(v).__module__.partition(".")[0] == "bitsandbytes"]
        shared |= {id(value): value for value in kept if not isinstance(value, nn.Module)}
    return copy.deepcopy(llm, shared)
