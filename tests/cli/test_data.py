import json

import pytest

from tests.cli.test_main import fails, run

ROWS = [(f"u{n % 5}", f"question {n}", ("good", "bad")[n // 5 % 2], f"2024-05-{n + 1:02}") for n in range(20)]


@pytest.fixture
def tickets(tmp_path):
    path = tmp_path / "tickets.csv"
    path.write_text("\n".join(["agent;question;reply;when", *(";".join(row) for row in ROWS)]))
    return path


COLUMNS = "user_id=agent,input=question,output=reply,timestamp=when"


def test_check_shows_what_is_there_and_how_it_will_be_split(tickets):
    row = json.loads(run("data", "check", tickets, "--columns", COLUMNS, "--json").stdout)
    assert (row["events"], row["users"], row["with_timestamp"], row["bad"]) == (20, 5, 20, [])
    assert (row["first"], row["last"]) == ("2024-05-01T00:00:00+00:00", "2024-05-20T00:00:00+00:00")
    assert row["label_counts"] == {"bad": 10, "good": 10}
    assert row["example"] == {"user_id": "u0", "input": "question 0", "output": "good", "timestamp": 1714521600.0}
    assert {k: v for k, v in row["split"].items() if k != "notes"} == {
        "train": "12 samples of 3 users", "valid": "4 samples of 1 users", "held_out": "4 samples of 1 users"
    }  # fmt: skip
    assert "samples: time (every item has a timestamp)" in row["split"]["notes"]
    text = run("data", "check", tickets, "--columns", COLUMNS).stdout
    for name in ("first: 2024-05-01", "last: 2024-05-20", "label_counts: ", "example: ", "split: "):
        assert name in text


def test_check_says_why_there_is_no_split(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps({"user_id": "a", "input": "b", "output": "c", "timestamp": 3}) + "\n")
    row = json.loads(run("data", "check", path, "--json").stdout)
    assert "too few to hold some out" in row["split"]["problem"]
    assert row["first"] == row["last"] == "3 (a count, no date)"
    assert row["answers"] == "free text"


def test_check_names_labels_that_look_alike(tmp_path):
    path = tmp_path / "e.csv"
    rows = [f"u{n % 5},q {n},{('Yes', 'yes', 'no')[n % 3]}" for n in range(30)]
    path.write_text("\n".join(["user_id,input,output", *rows]))
    row = json.loads(run("data", "check", path, "--json").stdout)
    assert "letter case, white space or spelling only" in row["answers"]


def test_a_missing_column_names_those_there_are_and_the_option(tickets):
    fails("data", "check", tickets, say=["tickets.csv:2: field 'user_id'", "agent, question, reply", "--columns"])
    fails("data", "check", tickets, "--columns", "user_id=agnt", say="has no column 'agnt'; it has agent, question")


@pytest.mark.parametrize(
    "text", ["", "user_id", "user_id=", "user_id=agent,input", "user_id:agent", "user_id=a,user_id=b"]
)
def test_columns_are_pairs(tickets, text):
    fails("data", "check", tickets, "--columns", text, say=["--columns", "write user_id=agent"])


@pytest.mark.parametrize("header", ["User_ID;Input;OUTPUT", "user id;Input;Output", " USER_ID ; input;output"])
def test_a_column_that_is_meant_is_offered(tmp_path, header):
    path = tmp_path / "e.csv"
    path.write_text("\n".join([header, *(";".join(row[:3]) for row in ROWS)]))
    user = header.split(";")[0].strip()
    fails("data", "check", path, say=["e.csv:2: field 'user_id'", f"--columns user_id={user},"])


def test_columns_the_wrong_way_round_are_told(tickets):
    fails("data", "check", tickets, "--columns", "agent=user_id", say="write field=column, so user_id=agent")


def test_a_folder_is_no_file_of_records(tmp_path):
    (tmp_path / "set.jsonl").mkdir()
    for words in (["data", "check"], ["encode"]):
        fails(*words, tmp_path / "set.jsonl", say="set.jsonl: is a folder")


def test_columns_name_fields_only(tickets):
    fails("data", "check", tickets, "--columns", "usr=agent", say="'usr' is no field of a record")
