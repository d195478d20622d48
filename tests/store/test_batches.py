"""A plug that reads a store gives what it gives for the same history in memory."""

import dataclasses
import logging

import pytest
import torch

from persona_plug.config import PARTS
from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, DataError, MismatchError
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.pairing import pair
from persona_plug.store.rows import text_hash

ANSWERS = ("4", "5", "yes!", "a very long label with spaces")
SETTINGS = {
    "free text": {},
    "labels": {"answers": ANSWERS},
    "paper": {"recipe": "paper"},
    "mean": {"recipe": "mean", "answers": ANSWERS},
    "uem": {"recipe": "uem"},
    "reads requests itself": {"train_request": True, "answer_head": False},
    "persoma": {"recipe": "persoma", "answers": ANSWERS},
}
PEOPLE = ("ann", "bob", "eve")


@pytest.fixture(params=SETTINGS)
def plug(request, make_plug):
    return make_plug(differ=True, **SETTINGS[request.param])


@pytest.fixture
def filled(make_store, people):
    """A store with everybody's history; settings as for `HistoryStore`."""

    def fill(**settings):
        store = make_store(**settings)
        for name in PEOPLE:
            store.append(name, [dataclasses.replace(i, id=str(n)) for n, i in enumerate(getattr(people, name))])
        return store

    return fill


@pytest.mark.parametrize("keep_text", [True, False])
def test_soft_prompts_are_bit_equal(plug, people, filled, keep_text):
    store = filled(keep_text=keep_text)
    for request in people.requests:
        for name in PEOPLE:
            expected = plug.soft_prompt(request, getattr(people, name))
            assert torch.equal(plug.soft_prompt(request, user=name, store=store), expected)
        assert torch.equal(plug.soft_prompt(request, user="nobody", store=store), plug.soft_prompt(request, []))


def test_a_batch_of_users_answers_as_their_histories_do(plug, people, filled):
    store = filled(keep_text=True)
    users = ["ann", "nobody", "eve", "bob", "bob", "eve"]  # as people.histories
    assert plug.generate(people.requests, user=users, store=store) == plug.generate(people.requests, people.histories)
    candidates = None if plug.config.answers else ["yes", "no"]
    for parts in (PARTS, ["soft"], ["answers"] if plug.answers else []):
        scores = plug.score(people.requests, candidates, user=users, store=store, parts=parts)
        assert torch.equal(scores, plug.score(people.requests, candidates, people.histories, parts=parts))
    names, probabilities = plug.choose(people.requests, candidates, user="ann", store=store)
    expected = plug.choose(people.requests, candidates, people.ann)
    assert names == expected[0]
    assert torch.equal(probabilities, expected[1])


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_labels_are_known_without_texts(make_plug, people, filled, kind):
    """What the user answered is exact in any format; only vectors are rounded."""
    plug = make_plug(differ=True, answers=ANSWERS)
    store = filled(vectors=kind)
    batch, expected = (
        plug.table(e).batch(e)
        for e in (pair(plug.config, "rate this", None, "ann", store), pair(plug.config, "rate this", people.ann))
    )
    assert torch.equal(batch.values[..., -len(ANSWERS) :], expected.values[..., -len(ANSWERS) :])
    assert batch.values[..., -len(ANSWERS) :].sum() == 3
    torch.testing.assert_close(batch.values, expected.values, atol=0.005, rtol=0)  # int8: 1/254 of the largest entry
    soft, wanted = plug.soft_prompt("rate this", user="ann", store=store), plug.soft_prompt("rate this", people.ann)
    assert torch.nn.functional.cosine_similarity(soft, wanted).min() > 0.999


def test_an_item_without_input_is_matched_by_its_output(make_plug, make_store, encoder):
    plug, store = make_plug(), make_store()
    store.append("ann", ["only an output", {"input": "an input", "output": "x"}])
    examples = pair(plug.config, "x", None, "ann", store)
    expected = encoder.encode(["only an output", "an input"])
    assert torch.equal(plug.table(examples).batch(examples).keys[0], expected)


def test_white_space_around_a_label_is_no_other_label(make_plug, make_store):
    plug = make_plug(differ=True, answers=("4", "5"))
    store = make_store()
    items = [{"input": "a", "output": " 5\n"}, {"input": " ", "output": "4"}, {"input": "b", "output": "5."}]
    store.append("ann", items)
    assert torch.equal(plug.soft_prompt("x", user="ann", store=store), plug.soft_prompt("x", items))
    examples = pair(plug.config, "x", None, "ann", store)
    assert plug.table(examples).batch(examples).values[0, :, -2:].tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("answers", [("4", "5"), ("4.0", "5.0")])
def test_a_number_in_another_spelling_is_no_other_label(make_plug, make_store, answers):
    plug = make_plug(differ=True, answers=answers)
    store = make_store()
    items = [{"input": "a", "output": "5.0"}, {"input": "b", "output": 4}, {"input": "c", "output": "5,0"}]
    store.append("ann", items)
    assert torch.equal(plug.soft_prompt("x", user="ann", store=store), plug.soft_prompt("x", items))
    examples = pair(plug.config, "x", None, "ann", store)
    assert plug.table(examples).batch(examples).values[0, :, -2:].tolist() == [[0, 1], [1, 0], [0, 1]]


@pytest.mark.parametrize("kind", ["file order", "newest first", "mixed"])
def test_the_latest_items_are_used_whatever_their_order(make_plug, make_store, kind):
    """20 items, three of which count: the last three days, in memory and through a store."""
    plug = make_plug(differ=True, max_history=3)
    items = [
        {"input": f"q {n}", "output": f"a {n}", "id": str(n), "timestamp": f"2024-05-{n:02}"} for n in range(1, 21)
    ]
    latest = items[-3:]
    if kind != "file order":
        items = items[::-1] if kind == "newest first" else items[1::2] + items[::2]
    store = make_store(keep_text=True)
    store.append("ann", items)
    expected = plug.soft_prompt("x", latest)
    assert torch.equal(plug.soft_prompt("x", items), expected)
    assert torch.equal(plug.soft_prompt("x", user="ann", store=store), expected)


@pytest.mark.parametrize("words", [True, False])
def test_a_plug_that_reads_words_says_once_that_a_store_has_none(make_plug, people, filled, caplog, words):
    plug, silent = make_plug(differ=True, words=words), filled()
    with caplog.at_level(logging.WARNING, "persona_plug"):
        plug.generate(people.requests[1], user="nobody", store=silent, max_new_tokens=2)
        assert not caplog.records
        plug.generate(people.requests[:2], user=["ann", "nobody"], store=silent, max_new_tokens=2)
        plug.generate(people.requests[0], user="bob", store=silent, max_new_tokens=2)
    told = "keeps no texts: this plug reads users' own words"
    assert [told in r.message for r in caplog.records] == [True] * words


def test_with_texts_nothing_is_missing(make_plug, people, filled, caplog):
    plug, store = make_plug(differ=True, words=True), filled(keep_text=True)
    result = plug.generate("rate this", user="ann", store=store, return_details=True, max_new_tokens=2)
    expected = plug.generate("rate this", people.ann, return_details=True, max_new_tokens=2)
    assert [(i.input, i.output, w) for i, w in result.weights] == [(i.input, i.output, w) for i, w in expected.weights]
    assert not caplog.records


def test_details_name_ids_and_what_was_dropped(make_plug, people, filled):
    plug, store = make_plug(differ=True, max_history=3), filled()
    result = plug.generate("rate this", user="ann", store=store, return_details=True, max_new_tokens=2)
    expected = plug.generate("rate this", people.ann, return_details=True, max_new_tokens=2)
    assert result.text == expected.text
    assert result.items_dropped == expected.items_dropped == 2
    assert [w for _, w in result.weights] == [w for _, w in expected.weights]
    assert sorted(item.id for item, _ in result.weights) == ["2", "3", "4"]
    assert {item.output for item, _ in result.weights} == {""}


def test_no_item_is_encoded_again(make_plug, make_store, people):
    encoder = HistoryEncoder("tiny-encoder", device="cpu", use_cache=False)
    plug, store = make_plug(encoder=encoder), make_store(encoder=encoder)
    store.append("ann", people.ann)
    before = encoder.stats.encoded
    plug.soft_prompt("rate this", user="ann", store=store)
    assert encoder.stats.encoded == before + 1  # the request


def test_a_new_item_counts_at_once(make_plug, filled):
    plug, store = make_plug(differ=True), filled(keep_text=True)
    before = plug.soft_prompt("rate this", user="ann", store=store)
    store.append("ann", [HistoryItem("rate this one", "never again", None, "new")])
    after = plug.soft_prompt("rate this", user="ann", store=store)
    assert not torch.equal(before, after)
    store.delete("ann", "new")
    assert torch.equal(plug.soft_prompt("rate this", user="ann", store=store), before)


def test_plain_answers_need_no_history(make_plug, filled):
    plug, store = make_plug(), filled()
    answer = plug.generate("rate this", user="ann", store=store, personal=False)
    assert answer == plug.generate("rate this", personal=False)


def test_wrong_use_is_one_line(make_plug, make_store, people):
    plug, store = make_plug(), make_store()
    for call in (plug.generate, plug.soft_prompt, plug.score):
        more = {"candidates": ["a", "b"]} if call == plug.score else {}
        with pytest.raises(ConfigError, match="not both"):
            call("x", history=people.ann, user="ann", store=store, **more)
        with pytest.raises(ConfigError, match="belong together"):
            call("x", user="ann", **more)
        with pytest.raises(ConfigError, match="belong together"):
            call("x", store=store, **more)
    with pytest.raises(DataError, match="2 inputs but 3 users"):
        plug.generate(["x", "y"], user=["a", "b", "c"], store=store)
    with pytest.raises(DataError, match="inputs must be texts"):
        plug.generate([1], user="a", store=store)


def test_a_store_of_another_encoder_is_refused(make_plug, make_store):
    other = HistoryEncoder("tiny-encoder", device="cpu", max_length=32, use_cache=False)
    plug, store = make_plug(), make_store(encoder=other)
    with pytest.raises(MismatchError) as caught:
        plug.generate("x", user="ann", store=store)
    assert other.fingerprint in str(caught.value)
    assert plug.config.encoder_fingerprint in str(caught.value)


def test_hashes_are_the_keys_of_the_encoders_cache():
    from persona_plug.models.encoder import _key

    for text in ("a", "schöne Grüße 🙂", "a\0b", ""):
        assert _key(text).startswith(text_hash(text))
