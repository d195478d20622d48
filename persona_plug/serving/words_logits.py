"""The words memory inside vLLM, as a logits processor of single requests.

    PERSONA_PLUG_WORDS=my-plug vllm serve MODEL --enable-prompt-embeds \
        --logits-processors persona_plug.serving.words_logits:WordsLogits

Only requests that bring a memory are changed. A memory travels with its request and is dropped with it.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from persona_plug.errors import ConfigError, CorruptFileError
from persona_plug.heads.packing import unpack_memory
from persona_plug.heads.words import WordsHead, WordsReader
from persona_plug.persistence import read_weights
from persona_plug.serving.vllm_request import MEMORY, WORDS_FOLDER


class WordsLogits(AdapterLogitsProcessor):
    """Mixes the memory that a request brings into the LLM's next-token probabilities."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:  # noqa: ANN401
        """Read the plug's words head.

        Raises:
            ConfigError: The environment names no plug with a words memory.
        """
        super().__init__(vllm_config, device, is_pin_memory)
        folder = os.environ.get(WORDS_FOLDER, "")
        weights = {k.removeprefix("words."): v for k, v in read_weights(Path(folder)).items() if k.startswith("words.")}
        if not weights:
            raise ConfigError(f"{WORDS_FOLDER}={folder!r} is no plug with a words memory; name the plug's folder")
        self.head = WordsHead.read(weights, vllm_config.model_config.hf_config).to(device)

    @classmethod
    def validate_params(cls, params: Any) -> None:  # noqa: ANN401
        """Refuse a memory that cannot be read, before the request is taken."""
        _memory(params)

    def is_argmax_invariant(self) -> bool:
        """Return False: greedy answers change, too."""
        return False

    def new_req_logits_processor(self, params: Any) -> Callable[[Sequence[int], Tensor], Tensor] | None:  # noqa: ANN401
        """Return what changes the logits (V,) of one request, or None where it brings no memory."""
        known = _memory(params)
        if known is None:
            return None
        reader = WordsReader(self.head, *known)

        @torch.no_grad()
        def mix(written: Sequence[int], logits: Tensor) -> Tensor:
            return reader.mix(logits.unsqueeze(0), written, len(written))[0][0].to(logits.dtype)

        return mix


def _memory(params: Any) -> Any:  # noqa: ANN401
    packed = (params.extra_args or {}).get(MEMORY)
    if packed is None:
        return None
    try:
        return unpack_memory(base64.b64decode(packed, validate=True))
    except (CorruptFileError, binascii.Error, TypeError) as exc:
        raise ValueError(f"{MEMORY}: {exc}") from exc
