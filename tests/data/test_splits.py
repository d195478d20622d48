import json
from collections import Counter

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_plug.data import synthetic
from persona_plug.data.history import Event, Example, HistoryItem, leave_one_out, time_ordered
from persona_plug.data.splits import prepare
from persona_plug.errors import ConfigError, DataError


def records(users=10, items=4, timestamps=False, outputs=("yes", "no")):
    rows = []
    for u in range(users):
        for i in range(items):
            row = {"user_id": f"u{u}", "input": f"request {u} {i}", "output": outputs[(u + i) % len(outputs)]}
            rows.append(row | ({"timestamp": i} if timestamps else {}))
    return rows


def parts(data):
    return data.train, data.valid, data.held_out


def users(part):
    return {e.user_id for e in part}


# --- the split


@given(
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=25),
    valid=st.floats(0.01, 0.4),
    held_out=st.floats(0, 0.4),
    seed=st.integers(0, 99),
    samples=st.sampled_from(["auto", "leave_one_out", "time"]),
)
@settings(max_examples=150, deadline=None)
def test_no_user_is_in_two_parts(sizes, valid, held_out, seed, samples):
    rows = [
        {"user_id": f"u{u}", "input": f"r {u} {i}", "output": f"o {u} {i}", "timestamp": i}
        for u, n in enumerate(sizes)
        for i in range(n)
    ]
    try:
        data = prepare(rows, samples=samples, valid=valid, held_out=held_out, seed=seed)
    except DataError as exc:
        assert "too few" in str(exc)  # noqa: PT017 - rounding up may leave nobody to train on
        assert len(sizes) - max(1, round(valid * len(sizes))) - max(held_out > 0, round(held_out * len(sizes))) < 1
        return
    train, validation, held = (users(p) for p in parts(data))
    assert train.isdisjoint(validation | held)
    assert validation.isdisjoint(held)
    assert train | validation | held == {f"u{u}" for u in range(len(sizes))}
    assert train
    assert validation
    assert bool(held) == (held_out > 0)
    # nobody's items reach another user's history, and every item is a target once
    for part in parts(data):
        for e in part:
            assert all(i.input.split()[1] == e.user_id[1:] for i in e.history)
    assert Counter(e.user_id for p in parts(data) for e in p) == {f"u{u}": n for u, n in enumerate(sizes)}


def test_the_seed_decides_the_split_and_nothing_else_does():
    rows = records(20)
    same = [users(p) for p in parts(prepare(rows, seed=3))]
    assert same == [users(p) for p in parts(prepare(rows, seed=3))]
    assert same == [users(p) for p in parts(prepare(rows[::-1], seed=3))]
    assert same != [users(p) for p in parts(prepare(rows, seed=4))]


def test_shares_of_users():
    data = prepare(records(40), valid=0.1, held_out=0.25)
    assert [len(users(p)) for p in parts(data)] == [26, 4, 10]


@pytest.mark.parametrize(("number", "held_out", "needed"), [(2, 0.2, 3), (1, 0, 2), (1, 0.2, 3), (3, 0.7, 4)])
def test_too_few_users(number, held_out, needed):
    with pytest.raises(DataError, match=f"{number} users are too few.*at least {needed} are needed"):
        prepare(records(number), held_out=held_out)


def test_the_fewest_users_that_do():
    assert [len(users(p)) for p in parts(prepare(records(3)))] == [1, 1, 1]
    assert [len(users(p)) for p in parts(prepare(records(2), held_out=0))] == [1, 1, 0]


# --- the cap


def test_a_capped_user_keeps_whole_histories_and_the_cap_is_noted():
    rows = records(9, items=2) + records(1, items=50)[2:]
    data = prepare(rows, targets_per_user=10)
    every = [e for p in parts(data) for e in p]
    assert Counter(e.user_id for e in every)["u0"] == 10
    assert {len(e.history) for e in every if e.user_id == "u0"} == {49}
    assert "40 targets left out: at most 10 a user are used (targets_per_user)" in data.notes
    assert not any("targets left out" in n for n in prepare(rows, targets_per_user=50).notes)


def test_the_cap_draws_at_random_and_keeps_the_order():
    rows = records(8, items=40)
    data = prepare(rows, targets_per_user=8)
    for user in {e.user_id for e in data.train}:
        drawn = [int(e.input.split()[-1]) for e in data.train if e.user_id == user]
        assert drawn == sorted(drawn)
    assert {int(e.input.split()[-1]) for e in data.train} - set(range(8))


# --- samples


def test_auto_goes_by_time_only_if_every_item_has_one():
    timed = prepare(records(timestamps=True))
    assert any("samples: time (every item has a timestamp)" in n for n in timed.notes)
    assert {len(e.history) for e in timed.train} == {0, 1, 2, 3}
    mixed = records(timestamps=True)
    del mixed[5]["timestamp"]
    found = prepare(mixed)
    assert any("samples: leave_one_out (not every item has a timestamp)" in n for n in found.notes)
    assert {len(e.history) for e in found.train} == {3}


def test_samples_can_be_imposed():
    assert {len(e.history) for e in prepare(records(timestamps=True), samples="leave_one_out").train} == {3}
    with pytest.raises(DataError, match="has no timestamp"):
        prepare(records(), samples="time")
    with pytest.raises(ConfigError, match="samples='random' is not one of auto, leave_one_out, time"):
        prepare(records(), samples="random")


def test_the_samples_are_those_of_the_history_module():
    rows = records(5, timestamps=True)
    for name, make in (("time", time_ordered), ("leave_one_out", leave_one_out)):
        data = prepare(rows, samples=name)
        items = [HistoryItem(r["input"], r["output"], float(r["timestamp"])) for r in rows if r["user_id"] == "u2"]
        found = [e for p in parts(data) for e in p if e.user_id == "u2"]
        assert found == make("u2", items)


def test_users_without_a_second_item_are_noted():
    rows = [*records(5), {"user_id": "lonely", "input": "a", "output": "yes"}]
    assert any(n.startswith("1 of 6 users have no second item") for n in prepare(rows).notes)


def test_users_who_answer_one_request_are_noted_as_such():
    rows = [*records(5), *({"user_id": "same", "input": "a", "output": o} for o in ("yes", "no"))]
    notes = prepare(rows).notes
    assert any(n.startswith("1 of 6 users answer the same request in all their items") for n in notes)
    assert not any("no second item" in n for n in notes)


@pytest.mark.parametrize("day", ["2024-05-02", "2024-05-02T10:00:00"])
def test_items_of_one_date_have_histories(day):
    rows = [row | {"timestamp": day} for row in records()]
    data = prepare(rows)
    assert {len(e.history) for e in data.train} == {0, 1, 2, 3}
    assert not any("no-history" in note for note in data.notes)


def test_some_items_without_a_time_are_noted():
    mixed = records(timestamps=True)
    del mixed[5]["timestamp"], mixed[9]["timestamp"]
    assert any(n.startswith("2 items have no timestamp") for n in prepare(mixed).notes)


@pytest.mark.parametrize("samples", ["time", "leave_one_out"])
def test_the_end_of_a_history_is_what_is_latest_whatever_the_files_order(samples):
    rows = [{"user_id": f"u{u}", "input": f"q {u} {day}", "output": f"a {u} {day}", "timestamp": f"2024-05-{day:02}"}
            for u in range(4) for day in range(1, 21)]  # fmt: skip
    for order in (rows, rows[::-1], sorted(rows, key=lambda r: r["input"][::-1])):
        last = max(prepare(order, samples=samples).train, key=lambda e: (e.user_id, len(e.history), e.input == "x"))
        days = [int(i.input.split()[-1]) for i in last.history]
        assert days == sorted(days)
        assert days[-1] >= 19


# --- answers and template


def test_answers_are_inferred_from_the_training_outputs_and_this_is_noted():
    data = prepare(records())
    assert data.answers == ("no", "yes")
    assert any("inferred" in n and "labels no, yes" in n for n in data.notes)
    free = prepare(records(outputs=tuple(f"text {i}" for i in range(30))))
    assert free.answers is None
    assert any("inferred" in n and "free text" in n for n in free.notes)


def test_given_answers_leave_other_outputs_out_and_say_so():
    rows = records(outputs=("yes", "no", "perhaps"), items=6)
    data = prepare(rows, answers=["yes", "no"])
    assert data.answers == ("yes", "no")
    assert {e.output for p in parts(data) for e in p} == {"yes", "no"}
    # they stay in the histories: the user did give them
    assert any(i.output == "perhaps" for e in data.train for i in e.history)
    for name in ("training", "validation", "held-out"):
        assert any(f"{name} samples left out" in n for n in data.notes)
    assert not any("inferred" in n for n in data.notes)


def test_none_means_free_text_even_for_labels():
    assert prepare(records(), answers=None).answers is None


def test_a_bare_text_is_no_answer_space():
    with pytest.raises(ConfigError, match="must be a list"):
        prepare(records(), answers="yes")


def test_the_template_beside_a_file_is_used_unless_another_is_given(tmp_path):
    made = synthetic.build("label", users=5, items_per_user=4)
    path = made.write(tmp_path / "set.jsonl")
    assert prepare(path).template == made.template
    assert prepare(path, template="Say: {input}").template == "Say: {input}"
    (tmp_path / "set.meta.json").unlink()
    assert prepare(path).template == "{input}"
    assert prepare(made.records).template == "{input}"


@pytest.mark.parametrize("content", ["{oops", "[]", '"x"', '{"template": 5}', "{}", b"\xff\xfe"])
def test_a_damaged_sidecar_is_ignored_or_named(tmp_path, content):
    path = synthetic.build("label", users=5, items_per_user=4).write(tmp_path / "set.jsonl")
    side = tmp_path / "set.meta.json"
    side.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        assert prepare(path).template == "{input}"
    except DataError as exc:
        assert "set.meta.json" in str(exc)  # noqa: PT017


# --- kinds of data


def test_skipped_records_are_noted(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records()) + "oops\n")
    with pytest.raises(DataError, match=":41: not JSON"):
        prepare(path)
    assert any(n.startswith("1 bad records skipped; ") for n in prepare(path, skip_bad=True).notes)


def of_users(*numbers):
    return [row for row in records(40) if int(row["user_id"].removeprefix("u")) in numbers]


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, pd.DataFrame], ids=["datasets", "pandas"])
@pytest.mark.parametrize("names", [("train", "validation", "test"), ("train", "dev", "test"), ("Train", "val", "TEST")])
def test_users_of_a_test_or_validation_split_alone_stay_there(kind, names):
    splits = [of_users(*range(8)), of_users(8, 9, 0), of_users(10, 11, 12, 1)]
    data = prepare({name: kind(rows) for name, rows in zip(names, splits, strict=True)})
    assert [users(p) for p in parts(data)] == [{f"u{n}" for n in ns} for ns in (range(8), (8, 9), (10, 11, 12))]
    assert any(f"the splits {', '.join(names)} count together" in note for note in data.notes)
    assert prepare({name: kind(rows) for name, rows in zip(names, splits, strict=True)}, held_out=0.5, valid=0.2)


def test_splits_of_the_same_users_are_joined_and_split_anew():
    rows = records(20)
    data = prepare(datasets.DatasetDict({"train": datasets.Dataset.from_list(rows[::2]),
                                         "test": datasets.Dataset.from_list(rows[1::2])}))  # fmt: skip
    assert [len(users(p)) for p in parts(data)] == [14, 2, 4]
    assert sum(len(p) for p in parts(data)) == len(rows)


def test_a_bad_record_of_a_split_is_named():
    bad = pd.DataFrame([{"user_id": "a", "input": "b", "output": "c"}, {"user_id": "a", "input": "b"}])
    with pytest.raises(DataError, match=r"split test, record 1: field 'output'"):
        prepare({"train": pd.DataFrame(records(5)), "test": bad})


@pytest.mark.parametrize("name", ["valid", "held_out"])
@pytest.mark.parametrize("share", [1, 1.0, 2, 20, -0.1, float("nan")])
def test_a_share_of_users_is_below_one(name, share):
    with pytest.raises(ConfigError, match=f"^{name}={share:g} is a share of the users: give a number from 0 to 1"):
        prepare(records(), **{name: share})


def test_validation_users_may_be_named():
    data = prepare(records(10), valid=["u1", "u2"], held_out=["u3"])
    assert [users(p) for p in parts(data)][1:] == [{"u1", "u2"}, {"u3"}]
    with pytest.raises(DataError, match="validation user 'u99' has no record"):
        prepare(records(10), valid=["u99"])


@pytest.mark.parametrize("data", [None, 5, 1.5, object()], ids=type)
def test_what_is_no_data_is_named(data):
    with pytest.raises(DataError, match="must be a file, a table or a list of records, not "):
        prepare(data)


def test_events_records_and_examples_are_taken():
    rows = records()
    events = [Event(r["user_id"], HistoryItem(r["input"], r["output"])) for r in rows]
    assert prepare(rows) == prepare(events) == prepare([*events[:5], *rows[5:]])
    examples = [e for p in parts(prepare(rows)) for e in p]
    assert sorted(e.input for p in parts(prepare(examples)) for e in p) == sorted(r["input"] for r in rows)


@pytest.mark.parametrize("data", [[], [1], [Example("u", "a", "b"), {"user_id": "u", "input": "a", "output": "b"}]])
def test_other_data_is_refused(data):
    with pytest.raises(DataError):
        prepare(data)


def test_a_bad_record_of_a_list_is_named_by_its_place():
    with pytest.raises(DataError, match="record 1: field 'output'"):
        prepare([*records(1, 1), {"user_id": "a", "input": "b"}])


@pytest.mark.parametrize("answers", [[0, 1, 2], ["0", "1", "2"], (0.0, 1.0, 2.0)], ids=repr)
def test_answers_may_be_numbers(answers):
    data = prepare(records(outputs=(0, 1, 2)), answers=answers)
    assert data.answers == ("0", "1", "2")
    assert {e.output for e in data.train} == {"0", "1", "2"}


@pytest.mark.parametrize("answers", [["5", "5.0", "4"], ["a", "a "], ["a", " "], ["a"], []], ids=repr)
def test_answers_that_are_one_label_are_refused(answers):
    with pytest.raises(ConfigError, match="answers must be two or more different, non-empty texts"):
        prepare(records(), answers=answers)


@pytest.mark.parametrize("answers", ["yes", [None, "a"], [["a"], "b"], [True, "no"]], ids=repr)
def test_answers_that_are_no_texts_are_refused(answers):
    with pytest.raises(ConfigError, match="must be a list of texts, 'auto' or None"):
        prepare(records(), answers=answers)


@pytest.mark.parametrize("name", ["held_out", "valid"])
def test_users_are_named_as_their_records_name_them(name):
    rows = [{**row, "user_id": int(row["user_id"][1:])} for row in records()]
    data = prepare(rows, **{name: [3]})
    assert users(data.held_out if name == "held_out" else data.valid) == {"3"}
    with pytest.raises(ConfigError, match=f"{name}='u1' must be a share of the users or a list of their names"):
        prepare(records(), **{name: "u1"})


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"output": ""}, "'output' is empty"),
        ({"output": " \n"}, "'output' is empty"),
        ({"user_id": "u\ud800"}, "'user_id' holds half a character"),
        ({"input": "\udfff"}, "'input' holds half a character"),
    ],
    ids=ascii,
)
def test_examples_are_checked_as_records_are(fields, reason):
    examples = [Example(f"u{n}", f"request {n}", "yes") for n in range(6)]
    examples[2] = Example(**{"user_id": "u", "input": "x", "output": "y", **fields})
    with pytest.raises(DataError, match=f"example 2: field {reason}"):
        prepare(examples)


@pytest.mark.parametrize(("input", "output"), [(None, "a"), ("a", None), ("a", 5), (["a"], "b")], ids=repr)
def test_what_is_no_text_is_refused_where_it_is_made(input, output):
    for kind in (HistoryItem, lambda *texts: Example("u", *texts)):
        with pytest.raises(DataError, match=r"field '(input|output)' must be a text, got"):
            kind(input, output)


def test_an_example_takes_a_history_of_any_form():
    items = (HistoryItem("a", "b"), HistoryItem("", "c"), HistoryItem("d", "e"))
    assert Example("u", "x", "y", ({"input": "a", "output": "b"}, "c", ("d", "e"))).history == items


@pytest.mark.parametrize("count", [0, "x", 1.5, None])
def test_targets_of_a_user_are_a_number(count):
    with pytest.raises(ConfigError, match=r"targets_per_user=.* must be a whole number from 1 up"):
        prepare(records(), targets_per_user=count)
