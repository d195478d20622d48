"""Files and tables as people have them all give the same events."""

import bz2
import csv
import datetime as dt
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from persona_plug.data.history import collect_events, read_events
from persona_plug.data.rows import table_rows
from persona_plug.data.splits import prepare
from persona_plug.errors import ConfigError, DataError

ROWS = [
    {"user_id": "ann", "input": "a, \"b\"; c\nd", "output": "grüße ☀", "timestamp": "2024-05-02", "id": "1"},
    {"user_id": "bob", "input": "", "output": "4", "timestamp": "2024-05-03", "id": "2"},
]  # fmt: skip
OWN = [{"agent": r["user_id"], "question": r["input"], "reply": r["output"], "when": r["timestamp"], "id": r["id"]}
       for r in ROWS]  # fmt: skip
DAY = 1714608000.0  # 2 May 2024
COLUMNS = {"user_id": "agent", "input": "question", "output": "reply", "timestamp": "when"}


def facts(events):
    return [(e.user_id, e.item.input, e.item.output, e.item.timestamp, e.item.id) for e in events]


EXPECTED = facts(collect_events(table_rows(ROWS), "rows").events)


def lines(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def table(rows, mark=",", **options):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=mark, **options)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def forms(rows):
    """File name -> content, for every form that a file may have."""
    plain = lines(rows).encode()
    array = json.dumps(rows).encode()
    return {
        "e.jsonl": plain, "E.JSONL": plain, "e.ndjson": plain, "e.json": plain, "bom.jsonl": b"\xef\xbb\xbf" + plain,
        "utf16.jsonl": lines(rows).encode("utf-16"), "crlf.jsonl": plain.replace(b"\n", b"\r\n"),
        "array.json": array, "pretty.JSON": json.dumps(rows, indent=2).encode(), "bom.json": b"\xef\xbb\xbf" + array,
        "array.jsonl": array, "space.json": b"\n  " + array,
        "e.jsonl.gz": gzip.compress(plain), "E.JSON.GZ": gzip.compress(array), "e.jsonl.bz2": bz2.compress(plain),
        "e.jsonl.xz": lzma.compress(plain), "e.csv.gz": gzip.compress(table(rows).encode()),
        "e.csv": table(rows).encode(), "E.CSV": table(rows).encode(), "bom.csv": b"\xef\xbb\xbf" + table(rows).encode(),
        "semicolon.csv": table(rows, ";").encode(), "sep.csv": b"sep=;\r\n" + table(rows, ";").encode(),
        "quoted.csv": table(rows, quoting=csv.QUOTE_ALL).encode(), "lf.csv": table(rows, lineterminator="\n").encode(),
        "utf16.csv": table(rows).encode("utf-16"), "pipe.csv": table(rows, "|").encode(),
        "e.tsv": table(rows, "\t").encode(), "e.tab": table(rows, "\t").encode(),
        "tabs.csv": table(rows, "\t").encode(),
        "e.parquet": parquet(rows), "E.PARQUET": parquet(rows), "a::b.jsonl": plain, "a*[1].csv": table(rows).encode(),
        "~e.jsonl": plain,
    }  # fmt: skip


@pytest.mark.parametrize("name", forms(ROWS))
def test_every_form_of_a_file_gives_the_same_events(tmp_path, name):
    (tmp_path / name).write_bytes(forms(ROWS)[name])
    assert facts(read_events(tmp_path / name).events) == EXPECTED


@pytest.mark.parametrize("name", forms(OWN))
def test_columns_may_have_names_of_their_own(tmp_path, name):
    (tmp_path / name).write_bytes(forms(OWN)[name])
    assert facts(read_events(tmp_path / name, columns=COLUMNS).events) == EXPECTED


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.jsonl").write_text(lines(ROWS))
    (tmp_path / "~nobody-at-all.jsonl").write_text(lines(ROWS[:1]))
    assert facts(read_events("~/e.jsonl").events) == EXPECTED
    assert len(read_events("~nobody-at-all.jsonl").events) == 1


def frame(rows):
    return pd.DataFrame(rows)


TABLES = {
    "list": lambda rows: rows,
    "tuple": tuple,
    "generator": iter,
    "pandas": frame,
    "pandas with dates": lambda rows: frame(rows).assign(**{k: pd.to_datetime(frame(rows)[k]) for k in rows[0]
                                                            if k in ("timestamp", "when")}),
    "pandas own index": lambda rows: frame(rows).set_index(pd.RangeIndex(100, 100 + len(rows))),
    "pandas categories": lambda rows: frame(rows).astype({next(iter(rows[0])): "category"}),
    "columns": lambda rows: {k: [r[k] for r in rows] for k in rows[0]},
    "arrow": pa.Table.from_pylist,
    "dataset": datasets.Dataset.from_list,
    "dataset dict": lambda rows: datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}),
    "iterable dataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("columns", [None, COLUMNS], ids=["own names", "other names"])
def test_every_table_gives_the_same_events(kind, columns):
    made = TABLES[kind](OWN if columns else ROWS)
    assert facts(collect_events(table_rows(made, columns), "data").events) == EXPECTED


@pytest.mark.parametrize("kind", TABLES)
def test_every_table_can_be_fitted_on(kind):
    rows = [{"user_id": f"u{n % 5}", "input": f"q {n}", "output": f"a {n}", "timestamp": f"2024-05-{n + 1:02}"}
            for n in range(20)]  # fmt: skip
    data = prepare(TABLES[kind](rows))
    assert len(data.train) + len(data.valid) + len(data.held_out) == 20


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("user_id", np.int64(5), "5"), ("user_id", 5.0, "5"), ("user_id", np.str_("u"), "u"), ("id", np.int32(7), "7"),
        ("id", 7.0, "7"), ("output", 5, "5"), ("output", 5.0, "5"), ("output", np.float64(5), "5"),
        ("output", np.float32(4.5), "4.5"), ("output", 4.5, "4.5"), ("output", np.int8(-1), "-1"),
        ("output", Decimal("5.0"), "5"), ("timestamp", dt.date(2024, 5, 2), DAY),
        ("timestamp", np.datetime64("2024-05-02"), DAY), ("timestamp", pd.Timestamp("2024-05-02"), DAY),
        ("timestamp", np.datetime64("2024-05-02", "ns"), DAY), ("timestamp", np.int64(1714608000), DAY),
        ("timestamp", pd.NaT, None), ("timestamp", np.datetime64("NaT"), None), ("timestamp", "", None),
        ("id", "", None), ("id", None, None),
    ],
)  # fmt: skip
def test_values_of_other_libraries_are_read(field, value, expected):
    (event,) = collect_events(table_rows([ROWS[0] | {field: value}]), "data").events
    values = dict(zip(("user_id", "input", "output", "timestamp", "id"), facts([event])[0], strict=True))
    assert values[field] == expected
    assert type(values[field]) is type(expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [("user_id", 1.5), ("user_id", True), ("user_id", float("nan")), ("user_id", "a\ud800"), ("input", 5), ("id", 1.5),
     ("id", "\udfff"), ("output", float("nan")), ("output", float("inf")), ("output", True), ("output", b"x"),
     ("output", "\ud83d"), ("timestamp", float("nan")), ("timestamp", np.array([1, 2])),
     ("user_id", None), ("output", None)],
)  # fmt: skip
def test_values_that_cannot_be_used_are_named_with_their_record(field, value):
    with pytest.raises(DataError, match=rf"^record 1: field '{field}' "):
        collect_events(table_rows([ROWS[0], ROWS[1] | {field: value}]), "data")


def test_what_a_data_frame_lacks_is_missing():
    made = pd.DataFrame([ROWS[0], {"user_id": "bob", "input": "x", "output": "y"}])
    first, second = collect_events(table_rows(made), "data").events
    assert (second.item.timestamp, second.item.id) == (None, None)
    assert first.item.id == "1"
    with pytest.raises(DataError, match=r"record 1: field 'output'.*field missing"):
        collect_events(table_rows(made.assign(output=["a", None])), "data")


def test_ids_in_lists_are_checked_as_in_files():
    with pytest.raises(DataError, match="record 2: field 'id' '1' of this user was already used at record 0"):
        prepare([*ROWS, ROWS[0]])


@pytest.mark.parametrize("data", ["text", 5, None, b"x"], ids=repr)
def test_no_table_is_named(data):
    with pytest.raises(DataError):
        list(table_rows(data))


def test_one_record_is_no_table():
    with pytest.raises(DataError, match="one mapping; give a list"):
        prepare(ROWS[0])


def test_rows_are_those_of_one_split():
    part = datasets.Dataset.from_list(ROWS)
    with pytest.raises(DataError, match=r"several splits \(train, test\); .*data\['train'\]"):
        list(table_rows(datasets.DatasetDict({"train": part, "test": part})))


# --- what is refused, in one line with place and remedy

BROKEN = {
    "cells.csv": ("user_id,input,output\na,b,c\na,b\n", r":3: 2 cells under 3 columns"),
    "open quote.csv": ('user_id,input,output\na,"b,c\na,b,c\n', "not a table that can be read"),
    "double.csv": ("user_id,input,input\na,b,c\n", "column 'input' stands twice"),
    "no header.csv": ("ann,why,because\nbob,where,here\n", r":2: field 'user_id'.*field missing; of ann, why, because"),
    "header only.csv": ("user_id,input,output\n", "holds no usable record"),
    "empty.csv": ("", "holds no usable record"),
    "open.json": ('[{"user_id": "a"},\n {"input": ]', r":2: not a JSON array \(.*column 12"),
    "numbers.json": ("[1, 2]", "record 1: holds a JSON int"),
    "one.json": ('{\n "user_id": "a"\n}', "one JSON object over several lines"),
    "not packed.jsonl.gz": ("{}", "the packed file is damaged"),
    "not packed.csv.xz": ("a,b", "the packed file is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named_with_the_cure(tmp_path, name):
    content, reason = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=reason) as caught:
        read_events(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_lines_of_a_table_are_those_of_the_file(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text('sep=,\nuser_id,input,output\na,"x\ny",b\n\na,b,\n')
    with pytest.raises(DataError, match=r":6: field 'output' is empty"):
        read_events(path)


def test_a_cut_packed_file_is_named(tmp_path):
    path = tmp_path / "e.jsonl.gz"
    path.write_bytes(gzip.compress(lines([r | {"id": None} for r in ROWS * 1000]).encode())[:-20])
    with pytest.raises(DataError, match="the packed file is damaged"):
        read_events(path)


def test_skip_bad_keeps_the_first_record_behind_a_byte_order_mark(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines(ROWS).encode() + b"oops\n")
    result = read_events(path, skip_bad=True)
    assert facts(result.events) == EXPECTED
    assert len(result.skipped) == 1


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"user_id": "agnt"}, "has no column 'agnt'; it has agent, question, reply, when, id"),
        ({**COLUMNS, "timestamp": "wen"}, "no row has the column 'wen'; the last one has agent"),
    ],
)
def test_a_wrong_column_is_named_with_those_there_are(columns, reason):
    with pytest.raises(DataError, match=reason):
        collect_events(table_rows(OWN, columns), "data")


def test_an_optional_column_may_be_missing_in_some_records():
    rows = [OWN[0], {k: v for k, v in OWN[1].items() if k != "when"}]
    assert [e.item.timestamp is None for e in collect_events(table_rows(rows, COLUMNS), "data").events] == [False, True]


def test_columns_name_fields(tmp_path):
    with pytest.raises(ConfigError, match="'usr' is no field of a record; use user_id, input, output"):
        read_events(tmp_path / "e.jsonl", columns={"usr": "agent"})


def test_a_named_column_wins_over_one_of_the_fields_name():
    rows = [r | {"user_id": "somebody else"} for r in OWN]
    assert facts(collect_events(table_rows(rows, COLUMNS), "data").events) == EXPECTED


# --- times of a whole file


@pytest.mark.parametrize("times", [(3, "2024-05-02"), ("2024-05-02", 3), (1714608000, "7"), ("May 2, 2024", 2019)])
def test_counts_and_dates_are_not_mixed(times):
    rows = [r | {"timestamp": t} for r, t in zip(ROWS, times, strict=True)]
    with pytest.raises(
        DataError, match=r"record 1: field 'timestamp' .*(count|date), but a (count|date) stands at record 0"
    ):
        collect_events(table_rows(rows), "data")
    assert len(collect_events(table_rows([*rows, ROWS[0] | {"id": "9", "timestamp": times[0]}]), "d", True).events) == 2


def test_units_may_be_mixed():
    rows = [ROWS[0] | {"timestamp": 1700000000003}, ROWS[1] | {"timestamp": "2024-05-02"}]
    first, second = (e.item.timestamp for e in collect_events(table_rows(rows), "data").events)
    assert first == 1700000000.003 < second


# --- nothing is written


@pytest.mark.parametrize("name", ["e.jsonl", "e.csv", "e.parquet"])
def test_a_file_is_read_where_nothing_can_be_written(tmp_path, name):
    (tmp_path / name).write_bytes(forms(ROWS)[name])
    home = tmp_path / "no folder"
    home.write_text("a file where the home folder should be")
    code = "import sys\nfrom persona_plug.data.history import read_events\n"
    code += "assert len(read_events(sys.argv[1]).events) == 2"
    places = dict.fromkeys(("HOME", "HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"), str(home / "x"))
    env = os.environ | places | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=env, check=True, timeout=120)
