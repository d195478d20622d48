"""How strongly a user's history counts: from nobody known to as trained; 0 is the plain LLM."""

import pytest
import torch

from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError, DataError
from tests.fit.test_words import few_steps, fitted  # noqa: F401 (a fixture)
from tests.fit.test_words import people as greeters
from tests.test_lora import shaken

LLMS = ["tiny-llama", "tiny-t5"]
SAID = ["yes", "no"]


def answers(plug, people, **how):
    scores = plug.score(people.requests, SAID, people.histories, **how)
    return scores, plug.generate(people.requests, people.histories, max_new_tokens=6, **how)


@pytest.fixture(scope="module", params=[(llm, lora) for llm in LLMS for lora in (0, 2)], ids=str)
def plug(request, make_plug):
    llm, lora = request.param
    made = make_plug(llm, differ=True, lora=lora)
    return shaken(made) if lora else made


@pytest.fixture(scope="module")
def judge(make_plug):
    """A plug with an answers head."""
    return make_plug(differ=True, answers=["1", "4", "5", "10"], answer_head=True)


def test_one_is_as_trained_and_none_the_plain_llm(plug, people):
    for strength, how in ((1.0, {}), (1, {}), (0.0, {"personal": False}), (0, {"personal": False})):
        scores, texts = answers(plug, people, strength=strength)
        wanted, wanted_texts = answers(plug, people, **how)
        assert torch.equal(scores, wanted)
        assert texts == wanted_texts
    assert not torch.equal(answers(plug, people, strength=0.5)[0], answers(plug, people)[0])


def test_a_little_is_near_the_user_nobody_knows(plug, people):
    nobody = plug.score(people.requests, SAID)
    plain, own = answers(plug, people, personal=False)[0], answers(plug, people)[0]
    gaps = [float((answers(plug, people, strength=s)[0] - nobody).abs().max()) for s in (0.5, 0.1)]
    assert gaps[0] > gaps[1]
    assert float((plain - nobody).abs().max()) > 0.01  # task tokens and adapters stay
    assert float((own - nobody).abs().max()) > 0.01


def test_tokens_keep_their_learned_lengths(make_plug, people):
    plug = make_plug(differ=True)
    batch = plug.table(people_examples(people, 0.5)).batch(people_examples(people, 0.5))
    soft = plug.embed(batch).soft
    own, nobody = (
        plug.embed(plug.table(rows).batch(rows)).soft
        for rows in (people_examples(people), [Example("", r, "") for r in people.requests])
    )
    torch.testing.assert_close(soft.norm(dim=-1), own.norm(dim=-1))
    k = plug.config.shared_tokens
    torch.testing.assert_close(soft[:, :k], own[:, :k])  # everyone's
    toward = torch.nn.functional.cosine_similarity
    assert bool((toward(soft, nobody, -1) >= toward(own, nobody, -1) - 1e-5).all())
    assert not torch.allclose(soft, own, atol=1e-2)


def people_examples(people, *strength):
    return [
        Example("", r, "", tuple(h), "", None, *strength)
        for r, h in zip(people.requests, people.histories, strict=True)
    ]


def test_requests_of_one_batch_have_their_own(plug, people):
    strengths = [0.25, 1.0, 0.5, 0.75, 1.0, 0.1]
    rows = [Example(e.user_id, e.input, "", e.history, strength=s) for e, s in
            zip(people_examples(people), strengths, strict=True)]  # fmt: skip
    together = plug.score(rows, SAID)
    for i, (row, strength) in enumerate(zip(people_examples(people), strengths, strict=True)):
        alone = plug.score([row], SAID, strength=strength)
        torch.testing.assert_close(together[i], alone[0], atol=1e-4, rtol=1e-4)


def test_of_shown_items_a_share_is_left(make_plug, people):
    plug = make_plug(retrieve=4)
    for strength, count in ((1.0, 4), (0.75, 3), (0.5, 2), (0.1, 1)):
        assert [len(t) for t in plug.turns(people_examples(people, strength))] == [
            min(count, len(h)) for h in people.histories
        ]


def test_of_labels_the_users_own_shares_count_less(judge, people):
    own = judge.score(people.requests, history=people.histories, parts=["answers"])
    nobody = judge.score(people.requests, parts=["answers"])
    half = judge.score(people.requests, history=people.histories, parts=["answers"], strength=0.5)
    torch.testing.assert_close(half, (own + nobody) / 2)
    assert not torch.allclose(own, nobody, atol=1e-2)


def test_labels_are_chosen_with_it(judge, people):
    names, probabilities = judge.choose(people.requests, history=people.histories, strength=0.5)
    scores = judge.score(people.requests, history=people.histories, strength=0.5)
    torch.testing.assert_close(probabilities, (scores / judge.embedder.score_temperature).softmax(-1))
    assert judge.generate(people.requests, people.histories, strength=0.5) == names
    _, plain = judge.choose(people.requests, history=people.histories, strength=0)
    torch.testing.assert_close(plain, judge.score(people.requests, personal=False).softmax(-1))
    assert judge.generate(people.requests, people.histories, strength=0) == judge.generate(
        people.requests, personal=False
    )


@pytest.mark.parametrize("llm", LLMS)
def test_words_count_less(make_plug, llm):
    plug = fitted(make_plug, FitData(greeters(18, 0), greeters(6, 1), [], "{input}", None), llm)
    samples = greeters(6, 2)[::5]
    plain = [plug.score([e], [e.output], personal=False) for e in samples]
    gold = [[float(plug.score([e], [e.output], strength=s)) for e in samples] for s in (0.1, 0.5, 1.0)]
    assert sum(gold[0]) < sum(gold[1]) < sum(gold[2])
    assert plug.generate(samples, strength=1.0) == plug.generate(samples)
    assert plug.generate(samples, strength=0) == plug.generate(samples, personal=False)
    assert torch.equal(torch.cat([plug.score([e], [e.output], strength=0) for e in samples]), torch.cat(plain))
    (reader,) = plug.readers([Example("", samples[0].input, "", samples[0].history, strength=0.5)])
    (whole,) = plug.readers(samples[:1])
    logits = torch.randn(3, len(plug.llm.get_output_embeddings().weight))
    mixed, weights = reader.mix(logits, [5, 6, 7])
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(3))
    assert torch.allclose(weights[:, 1:], whole.mix(logits, [5, 6, 7])[1][:, 1:] / 2)
    less = reader.memory_share(logits, [5, 6, 7]) - whole.memory_share(logits, [5, 6, 7])
    assert float(less.detach().max()) <= 0


@pytest.mark.parametrize("strength", [-0.1, 1.01, float("nan"), "1", None, True])
def test_other_values_are_refused(make_plug, people, strength):
    plug = make_plug(answers=SAID)
    for ask in (plug.generate, plug.choose):
        with pytest.raises(ConfigError, match=r"strength=.* must be a number from 0 to 1") as refusal:
            ask("x", history=people.ann, strength=strength)
        assert "\n" not in str(refusal.value)


def test_a_token_for_each_item_cannot_count_less(make_plug, people):
    plug = make_plug(aggregator="uem")
    assert plug.generate("x", people.ann, strength=0) == plug.generate("x", personal=False)
    with pytest.raises(DataError, match=r"aggregator='uem'.*strength 0 or 1"):
        plug.generate("x", people.ann, strength=0.5)
