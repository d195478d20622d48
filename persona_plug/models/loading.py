"""Loading frozen weights with transformers: all of them or none, and never code of theirs."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from persona_plug.errors import CorruptFileError, ModelUnavailable
from persona_plug.models import zoo
from persona_plug.models.hub import cache_only

# Tells at every start of kernels that are optional on a CPU, and at every product that it casts to half precision.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_POINTER = b"version https://git-lfs"
_BUFFERS = re.compile(r"(position_ids|inv_freq|\.attn\.bias|masked_bias|num_batches_tracked|rotary_emb\..*)$")
"""What older checkpoints hold beside their weights: numbers that a model makes by itself."""


def load(auto: Any, folder: str, name: str, **options: Any) -> Any:  # noqa: ANN401
    """Return what an auto class of transformers makes of a folder or Hub id.

    Args:
        auto: `AutoTokenizer`, `AutoConfig`, `AutoModel` and the like.
        folder: Folder or Hub id.
        name: What a user calls it.
        options: Passed on.

    Raises:
        ModelUnavailable: It cannot be had, or needs code of its own.
        CorruptFileError: A weight file is damaged, or is a pointer to one.
    """
    if cache_only(folder):
        options["local_files_only"] = True
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, **options)
    except Exception as exc:  # readers of configs, tokenizers and weights share no base
        raise _reason(folder, name, exc) from exc


def load_weights(auto: Any, folder: str, name: str, unused: str = "", **options: Any) -> Any:  # noqa: ANN401
    """Return a model with all its weights from a checkpoint.

    Args:
        auto: `AutoModel` and the like.
        folder: Folder or Hub id.
        name: What a user calls it.
        unused: Name of a head that is never used; where the checkpoint lacks it, the model is without it.
        options: Passed on.

    Raises:
        ModelUnavailable: The checkpoint lacks weights of the model, or holds some that the model has no place for.
        CorruptFileError: A weight file is damaged, or is a pointer to one.
    """
    model, info = load(auto, folder, name, output_loading_info=True, **options)
    missing = sorted(info["missing_keys"])
    if unused and any(key.startswith(f"{unused}.") for key in missing):
        setattr(model, unused, None)
        missing = [key for key in missing if not key.startswith(f"{unused}.")]
    if missing:
        raise ModelUnavailable(f"{name} lacks weights ({_some(missing)}); pass a complete checkpoint of its kind")
    strange = sorted(key for key in info["unexpected_keys"] if _of_body(model, key))
    if strange:
        raise ModelUnavailable(
            f"{name} holds weights that its config has no place for ({_some(strange)}); check its config.json"
        )
    return model


def _of_body(model: Any, key: str) -> bool:  # noqa: ANN401
    """Whether a weight's name is one of the model's body; heads of other tasks are none of it."""
    body = model.base_model
    key = key.removeprefix(f"{model.base_model_prefix}.")
    top = key.partition(".")[0]
    return top in dict(body.named_children()) and top != "pooler" and not _BUFFERS.search(key)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:2]) + (f" and {len(keys) - 2} more" if len(keys) > 2 else "")


def _reason(folder: str, name: str, exc: Exception) -> Exception:
    for file in sorted(Path(folder).glob("*")) if Path(folder).is_dir() else []:
        if not file.is_file():
            continue
        with file.open("rb") as start:
            if start.read(len(_POINTER)) == _POINTER:
                return CorruptFileError(f"{file} is a Git-LFS pointer, not the file; run `git lfs pull` there")
    if "ignore_mismatched_sizes" in str(exc):
        return ModelUnavailable(f"{name} holds weights of other sizes than its config.json says; copy the model again")
    if type(exc).__name__ == "SafetensorError":
        return CorruptFileError(f"{name}: a weight file is damaged or cut off ({exc}); copy the model again")
    if "trust_remote_code" in str(exc):
        return ModelUnavailable(f"{name} needs code of its own, which is never run; use a model that transformers has")
    return zoo.load_error(name, exc)
