import datetime
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from persona_plug.data.history import (
    Event,
    Example,
    HistoryItem,
    by_user,
    detect_answers,
    is_twin,
    leave_one_out,
    longest_by_user,
    parse_event,
    read_events,
    time_ordered,
)
from persona_plug.errors import DataError

GOOD = {"user_id": "ann", "input": "a request", "output": "an answer"}


def write(path, *lines):
    """Write records (or raw lines) as JSON lines."""
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
    return path


# --- records: what is read


def test_jsonl_fields_arrive_and_unknown_ones_are_only_metadata(tmp_path):
    record = GOOD | {"timestamp": 12, "id": 7, "mood": "good", "tags": ["a", {"b": None}]}
    (event,) = read_events(write(tmp_path / "e.jsonl", record)).events
    assert event == Event("ann", HistoryItem("a request", "an answer", 12.0, "7"), event.metadata)
    assert event.metadata == {"mood": "good", "tags": ["a", {"b": None}]}


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".ndjson"])
def test_every_json_lines_ending_is_read(tmp_path, ending):
    assert len(read_events(write(tmp_path / f"e{ending}", GOOD, GOOD)).events) == 2


def test_parquet_gives_the_same_events_as_jsonl(tmp_path):
    rows = [
        GOOD | {"timestamp": 3.5, "id": "x", "mood": "good"},
        {"user_id": "bob", "input": "", "output": "free text", "timestamp": None, "id": None, "mood": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "e.parquet")
    lines = write(tmp_path / "e.jsonl", *({k: v for k, v in r.items() if v is not None} for r in rows))
    assert read_events(tmp_path / "e.parquet").events == read_events(lines).events


def test_parquet_timestamps_and_whole_number_users(tmp_path):
    moment = datetime.datetime(2024, 5, 1, 12, tzinfo=datetime.UTC)
    pq.write_table(pa.Table.from_pylist([GOOD | {"user_id": 5, "timestamp": moment}]), tmp_path / "e.parquet")
    (event,) = read_events(tmp_path / "e.parquet").events
    assert (event.user_id, event.item.timestamp) == ("5", moment.timestamp())


def test_order_users_and_blank_lines(tmp_path):
    bob = GOOD | {"user_id": "bob"}
    path = write(tmp_path / "e.jsonl", "", GOOD, "   ", bob, "\t", GOOD | {"output": "more"})
    users = by_user(read_events(path).events)
    assert list(users) == ["ann", "bob"]
    assert [i.output for i in users["ann"]] == ["an answer", "more"]


def test_line_breaks_of_all_systems_and_rare_separators_inside_texts(tmp_path):
    path = tmp_path / "e.jsonl"
    texts = ["one\u2028line", "one\x0bline", "one\x85line", "one\x1cline"]
    body = "\r\n".join(json.dumps(GOOD | {"output": t}, ensure_ascii=False) for t in texts)
    path.write_bytes(body.encode())
    assert [e.item.output for e in read_events(path).events] == texts


def test_many_lines_keep_their_numbers(tmp_path):
    # datasets reads a text file in pieces; a number counted per piece would start over.
    lines = [json.dumps(GOOD | {"output": "y" * 400})] * 40_000
    path = write(tmp_path / "e.jsonl", *lines, "oops")
    with pytest.raises(DataError, match=r":40001: not JSON"):
        read_events(path)


@pytest.mark.parametrize("name", ["e[1].jsonl", "e*.jsonl", "my events.jsonl", "ünï.jsonl", ".hidden.jsonl"])
def test_names_that_look_like_patterns(tmp_path, name):
    write(tmp_path / "e1.jsonl", GOOD | {"user_id": "someone else"})
    events = read_events(write(tmp_path / name, GOOD)).events
    assert [e.user_id for e in events] == ["ann"]


def test_a_relative_path_is_read(tmp_path, monkeypatch):
    write(tmp_path / "e.jsonl", GOOD)
    monkeypatch.chdir(tmp_path)
    assert len(read_events("e.jsonl").events) == 1


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0.0),
        (-1.5, -1.5),
        ("2024-05-01", 1714521600.0),
        ("2024-05-01T00:00:00", 1714521600.0),
        ("2024-05-01T02:00:00+02:00", 1714521600.0),
        ("2024-05-01T00:00:00Z", 1714521600.0),
        (None, None),
    ],
)
def test_timestamps(value, seconds):
    assert parse_event(GOOD | {"timestamp": value}, "here").item.timestamp == seconds


# --- records: what is refused

BAD = {
    "not JSON": ("{oops", "not JSON"),
    "cut off": ('{"user_id": "a", "input": "b", "out', "not JSON"),
    "a list": ("[1, 2]", "a JSON list"),
    "a text": ('"text"', "a JSON str"),
    "null": ("null", "a JSON NoneType"),
    "no user": ({"input": "a", "output": "b"}, "'user_id'.*field missing"),
    "empty user": (GOOD | {"user_id": " "}, "'user_id'"),
    "true as user": (GOOD | {"user_id": True}, "'user_id'"),
    "user of a wrong type": (GOOD | {"user_id": 1.5}, "'user_id'"),
    "no input": ({"user_id": "a", "output": "b"}, "'input'.*field missing"),
    "null input": (GOOD | {"input": None}, "'input'"),
    "number as input": (GOOD | {"input": 3}, "'input'"),
    "no output": ({"user_id": "a", "input": "b"}, "'output'.*field missing"),
    "list as output": (GOOD | {"output": ["b"]}, "'output'"),
    "empty output": (GOOD | {"output": " \n"}, "'output' is empty"),
    "word as time": (GOOD | {"timestamp": "yesterday"}, "'timestamp'.*yesterday"),
    "true as time": (GOOD | {"timestamp": True}, "'timestamp'"),
    "list as time": (GOOD | {"timestamp": [1]}, "'timestamp'"),
    "NaN as time": ('{"user_id": "a", "input": "b", "output": "c", "timestamp": NaN}', "'timestamp'"),
    "infinite time": ('{"user_id": "a", "input": "b", "output": "c", "timestamp": 1e999}', "'timestamp'"),
    "time beyond any clock": (GOOD | {"timestamp": 10**400}, "'timestamp'"),
    "number of too many digits": (
        '{"user_id": "a", "input": "b", "output": "c", "n": 1' + "0" * 5000 + "}",
        "not JSON",
    ),
    "nested too deeply": ("[" * 100_000, "not JSON"),
    "object as id": (GOOD | {"id": {"a": 1}}, "'id'"),
    "half a character": ('{"user_id": "a", "input": "b", "output": "\\ud800"}', "'output'"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_is_named_by_file_line_and_field(tmp_path, line, reason):
    path = write(tmp_path / "events.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=reason) as caught:
        read_events(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < len(str(path)) + 250


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_skip_bad_leaves_out_exactly_the_bad_line(tmp_path, line, reason):
    path = write(tmp_path / "events.jsonl", GOOD, line, GOOD | {"user_id": "bob"})
    result = read_events(path, skip_bad=True)
    assert [e.user_id for e in result.events] == ["ann", "bob"]
    (skipped,) = result.skipped
    assert skipped.startswith(f"{path}:2: ")


def test_skip_bad_counts_all_and_says_so(tmp_path, caplog):
    path = write(tmp_path / "e.jsonl", "x", GOOD, "y", GOOD | {"output": ""})
    with caplog.at_level("WARNING", "persona_plug"):
        result = read_events(path, skip_bad=True)
    assert (len(result.events), len(result.skipped)) == (1, 3)
    assert "3 bad records skipped" in caplog.text


def test_bad_parquet_rows_are_named_by_row_and_field(tmp_path):
    path = tmp_path / "e.parquet"
    pq.write_table(pa.Table.from_pylist([GOOD, GOOD | {"output": None}, GOOD]), path)
    with pytest.raises(DataError, match=rf"{path}:row 2: field 'output'.*field missing"):
        read_events(path)
    assert len(read_events(path, skip_bad=True).events) == 2


def test_ids_are_unique_for_each_user(tmp_path):
    bob = GOOD | {"user_id": "bob", "id": "1"}
    path = write(tmp_path / "e.jsonl", GOOD | {"id": "1"}, bob, GOOD, GOOD, GOOD | {"id": 1})
    with pytest.raises(DataError, match=rf"{path}:5: field 'id' '1' of this user was already used at {path}:1"):
        read_events(path)
    result = read_events(path, skip_bad=True)
    assert (len(result.events), len(result.skipped)) == (4, 1)


def test_a_bad_record_does_not_take_its_id(tmp_path):
    path = write(tmp_path / "e.jsonl", GOOD | {"id": "1", "output": ""}, GOOD | {"id": "1"})
    result = read_events(path, skip_bad=True)
    assert (len(result.events), len(result.skipped)) == (1, 1)


@pytest.mark.parametrize("broken", [b"\xff\xfe", b"ol\xe9", b"caf\xc3"])
def test_a_file_that_is_not_utf8_is_refused(tmp_path, broken):
    path = tmp_path / "e.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"user_id": "' + broken + b'"}\n')
    with pytest.raises(DataError, match=rf"{path}: not UTF-8"):
        read_events(path)


def test_a_byte_order_mark_is_named(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n" + json.dumps(GOOD).encode())
    (skipped,) = read_events(path, skip_bad=True).skipped
    assert skipped.startswith(f"{path}:1: not JSON (Unexpected UTF-8 BOM")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    path = tmp_path / "e.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=f"{path}: holds no usable record"):
        read_events(path)


def test_a_file_of_bad_records_only_is_refused_with_their_number(tmp_path):
    with pytest.raises(DataError, match=r"no usable record \(2 skipped\)"):
        read_events(write(tmp_path / "e.jsonl", "x", "y"), skip_bad=True)


def test_an_empty_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([GOOD]).slice(0, 0), tmp_path / "e.parquet")
    with pytest.raises(DataError, match="holds no usable record"):
        read_events(tmp_path / "e.parquet")


@pytest.mark.parametrize("content", [b"", b"PAR1 no parquet at all PAR1"])
def test_a_broken_parquet_file_is_refused(tmp_path, content):
    path = tmp_path / "e.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"{path}: not a readable Parquet file"):
        read_events(path)


@pytest.mark.parametrize("name", ["e.csv", "e", "e.jsonl.gz"])
def test_an_unknown_ending_is_refused(tmp_path, name):
    with pytest.raises(DataError, match=r"unknown ending.*use \.jsonl or \.parquet"):
        read_events(write(tmp_path / name, GOOD))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        read_events(tmp_path / "nowhere.jsonl")


def test_no_copy_of_the_texts_stays_behind(tmp_path):
    """Reading leaves no personal data in the caches of datasets, in the home folder or among temporary files."""
    rare = "zebra-quartz-71"
    record = GOOD | {"output": rare}
    write(tmp_path / "e.jsonl", record)
    pq.write_table(pa.Table.from_pylist([record]), tmp_path / "e.parquet")
    places = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "datasets", "HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "x"}
    for folder in places.values():
        (tmp_path / folder).mkdir()
    env = os.environ | {k: str(tmp_path / v) for k, v in places.items()}
    code = "import sys\nfrom persona_plug.data.history import read_events\n"
    code += "for f in sys.argv[1:]: assert read_events(f).events[0].item.output == " + repr(rare)
    files = [str(tmp_path / f) for f in ("e.jsonl", "e.parquet")]
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, *files], env=env | {"PYTHONPATH": str(root)}, check=True, timeout=120)
    left = [f for v in places.values() for f in (tmp_path / v).rglob("*") if f.is_file()]
    assert [f for f in left if rare.encode() in f.read_bytes()] == []


# --- items from what callers pass


def test_items_from_mappings_and_texts():
    item = HistoryItem("q", "a", 1.0, "x")
    assert HistoryItem.of(item) is item
    assert HistoryItem.of("my text") == HistoryItem("", "my text")
    assert HistoryItem.of({"output": "a"}) == HistoryItem("", "a")
    assert HistoryItem.of({"input": "q", "output": "a", "timestamp": 1, "id": "x"}) == item


@pytest.mark.parametrize("bad", [3, None, ["q", "a"], {"input": "q"}, {"output": 1}])
def test_malformed_items_are_refused(bad):
    with pytest.raises(DataError):
        HistoryItem.of(bad)


# --- samples

words = st.sampled_from(["", " ", "a", "b", "a b", "a  b", "c"])
items = st.builds(HistoryItem, words, st.sampled_from(["yes", "no", "y es"]), st.integers(0, 4).map(float))
histories = st.lists(items, max_size=9)


@given(histories)
@example([HistoryItem("a", "yes"), HistoryItem("a", "yes"), HistoryItem("a", "no")])
@example([HistoryItem("", "yes"), HistoryItem("", "yes"), HistoryItem("a", "yes")])
def test_leave_one_out_never_shows_the_target(history):
    samples = leave_one_out("u", history)
    assert [(s.input, s.output) for s in samples] == [(i.input, i.output) for i in history]
    for i, (target, sample) in enumerate(zip(history, samples, strict=True)):
        assert not any(o is target for o in sample.history) or sum(o is target for o in history) > 1
        assert not any(o.input.split() == target.input.split() != [] for o in sample.history)
        if not target.input.strip():
            assert not any(not o.input.strip() and o.output.split() == target.output.split() for o in sample.history)
        # and nothing else is missing
        expected = [o for j, o in enumerate(history) if j != i and not is_twin(o, target.input, target.output)]
        assert list(sample.history) == expected
        assert len(expected) == len(history) - 1 - sum(
            (o.input.split() == target.input.split())
            if (o.input.strip() or target.input.strip())
            else (o.output.split() == target.output.split())
            for j, o in enumerate(history)
            if j != i
        )


@given(histories, st.randoms(use_true_random=False))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_leave_one_out_does_not_depend_on_the_order(history, random):
    def facts(given_items):
        return sorted(
            (s.input, s.output, sorted((o.input, o.output, o.timestamp) for o in s.history))
            for s in leave_one_out("u", given_items)
        )

    shuffled = random.sample(history, len(history))
    assert facts(history) == facts(shuffled)


@given(histories, st.randoms(use_true_random=False))
def test_time_ordered_sees_strictly_earlier_items_only(history, random):
    samples = time_ordered("u", random.sample(history, len(history)))
    assert len(samples) == len(history)
    for sample in samples:
        (target, *_) = [i for i in history if (i.input, i.output) == (sample.input, sample.output)]
        times = [o.timestamp for o in sample.history]
        assert times == sorted(times)
        assert not any(is_twin(o, target.input, target.output) for o in sample.history)
    # each sample's history is that of some item with the sample's text, at that item's time
    expected = sorted(
        (
            i.input,
            i.output,
            sorted(
                (o.input, o.output, o.timestamp)
                for o in history
                if o.timestamp < i.timestamp and not is_twin(o, i.input, i.output)
            ),
        )
        for i in history
    )
    found = sorted((s.input, s.output, sorted((o.input, o.output, o.timestamp) for o in s.history)) for s in samples)
    assert found == expected


def test_items_of_the_same_moment_do_not_see_each_other():
    first, second = time_ordered("u", [HistoryItem("a", "x", 1.0), HistoryItem("b", "y", 1.0)])
    assert first.history == second.history == ()


def test_time_ordered_needs_all_timestamps():
    with pytest.raises(DataError, match=r"user 'u': item 1 has no timestamp; .*leave-one-out"):
        time_ordered("u", [HistoryItem("a", "x", 1.0), HistoryItem("b", "y")])
    assert time_ordered("u", [HistoryItem("a", "x", 0.0)])[0].history == ()


def test_sample_ids_are_the_items_or_made_up_and_unique():
    samples = leave_one_out("u", [HistoryItem("a", "x", id="mine"), HistoryItem("b", "y"), HistoryItem("c", "y")])
    assert samples[0].id == "mine"
    assert len({s.id for s in samples}) == 3


# --- answers


@pytest.mark.parametrize(
    ("outputs", "answers"),
    [
        (["yes", "no"] * 5, ("no", "yes")),
        ([" yes", "no "] * 5, ("no", "yes")),
        (["5", "1", "3"] * 5, ("1", "3", "5")),
        (["yes"] * 20, None),  # one answer is no choice
        (["yes", "no"] * 4 + ["no"], None),  # 9 outputs are too few for two answers
        ([f"text {i}" for i in range(50)], None),
        ([f"label {i % 33}" for i in range(500)], None),
        (["yes", "x" * 49] * 20, None),
        ([], None),
    ],
)
def test_detect_answers(outputs, answers):
    assert detect_answers(outputs) == answers


def test_detect_answers_takes_just_enough_repetition():
    assert detect_answers([f"l{i % 32:02}" for i in range(160)]) == tuple(f"l{i:02}" for i in range(32))
    assert detect_answers([f"l{i % 32:02}" for i in range(159)]) is None


def test_times_are_finite_numbers():
    assert math.isfinite(parse_event(GOOD | {"timestamp": "1970-01-01"}, "x").item.timestamp)


def test_reading_a_file_is_told_to_no_server(tmp_path, monkeypatch):
    """`datasets` counts downloads, of local files too, and swallows the error where it cannot."""
    import datasets

    asked = []
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.load.get_session", lambda: asked.append("a session"))
    file = tmp_path / "events.jsonl"
    file.write_text('{"user_id": "a", "input": "b", "output": "c"}\n')
    assert len(read_events(file).events) == 1
    assert not asked


def test_a_users_longest_history_is_the_first_of_equally_long_ones():
    one, two, three = (HistoryItem("", text) for text in ("one", "two", "three"))
    rows = [("ann", (one,)), ("bob", ()), ("ann", (two, three)), ("ann", (three, one)), ("cem", (two,))]
    examples = [Example(user, "", "", history) for user, history in rows]
    assert longest_by_user(examples) == {"ann": (two, three), "cem": (two,)}
