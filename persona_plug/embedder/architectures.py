"""Which class stands behind each aggregator that a config may name."""

from __future__ import annotations

from torch import Tensor, nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.aggregators import AGGREGATORS
from persona_plug.embedder.contract import Embedder
from persona_plug.embedder.pooled import PooledEmbedder
from persona_plug.embedder.resampled import ResampledEmbedder
from persona_plug.embedder.resamplers import RESAMPLERS
from persona_plug.embedder.task_prompt import NoTokens, TaskPrompt
from persona_plug.embedder.user_embedder import UserEmbedder

ARCHITECTURES: dict[str, type[UserEmbedder]] = {
    **dict.fromkeys(AGGREGATORS, PooledEmbedder),
    **dict.fromkeys(RESAMPLERS, ResampledEmbedder),
}


def make_embedder(
    config: PlugConfig,
    embedding_norm: float,
    start: Tensor | None = None,
    request_encoder: nn.Module | None = None,
) -> Embedder:
    """Return the untrained embedder that a config describes; one without user tokens is a task prompt, or nothing.

    Args:
        config: Architecture; `llm_width` and `encoder_dim` must be set.
        embedding_norm: Mean L2 norm of the LLM's input embeddings.
        start: (m + k, H) where the soft tokens start; rows of the LLM's embedding table are a good choice.
        request_encoder: (B, L) ids -> (B, d) vectors of requests, needed where the config trains it.

    Raises:
        ConfigError: The config names what its architecture cannot do.
    """
    if not config.soft_tokens:
        return NoTokens(config)
    if not config.user_tokens:
        return TaskPrompt(config, embedding_norm, start)
    return ARCHITECTURES[config.aggregator](config, embedding_norm, start, request_encoder)
