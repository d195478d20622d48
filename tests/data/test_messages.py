import json

import pytest

from persona_plug.data.history import read_events
from persona_plug.data.splits import prepare
from persona_plug.errors import DataError


def say(role, content):
    return {"role": role, "content": content}


PART = {"type": "text"}
ASK, REPLY = say("user", "Where is it?"), say("assistant", "On its way.")


def read(tmp_path, *messages, **fields):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"user_id": "ann", "messages": list(messages), **fields}) + "\n")
    return [(e.user_id, e.item.input, e.item.output, e.item.id) for e in read_events(path).events]


@pytest.mark.parametrize(
    "messages",
    [
        [ASK, REPLY],
        [say("system", "Be brief."), ASK, REPLY],
        [say("developer", "Be brief."), ASK, REPLY],
        [say("user", [PART | {"text": "Where is it?"}]), say("assistant", [PART | {"text": "On its way."}])],
        [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "On its way."}],
    ],
    ids=["plain", "system", "developer", "parts", "from and value"],
)  # fmt: skip
def test_one_turn_is_one_event(tmp_path, messages):
    assert read(tmp_path, *messages, id="7") == [("ann", "Where is it?", "On its way.", "7")]


def test_sharegpt_calls_them_conversations(tmp_path):
    path = tmp_path / "chats.json"
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    path.write_text(json.dumps([{"user_id": "ann", "conversations": talk}]))
    assert [(e.item.input, e.item.output) for e in read_events(path).events] == [("a", "b")]


def test_each_answer_of_a_talk_is_an_event_behind_what_was_said(tmp_path):
    talk = [ASK, REPLY, say("user", "When?"), say("user", "Today?"), say("assistant", "Yes.")]
    assert read(tmp_path, *talk, id="7") == [
        ("ann", "Where is it?", "On its way.", "7#1"),
        ("ann", "user: Where is it?\nassistant: On its way.\nuser: When?\nuser: Today?", "Yes.", "7#2"),
    ]


def test_an_assistant_who_begins_has_no_request(tmp_path):
    assert read(tmp_path, say("assistant", "Hello!"))[0][1:3] == ("", "Hello!")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "list of messages"), ("text", "list of messages"), ([ASK], "no message of the assistant"),
        ([ASK, "reply"], "message 1 must be an object"),
        ([ASK, say("tool", "x"), REPLY], "message 1 has the role 'tool'"),
        ([ASK, say("assistant", None)], "message 1: its content must be text"),
        ([say("user", [{"type": "image_url"}]), REPLY], "message 0: its content must be text"),
        ([ASK, say("assistant", " ")], "field 'output' is empty"), ([{"content": "x"}], "message 0 has the role None"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_be_used_is_named(tmp_path, messages, reason):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"user_id": "ann", "messages": messages}) + "\n")
    with pytest.raises(DataError, match=f"{path}:1: .*{reason}"):
        read_events(path)


def chats(*prompts, users=5):
    rows = []
    for n in range(users * 4):
        system = [say("system", prompts[n % len(prompts)])] if prompts[n % len(prompts)] else []
        rows.append(
            {"user_id": f"u{n % users}", "messages": [*system, say("user", f"q{n}"), say("assistant", f"a {n}")]}
        )
    return rows


def test_a_system_prompt_that_all_share_is_the_template():
    data = prepare(chats("Be {very} brief."))
    assert data.template == "Be (very) brief.\n\n{input}"
    assert all(e.input.startswith("q") for e in data.train)
    assert any("system prompt" in note for note in data.notes)
    assert prepare(chats("Be brief."), template="Say: {input}").template == "Say: {input}"


def test_system_prompts_that_differ_stand_before_their_requests():
    data = prepare(chats("Be brief.", "Be kind.", None))
    assert data.template == "{input}"
    heads = {e.input.split("\n\n")[0] for e in (*data.train, *data.valid, *data.held_out) if "\n\n" in e.input}
    assert heads == {"Be brief.", "Be kind."}
    assert any("3 system prompts" in note for note in data.notes)
