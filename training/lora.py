"""LoRA on the LLM (Hu et al., arXiv 2106.09685), with or without a plug's soft tokens; one adapter for all or a user.

The adapters live in a copy of the LLM that was loaded for them: wrapping one base twice would share them silently.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from persona_plug.data.history import Example, leave_one_out
from persona_plug.dataset import PlugDataset
from persona_plug.embedder.task_prompt import NoTokens
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.fit.trainer import batch_loss
from persona_plug.models.llm import load_llm, loaded_as
from persona_plug.plug import PersonaPlug

RANK, ALPHA = 8, 32  # of the LaMP authors' per-user adapters (arXiv 2409.09510), there with dropout
ADAPTERS = "adapters"  # the embedder's module that holds them
TARGETS = {"q_proj", "k_proj", "v_proj", "q", "k", "v", "c_attn"}  # names in Llama-likes, T5, GPT-2


def with_lora(plug: PersonaPlug, soft: bool) -> PersonaPlug:
    """Return an untrained plug like `plug` whose own copy of the LLM has LoRA adapters on its attention.

    The copy is loaded as the plug's LLM was; on a quantised one this is QLoRA (Dettmers et al., arXiv 2305.14314).

    Args:
        plug: Gives config, encoder and seed; its LLM is not changed.
        soft: Whether the plug's soft tokens are trained beside the adapters.

    Raises:
        ConfigError: peft is missing, or the LLM has no layer of a known name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as exc:
        raise ConfigError("LoRA needs peft: pip install 'persona-plug[lora]'") from exc

    llm, _ = load_llm(plug.config.llm, **loaded_as(plug.llm))
    names = sorted({name.rsplit(".", 1)[-1] for name, _ in llm.named_modules()} & TARGETS)
    if not names:
        raise ConfigError(f"{plug.config.llm} has none of the layers {', '.join(sorted(TARGETS))} that LoRA adapts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plug.seed)
        transposed = "c_attn" in names  # GPT-2's layers
        adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names, fan_in_fan_out=transposed)
        inject_adapter_in_model(adapter, llm)
    config = plug.config if soft else plug.config.replace(user_tokens=0, task_tokens=1)
    twin = plug.twin(config, llm=llm)  # freezes all of its LLM
    twin.llm.generation_config.num_beams = plug.llm.generation_config.num_beams
    twin.splicer.frozen = False
    if not soft:
        twin.embedder = NoTokens(config)
    # As part of the embedder, adapters are trained, saved and resumed as a plug is.
    adapters = [p.requires_grad_() for name, p in llm.named_parameters() if "lora_" in name]
    twin.embedder.add_module(ADAPTERS, nn.ParameterList(adapters))
    return twin


def for_each_user(
    plug: PersonaPlug, questions: Sequence[Example], config: FitConfig, steps: int
) -> Iterator[tuple[list[int], PersonaPlug]]:
    """Train the adapters further on one user's history after the other (OPPU, arXiv 2402.04401).

    Args:
        plug: A plug with trained adapters; it is left as it was.
        questions: Each user's own are asked once their adapter is trained. A user's history is that of their first
            question: the questions' own answers are no part of it.
        config: Learning rate, batch size and seed.
        steps: Optimiser steps per user.

    Yields:
        Indices into `questions`, and the plug with that user's adapter.
    """
    start = copy.deepcopy(plug.embedder.state_dict())
    users: dict[str, list[int]] = {}
    for i, example in enumerate(questions):
        users.setdefault(example.user_id, []).append(i)
    answers = plug.config.answers
    for user, indices in users.items():
        samples = leave_one_out(user, questions[indices[0]].history)
        samples = [s for s in samples if s.output.strip() and (answers is None or s.output.strip() in answers)]
        try:
            if samples:
                _train(plug, samples, config, steps)
            yield indices, plug
        finally:
            plug.embedder.load_state_dict(start)


def _train(plug: PersonaPlug, examples: Sequence[Example], config: FitConfig, steps: int) -> None:
    samples = PlugDataset(plug, examples)
    adapters = list(plug.embedder.get_submodule(ADAPTERS).parameters())
    optimizer = torch.optim.AdamW(adapters, lr=config.lr, weight_decay=config.weight_decay)
    draw = torch.Generator().manual_seed(config.seed)
    for _ in range(steps):
        batch = samples.collate(torch.randperm(len(samples), generator=draw)[: config.batch_size].tolist())
        output = plug(batch.history, batch.parts, batch.trees)
        optimizer.zero_grad()
        batch_loss(output, plug.embedder, batch, config.token_weight).backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
