"""Recipes: clean bases, adapters that train alone or beside soft tokens, users kept apart, runs that go on."""

import dataclasses

import pytest
import torch

from persona_plug.errors import ConfigError
from persona_plug.fingerprint import full_digest
from persona_plug.history import Example, HistoryItem
from persona_plug.trainer import FitConfig
from persona_plug.training_data import FitData
from training import recipes
from training.lora import for_each_user, with_lora
from training.recipes import RECIPES, fit, make

ANSWERS = ("good", "bad")


@pytest.fixture
def data():
    def user(name, taste):
        items = [HistoryItem(f"rate {name} {i}", ANSWERS[taste], id=f"{name}-{i}") for i in range(4)]
        return [
            Example(name, item.input, item.output, tuple(o for o in items if o is not item), item.id) for item in items
        ]

    people = [user(f"u{i}", i % 2) for i in range(6)]
    return FitData(
        [e for p in people[:3] for e in p], people[3], [e for p in people[4:] for e in p], "{input}", ANSWERS
    )


@pytest.fixture
def base(make_plug):
    return make_plug(answers=ANSWERS)


CONFIG = FitConfig(steps=2, batch_size=4, eval_every=1, eval_samples=4, lr=1e-2)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_trains_what_it_says_and_leaves_the_llm_alone(base, data, tmp_path, name):
    before = full_digest(base.llm)
    fitted = fit(name, base, {"max_input_tokens": 64}, data, CONFIG, tmp_path)
    assert full_digest(base.llm) == before
    assert not any(p.requires_grad for p in base.llm.parameters())
    assert fitted.steps == 2
    trained = {n.split(".")[0] for n, p in fitted.plug.embedder.named_parameters() if p.requires_grad}
    assert ("adapters" in trained) == RECIPES[name].adapter
    assert ("tokens" in trained) == (RECIPES[name].plug is not None)
    assert fitted.parameters == sum(p.numel() for p in fitted.plug.embedder.parameters() if p.requires_grad)
    scores = fitted.plug.score(data.held_out)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("name", ["plug", "plug_lora"])
def test_a_finished_training_is_read_back_and_not_repeated(base, data, tmp_path, name, monkeypatch):
    first = fit(name, base, {"max_input_tokens": 64}, data, CONFIG, tmp_path)
    scores = first.plug.score(data.held_out)
    monkeypatch.setattr(recipes, "train", lambda *_, **__: pytest.fail("trained again"))
    again = fit(name, base, {"max_input_tokens": 64}, data, CONFIG, tmp_path)
    torch.testing.assert_close(again.plug.score(data.held_out), scores, atol=1e-6, rtol=1e-6)
    assert (again.seconds, again.steps, again.parameters) == (first.seconds, first.steps, first.parameters)


def test_two_adapted_llms_share_nothing(base):
    """Wrapping one base twice would share adapters; each recipe has its own copy of the LLM."""
    one, two = with_lora(base, soft=False), with_lora(base, soft=False)
    pointers = [{p.data_ptr() for p in plug.llm.parameters()} for plug in (one, two, base)]
    assert not pointers[0] & pointers[1]
    assert not (pointers[0] | pointers[1]) & pointers[2]
    assert not any("lora_" in n for n, _ in base.llm.named_parameters())


def test_untrained_adapters_change_nothing_and_trained_ones_do(base, data):
    plug = with_lora(base, soft=False)
    torch.testing.assert_close(
        plug.score(data.held_out), base.score(data.held_out, personal=False), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        for p in plug.embedder.adapters:
            p.add_(0.05)
    assert not torch.allclose(plug.score(data.held_out), base.score(data.held_out, personal=False), atol=1e-3)


def test_gradients_reach_adapters_in_front_of_the_soft_tokens(base, data):
    """Nothing of an LLM with adapters is reused: a state kept from before a step would be stale."""
    plug = with_lora(base, soft=True)
    before = plug.score(data.held_out[:2])
    with torch.no_grad():
        for p in plug.embedder.adapters:
            p.add_(0.05)
    assert not torch.allclose(plug.score(data.held_out[:2]), before, atol=1e-3)
    assert plug.splicer.cache.used == 0


def test_each_user_starts_from_the_shared_adapters(base, data, tmp_path):
    plug = fit("lora", base, {"max_input_tokens": 64}, data, CONFIG, tmp_path).plug
    start = {k: v.clone() for k, v in plug.embedder.state_dict().items()}
    config = dataclasses.replace(CONFIG, lr=1e-2)
    seen, scores = [], {}
    for indices, own in for_each_user(plug, data.held_out, config, 3):
        seen += indices
        assert any(not torch.equal(v, start[k]) for k, v in own.embedder.state_dict().items())
        scores[data.held_out[indices[0]].user_id] = own.score(data.held_out[:1])
    assert seen == list(range(len(data.held_out)))
    for key, value in plug.embedder.state_dict().items():
        torch.testing.assert_close(value, start[key], atol=0, rtol=0)
    # The same user alone gives the same: no user's training reaches the next.
    last = data.held_out[-1].user_id
    alone = [e for e in data.held_out if e.user_id == last]
    for _, own in for_each_user(plug, alone, config, 3):
        torch.testing.assert_close(own.score(data.held_out[:1]), scores[last], atol=1e-5, rtol=1e-5)


def test_an_unknown_recipe_is_named(base):
    with pytest.raises(ConfigError, match=r"no recipe 'nonsense'; known are task_prompt"):
        make("nonsense", base, {}, 0)
