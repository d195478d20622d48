"""What a sentence-transformers folder says of itself: pooling, length, prompt, dense layers, in its JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from persona_plug.errors import ConfigError
from persona_plug.models.hub import cache_only

POOLINGS = ("cls", "max", "mean", "mean_sqrt_len", "weighted_mean", "last")
"""How token vectors become one, in the order in which several are joined."""

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted_mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"weightedmean": "weighted_mean", "lasttoken": "last"}  # of newer folders, which write one name
_ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "Sigmoid", "SiLU")


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """How a folder turns a text into a vector.

    Attributes:
        body: Folder of the transformers model, below the folder itself.
        pooling: Names of `POOLINGS`, joined by "+".
        max_length: Tokens that are read of a text; None is what model and tokenizer hold.
        prefix: The default prompt.
        lower: Whether texts are put in lower case.
        skips_prefix: Whether the prompt's tokens are left out of the pooling.
        layers: What follows the pooling.
    """

    body: str = ""
    pooling: str = "mean"
    max_length: int | None = None
    prefix: str = ""
    lower: bool = False
    skips_prefix: bool = False
    layers: list[nn.Module] = field(default_factory=list)


class Unit(nn.Module):
    """Vectors scaled to unit length."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors (n, d) of length 1."""
        return nn.functional.normalize(vectors, dim=-1)


def read_settings(folder: str) -> SentenceSettings | None:
    """Return the settings of a sentence-transformers folder or Hub id, None where it is none.

    Raises:
        ConfigError: It has a part that is not built here; the part is named.
    """
    modules = read_json(folder, "modules.json")
    if modules is None:
        return None
    settings: dict[str, Any] = {"layers": []}
    for module in modules:
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Transformer":
            own = read_json(folder, _join(path, "sentence_bert_config.json")) or {}
            task = own.get("transformer_task", "feature-extraction")
            if task != "feature-extraction":
                raise ConfigError(f"encoder {folder}: transformer_task={task!r} is not built here; use another encoder")
            settings |= {"body": path, "max_length": own.get("max_seq_length"), "lower": bool(own.get("do_lower_case"))}
        elif kind == "Pooling":
            settings |= _pooling(folder, read_json(folder, _join(path, "config.json")) or {})
        elif kind == "Dense":
            settings["layers"].append(_dense(folder, path))
        elif kind == "Normalize":
            settings["layers"].append(Unit())
        elif kind != "Dropout":  # none acts in use
            raise ConfigError(f"encoder {folder}: its part {kind!r} is not built here; use another encoder")
    whole = read_json(folder, "config_sentence_transformers.json") or {}
    settings["prefix"] = (whole.get("prompts") or {}).get(whole.get("default_prompt_name")) or ""
    return SentenceSettings(**settings)


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return one vector a text (n, d times the number of poolings), float32.

    Args:
        hidden: (n, L, d) vectors of tokens, padded behind.
        mask: (n, L), 1 for tokens that count.
        pooling: Names of `POOLINGS`, joined by "+".
    """
    wide = mask.unsqueeze(-1).to(hidden.dtype)
    count = wide.sum(1)
    parts = []
    for name in pooling.split("+"):
        if name == "cls":
            first = mask.argmax(1)
            parts.append(hidden[torch.arange(len(hidden), device=hidden.device), first])
        elif name == "last":
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            parts.append(hidden[torch.arange(len(hidden), device=hidden.device), last])
        elif name == "max":
            parts.append(hidden.masked_fill(wide == 0, float("-inf")).amax(1))
        elif name == "weighted_mean":
            steps = torch.arange(1, mask.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)[None, :, None] * wide
            parts.append((hidden * steps).sum(1) / steps.sum(1))
        else:
            parts.append((hidden * wide).sum(1) / (count if name == "mean" else count.sqrt()))
    return torch.cat(parts, -1).float()


def _pooling(folder: str, config: dict[str, Any]) -> dict[str, Any]:
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        names = [_NAMES.get(m, m) for m in ([mode] if isinstance(mode, str) else mode)]
    else:
        names = [name for key, name in _MODES.items() if config.get(key)]
    if not names or not set(names) <= set(POOLINGS):
        raise ConfigError(
            f"encoder {folder}: its pooling {names} is none of {', '.join(POOLINGS)}; use another encoder"
        )
    names.sort(key=POOLINGS.index)
    return {"pooling": "+".join(names), "skips_prefix": not config.get("include_prompt", True)}


def _dense(folder: str, path: str) -> nn.Module:
    from safetensors.torch import load_file

    config = read_json(folder, _join(path, "config.json")) or {}
    activation = str(config.get("activation_function", "")).rpartition(".")[2] or "Identity"
    other = {config.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    file = _file(folder, _join(path, "model.safetensors"))
    if activation not in _ACTIVATIONS or other - {"sentence_embedding", None}:
        raise ConfigError(f"encoder {folder}: its dense layer {path} ({activation}) is not built here; use another one")
    if file is None:
        raise ConfigError(f"encoder {folder}: {path}/model.safetensors is missing; save the encoder as safetensors")
    layer = nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    try:
        layer.load_state_dict({name.removeprefix("linear."): w.float() for name, w in load_file(file).items()})
    except Exception as exc:  # safetensors and torch share no base
        raise ConfigError(f"encoder {folder}: {path}/model.safetensors does not fit its config.json") from exc
    return nn.Sequential(layer, getattr(nn, activation)())


def read_json(folder: str, path: str) -> Any:  # noqa: ANN401
    """Return what a JSON file of a folder or Hub id holds, None where there is none.

    Raises:
        ConfigError: The file is no JSON.
    """
    file = _file(folder, path)
    if file is None:
        return None
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{folder}: {path} is not JSON ({exc}); mend or remove it") from exc


def _file(folder: str, path: str) -> str | None:
    """Return a file of a folder or Hub id, None where it has none."""
    if Path(folder).is_dir():
        return str(Path(folder) / path) if (Path(folder) / path).is_file() else None
    from transformers.utils.hub import cached_file

    try:
        own = cache_only(folder)
        return cached_file(folder, path, local_files_only=own, _raise_exceptions_for_missing_entries=False)
    except OSError:  # what loads the model says why it cannot be had
        return None


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
