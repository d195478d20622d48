"""What is deleted is gone: from the rows, and from the bytes of every file."""

import json
import sqlite3
import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from persona_plug import HistoryStore
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.vector_cache import VectorCache
from persona_plug.store.rows import text_hash


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """An encoder with a cache of this module alone."""
    return HistoryEncoder("tiny-encoder", device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))


def files(*folders):
    """All bytes of all files, logs and caches in folders."""
    return b"\n".join(p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file())


def traces(encoder, user, items, kind="fp16"):
    """What a user's bytes look like: ids, texts, their hashes, vectors in the store and in the cache."""
    found = {f"id {user}": user.encode()}
    for item in items:
        found[f"item {item['id']}"] = item["id"].encode()
        for text in (item["input"], item["output"]):
            if not text:
                continue
            vector = encoder.encode([text])[0].numpy()
            found |= {f"text {text}": text.encode(), f"hash {text}": text_hash(text)}
            found[f"cached {text}"] = vector.astype(np.float16).tobytes()
            if kind == "int8":
                found[f"int8 {text}"] = np.rint(vector / (np.abs(vector).max() / 127)).astype(np.int8).tobytes()
    return found


def seen(where, marks):
    return sorted(name for name, mark in marks.items() if mark in where)


def items_of(user, count, start=0):
    return [
        {"input": f"{user} asks {i} {'x' * (i * 37 % 90)}", "output": f"{user} says {i}", "id": f"{user}#{i}"}
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@pytest.mark.parametrize("keep_text", [True, False])
def test_no_byte_of_a_forgotten_user_is_left(tmp_path, own_cache, kind, keep_text):
    """Many appends by turns make SQLite split and balance its pages, which leaves copies behind."""
    cache = own_cache.cache.path.parent
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache, keep_text=keep_text, vectors=kind) as store:
        people = [f"person-{kind}-{keep_text}-{i:02d}" for i in range(12)]
        for part in range(0, 24, 3):
            for user in people:
                store.append(user, items_of(user, 3, part))
        marks = {user: traces(own_cache, user, items_of(user, 24), kind) for user in people}
        there = files(tmp_path, cache)
        gone = people[::2]
        for user in gone:
            assert seen(there, marks[user])  # the test sees what it looks for
            assert f"cached {user} says 3" in seen(there, marks[user])
            result = store.forget(user)
            assert result.items == 24
            assert result.cached_vectors == 48
            assert seen(files(tmp_path, cache), marks[user]) == []
        for user in people[1::2]:
            assert store.read(user).ids == [f"{user}#{i}" for i in range(24)]
    after = files(tmp_path, cache)
    assert [name for user in gone for name in seen(after, marks[user])] == []


def test_an_item_is_deleted_from_rows_log_and_cache(tmp_path, own_cache):
    items = items_of("deleter", 4)
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache, keep_text=True) as store:
        store.append("deleter", items)
        marks = traces(own_cache, "-", items[1:2])
        del marks["id -"]
        assert len(seen(files(tmp_path), marks)) >= 4
        store.delete("deleter", items[1]["id"])
        assert seen(files(tmp_path, own_cache.cache.path.parent), marks) == []


def test_requests_of_stored_users_are_not_kept(tmp_path, own_cache, make_plug):
    plug = make_plug(encoder=own_cache)
    request = "a request that tells who asks"
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache) as store:
        store.append("asker", items_of("asker", 3))
        plug.generate(request, user="asker", store=store, max_new_tokens=2)
        marks = {"hash": text_hash(request), "vector": own_cache.encode([request])[0].numpy().astype("<f2").tobytes()}
        assert seen(files(own_cache.cache.path.parent), marks)  # an ordinary encode keeps them
        own_cache.cache.delete([text_hash(request)])
        plug.soft_prompt(request, user="asker", store=store)
        assert seen(files(own_cache.cache.path.parent, tmp_path), marks) == []


def test_forgetting_without_encoder_reaches_its_usual_cache(tmp_path):
    usual = HistoryEncoder("tiny-encoder", device="cpu")
    text = "only this person ever wrote this"
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", usual) as store:
        store.append("ann", [text])
    vector = usual.encode([text])[0].numpy().astype("<f2").tobytes()
    assert vector in files(zoo.cache_dir() / "vectors")
    with HistoryStore(f"sqlite:///{tmp_path}/users.db") as plain:
        assert plain.forget("ann").cached_vectors == 1
    assert vector not in files(zoo.cache_dir() / "vectors")


def test_a_reader_of_an_old_state_is_waited_for(tmp_path, own_cache):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache, keep_text=True) as store:
        store.append("slowly-read", items_of("slowly-read", 5))
        reader = sqlite3.connect(tmp_path / "users.db", isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM persona_items").fetchone() == (5,)
        threading.Timer(1, reader.rollback).start()
        store.forget("slowly-read")
        assert seen(files(tmp_path), traces(own_cache, "slowly-read", items_of("slowly-read", 5))) == []
        reader.close()


def test_the_cache_deletes_what_it_set_aside_as_damaged(tmp_path):
    cache = VectorCache(tmp_path / "x.sqlite", 4)
    cache.put({text_hash("a") * 4: np.ones(4, dtype=np.float16), text_hash("b") * 4: np.zeros(4, dtype=np.float16)})
    (tmp_path / "x.damaged-123").write_bytes(b"vectors of anybody")
    assert cache.delete([text_hash("a"), text_hash("c")]) == 1
    assert len(cache) == 1
    assert not (tmp_path / "x.damaged-123").exists()
    assert cache.delete([]) == 0


@pytest.mark.services
def test_postgres_keeps_no_row_and_no_statistics(postgres_server, own_cache):
    """The planner's statistics hold samples of values; they would outlive the rows."""
    import psycopg

    with HistoryStore(postgres_server, own_cache, keep_text=True) as store:
        for user in ("kept", "unmistakable"):
            store.append(user, items_of(user, 40))
        with psycopg.connect(postgres_server, autocommit=True) as connection:
            connection.execute("ANALYZE")
            store.forget("unmistakable")
            connection.execute("CREATE EXTENSION pageinspect")
            tables = [
                r[0] for r in connection.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE 'persona%'")
            ]
            assert len(tables) > 30  # the parts are tables of their own
            for table in tables:
                rows = connection.execute(f"SELECT t::text FROM {table} t").fetchall()  # noqa: S608
                assert "unmistakable" not in str(rows)
                pages = connection.execute("SELECT pg_relation_size(%s) / 8192", [table]).fetchone()[0]
                for page in range(pages):  # dead rows would still be there before a vacuum
                    question = "SELECT t_data FROM heap_page_items(get_raw_page(%s, %s)) WHERE t_data IS NOT NULL"
                    found = connection.execute(question, [table, page]).fetchall()
                    assert not [1 for (data,) in found if b"unmistakable" in data]
            statistics = connection.execute("SELECT * FROM pg_stats WHERE tablename LIKE 'persona%'").fetchall()
            assert "kept" not in str(statistics)
            assert "unmistakable" not in str(statistics)
        assert store.read("kept").total == 40


class TwoUsers(RuleBasedStateMachine):
    """Whatever happens to A and B by turns: each sees their own items, and what is gone is gone."""

    encoder = folder = None
    kept = Bundle("kept")

    def __init__(self):
        super().__init__()
        self.path = self.folder / "users.db"
        self.store = HistoryStore(f"sqlite:///{self.path}", self.encoder, keep_text=True)
        self.model = {"A-user": {}, "B-user": {}}
        self.number = 0

    @rule(target=kept, user=st.sampled_from(["A-user", "B-user"]), count=st.integers(1, 4))
    def append(self, user, count):
        items = items_of(user, count, self.number)
        self.number += count
        assert self.store.append(user, items) == count
        self.model[user] |= {i["id"]: i for i in items}
        return user, items[0]["id"]

    @rule(item=kept)
    def append_again(self, item):
        user, name = item
        if name in self.model[user]:
            assert self.store.append(user, [{**self.model[user][name], "output": "another text"}]) == 0

    @rule(item=consumes(kept))
    def delete(self, item):
        user, name = item
        assert self.store.delete(user, name) is (self.model[user].pop(name, None) is not None)

    @rule(item=kept)
    def delete_as_the_other(self, item):
        user, name = item
        assert self.store.delete({"A-user": "B-user", "B-user": "A-user"}[user], name) is False

    @rule(user=st.sampled_from(["A-user", "B-user"]))
    def forget(self, user):
        assert self.store.forget(user).items == len(self.model[user])
        self.model[user] = {}
        assert user.encode() not in files(self.folder)

    @rule()
    def reopen(self):
        self.store.close()
        self.store = HistoryStore(f"sqlite:///{self.path}", self.encoder)

    @invariant()
    def each_sees_their_own(self):
        for user, items in self.model.items():
            history = self.store.read(user)
            assert history.ids == list(items)
            assert history.total == len(items)
            assert [i.output for i in history.texts] == [i["output"] for i in items.values()]
            expected = self.encoder.encode([i["output"] for i in items.values()]).numpy()
            assert np.array_equal(history.outputs, expected)
            assert [json.dumps(r["id"]) for r in self.store.export(user)] == [json.dumps(i) for i in items]
        assert {r.user_id: r.items for r in self.store.users()} == {u: len(i) for u, i in self.model.items() if i}

    def teardown(self):
        self.store.close()
        for path in self.folder.iterdir():
            path.unlink()


def test_two_users_never_meet(tmp_path, own_cache):
    from hypothesis.stateful import run_state_machine_as_test

    TwoUsers.encoder, TwoUsers.folder = own_cache, tmp_path
    run_state_machine_as_test(TwoUsers, settings=settings(max_examples=15, stateful_step_count=15, deadline=None))
