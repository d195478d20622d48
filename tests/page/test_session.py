import json

import pytest

from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, CorruptFileError, DataError
from persona_plug.fit.report import FitReport
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval
from persona_plug.page.session import SELF, Session, messages, parse_pasted

# --- reading what is pasted


def test_pasted_lines_of_every_kind():
    lines = [
        "What about tea? -> Yes, please!",
        "",
        "  I never liked mornings  ",
        '{"input": "a", "output": "b -> c", "timestamp": 3, "id": 7}',
        '{"output": "alone", "user_id": "bob"}',
    ]
    events = parse_pasted("ann", "\n".join(lines))
    assert [e.user_id for e in events] == ["ann", "ann", "ann", "bob"]
    assert [(e.item.input, e.item.output) for e in events] == [
        ("What about tea?", "Yes, please!"),
        ("", "I never liked mornings"),
        ("a", "b -> c"),
        ("", "alone"),
    ]
    assert (events[2].item.timestamp, events[2].item.id) == (3.0, "7")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"input": "a"}', "field 'output' must be a text"),
        ('{"input": 3, "output": "b"}', "field 'input' must be a text"),
        ('{"output": "b", "timestamp": "soon"}', "field 'timestamp'"),
        ('{"output": ', "not JSON"),
        ("a -> ", "field 'output'"),
    ],
)
def test_bad_pasted_line_is_named(line, says):
    with pytest.raises(DataError, match=r"^pasted text, line 2: ") as error:
        parse_pasted("ann", f"fine\n{line}\nfine too")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# --- items


def test_items_are_newest_first(open_session, people):
    session = open_session()
    held = session.items("ann")
    assert [i.output for i in held] == [i.output for i in reversed(people.ann)]
    assert session.items("nobody") == []
    assert len({i.id for i in held}) == len(held)


def test_the_page_begins_with_a_held_out_user_or_the_longest_history(open_session, make_plug, open_store):
    session = open_session()
    assert session.first() == "ann"
    assert Session(make_plug(), open_store(), held_out=["eve", "nobody", "bob"]).first() == "bob"
    assert Session(make_plug(), open_store(), held_out=["nobody"]).first() == "ann"
    assert open_session(filled=False).first() is None


def test_examples_are_what_others_were_asked(open_session):
    session = open_session()
    for name in ("fay", "gus", "hal"):
        session.add(name, f"asked of {name} -> answer")
    assert session.examples("ann") == ["rate the cake", "Grüße aus Köln", "asked of fay"]
    assert len(session.examples(None)) == 3
    session.add("ann", "asked of fay -> mine")
    session.forget("bob")
    assert session.examples("ann") == ["Grüße aus Köln", "asked of gus", "asked of hal"]
    assert open_session(filled=False).examples("ann") == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one\ntwo\n\nthree", ["one\ntwo", "three"]),
        ("one\ntwo", ["one", "two"]),
        ("  one  ", ["one"]),
        ("a\n \t\n\nb\n\n", ["a", "b"]),
        ("\n \n", []),
    ],
)
def test_messages_are_parted_by_empty_lines_or_else_by_lines(text, parts):
    assert messages(text) == parts


def test_pasted_messages_replace_earlier_ones(open_session):
    session = open_session()
    assert session.take("Servus,\nall fine\nMo 🌳\n\nServus again") == 2
    assert [i.output for i in session.items(SELF)] == ["Servus again", "Servus,\nall fine\nMo 🌳"]
    assert session.take("other\nmessages\nhere") == 3
    assert [i.output for i in session.items(SELF)] == ["here", "messages", "other"]
    with pytest.raises(DataError, match="no message is pasted"):
        session.take(" \n")
    assert len(session.items(SELF)) == 3


def test_style_is_of_the_items(open_session):
    session = open_session()
    session.take("Servus, fine 🌳\nServus, good 🌳\nServus, so 🌳")
    style = session.style(SELF)
    assert style.texts == 3
    assert style.openings[0].text == "Servus,"
    assert style.emoji[0].text == "🌳"
    assert session.style("nobody") is None


def test_add_counts_new_items_of_each_user(open_session, tmp_path):
    session = open_session(filled=False)
    file = tmp_path / "some.jsonl"
    records = [{"input": "x", "output": "y", "id": "1"}, {"user_id": "cid", "input": "x", "output": "z", "id": "1"}]
    file.write_text("\n".join(map(json.dumps, records)))
    assert session.add(" dot ", "one\ntwo", file) == {"dot": 3, "cid": 1}
    assert [i.output for i in session.items("dot")] == ["y", "two", "one"]
    assert session.add("dot", "", file) == {"dot": 0, "cid": 0}


@pytest.mark.parametrize("user", ["", "  ", None])
def test_add_needs_a_user(open_session, user):
    with pytest.raises(DataError, match="no user is chosen"):
        open_session().add(user, "text")


def test_add_needs_something(open_session):
    with pytest.raises(DataError, match="nothing to add"):
        open_session().add("ann", " \n ")


def test_bad_file_stores_nothing_and_names_file_line_and_field(open_session, tmp_path):
    session = open_session()
    before = session.items("ann")
    file = tmp_path / "mine.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n{"input": "a", "output": [5]}\n')
    with pytest.raises(DataError, match=r"^mine\.jsonl:2: field 'output' must be a text or a number, got \[5\]$"):
        session.add("ann", "a good line", file)
    assert session.items("ann") == before


def test_edited_item_keeps_its_time_and_its_place(open_session):
    session = open_session(filled=False)
    session.add("dot", '{"input": "a", "output": "first", "timestamp": 1}\n{"output": "second", "timestamp": 2}')
    first = session.items("dot")[1]
    session.edit("dot", first.id, " b ", "better")
    items = session.items("dot")
    assert [(i.input, i.output, i.timestamp) for i in items] == [("", "second", 2.0), ("b", "better", 1.0)]


def test_edit_to_the_same_text_changes_nothing(open_session):
    session = open_session()
    before = session.items("ann")
    session.edit("ann", before[0].id, before[0].input, before[0].output)
    assert session.items("ann") == before


def test_edit_to_nothing_loses_nothing(open_session):
    session = open_session()
    before = session.items("ann")
    with pytest.raises(DataError, match="field 'output' is empty"):
        session.edit("ann", before[0].id, "x", "  ")
    assert session.items("ann") == before


def test_delete_takes_one_item(open_session):
    session = open_session()
    before = session.items("bob")
    session.delete("bob", before[1].id)
    assert session.items("bob") == [before[0], before[2]]
    for ident in (before[1].id, None):
        with pytest.raises(DataError, match="choose one from the list"):
            session.delete("bob", ident)


def test_forget_leaves_nothing_of_the_user_and_all_of_the_others(open_session):
    session = open_session()
    others = session.items("ann"), session.items("eve")
    gone, left = session.forget("bob")
    assert (gone.items, left) == (3, 0)
    assert session.items("bob") == []
    assert (session.items("ann"), session.items("eve")) == others
    assert [row.user_id for row in session.users()] == ["ann", "eve"]


def test_store_without_text_is_refused(make_plug, open_store):
    with pytest.raises(ConfigError, match="vectors without text"):
        Session(make_plug(), open_store(filled=False, keep_text=False))


# --- the report


def test_no_report(open_session, tmp_path):
    assert open_session().report() is None
    assert open_session(folder=tmp_path).report() is None


def test_report_is_read_with_its_plots(open_session, tmp_path):
    lift = Contrast("plug", "plug_shuffled", "nll", 0.2, 0.1, 0.3)
    made = FitReport({"plug": {"nll": Interval(1.0, 0.9, 1.1)}}, [lift], 5, 2, ["a note"])
    made.save(tmp_path)
    (tmp_path / "loss.png").write_bytes(b"png")
    report, plots = open_session(folder=tmp_path).report()
    assert report.verdict() == made.verdict()
    assert [plot.name for plot in plots] == ["loss.png"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"metrics": {}, "surprise": 1}',
        '{"metrics": {}, "contrasts": [], "n": 0, "n_users": 0, "surprise": 1}',
    ],
)
def test_broken_report_is_one_line(open_session, tmp_path, text):
    (tmp_path / "fit_report.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"^fit_report\.json is no report .*fit the plug again$"):
        open_session(folder=tmp_path).report()


def test_item_needs_an_id_that_is_there(open_session):
    session = open_session()
    held = session.items("eve")[0]
    assert session.item("eve", held.id) == held
    assert isinstance(held, HistoryItem)
    with pytest.raises(DataError, match="no item is picked"):
        session.item("ann", held.id)
