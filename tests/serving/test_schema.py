"""Requests: what is taken, what is ignored, and what is refused because ignoring it would change the answer."""

import pytest
from pydantic import ValidationError

from persona_plug.serving.schema import HARMLESS, NEUTRAL, ChatRequest, CompletionRequest, EventsRequest

HI = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def chat(**fields):
    return ChatRequest.model_validate({**HI, **fields})


def refused(field, **fields):
    with pytest.raises(ValidationError) as caught:
        chat(**fields)
    assert field in {str(part) for error in caught.value.errors() for part in error["loc"]}


def test_every_field_of_the_client_is_known():
    """Whatever the official client can send is implemented, neutral at some value, or changes no answer."""
    import inspect

    from openai.resources import Completions
    from openai.resources.chat import Completions as Chat

    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    for method, model in ((Chat.create, ChatRequest), (Completions.create, CompletionRequest)):
        names = set(inspect.signature(method).parameters) - own
        assert names - set(model.model_fields) - set(NEUTRAL) - HARMLESS - {"user"} == set()


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_what_is_not_implemented_is_refused_by_name_unless_it_asks_for_nothing(name):
    chat(**{name: None})
    for value in NEUTRAL[name]:
        chat(**{name: value})
    refused(name, **{name: {"something": "else"}})


@pytest.mark.parametrize(
    ("name", "value"),
    [("best_of", 2), ("n", True), ("n", "1"), ("logprobs", True), ("tools", [{}]), ("echo", 0), ("tools", [{}, {}])],
)
def test_neutral_is_meant_exactly(name, value):
    refused(name, **{name: value})


def test_numbers_may_be_written_as_floats():
    chat(presence_penalty=0.0, frequency_penalty=0, temperature=1)


@pytest.mark.parametrize("name", sorted(HARMLESS))
def test_what_changes_no_answer_is_ignored(name):
    assert not hasattr(chat(**{name: "anything"}), name)


def test_unknown_fields_are_refused():
    refused("top_k", top_k=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_completion_tokens", 0),
        ("seed", 2**63),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("stop", ["x" * 65]),
        ("user", ""),
        ("user", "x" * 257),
        ("user", 7),
        ("user", "\ud800"),
        ("personal", "no"),
        ("messages", []),
        ("messages", [{"role": "user", "content": "x" * 200_001}]),
        ("messages", [{"role": "user", "content": "\ud800"}]),
        ("messages", [{"role": "tool", "content": "x"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "x", "name": "ann"}]),
        ("messages", [{"role": "user", "content": "x"}] * 257),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    refused(name, **{name: value})


def test_messages_in_all_their_shapes():
    body = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "assistant", "content": "a", "refusal": None, "tool_calls": [], "annotations": []},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        ]
    )
    assert [m.pair() for m in body.messages] == [("system", "be brief"), ("assistant", "a"), ("user", "one\ntwo")]


def test_both_names_of_the_limit():
    assert chat(max_tokens=3).limit == 3
    assert chat(max_completion_tokens=4).limit == 4
    assert chat().limit is None


def test_prompts():
    def complete(prompt, **fields):
        return CompletionRequest.model_validate({"model": "m", "prompt": prompt, **fields})

    assert complete("x").prompts == complete(["x"]).prompts == ["x"]
    assert complete(["x", "yz"]).prompts == ["x", "yz"]
    assert complete(["x", "yz"]).characters == 3
    assert complete(["x"] * 4, n=4).n == 4
    for prompt, fields in ((["x"] * 17, {}), ([], {}), ([1, 2], {}), (None, {}), (["x"] * 6, {"n": 3})):
        with pytest.raises(ValidationError):
            complete(prompt, **fields)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("repetition_penalty", 0.4),
        ("repetition_penalty", float("inf")),
        ("frequency_penalty", -2.1),
        ("presence_penalty", 3),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {"1": 101}),
        ("logit_bias", {str(i): 1 for i in range(301)}),
        ("logit_bias", []),
    ],
)
def test_how_tokens_are_chosen_is_bounded(name, value):
    refused(name, **{name: value})


def test_how_tokens_are_chosen_reaches_the_engine():
    body = chat(repetition_penalty=1.2, frequency_penalty=0.5, presence_penalty=-1, logit_bias={"7": -100, "3": 2})
    assert body.sampling() == {
        "stop_loops": True,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": None,
        "stop": (),
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "logit_bias": ((3, 2), (7, -100)),
    }


@pytest.mark.parametrize(
    ("body", "items"),
    [
        ({"output": "a"}, [{"input": "", "output": "a"}]),
        ({"input": "q", "output": "a", "id": "1"}, [{"input": "q", "output": "a", "id": "1"}]),
        ({"events": [{"output": "a"}, {"input": "q", "output": "b", "timestamp": "2026-01-01"}]},
         [{"input": "", "output": "a"}, {"input": "q", "output": "b", "timestamp": "2026-01-01"}]),
    ],
)  # fmt: skip
def test_events(body, items):
    assert EventsRequest.model_validate(body).items() == items


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"input": "q"},
        {"accept": "c", "output": "a"},
        {"accept": "c", "events": [{"output": "a"}]},
        {"events": []},
        {"events": [{"output": "a"}] * 101},
        {"events": [{"input": "a"}]},
        {"output": "a", "user_id": "bob"},
        {"output": "a", "timestamp": True},
    ],
)
def test_events_that_are_none(body):
    with pytest.raises(ValidationError):
        EventsRequest.model_validate(body)
