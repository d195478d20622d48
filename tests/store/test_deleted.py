"""Deleting costs what is deleted, is final, and reaches every place; adding anew works."""

import json
import random
import sqlite3
import threading
import time

import numpy as np
import pytest

from persona_plug import HistoryStore
from persona_plug.data.history import HistoryItem
from persona_plug.errors import DataError
from persona_plug.models.caching import uncached
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.vector_cache import VectorCache
from persona_plug.store import tables
from persona_plug.store.history_store import Forgotten, HistoryFull, StoreUnavailable
from persona_plug.store.rows import text_hash


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    return HistoryEncoder("tiny-encoder", device="cpu", cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def store(tmp_path, own_cache):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache, keep_text=True, wait=1) as opened:
        yield opened


def files(*folders):
    return b"\n".join(p.read_bytes() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file())


def item(user, number, length=20):
    text = f"{user} wrote {number} " + chr(97 + number % 26) * length
    return {"input": f"{user} was asked {number}", "output": text, "id": f"{user}#{number}"}


# No byte is left, whatever was written before


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_all_sizes_leave_nothing_wherever_they_stood(tmp_path, own_cache, monkeypatch, seed):
    """Sizes around those at which SQLite changes how it stores a row; places are used again and again."""
    rng = random.Random(seed)  # noqa: S311
    monkeypatch.setattr(own_cache, "cache", None)  # only the store's own files count here
    made = {}
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", own_cache, keep_text=True) as store:
        for step in range(60):
            user = f"person-{rng.randrange(8)}-of-{seed}"
            lengths = [rng.choice([1, 40, 300, 1000, 6500, 7000, 7100, 7900, 8200, 20000]) for _ in range(3)]
            store.append(user, [item(user, 10 * step + i, n) for i, n in enumerate(lengths)])
            made.setdefault(user, set()).update(10 * step + i for i in range(3))
            if rng.random() < 0.4:
                gone = rng.choice(sorted(made))
                if rng.random() < 0.5:
                    store.forget(gone)
                    marks = [gone.encode()]
                    del made[gone]
                else:
                    number = rng.choice(sorted(made[gone]))
                    store.delete(gone, f"{gone}#{number}")
                    made[gone].discard(number)
                    if not made[gone]:
                        del made[gone]
                    marks = [f"{gone} wrote {number} ".encode()]
                assert not [mark for mark in marks if mark in files(tmp_path)]
        for user, numbers in made.items():
            assert set(store.read(user).ids) == {f"{user}#{n}" for n in numbers}


def test_places_are_used_again(tmp_path, store):
    for turn in range(30):
        store.append(f"u{turn}", [item(f"u{turn}", n) for n in range(20)])
        store.forget(f"u{turn}")
        if turn == 1:
            size = (tmp_path / "users.db").stat().st_size
    assert (tmp_path / "users.db").stat().st_size == size


def test_forgetting_touches_few_pages_of_a_large_store(tmp_path, store):
    """What it costs is what the user holds."""
    for n in range(60):
        store.append(f"other{n}", [item(f"other{n}", i, 400) for i in range(40)])
    store.append("ann", [item("ann", 0)])
    store.append("one-more", [item("one-more", 0)])
    store.delete("one-more", "one-more#0")  # empties the log
    before = (tmp_path / "users.db").read_bytes()
    store.forget("ann")
    after = (tmp_path / "users.db").read_bytes()
    pages = [at for at in range(0, len(after), 8192) if before[at : at + 8192] != after[at : at + 8192]]
    assert len(after) // 8192 > 200
    assert len(pages) < 20


def test_nobody_costs_nothing(tmp_path, store):
    store.append("ann", [item("ann", 0)])
    reader = sqlite3.connect(tmp_path / "users.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM persona_items").fetchone()
    assert store.forget("nobody").items == 0  # although a reader would keep anybody's bytes
    reader.close()


def test_an_old_reader_holds_nobody_up_and_is_told_of(tmp_path, store):
    for user in ("ann", "bob"):
        store.append(user, [item(user, 0)])
    reader = sqlite3.connect(tmp_path / "users.db", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM persona_items").fetchone()
    waits = []

    def write():
        for n in range(1, 15):
            start = time.monotonic()
            store.append("bob", [item("bob", n)])
            waits.append(time.monotonic() - start)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(StoreUnavailable, match=r"bytes are left.*forget once more"):
        store.forget("ann")
    writer.join()
    assert len(waits) == 14
    assert store.read("ann").total == 0
    reader.close()
    store.forget("ann")  # of whom nothing is there any more
    assert b"ann wrote" not in files(tmp_path)


# The vectors' cache


@pytest.mark.parametrize("how", ["keep nothing", "another encoder", "no encoder"])
def test_cached_vectors_go_whatever_encoder_the_store_was_opened_with(tmp_path, monkeypatch, how):
    monkeypatch.setenv("PERSONA_PLUG_CACHE", str(tmp_path / "home"))
    caching = HistoryEncoder("tiny-encoder", device="cpu")
    url = f"sqlite:///{tmp_path}/users.db"
    with HistoryStore(url, caching) as store:
        store.append("ann", [item("ann", n) for n in range(3)])
    assert len(caching.cache) == 6
    if how == "keep nothing":
        opened = HistoryStore(url, caching)
        monkeypatch.setattr(caching, "cache", None)  # what `PersonaPlug.keep_nothing` does
    else:
        other = HistoryEncoder("tiny-encoder", device="cpu", use_cache=False) if how == "another encoder" else None
        opened = HistoryStore(url, other)
    with opened:
        assert opened.delete("ann", "ann#0")
        assert opened.forget("ann").cached_vectors == 4
    assert len(VectorCache(caching.cache_path, caching.dim)) == 0


def test_the_cache_leaves_no_byte_and_uses_places_again(tmp_path):
    cache = VectorCache(tmp_path / "x.sqlite", 64)
    rng = np.random.default_rng(0)
    rows = {text_hash(str(n)) * 4: rng.normal(size=64).astype(np.float16) for n in range(400)}
    for start in range(0, 400, 7):  # by turns, so that SQLite has much to balance
        cache.put(dict(list(rows.items())[start : start + 7]))
    size = (tmp_path / "x.sqlite").stat().st_size
    gone = list(rows)[::3]
    assert cache.delete(key[:8] for key in gone) == len(gone)
    there = files(tmp_path)
    assert not [key for key in gone if key[:8] in there or rows[key].tobytes() in there]
    assert set(cache.get(list(rows))) == set(rows) - set(gone)
    cache.put({key: rows[key] for key in gone})
    assert (cache.get(gone)[gone[0]] == rows[gone[0]]).all()
    assert (tmp_path / "x.sqlite").stat().st_size <= size + 40960  # tables of numbers


def test_a_cache_of_the_first_format_is_taken_over(tmp_path):
    import zlib

    key, vector = text_hash("x") * 4, np.arange(4, dtype=np.float16)
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        db.execute("CREATE TABLE vectors (key BLOB PRIMARY KEY, crc INTEGER, vector BLOB) WITHOUT ROWID")
        db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (key, zlib.crc32(vector.tobytes()), vector.tobytes()))
    db.close()
    assert (VectorCache(tmp_path / "x.sqlite", 4).get([key])[key] == vector).all()
    cache = VectorCache(tmp_path / "x.sqlite", 4)
    assert len(cache) == 1
    assert cache.delete([key[:8]]) == 1
    assert key[:8] not in files(tmp_path)


# Nothing comes back


def test_what_was_begun_before_is_refused_by_every_store_and_adding_anew_works(make_store, url, encoder):
    here, there = make_store(keep_text=True), make_store(keep_text=True)
    before = here.moment()
    encoded = here.encode(here.missing("ann", [item("ann", 1)]).items)
    here.append("ann", [item("ann", 0)])
    there.forget("ann")
    for store in (here, there):
        with pytest.raises(Forgotten, match="deleted after this was begun"):
            store.insert("ann", encoded, before)
        with pytest.raises(Forgotten):
            store.append("ann", [item("ann", 1)], moment=before)
        with pytest.raises(Forgotten):
            store.keep_answer("ann", "cmpl-1", "q", "a", before, 60)
    assert here.read("ann").total == 0
    assert here.append("bob", [item("bob", 0)], moment=before) == 1  # nobody else is refused
    assert here.append("ann", [item("ann", 1)], moment=here.moment()) == 1
    assert there.append("ann", [item("ann", 2)]) == 1


@pytest.mark.parametrize("known", [True, False])
def test_whoever_was_never_there_does_not_appear_after_a_forget(make_store, known):
    store = make_store()
    if known:
        store.append("ann", [item("ann", 0)])
    before = store.moment()
    store.forget("ann")
    with pytest.raises(Forgotten):
        store.append("ann", [item("ann", 1)], moment=before)


def test_a_deleted_item_stays_away_and_the_others_are_added(make_store):
    store = make_store()
    store.append("ann", [item("ann", n) for n in range(3)])
    before = store.moment()
    store.delete("ann", "ann#1")
    with pytest.raises(Forgotten):
        store.append("ann", [item("ann", 1)], moment=before)
    assert store.append("ann", [item("ann", 3)], moment=before) == 1
    assert store.append("ann", [item("ann", 1)]) == 1
    assert store.read("ann").total == 4


def test_the_note_of_a_deletion_ends_and_what_is_older_is_refused(make_store, monkeypatch):
    store = make_store()
    before = store.moment()
    store.forget("ann")
    between = store.moment()
    monkeypatch.setattr(tables, "REMEMBERED", -1)
    store.forget("bob")
    with pytest.raises(Forgotten):
        store.append("ann", [item("ann", 0)], moment=before)
    assert store.append("eve", [item("eve", 0)], moment=store.moment()) == 1
    assert between > before


def test_an_import_does_not_bring_a_user_back(make_store, tmp_path, encoder, monkeypatch):
    store = make_store()
    (tmp_path / "e.jsonl").write_text(
        "".join(json.dumps({"user_id": "ann", **item("ann", n)}) + "\n" for n in range(3))
    )
    real = store.encode

    def encode(items):
        store.forget("ann")
        return real(items)

    monkeypatch.setattr(store, "encode", encode)
    with pytest.raises(Forgotten):
        store.load_file(tmp_path / "e.jsonl")
    assert store.read("ann").total == 0
    monkeypatch.undo()
    assert store.load_file(tmp_path / "e.jsonl").new == 3


def test_many_writers_against_one_who_forgets(make_store):
    """Whatever was begun before the last forget is gone in the end."""
    store = make_store()
    failed = []

    def work(number):
        for n in range(12):
            moment = store.moment()
            try:
                store.append("ann", [{"output": f"{number}-{n}", "id": f"{number}-{n}-{moment}"}], moment=moment)
            except Forgotten:
                continue
            except Exception as exc:
                failed.append(exc)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(6):
        store.forget("ann")
        last = store.moment()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(int(name.rsplit("-", 1)[1]) >= last for name in store.read("ann").ids)


# Limits


def test_a_limit_holds_whoever_writes_at_once(make_store):
    store = make_store()
    results = []

    def work(number):
        try:
            results.append(store.append("ann", [{"output": "x", "id": f"{number}-{n}"} for n in range(4)], limit=10))
        except HistoryFull:
            results.append(0)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("ann").total == sum(results) == 8


def test_what_is_known_is_never_refused(make_store):
    store = make_store()
    full = [{"output": "x", "id": str(n)} for n in range(5)]
    assert store.append("ann", full, limit=5) == 5
    assert store.append("ann", full, limit=5) == 0
    assert store.append("ann", full[:2], limit=2) == 0
    with pytest.raises(HistoryFull, match="has 5 events, and at most 5"):
        store.append("ann", [*full, {"output": "y", "id": "new"}], limit=5)
    assert store.append("bob", full[:3], limit=3) == 3


# Expiry


def test_items_expire_by_the_day_they_were_added(make_store):
    store = make_store(keep_text=True)
    store.append("ann", [{**item("ann", 0), "timestamp": "1999-01-01"}])
    store.append("bob", [item("bob", 0)])
    assert store.expire(1) == 0
    with store._engine.begin() as connection:
        from persona_plug.store.database import sql

        connection.execute(sql("UPDATE persona_items SET added = added - 86400 * 3"))
    store.append("bob", [item("bob", 1)])
    assert store.expire(2) == 2
    assert [(u.user_id, u.items) for u in store.users()] == [("bob", 1)]
    assert store.read("bob").ids == ["bob#1"]


# Answers that may be accepted


def test_an_answer_is_its_users_and_sealed(make_store, url):
    store, other = make_store(), make_store()
    moment = store.moment()
    store.keep_answer("acme/ann", "cmpl-secret", "a quince?", "a medlar \u2028 \ud800", moment, 60)
    held, begun = other.answer("acme/ann", "cmpl-secret", 60)
    assert (held.input, held.output, held.id, begun) == ("a quince?", "a medlar \u2028 \ud800", "cmpl-secret", moment)
    assert other.answer("bolt/ann", "cmpl-secret", 60) is None
    assert other.answer("acme/ann", "cmpl-other", 60) is None
    assert other.answer("acme/ann", "cmpl-secret", -1) is None
    if url.startswith("sqlite"):
        from pathlib import Path

        there = files(Path(url.removeprefix("sqlite:///")).parent)
        assert not [w for w in (b"quince", b"medlar", b"cmpl-secret", b"acme/ann") if w in there]
    store.forget("acme/ann")
    assert other.answer("acme/ann", "cmpl-secret", 60) is None


# Export and import


@pytest.mark.parametrize("keep_text", [True, False])
@pytest.mark.parametrize("kinds", [("fp16", "fp16"), ("int8", "int8"), ("fp16", "int8")])
def test_an_export_is_loaded_back(tmp_path, encoder, keep_text, kinds):
    with HistoryStore(f"sqlite:///{tmp_path}/a.db", encoder, keep_text, kinds[0]) as store:
        store.append("ann", [{**item("ann", 0), "timestamp": 5}, {"output": "only an output", "id": "2"}])
        (tmp_path / "ann.jsonl").write_text("".join(json.dumps(r) + "\n" for r in store.export("ann")))
        before = store.read("ann")
    requested = encoder.stats.requested
    with HistoryStore(f"sqlite:///{tmp_path}/b.db", encoder, keep_text, kinds[1]) as copy:
        assert copy.load_file(tmp_path / "ann.jsonl").new == 2
        assert copy.load_file(tmp_path / "ann.jsonl").known == 2
        after = copy.read("ann")
        assert (after.ids, after.timestamps, after.output_hashes) == (
            before.ids,
            before.timestamps,
            before.output_hashes,
        )
        assert np.allclose(after.outputs, before.outputs, atol=0.01)
        if kinds[0] == kinds[1]:
            assert np.array_equal(after.inputs, before.inputs)
            assert [r for r in copy.export("ann") if r.pop("added") and r.pop("last_update_of_user")] == [
                {k: v for k, v in json.loads(line).items() if k not in ("added", "last_update_of_user")}
                for line in (tmp_path / "ann.jsonl").read_text().splitlines()
            ]
    if not keep_text:
        assert encoder.stats.requested == requested


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"encoder": "another"}, "vectors of encoder another"),
        ({"vector_format": "fp8"}, "vector_format"),
        ({"output_bytes": "AAAA"}, "not .* wide"),
        ({"output_bytes": "?"}, "missing or damaged"),
        ({"text_hashes": None}, "missing or damaged"),
        ({"text_hashes": "AAAA"}, "hashes are cut"),
        ({"id": 1.5}, "'id'"),
        ({"timestamp": "never"}, "timestamp"),
    ],
)
def test_a_damaged_export_is_named(tmp_path, encoder, change, says):
    with HistoryStore(f"sqlite:///{tmp_path}/a.db", encoder) as store:
        store.append("ann", [item("ann", 0)])
        record = {**next(store.export("ann")), **change}
        (tmp_path / "bad.jsonl").write_text(json.dumps(record))
        with pytest.raises(DataError, match=rf"bad\.jsonl:1.*{says}"):
            store.load_file(tmp_path / "bad.jsonl")


def test_vectors_alone_are_refused_where_texts_are_kept(tmp_path, encoder):
    with HistoryStore(f"sqlite:///{tmp_path}/a.db", encoder) as store:
        store.append("ann", [item("ann", 0)])
        (tmp_path / "ann.jsonl").write_text(json.dumps(next(store.export("ann"))))
    with (
        HistoryStore(f"sqlite:///{tmp_path}/b.db", encoder, keep_text=True) as copy,
        pytest.raises(DataError, match="vectors without texts"),
    ):
        copy.load_file(tmp_path / "ann.jsonl")


# Corrections


def test_an_item_is_replaced_in_one_step_and_leaves_no_byte(tmp_path, store):
    store.append("ann", [{**item("ann", n), "timestamp": n} for n in range(3)])
    assert store.replace("ann", HistoryItem("q", "the right one", 1, "ann#1"))
    assert b"ann wrote 1 " not in files(tmp_path)
    assert [i.output.split()[0] for i in store.read("ann").items] == ["ann", "the", "ann"]
    assert (store.read("ann").total, next(store.users()).items) == (3, 3)
    assert not store.replace("ann", HistoryItem("q", "x", 1, "nothing"))
    assert not store.replace("bob", HistoryItem("q", "x", 1, "ann#1"))
    store.append("eve", [item("eve", 0)])
    assert store.replace("eve", HistoryItem("", "only", None, "eve#0"))
    assert store.read("eve").total == 1


# Pages


def test_a_history_comes_in_pages_that_add_up(make_store):
    store = make_store(keep_text=True)
    store.append("ann", [{**item("ann", n), "timestamp": 100 - n} for n in range(25)])
    whole, pages = store.read("ann", 20), list(store.pages("ann", 20, size=7))
    assert [i for page in pages for i in page.ids] == whole.ids
    assert [len(page.ids) for page in pages] == [7, 7, 6]
    assert {page.total for page in pages} == {25}
    assert [page.ids for page in store.pages("nobody", 20)] == [[]]


def test_nothing_is_cached_of_what_is_encoded_uncached(own_cache):
    before = len(own_cache.cache)
    with uncached():
        own_cache.encode(["a text that nobody keeps"])
    assert len(own_cache.cache) == before
