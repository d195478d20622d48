"""What vLLM is sent: prompts as embeddings, how tokens are chosen, and a user's words."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from persona_plug.errors import ConfigError, DataError
from persona_plug.export import dense
from persona_plug.heads.packing import pack_memory
from persona_plug.heads.words import WordsReader
from persona_plug.serving.writing import NONE, Penalties
from persona_plug.splice.prompts import PromptParts
from persona_plug.splice.soft import Soft

if TYPE_CHECKING:
    from persona_plug.plug import PersonaPlug

MEMORY = "persona_words"  # what a request's memory of words is called among vLLM's extra arguments
WORDS_FOLDER = "PERSONA_PLUG_WORDS"  # the variable that names the plug whose words head a vLLM process reads
WORDS_LOGITS = "persona_plug.serving.words_logits:WordsLogits"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_tokens: New tokens at most.
        temperature: 0 takes the most probable token.
        top_p: Probability mass that is sampled from.
        seed: Of the sampling; None draws one.
        stop: Texts that end the answer and do not belong to it.
        memory: The user's words as `packed_words` gives them, or an empty text.
        adapter: The LoRA adapter that the LLM answers with, as the server names it; empty for the LLM alone.
        penalties: What changes logits by what is written.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    memory: str = ""
    adapter: str = ""
    penalties: Penalties = NONE

    def fields(self) -> dict[str, Any]:
        """Return what vLLM calls them; `top_k` is switched off, which a server may have switched on by default."""
        return {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "seed": self.seed,
            "stop": list(self.stop),
            **self._penalties(),
        }

    def _penalties(self) -> dict[str, Any]:
        if self.penalties == NONE:
            return {}
        return {
            "repetition_penalty": self.penalties.repetition,
            "frequency_penalty": self.penalties.frequency,
            "presence_penalty": self.penalties.presence,
            "logit_bias": dict(self.penalties.biases) or None,
        }


def packed_words(reader: WordsReader | None) -> str:
    """Return a request's memory as it travels to vLLM: base64, or an empty text where there is none."""
    if reader is None:
        return ""
    return base64.b64encode(pack_memory(reader.memory, reader.request, reader.end, reader.strength)).decode()


@torch.no_grad()
def prompt_embeds(plug: PersonaPlug, parts: Sequence[PromptParts], soft: Soft) -> list[Tensor]:
    """Return whole prompts as embeddings: B tensors (n_b, H), dense float32 on the CPU.

    Args:
        plug: The plug.
        parts: B prompts.
        soft: (B, S, H) or B tensors (S_b, H); S may be 0 for the plain LLM.

    Raises:
        ConfigError: The LLM is an encoder-decoder.
        DataError: Soft tokens are not finite, or have another width.
    """
    if plug.llm.config.is_encoder_decoder:
        raise ConfigError("vLLM takes embeddings of decoder-only LLMs alone; answer with plug.generate instead")
    rows = []
    for p, s in zip(parts, soft, strict=True):
        pieces = [plug.splicer.embed(p.left).cpu().float(), s.cpu().float(), plug.splicer.embed(p.right).cpu().float()]
        if s.dim() != 2 or s.shape[1] != plug.config.llm_width:
            raise DataError(f"soft tokens must have shape (S, {plug.config.llm_width}), not {tuple(s.shape)}")
        rows.append(dense(torch.cat(pieces), plug.config.llm_width))
    return rows
