import dataclasses

import pytest

from persona_plug.data.history import Example
from persona_plug.errors import DataError
from persona_plug.fit.examples import few_shot
from persona_plug.page.answers import COLUMNS, TURNS

LABELS = ("1", "4", "5", "10")


def all_four(session, user, request):
    return {column: session.comparison.answer(column, user, request) for column in COLUMNS}


def test_each_column_is_what_the_plug_gives(open_session, people):
    session = open_session()
    plug, request = session.plug, "rate the bread"
    four = all_four(session, "bob", request)
    assert four["base"].text == plug.generate(request, personal=False)
    assert four["own"].text == plug.generate(request, people.bob)
    assert four["other"].text == plug.generate(request, people.ann)
    assert (four["base"].user, four["own"].user, four["other"].user) == (None, "bob", "ann")
    assert len({four[c].text for c in ("base", "other", "own")}) == 3  # a comparison that can show a difference


def test_numbers_of_an_answer(open_session):
    session = open_session()
    made = session.plug.generate("rate this", user="bob", store=session.store, return_details=True)
    own = session.comparison.answer("own", "bob", "rate this")
    assert own.prompt_tokens == made.prompt_tokens
    assert own.answer_tokens == session.plug.config.max_answer_tokens  # a random LLM does not end by itself
    assert own.seconds > 0
    assert own.probabilities is None


def test_written_tokens_end_with_the_end_token(open_session, monkeypatch):
    session = open_session()
    plug = session.plug
    ids = plug.llm.generate(
        **plug.splicer.generation_inputs([plug.prompter.parts("x")], plug.embed(None).soft), max_new_tokens=5,
        do_sample=False,
    )  # fmt: skip
    monkeypatch.setattr(plug.llm.generation_config, "eos_token_id", int(ids[0, 2]))
    first = ids[0].tolist().index(int(ids[0, 2])) + 1
    assert session.comparison.answer("base", "ann", "x").answer_tokens == first


def test_weights_are_of_the_users_items(open_session, people):
    answer = open_session().comparison.answer("own", "ann", "rate this")
    assert {(i.input, i.output) for i, _ in answer.weights} == {(i.input, i.output) for i in people.ann}
    values = [w for _, w in answer.weights]
    assert values == sorted(values, reverse=True)
    assert 0 < sum(values) < 1  # the null item has the rest


def test_turns_are_the_users_nearest_items(open_session, people):
    session = open_session(max_input_tokens=60)
    answer = session.comparison.answer("turns", "ann", "rate the film of the evening")
    assert answer.notes == [f"{TURNS} of {len(people.ann)} items shown."]
    assert answer.prompt_tokens > session.comparison.answer("base", "ann", "rate the film of the evening").prompt_tokens
    assert answer.weights is None
    row = Example("ann", "rate the film of the evening", "", tuple(people.ann))
    assert [answer.text] == few_shot(session.plug, [row])


def test_more_turns_than_the_llm_has_room_for_are_said(open_session, monkeypatch):
    session = open_session()
    prompter = session.comparison.turns.prompter
    monkeypatch.setattr(prompter, "limits", dataclasses.replace(prompter.limits, positions=20))
    (note,) = session.comparison.answer("turns", "ann", "rate this").notes
    assert "positions" in note
    assert session.comparison.answer("base", "ann", "rate this").text is not None


def test_an_llm_without_a_chat_template_has_no_turns(open_session):
    answer = open_session(llm="tiny-gpt2").comparison.answer("turns", "ann", "rate this")
    assert (answer.text, answer.notes) == (None, ["This LLM has no chat template, and so no chat turns."])


def test_long_requests_are_cut_and_counted(open_session):
    base = open_session().comparison.answer("base", "ann", "a request " * 60)
    assert any("tokens of the request cut" in line for line in base.notes)


def test_marks_are_those_of_the_answer(open_session, monkeypatch):
    session = open_session()
    real = session.plug.generate
    monkeypatch.setattr(
        session.plug, "generate", lambda *a, **k: [dataclasses.replace(g, marks=[(0, 2)]) for g in real(*a, **k)]
    )
    assert session.comparison.answer("own", "ann", "rate this").marks == [(0, 2)]
    assert session.comparison.answer("turns", "ann", "rate this").marks == []


def test_somebody_new(open_session):
    session = open_session()
    four = all_four(session, "new", "rate this")
    assert four["own"].text == session.plug.generate("rate this", [])
    assert four["own"].weights == []
    assert four["own"].notes == ["No items yet: a new user gets this answer."]
    assert four["turns"].text is None
    assert four["turns"].notes == ["The user has no items to show yet."]
    assert four["other"].user == "ann"


def test_nobody_else(open_session):
    session = open_session(filled=False)
    session.add("ann", "hello")
    answer = session.comparison.answer("other", "ann", "x")
    assert (answer.text, answer.user, answer.notes) == (None, None, ["No other user is in the store yet."])


def test_other_has_the_most_items_and_ties_go_to_the_first_id(open_session):
    session = open_session()
    assert session.comparison.other("ann") == "bob"
    assert session.comparison.other("bob") == "ann"
    session.add("abe", "a\nb\nc")
    assert session.comparison.other("ann") == "abe"


@pytest.mark.parametrize("column", COLUMNS)
def test_empty_request_is_refused(open_session, column):
    with pytest.raises(DataError, match="the request is empty"):
        open_session().comparison.answer(column, "ann", " \n")


def test_items_beyond_what_the_plug_reads_are_counted(open_session):
    session = open_session(max_history=2)
    answer = session.comparison.answer("own", "ann", "x")
    assert answer.notes == ["3 older items left out: the plug reads the newest."]
    assert len(answer.weights) == 2


def test_labels_come_with_probabilities(open_session, people):
    session = open_session(answers=LABELS)
    four = all_four(session, "ann", "rate this")
    for answer in four.values():
        assert tuple(answer.probabilities) == LABELS
        assert sum(answer.probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert answer.text == max(answer.probabilities, key=answer.probabilities.get)
        assert answer.answer_tokens == 0
    (label,), chances = session.plug.choose(["rate this"], history=[people.ann])
    assert four["own"].text == label
    assert list(four["own"].probabilities.values()) == pytest.approx(chances[0].tolist(), abs=1e-5)
    plain = session.plug.score("rate this", personal=False).softmax(-1)[0]
    assert list(four["base"].probabilities.values()) == pytest.approx(plain.tolist(), abs=1e-5)
    assert four["own"].weights


def test_plug_without_item_weights(open_session):
    assert open_session(recipe="persoma_mlp").comparison.answer("own", "ann", "x").weights is None


def test_encoder_decoder_plug(open_session):
    four = all_four(open_session(llm="tiny-t5"), "ann", "rate this")
    assert four.pop("turns").text is None
    assert all(answer.text is not None and answer.answer_tokens > 0 for answer in four.values())
