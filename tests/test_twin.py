"""A second plug on the same frozen models, and plugs that cache nothing."""

import threading

import pytest
import torch

from persona_plug.models.caching import caching, uncached
from persona_plug.models.encoder import HistoryEncoder


@pytest.fixture
def own_encoder(tmp_path):
    return HistoryEncoder("tiny-encoder", device="cpu", cache_dir=tmp_path)


# A twin


def test_a_twin_shares_what_is_frozen_and_nothing_that_is_trained(make_plug, people):
    plug = make_plug(differ=True, seed=3)
    twin = plug.twin()
    assert (twin.llm, twin.encoder, twin.splicer) == (plug.llm, plug.encoder, plug.splicer)
    trained = [{p.data_ptr() for p in own.parameters() if p.numel()} for own in (plug, twin)]
    assert not trained[0] & trained[1]
    assert torch.equal(twin.soft_prompt("x", people.ann), make_plug(seed=3).soft_prompt("x", people.ann))
    other = plug.twin(seed=4)
    assert torch.equal(other.soft_prompt("x", people.ann), make_plug(seed=4).soft_prompt("x", people.ann))


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        ({"user_tokens": 0, "task_tokens": 8}, True),
        ({"max_input_tokens": 128}, True),
        ({"placement": "prefix"}, False),
        ({"template": "another instruction: {input}"}, False),
    ],
)
def test_twins_share_states_where_their_prompts_begin_alike(make_plug, changes, shared):
    plug = make_plug(template="an instruction: {input}")
    plug.splicer.cache.budget = 12345
    head = plug.splicer.head
    twin = plug.twin(plug.config.replace(**changes))
    assert (twin.splicer is plug.splicer) == shared
    assert twin.splicer.cache.budget == 12345
    assert twin.splicer.head == twin.prompter.head
    assert plug.splicer.head == head
    assert plug.twin(share_states=False).splicer is not plug.splicer


def test_a_twin_with_adapters_shares_the_llm_and_no_states(make_plug):
    plug = make_plug()
    twin = plug.twin(plug.config.replace(lora=2))
    assert twin.plain_splicer is plug.splicer
    assert twin.llm is twin.splicer.llm is not plug.llm
    assert twin.splicer.cache is not plug.splicer.cache
    assert twin.twin().llm is not twin.llm
    assert twin.twin(plug.config).splicer is plug.splicer


# Caching


def cached(plug):
    return len(plug.encoder.cache), plug.splicer.cache.used


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_inside_uncached_nothing_is_cached_and_answers_are_the_same(make_plug, people, own_encoder, llm):
    plug = make_plug(llm, encoder=own_encoder, differ=True)
    with uncached():
        once = plug.score(people.requests, ["yes", "no"], people.histories)
        text = plug.generate("rate this", people.ann, max_new_tokens=4)
    assert cached(plug) == (0, 0)
    scores = plug.score(people.requests, ["yes", "no"], people.histories)
    torch.testing.assert_close(scores, once, atol=1e-4, rtol=0)
    assert plug.generate("rate this", people.ann, max_new_tokens=4) == text
    assert min(cached(plug)) > 0


def test_uncached_ends_with_its_block_after_exceptions_and_in_its_own_thread(make_plug):
    plug, elsewhere = make_plug(), []

    def block():
        with uncached(), uncached():
            assert not caching()
            assert not plug.splicer.reuses
            thread = threading.Thread(target=lambda: elsewhere.append(caching()))
            thread.start()
            thread.join()
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        block()
    assert elsewhere == [True]
    assert caching()
    assert plug.splicer.reuses


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_a_plug_that_keeps_nothing_holds_no_trace_of_a_request(make_plug, people, own_encoder, llm):
    plug = make_plug(llm, encoder=own_encoder, differ=True)
    expected = plug.score(people.requests, ["yes", "no"], people.histories)
    plug.keep_nothing()
    assert own_encoder.cache is None
    scores = plug.score(people.requests, ["yes", "no"], people.histories)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    plug.generate(people.requests, people.histories, max_new_tokens=2)
    splicer = plug.splicer
    assert (splicer.cache.used, splicer.cache.seconds, splicer.bill.used, splicer.groups) == (0, {}, set(), {})
