import pytest

from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import DataError
from persona_plug.page.answers import COLUMNS, RAG_ITEMS, RAG_TEXT_TOKENS

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
        **plug.splicer.generation_inputs([plug.prompter.parts("x")], plug.plain(1).soft), max_new_tokens=5,
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


def test_retrieval_puts_the_nearest_items_in_front(open_session, people):
    session = open_session()
    request = "rate the film of the evening"
    answer = session.comparison.answer("rag", "ann", request)
    prompt, cut = session.comparison._with_items([people.ann[2], people.ann[3]], request)
    assert prompt == f'"5" is the answer for "rate the film".\n"4" is the answer for "rate the play".\n{request}'
    assert cut == 0
    assert answer.notes == [f"{RAG_ITEMS} of {len(people.ann)} items read."]
    assert answer.prompt_tokens > session.comparison.answer("base", "ann", request).prompt_tokens
    assert answer.weights is None
    found = [people.ann[i] for i in session_rank(request, people.ann)]
    prompt, _ = session.comparison._with_items(found, request)
    expected = session.comparison.reader.generate([Example("", request, "", prompt=prompt)], personal=False)[0]
    assert answer.text == expected


def session_rank(request, items):
    from persona_plug.retrieval import Retriever

    return Retriever().rank("bm25", request, items, RAG_ITEMS)


def test_long_items_and_requests_are_cut_and_counted(open_session):
    session = open_session()
    long = "many words of a long story " * 40
    session.store.append("dot", [HistoryItem("short", long)] * 1)
    answer = session.comparison.answer("rag", "dot", "a request " * 60)
    assert f"1 texts of items cut to {RAG_TEXT_TOKENS} tokens." in answer.notes
    assert not any("of the request cut" in line for line in answer.notes[1:])
    base = session.comparison.answer("base", "dot", "a request " * 60)
    assert any("tokens of the request cut" in line for line in base.notes)
    # Items come on top of the budget: what the LLM reads of the request is the same.
    assert answer.prompt_tokens > base.prompt_tokens


def test_retrieval_reads_as_much_of_a_long_request_as_the_plug(open_session):
    session = open_session()
    request = "a request of many words " * 20
    prompt, _ = session.comparison._with_items([], request)
    assert request.startswith(prompt)
    assert len(session.plug.prompter.ids(prompt)) == session.plug.config.max_input_tokens


def test_template_stays_in_the_prompt_of_retrieval(open_session, people):
    session = open_session(template="Answer kindly: {input} !")
    prompt, _ = session.comparison._with_items([people.ann[0]], "hello {input}")
    assert prompt.endswith("\nAnswer kindly: hello {input} !")


def test_somebody_new(open_session):
    session = open_session()
    four = all_four(session, "new", "rate this")
    assert four["own"].text == session.plug.generate("rate this", [])
    assert four["own"].weights == []
    assert four["own"].notes == ["No items yet: this is how the plug answers somebody new."]
    assert four["rag"].text is None
    assert four["rag"].notes == ["Nothing to retrieve: the user has no items yet."]
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
    session = open_session(answers=LABELS, quote_tokens=0)
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
    assert all(answer.text is not None and answer.answer_tokens > 0 for answer in four.values())
