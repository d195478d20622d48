"""The store on SQLite and on PostgreSQL: what goes in comes out, once, in order, for its owner alone."""

import base64
import json
import logging
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from persona_plug import HistoryStore
from persona_plug.data.history import HistoryItem
from persona_plug.data.moments import in_time
from persona_plug.errors import ConfigError, CorruptFileError, DataError, MismatchError
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.store import database as store_engine
from persona_plug.store import history_store as store_module
from persona_plug.store import reading as reading_module
from persona_plug.store.database import StoreUnavailable
from persona_plug.store.rows import LONGEST_ID

ANN = [
    {"input": "tea or coffee", "output": "tea", "id": "1", "timestamp": 1.5},
    {"input": "", "output": "I like mornings", "id": "2"},
    {"input": "Grüße aus Köln", "output": "schöne Grüße 🙂", "id": "3", "timestamp": 5},
]
ODD = ["../../etc/passwd", "'; DROP TABLE persona_users; --", "100%_", "Zoë 🙂", "a\nb", "  spaces  ", "%s :user ?"]


def texts(history):
    return [(i.input, i.output, i.timestamp, i.id) for i in history.texts]


def test_what_goes_in_comes_out_oldest_first(make_store, encoder):
    store = make_store(keep_text=True)
    assert store.append("ann", ANN) == 3
    history = store.read("ann")
    assert (history.user, history.ids, history.total) == ("ann", ["1", "2", "3"], 3)
    assert history.timestamps == [1.5, None, 5]
    assert texts(history) == [(i["input"], i["output"], i.get("timestamp"), i["id"]) for i in ANN]
    for got, name in ((history.inputs, "input"), (history.outputs, "output")):
        assert got.dtype == np.float32
        assert np.array_equal(got, encoder.encode([i[name] for i in ANN]).numpy())
    assert not history.inputs[1].any()


def test_the_newest_items_are_read_and_all_are_counted(make_store):
    store = make_store()
    store.append("ann", ANN[:2])
    store.append("bob", ANN)
    store.append("ann", ANN[2:])
    history = store.read("ann", limit=2)
    assert (history.ids, history.total) == (["2", "3"], 3)
    assert store.read("ann", 0).ids == []


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("days", [(1, 2, 3, 4), (1, 1, 2, 2), (None,) * 4, (1, None, 2, None), (2, 2, 2, 2)])
def test_the_order_is_that_of_a_list_in_memory(make_store, tmp_path, days, reverse):
    items = [{"output": "x", "id": str(n)} | ({} if day is None else {"timestamp": f"2024-05-{day:02}"})
             for n, day in enumerate(days)][:: -1 if reverse else 1]  # fmt: skip
    expected = [item.id for item in in_time([HistoryItem.of(item) for item in items])]
    store = make_store()
    store.append("list", items)
    path = tmp_path / "e.csv"
    rows = [f"file,,x,{item.get('timestamp', '')},{item['id']}" for item in items]
    path.write_text("\n".join(["user_id,input,output,timestamp,id", *rows]))
    store.load_file(path)
    for user in ("list", "file"):
        assert store.read(user).ids == expected
        assert store.read(user, 2).ids == expected[-2:]


def test_what_comes_late_is_put_where_its_time_is(make_store):
    store = make_store()
    for name, day in (("b", 2), ("d", 4), ("a", 1), ("e", None), ("c", 3)):
        store.append("ann", [{"output": "x", "id": name, "timestamp": day}])
    assert store.read("ann").ids == ["a", "b", "c", "d", "e"]  # e came behind d, the latest at that time


def test_a_file_of_chats_under_other_names_is_loaded(make_store, tmp_path):
    talk = [
        {"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    ]
    path = tmp_path / "e.json"
    path.write_text(json.dumps([{"agent": "ann", "messages": talk}]))
    store = make_store(keep_text=True)
    assert store.load_file(path, columns={"user_id": "agent"}).new == 2
    assert store.load_file(path, columns={"user_id": "agent"}).known == 2
    assert [i.output for i in store.read("ann").items] == ["a", "b"]


def test_texts_are_kept_only_if_asked(make_store, url):
    store = make_store()
    store.append("ann", ANN)
    history = store.read("ann")
    assert history.texts is None
    assert [(i.output, i.id, i.timestamp) for i in history.items] == [("", "1", 1.5), ("", "2", None), ("", "3", 5)]
    assert all("output" not in record for record in store.export("ann"))
    store.close()
    if url.startswith("sqlite"):
        data = Path(url.removeprefix("sqlite:///")).read_bytes()
        assert b"mornings" not in data
        assert b"ann" in data


def test_an_unknown_user_has_an_empty_history(make_store):
    store = make_store(keep_text=True)
    history = store.read("nobody")
    assert (history.ids, history.texts, history.total, history.inputs.shape) == ([], [], 0, (0, store.dim))
    assert list(store.export("nobody")) == []
    assert store.delete("nobody", "1") is False
    assert store.forget("nobody").items == 0


def test_adding_again_changes_nothing(make_store, encoder):
    store = make_store(keep_text=True)
    store.append("ann", ANN)
    before, encoded = store.read("ann"), encoder.stats.requested
    assert store.append("ann", [{**ANN[0], "output": "changed"}]) == 0
    assert store.append("ann", [*ANN, ANN[0]]) == 0
    assert encoder.stats.requested == encoded  # not even encoded
    assert texts(store.read("ann")) == texts(before)
    assert store.append("bob", [ANN[0], ANN[0]]) == 1  # ids are a user's own


def test_items_without_id_are_events_of_their_own(make_store):
    store = make_store()
    items = ["yes", "yes", HistoryItem("again?", "yes")]
    assert store.append("ann", items) == 3
    assert store.append("ann", items) == 0  # the call was made again
    assert store.append("ann", ["yes"] * 3) == 1
    assert store.append("ann", [HistoryItem("again?", "yes", timestamp=3.0)]) == 1
    assert len(set(store.read("ann").ids)) == 5


@pytest.mark.parametrize("user", ODD)
def test_ids_are_plain_data(make_store, user):
    store = make_store(keep_text=True)
    store.append("bystander", ANN)
    assert store.append(user, [{"input": user, "output": user, "id": user}]) == 1
    assert texts(store.read(user)) == [(user, user, None, user)]
    assert [row.user_id for row in store.users(user)] == [user]
    assert [record["user_id"] for record in store.export(user)] == [user]
    assert store.delete(user, user) is True
    assert [row.user_id for row in store.users()] == ["bystander"]


@pytest.mark.parametrize("bad", ["", "  ", "a\0b", "\ud800", "x" * (LONGEST_ID + 1), None, 5])
def test_ids_that_a_database_cannot_hold_are_refused(make_store, bad):
    store = make_store()
    with pytest.raises(DataError, match="user id"):
        store.append(bad, ANN)
    if bad is not None:
        with pytest.raises(DataError, match="item id"):
            store.append("ann", [HistoryItem("", "x", None, bad)])
    assert list(store.users()) == []


def test_the_longest_ids_fit(make_store):
    store = make_store()
    user = "ö" * (LONGEST_ID // 2)
    assert store.append(user, [HistoryItem("", "x", None, "i" * LONGEST_ID)]) == 1
    assert store.read(user).total == 1


def test_a_text_with_a_nul_character_is_kept(make_store):
    store = make_store(keep_text=True)
    store.append("ann", [{"input": "a\0b", "output": "c\0d"}])
    assert store.read("ann").texts[0].output == "c\0d"


@pytest.mark.parametrize("items", ["one text", {"input": "a", "output": "b"}])
def test_a_single_item_must_be_in_a_list(make_store, items):
    with pytest.raises(DataError, match="list"):
        make_store().append("ann", items)


def test_users_are_listed_by_prefix_over_many_pages(make_store, monkeypatch):
    monkeypatch.setattr(reading_module, "PAGE_ROWS", 3)
    store = make_store()
    names = [f"acme/{i}" for i in range(8)] + ["acmf", "acm", "Acme/0", "acme/ü"]
    for i, name in enumerate(names):
        store.append(name, [f"text {i % 3}"] * (i % 2 + 1))
    rows = list(store.users("acme/"))
    assert [r.user_id for r in rows] == [*names[:8], "acme/ü"]
    assert [r.items for r in rows[:3]] == [1, 2, 1]
    assert rows[0].last_update > 1.7e9
    assert [r.user_id for r in store.users()] == sorted(names)
    assert list(store.users("acme/9")) == []


def test_export_is_all_there_is_and_can_be_loaded_again(make_store, tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(reading_module, "PAGE_ROWS", 2)
    store = make_store(keep_text=True)
    store.append("ann", ANN)
    store.append("bob", ANN[:1])
    records = list(store.export("ann"))
    path = tmp_path / "ann.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert [r["id"] for r in records] == ["1", "2", "3"]
    raw = np.frombuffer(base64.b64decode(records[2]["output_bytes"]), "<f2")
    assert np.array_equal(raw, encoder.encode([ANN[2]["output"]])[0].numpy())
    assert records[0]["encoder"] == encoder.fingerprint
    with HistoryStore(f"sqlite:///{tmp_path}/copy.db", encoder=encoder, keep_text=True) as copy:
        assert copy.load_file(path).new == 3
        assert texts(copy.read("ann")) == texts(store.read("ann"))


def test_an_item_is_deleted_and_the_last_takes_the_user_along(make_store):
    store = make_store()
    store.append("ann", ANN)
    assert store.delete("ann", "2") is True
    assert store.delete("ann", "2") is False
    assert (store.read("ann").ids, store.read("ann").total) == (["1", "3"], 2)
    store.append("ann", [ANN[1]])
    assert store.read("ann").ids == ["1", "3", "2"]
    for name in "123":
        store.delete("ann", name)
    assert list(store.users()) == []


def test_int8_is_half_as_large_and_nearly_the_same(make_store, encoder):
    store = make_store(vectors="int8")
    store.append("ann", ANN)
    history, exact = store.read("ann"), encoder.encode([i["output"] for i in ANN]).numpy()
    cosines = (history.outputs * exact).sum(1) / np.linalg.norm(history.outputs, axis=1)
    assert cosines.min() > 0.9995  # rounding to 1/127 of the largest entry
    assert not history.inputs[1].any()
    assert np.abs(history.outputs - exact).max() <= np.abs(exact).max() / 127
    record = next(store.export("ann"))
    assert len(base64.b64decode(record["output_bytes"])) == store.dim


# Opening


def test_a_store_is_opened_as_it_was_made(make_store):
    make_store(keep_text=True, vectors="int8").append("ann", ANN)
    again = make_store()
    assert (again.keep_text, again.vectors) == (True, "int8")
    assert again.read("ann").total == 3


@pytest.mark.parametrize(
    ("settings", "names"), [({"vectors": "int8"}, ["int8", "fp16"]), ({"keep_text": True}, ["True", "False"])]
)
def test_another_format_is_refused(make_store, settings, names):
    make_store()
    with pytest.raises(MismatchError) as caught:
        make_store(**settings)
    assert all(name in str(caught.value) for name in names)


def test_another_encoder_is_refused_on_every_open(make_store, encoder):
    make_store().append("ann", ANN)
    other = HistoryEncoder("tiny-encoder", device="cpu", max_length=32, use_cache=False)
    with pytest.raises(MismatchError) as caught:
        make_store(encoder=other)
    assert encoder.fingerprint in str(caught.value)
    assert other.fingerprint in str(caught.value)
    assert make_store().read("ann").total == 3


def test_without_encoder_a_store_can_be_read_and_deleted_from(make_store):
    store = make_store()
    store.append("ann", ANN)
    plain = make_store(encoder=None)
    assert plain.read("ann").total == 3
    with pytest.raises(ConfigError, match="encoder="):
        plain.append("ann", ["x"])
    assert plain.forget("ann").items == 3


def test_without_encoder_no_store_is_made(make_store, url):
    with pytest.raises(DataError, match="users add"):
        make_store(encoder=None)
    if url.startswith("sqlite"):
        assert not Path(url.removeprefix("sqlite:///")).exists()


@pytest.mark.parametrize("url", ["nonsense", "mysql://h/d", "sqlite://", "sqlite:///:memory:", ""])
def test_urls_that_cannot_be_used(encoder, url):
    with pytest.raises(ConfigError):
        HistoryStore(url, encoder=encoder)


def test_a_place_that_is_not_there(encoder, tmp_path):
    with pytest.raises(ConfigError, match="cannot be opened"):
        HistoryStore(f"sqlite:///{tmp_path}/no/such/folder/users.db", encoder=encoder)


@pytest.mark.services
def test_a_server_that_is_not_there(encoder):
    with pytest.raises(StoreUnavailable) as caught:
        HistoryStore("postgresql://me:secret@127.0.0.1:1/db", encoder=encoder)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database(encoder, tmp_path):
    path = tmp_path / "users.db"
    path.write_bytes(b"something else entirely " * 100)
    with pytest.raises(CorruptFileError, match=r"users\.db"):
        HistoryStore(f"sqlite:///{path}", encoder=encoder)
    assert path.read_bytes().startswith(b"something else")


def test_vectors_of_another_width_are_noticed(encoder, tmp_path):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", encoder=encoder) as store:
        store.append("ann", ANN)
        with sqlite3.connect(tmp_path / "users.db") as db:
            db.execute("UPDATE persona_items SET vectors = substr(vectors, 1, 7)")
        with pytest.raises(CorruptFileError, match="wide"):
            store.read("ann")


def test_a_new_file_is_its_owners_alone(encoder, tmp_path):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", encoder=encoder) as store:
        store.append("ann", ANN)
        for name in ("users.db", "users.db-wal"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_the_schema_is_the_migrations_last():
    from alembic.script import ScriptDirectory

    assert ScriptDirectory(store_engine.MIGRATIONS).get_heads() == [store_engine.HEAD]


@pytest.fixture
def later_version(tmp_path):
    """Patches persona_plug to one with a further migration, inside the `with`."""
    folder = tmp_path / "migrations"
    shutil.copytree(store_engine.MIGRATIONS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "versions" / "v9999_note.py").write_text(
        "import sqlalchemy as sa\nfrom alembic import op\nrevision, down_revision = '9999', '0003'\n"
        "def upgrade():\n    op.add_column('persona_users', sa.Column('note', sa.String, server_default='-'))\n"
    )

    def patched():
        patch = pytest.MonkeyPatch()
        patch.setattr(store_engine, "MIGRATIONS", folder)
        patch.setattr(store_engine, "HEAD", "9999")
        return patch

    return patched


def test_an_older_schema_is_migrated_and_a_newer_refused(make_store, later_version):
    from sqlalchemy import text

    make_store().append("ann", ANN)
    patch = later_version()
    try:
        store = make_store()
        assert store.read("ann").ids == ["1", "2", "3"]
        with store_engine.transaction(store._engine) as connection:
            assert connection.execute(text("SELECT note FROM persona_users")).scalar() == "-"
    finally:
        patch.undo()
    with pytest.raises(MismatchError, match=r"9999.*0003.*newer persona_plug"):
        make_store()


# Files


def write(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def event(user, number, **more):
    return {"user_id": user, "input": f"question {number % 7}", "output": f"answer {number % 5}", **more}


def test_a_file_is_loaded_in_the_order_of_its_times(make_store, tmp_path):
    store = make_store(keep_text=True)
    path = write(tmp_path / "e.jsonl", [event(f"u{i % 3}", i, id=i, timestamp=100 - i) for i in range(30)])
    result = store.load_file(path)
    assert (result.new, result.known, result.skipped) == (30, 0, [])
    assert store.read("u1").ids == [str(i) for i in range(28, 0, -3)]
    again = store.load_file(path)
    assert (again.new, again.known) == (0, 30)


def test_records_without_id_are_told_apart_by_their_number(make_store, tmp_path):
    store = make_store()
    path = write(tmp_path / "e.jsonl", [event("ann", 1)] * 3 + [event("bob", 1)])
    assert store.load_file(path).new == 4
    write(path, [event("ann", 1)] * 3 + [event("bob", 1), event("ann", 1), event("ann", 2)])  # the file has grown
    result = store.load_file(path)
    assert (result.new, result.known) == (2, 4)
    assert store.read("ann").total == 5


def test_a_broken_off_import_goes_on(make_store, tmp_path, monkeypatch, encoder):
    monkeypatch.setattr(store_module, "CHUNK", 4)
    path = write(tmp_path / "e.jsonl", [event("ann", i) for i in range(10)] + ["oops"] + [event("bob", 1)])
    store = make_store()
    with pytest.raises(DataError, match=r"e\.jsonl:11: not JSON"):
        store.load_file(path)
    assert store.read("ann").total == 8  # whole chunks
    requested = encoder.stats.requested
    result = store.load_file(path, skip_bad=True)
    assert (result.new, result.known) == (3, 8)
    assert "e.jsonl:11" in result.skipped[0]
    assert encoder.stats.requested == requested + 2 * 3


def test_parquet_and_bad_ids(make_store, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([event("ann", 1), event("x" * 2000, 2)]), tmp_path / "e.parquet")
    store = make_store()
    with pytest.raises(DataError, match=r"e\.parquet:row 2: user id is 2000 bytes long"):
        store.load_file(tmp_path / "e.parquet")
    assert len(store.load_file(tmp_path / "e.parquet", skip_bad=True).skipped) == 1
    with pytest.raises(DataError, match="no such file"):
        store.load_file(tmp_path / "no.jsonl")


# Writers side by side


def test_threads_write_and_read_together(make_store):
    store = make_store()
    failed = []

    def work(number):
        try:
            for i in range(10):
                shared = {"input": "shared", "output": f"text {i}", "id": f"shared-{i}"}
                store.append("both", [shared, {"output": f"own {i % 3}", "id": f"{number}-{i}"}])
                assert store.read("both").ids
        except Exception as exc:
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    history = store.read("both")
    assert len(history.ids) == len(set(history.ids)) == history.total == 10 + 4 * 10
    for n in range(4):
        assert [i for i in history.ids if i.startswith(f"{n}-")] == [f"{n}-{i}" for i in range(10)]


WRITER = """
import sys
from persona_plug import HistoryStore
from persona_plug.models.encoder import HistoryEncoder
url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
store = HistoryStore(url, encoder=HistoryEncoder("tiny-encoder", device="cpu", use_cache=False))
for i in range(count):
    store.append(f"user-{i % 3}", [{"input": f"q {i % 5}", "output": "a", "id": f"{name}-{i}"}])
    print(f"{name}-{i}", flush=True)
"""


def writer(url, name, count):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url, name, str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_make_and_fill_a_store_together(make_store, url):
    processes = [writer(url, name, 15) for name in ("a", "b", "c")]
    for process in processes:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert len(out.split()) == 15
    store = make_store()
    assert sorted(row.items for row in store.users()) == [15, 15, 15]


def test_a_killed_writer_loses_nothing_it_acknowledged(make_store, url):
    process = writer(url, "k", 10**6)
    acknowledged = [process.stdout.readline().strip() for _ in range(25)]
    process.send_signal(signal.SIGKILL)
    acknowledged += process.communicate(timeout=60)[0].split()
    store = make_store()
    stored = {i for row in store.users() for i in store.read(row.user_id).ids}
    assert len(acknowledged) >= 25
    assert set(acknowledged) <= stored
    assert len(stored) <= len(acknowledged) + 1  # the one in flight, whole or not at all
    assert sum(row.items for row in store.users()) == len(stored)
    assert store.append("user-0", ["and on it goes"]) == 1


def test_nothing_of_a_user_is_logged(make_store, caplog, tmp_path):
    path = write(tmp_path / "e.jsonl", [event("unmistakable-user", 1, id="unmistakable-item"), "oops"])
    with caplog.at_level(logging.DEBUG):
        store = make_store(keep_text=True)
        store.append("unmistakable-user", [{"input": "unmistakable-question", "output": "unmistakable-answer"}])
        store.load_file(path, skip_bad=True)
        store.read("unmistakable-user")
        list(store.export("unmistakable-user"))
        store.delete("unmistakable-user", "unmistakable-item")
        store.forget("unmistakable-user")
    assert "unmistakable" not in caplog.text
