"""How much work a training is, so that trainings of unlike shape can be given the same."""

from __future__ import annotations

import dataclasses

from persona_plug.dataset import PlugDataset
from persona_plug.fit.config import FitConfig
from persona_plug.model import PlugModel


def sample_flops(plug: PlugModel, samples: PlugDataset) -> float:
    """Return the FLOPs of one sample in training, the mean over samples.

    A position costs two FLOPs a weight, and four where gradients pass through it: in front of the soft tokens nothing
    depends on what is trained, unless that lies inside the LLM. The output layer counts where an answer is predicted.
    What is trained, norms and the products of attention do not count, nor that frozen states may be kept.
    """
    inner, output = _weights(plug)
    total = 0.0
    for example, parts, tree in zip(samples.examples, samples.parts, samples.trees, strict=True):
        answer = len(tree.tokens) + 1
        frozen = len(parts.left) if plug.splicer.reuses else 0
        soft = plug.embedder.soft_count(len(example.history)) + plug.splicer.prefix_length
        behind = len(parts.left) - frozen + soft + len(parts.right) + answer
        total += 2.0 * inner * frozen + 4.0 * (inner * behind + output * answer)
    return total / len(samples)


def pass_flops(plug: PlugModel) -> float:
    """Return the FLOPs of a token that the LLM reads and predicts from, without gradients."""
    return 2.0 * sum(_weights(plug))


def _weights(plug: PlugModel) -> tuple[int, int]:
    """Return the weights that every position meets, and those of the output layer."""
    llm = plug.plain_splicer.llm
    table, output = llm.get_input_embeddings().weight, llm.get_output_embeddings().weight
    every = sum(p.numel() for p in llm.parameters()) - table.numel()
    return every - (output.numel() if output is not table else 0), output.numel()


def affordable(config: FitConfig, plug: PlugModel, samples: PlugDataset, processes: int = 1) -> FitConfig:
    """Return a config whose steps `config.flops` pays for: a whole number of looks, one at least."""
    if not config.flops:
        return config
    step = sample_flops(plug, samples) * config.batch_size * config.gradient_accumulation * processes
    steps = max(1, min(config.steps, int(config.flops / step)))
    look = min(config.eval_every, steps)
    return dataclasses.replace(config, steps=steps // look * look, eval_every=look)
