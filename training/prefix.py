"""Prefix tuning (Li & Liang, arXiv 2101.00190): trained keys and values in every layer, the same for all users."""

from __future__ import annotations

import torch
from torch import nn

from persona_plug.config import PlugConfig
from persona_plug.embedder.task_prompt import NoTokens
from persona_plug.errors import ConfigError
from persona_plug.plug import PersonaPlug
from persona_plug.splice.causal import CausalSplicer
from persona_plug.splice.states import StateCache


class Prefix(NoTokens):
    """No soft tokens and no answer head, but the parameters of the prefix."""

    def __init__(self, config: PlugConfig, start: torch.Tensor) -> None:
        """Start at the keys and values (layers, 2, heads, P, head_dim) that the LLM computes for some text."""
        super().__init__(config)
        self.prefix = nn.Parameter(start)


def with_prefix(plug: PersonaPlug) -> PersonaPlug:
    """Return an untrained plug like `plug` with P trained positions in every layer in place of its P soft tokens.

    They start as what the LLM makes of the instruction (repeated, or cut, to P tokens), as the paper advises; its
    reparametrisation by an MLP is left out. No prompt's states can be reused: each layer of each prompt sees them.

    Args:
        plug: Gives config, encoder and seed; its LLM is shared and not changed.

    Raises:
        ConfigError: The LLM is an encoder-decoder.
    """
    if plug.llm.config.is_encoder_decoder:
        raise ConfigError("prefix tuning is built for decoder-only LLMs; leave prefix_tuning out of methods")
    if not isinstance(plug.splicer, CausalSplicer):
        family = plug.llm.config.model_type
        raise ConfigError(
            f"LLMs of family {family} take no trained keys and values; leave prefix_tuning out of methods"
        )
    count = plug.config.soft_tokens
    config = plug.config.replace(user_tokens=0, task_tokens=1, words=False)
    words = plug.prompter.ids(plug.config.template.replace("{input}", " "))
    draw = torch.Generator().manual_seed(plug.seed)
    shift = int(torch.randint(len(words), (1,), generator=draw))  # seeds start at different words
    text = ([*words[shift:], *words[:shift]] * count)[:count]
    # A splicer without a head gives the states of the whole text.
    start = CausalSplicer(plug.llm, StateCache(0)).states([tuple(text)])[0]
    twin = plug.twin(config, share_states=False)
    twin.embedder = embedder = Prefix(config, start.float())
    twin.splicer.prefix = embedder.prefix
    return twin
