"""The contract of embedders: one class per architecture, each saying for itself what it reads and gives."""

import pytest
import torch

from persona_plug import UserEmbedder
from persona_plug.config import AGGREGATORS, PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.embedder.architectures import ARCHITECTURES, make_embedder
from persona_plug.embedder.task_prompt import NoTokens, TaskPrompt

HISTORY = (HistoryItem("what was asked", "4"), HistoryItem("a song", "no, thank you"))
EXAMPLES = [Example("u", request, "", HISTORY) for request in ("a film about love", "the price of coal")]
SETTINGS = [
    {},
    {"recipe": "mean"},
    {"recipe": "paper"},
    {"recipe": "uem", "max_history": 4},
    {"recipe": "persoma"},
    {"recipe": "persoma_mlp", "answers": ("4", "5"), "answer_head": True},
    {"user_tokens": 0},
    {"answers": ("4", "5")},
]


def config_of(aggregator, **settings):
    fields = {"llm_width": 16, "encoder_dim": 12, "aggregator": aggregator, **settings}
    return PlugConfig.create("llm", "encoder", **fields)


def test_every_aggregator_that_a_config_may_name_has_a_class():
    assert set(ARCHITECTURES) == set(AGGREGATORS)
    for name in AGGREGATORS:
        embedder = make_embedder(config_of(name), 1.0)
        assert type(embedder) is ARCHITECTURES[name]
        assert isinstance(embedder, UserEmbedder)
        assert type(make_embedder(config_of(name, user_tokens=0), 1.0)) is TaskPrompt


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_embedder_counts_the_soft_tokens_that_it_gives(make_plug, people, settings):
    plug = make_plug(**settings)
    for history in (people.none, people.one, people.many):
        assert len(plug.soft_prompt("x", history)) == plug.embedder.soft_count(len(history))


def test_no_tokens_are_none(make_plug):
    plug = make_plug()
    plug.embedder = NoTokens(plug.config)
    batch = plug.table(EXAMPLES).batch(EXAMPLES)
    assert plug.embed(batch).soft.shape == (2, 0, plug.config.llm_width)
    assert plug.embedder.soft_count(3) == 0
    assert not plug.embedder.reads_request


@pytest.mark.parametrize("settings", SETTINGS)
def test_an_embedder_reads_the_requests_vector_or_says_that_it_does_not(make_plug, settings):
    plug = make_plug(**settings, differ=True)
    with torch.no_grad():
        output = plug.embed(plug.table(EXAMPLES).batch(EXAMPLES))
    one, other = output.soft
    assert plug.embedder.reads_request == (not torch.equal(one, other))
