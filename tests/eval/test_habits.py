"""Whether answers keep the habits of generated users: what is asked, what is counted, what is written."""

import json
from dataclasses import replace

import pytest

from eval import habits
from eval.habits import METHODS, RUN_ON, HabitSettings, main, questions, shares
from persona_plug.errors import ConfigError

SETTINGS = HabitSettings(plug="folder", users=3, requests=2, items=(2, 0))


def test_the_same_requests_are_asked_at_every_length_of_history():
    longer, shorter = (questions(SETTINGS, items)[0] for items in SETTINGS.items)
    assert [e.input for e in longer] == [e.input for e in shorter]
    assert [len(e.history) for e in longer] == [2] * 6
    assert [len(e.history) for e in shorter] == [0] * 6
    assert len({e.user_id for e in longer}) == 3
    assert not {e.input for e in longer} & {i.input for e in longer for i in e.history}


def test_what_a_user_wrote_keeps_their_habits_and_what_another_wrote_does_not(make_plug):
    plug = make_plug(max_answer_tokens=400)
    settings = replace(SETTINGS, users=12)
    examples, known = questions(settings, 2)
    own = shares(plug, examples, [e.output for e in examples], known)
    others = shares(plug, examples, [e.output for e in [*examples[2:], *examples[:2]]], known)
    for check in ("greeting", "sign_off", "name"):
        assert own[check].value > 0.8 > 0.3 > others[check].value
    assert own["product"].value == 1.0
    assert own[RUN_ON].value == 0.0
    assert shares(plug, examples, ["word " * 500] * len(examples), known)[RUN_ON].value == 1.0


def test_another_users_history_is_another_users(make_plug, monkeypatch):
    examples, _ = questions(SETTINGS, 2)
    seen = []
    plug = make_plug()
    monkeypatch.setattr(plug, "generate", lambda rows, **_: seen.extend(rows) or [""] * len(rows))
    METHODS["plug_shuffled"](plug, examples)
    assert [e.input for e in seen] == [e.input for e in examples]
    assert all(a.history != b.history for a, b in zip(seen, examples, strict=True))


def test_the_command_writes_shares_and_answers(make_plug, tmp_path, capsys, monkeypatch):
    plug = make_plug(max_answer_tokens=4)
    monkeypatch.setattr(habits.PersonaPlug, "from_pretrained", lambda *_, **__: plug)
    main(["plug=x", "users=2", "requests=1", "items=[1]", 'methods=["none","plug"]', f"out={tmp_path}/h.json"])
    shown = capsys.readouterr().out
    assert "2 requests of 2 users with 1 items" in shown
    assert "| greeting |" in shown
    written = json.loads((tmp_path / "h.json").read_text())["1 items"]
    assert set(written["shares"]) == {"none", "plug"}
    assert len(written["answers"]["plug"]) == 2


@pytest.mark.parametrize(
    ("fields", "say"),
    [
        ({}, "plug=DIR"),
        ({"plug": "x", "methods": ("lora",)}, "'lora' is not one of"),
        ({"plug": "x", "users": 1}, "users"),
        ({"plug": "x", "items": ()}, "items"),
    ],
)
def test_impossible_settings_are_named(fields, say):
    with pytest.raises(ConfigError, match=say):
        HabitSettings(**fields)
