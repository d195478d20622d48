"""A plug that puts the user's nearest items into the prompt, as chat turns."""

import dataclasses

import pytest
import torch

from persona_plug import PersonaPlug
from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import ConfigError, DataError
from persona_plug.pairing import nearest, pair

SAID = ["yes", "no"]


@pytest.fixture(scope="module")
def plug(make_plug):
    return make_plug(differ=True, retrieve=2, max_input_tokens=200, max_answer_tokens=40, template="Please: {input}")


def texts_of(plug, parts):
    return plug.tokenizer.decode([*parts.left, *parts.right])


def turns(*rows):
    """A prompt of the tiny Llama's template: (role, text) turns, and the header of an answer."""
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in rows) + "<|im_start|>assistant\n"


# --- which items


def test_the_nearest_items_are_found_by_input_or_else_by_output(encoder, people):
    examples = [Example("u", request, "", tuple(people.bob)) for request in people.requests]
    for example, found in zip(examples, nearest(encoder, examples, 2, 512), strict=True):
        keys = encoder.encode([item.input or item.output for item in people.bob])
        order = (keys @ encoder.encode([example.input])[0]).argsort().tolist()
        assert found == [(people.bob[i].input, people.bob[i].output) for i in order[-2:]]


@pytest.mark.parametrize(("count", "limit", "known"), [(9, 512, 5), (3, 512, 3), (9, 2, 2), (1, 1, 1)])
def test_there_are_at_most_so_many_of_the_latest_items(encoder, people, count, limit, known):
    (found,) = nearest(encoder, [Example("u", "a film", "", tuple(people.ann))], count, limit)
    assert len(found) == known
    assert set(found) <= {(i.input, i.output) for i in people.ann[-limit:]}


def test_nobody_has_no_turns(encoder):
    assert nearest(encoder, [Example("u", "x", "")], 3, 512) == [[]]


# --- the prompt


def test_items_stand_as_turns_in_front_of_the_request(plug, people):
    (parts,) = plug.prompts([Example("u", "rate this", "", tuple(people.eve))])
    rows = [("user", "Grüße aus Köln"), ("assistant", "schöne Grüße 🙂"), ("user", "Please: rate this")]
    assert texts_of(plug, parts) == turns(*rows)
    assert plug.tokenizer.decode(parts.right).startswith("<|im_end|>")  # the soft tokens' place is the last user's turn


def test_without_items_the_prompt_is_the_usual_one(plug, make_plug):
    alike = make_plug(max_input_tokens=200, template="Please: {input}")
    assert plug.prompts([Example("u", "rate this", "")]) == [alike.prompter.parts("rate this")]


def test_a_prompt_that_is_given_is_taken_as_it_is(plug, people):
    example = Example("u", "rate this", "", tuple(people.ann), prompt="all of it")
    assert plug.prompts([example]) == [plug.prompter.parts("rate this", "all of it")]


def test_what_the_system_says_stays_first(plug):
    messages = [("system", "be kind"), ("user", "hello"), ("assistant", "hi"), ("user", "rate this")]
    parts, request = plug.prompter.chat(messages, [("tea", "yes"), ("milk", "no")])
    shown = [("user", "tea"), ("assistant", "yes"), ("user", "milk"), ("assistant", "no")]
    rest = [("user", "hello"), ("assistant", "hi"), ("user", "Please: rate this")]
    assert texts_of(plug, parts) == turns(("system", "be kind"), *shown, *rest)
    assert request == "rate this"


def test_long_items_are_cut_as_requests_and_answers_are(make_plug):
    plug = make_plug(retrieve=1, max_input_tokens=8, max_answer_tokens=5)
    (parts,) = plug.prompts([Example("u", "x", "", (HistoryItem("a" * 99, "b" * 99),))])
    assert texts_of(plug, parts) == turns(("user", "a" * 8), ("assistant", "b" * 4), ("user", "x"))


def test_a_prompt_beyond_the_llms_positions_names_both_limits(make_plug, people):
    plug = make_plug(retrieve=40, max_input_tokens=400, max_answer_tokens=400)
    many = [HistoryItem(f"{i} " + "a" * 300, "b" * 300) for i in range(40)]
    with pytest.raises(DataError, match=r"lower max_input_tokens=400, or retrieve=40"):
        plug.score(["rate this"], SAID, many)


@pytest.mark.parametrize("llm", ["tiny-gpt2", "tiny-t5"])
def test_an_llm_without_a_chat_template_is_refused(make_plug, llm):
    with pytest.raises(ConfigError, match=r"retrieve=2 puts items into the prompt.*no chat template.*retrieve=0"):
        make_plug(llm, retrieve=2)


# --- answers


def answers(plug, people, **how):
    scores = plug.score(people.requests, SAID, people.histories, **how)
    return scores, plug.generate(people.requests, people.histories, max_new_tokens=6, **how)


def test_turns_change_personal_answers_and_no_others(plug, make_plug, people):
    alike = make_plug(differ=True, max_input_tokens=200, max_answer_tokens=40, template="Please: {input}")
    with_items, without = answers(plug, people), answers(alike, people)
    nobody = [i for i, history in enumerate(people.histories) if not history]
    assert torch.allclose(with_items[0][nobody], without[0][nobody], atol=1e-4)
    assert not torch.allclose(with_items[0], without[0], atol=1e-2)
    assert answers(plug, people, personal=False)[1] == answers(alike, people, personal=False)[1]


def test_what_is_saved_is_what_is_loaded(plug, people, tmp_path):
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), device="cpu")
    assert again.config == plug.config
    mine, theirs = answers(plug, people), answers(again, people)
    assert torch.equal(mine[0], theirs[0])
    assert mine[1] == theirs[1]
    assert "2 nearest items stand in the prompt" in (tmp_path / "README.md").read_text()


def test_a_plug_of_turns_alone_has_no_soft_tokens(make_plug, people):
    plug = make_plug(retrieve=2, user_tokens=0, task_tokens=0)
    assert plug.soft_prompt("x", people.ann).shape[0] == 0
    assert not list(plug.parameters())
    text = plug.generate("rate this", people.ann, max_new_tokens=6)
    parts = plug.prompts([Example("u", "rate this", "", tuple(people.ann))])
    ids = torch.tensor([[*parts[0].left, *parts[0].right]])
    out = plug.llm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert text == plug.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


# --- users of a store


@pytest.fixture
def store(encoder, people, tmp_path):
    from persona_plug import HistoryStore

    made = HistoryStore(f"sqlite:///{tmp_path}/users.db", encoder, keep_text=True)
    for name in ("ann", "bob", "eve"):
        made.append(name, [dataclasses.replace(i, id=str(n)) for n, i in enumerate(getattr(people, name))])
    yield made
    made.close()


@pytest.mark.parametrize("name", ["ann", "bob", "eve", "nobody"])
def test_a_stored_user_gets_the_same_turns(plug, people, store, name):
    items = getattr(people, name, [])
    stored = plug.prompts(pair(plug.config, people.requests, None, name, store))
    assert stored == plug.prompts([Example("", r, "", tuple(items)) for r in people.requests])
    scores = plug.score(people.requests, SAID, user=name, store=store)
    torch.testing.assert_close(scores, plug.score(people.requests, SAID, items), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ann", "nobody"])
def test_a_store_without_texts_is_refused(plug, encoder, tmp_path, name):
    from persona_plug import HistoryStore

    with (
        HistoryStore(f"sqlite:///{tmp_path}/vectors.db", encoder) as bare,
        pytest.raises(ConfigError, match=r"vectors\.db keeps no texts.*retrieve=2.*keep_text=True.*retrieve=0"),
    ):
        plug.generate("rate this", user=name, store=bare)
