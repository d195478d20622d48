"""Trainings of unlike shape are given the same work."""

from dataclasses import replace

import pytest

from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from persona_plug.dataset import PlugDataset
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.fit.loop import train
from persona_plug.fit.work import affordable, sample_flops

ASKED = [Example("a", "one two three", "four five", ()), Example("b", "one", "two", ())]


def weights(plug):
    """Matrices that every position goes through, and the output layer."""
    llm = plug.llm
    every = {name: p.numel() for name, p in llm.named_parameters() if "lora_" not in name and "embed" not in name}
    head = every.pop("lm_head.weight", llm.get_input_embeddings().weight.numel())
    return sum(every.values()), head


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_frozen_positions_cost_half(make_plug, placement):
    plug = make_plug(placement=placement, task_tokens=3, user_tokens=0)
    samples = PlugDataset(plug, ASKED[:1])
    inner, head = weights(plug)
    parts, answer = samples.parts[0], len(plug.prompter.answer("four five")) + 1
    behind = 3 + len(parts.right) + answer
    expected = 2 * inner * len(parts.left) + 4 * (inner * behind + head * answer)
    assert sample_flops(plug, samples) == expected


def test_adapters_leave_nothing_frozen(make_plug):
    plug = make_plug(lora=2, task_tokens=0, user_tokens=0)
    samples = PlugDataset(plug, ASKED)
    inner, head = weights(plug)
    total = sum(
        4 * (inner * (len(p.left) + len(p.right) + a) + head * a)
        for p, a in zip(samples.parts, (len(plug.prompter.answer(e.output)) + 1 for e in ASKED), strict=True)
    )
    assert sample_flops(plug, samples) == total / 2


def test_steps_follow_from_work(make_plug):
    plug = make_plug(task_tokens=3, user_tokens=0)
    samples = PlugDataset(plug, ASKED)
    one = sample_flops(plug, samples)
    asked = FitConfig(steps=50, eval_every=4, batch_size=2, gradient_accumulation=2)
    for flops, steps, look in ((0, 50, 4), (one * 4 * 9.5, 8, 4), (one * 4 * 2.5, 2, 2), (1, 1, 1), (1e30, 48, 4)):
        got = affordable(replace(asked, flops=flops), plug, samples)
        assert (got.steps, got.eval_every) == (steps, look), flops
    assert affordable(replace(asked, flops=one * 4 * 9.5), plug, samples, processes=2).steps == 4


def test_a_training_takes_no_more_steps_than_its_work_pays_for(make_plug, tmp_path):
    plug = make_plug(task_tokens=3, user_tokens=0)
    flops = 2 * 3.5 * sample_flops(plug, PlugDataset(plug, ASKED))
    log = train(
        plug,
        FitData(ASKED, ASKED, [], "{input}", None),
        FitConfig(steps=9, flops=flops, batch_size=2, eval_every=1),
        tmp_path,
    )
    assert max(line["step"] for line in log) == 3


def test_work_is_not_negative():
    with pytest.raises(ConfigError, match="flops=-1"):
        FitConfig(flops=-1)
