"""`users re-encode`: another store from a store's texts, for another encoder or plug."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_plug import HistoryStore
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder
from tests.cli.test_users import fails, run
from tests.cli.test_words import folder  # noqa: F401 (a fixture)
from tests.fit.test_words import data, few_steps, people  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Folder of an encoder with other weights."""
    made = tmp_path_factory.mktemp("encoders") / "other"
    shutil.copytree(zoo.pull("tiny-encoder"), made)
    weights = load_file(made / "model.safetensors")
    save_file({name: w + 0.1 * torch.randn(w.shape) for name, w in weights.items()}, made / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    return made


@pytest.fixture
def urls(tmp_path):
    return [f"sqlite:///{tmp_path}/{name}.db" for name in ("old", "new")]


@pytest.fixture
def filled(urls, encoder):
    """A store of two users; the items of one have no times and no given ids."""
    with HistoryStore(urls[0], encoder, keep_text=True) as store:
        events = [{"input": f"q{i}", "output": f"a{i}", "id": str(i), "timestamp": 86400 * (9 - i)} for i in range(5)]
        store.append("ann", events)
        store.append("bob", ["one", "two\n🙂", ("three?", "3")])
    return urls


def words_of(urls, *more):
    return ["users", "re-encode", "--store", urls[0], "--into", urls[1], "--device", "cpu", *more]


def told(urls, *more):
    return [json.loads(line) for line in run(*words_of(urls, *more, "--json")).stdout.splitlines()]


def held(url, user):
    with HistoryStore(url) as store:
        rows = list(store.export(user))
        return [{k: r.get(k) for k in ("id", "input", "output", "timestamp", "added")} for r in rows]


def test_all_but_the_vectors_stays(filled, other):
    (row,) = told(filled, "--encoder", other)
    assert (row["new"], row["known"]) == (8, 0)
    assert row["events_per_second"] > 0
    reader = HistoryEncoder(str(other), device="cpu", use_cache=False)
    for user, count in (("ann", 5), ("bob", 3)):
        assert held(filled[0], user) == held(filled[1], user)
        with HistoryStore(filled[0]) as old, HistoryStore(filled[1]) as new:
            before, after = old.read(user), new.read(user)
            assert before.ids == after.ids
            assert new.fingerprint == reader.fingerprint != old.fingerprint
            texts = [item.output for item in after.items]
            assert len(texts) == count
            torch.testing.assert_close(torch.from_numpy(after.outputs), reader.encode(texts))
            assert abs(before.outputs - after.outputs).max() > 0.01


def test_it_goes_on_where_it_broke_off(filled, other, monkeypatch, encoder):
    monkeypatch.setattr("persona_plug.store.history_store.CHUNK", 3)
    load, calls = HistoryStore._load, []

    def broken(self, found, moment):
        calls.append(len(found))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return load(self, found, moment)

    with monkeypatch.context() as patch:
        patch.setattr(HistoryStore, "_load", broken)
        run(*words_of(filled, "--encoder", other), code=130)
    assert calls == [3, 3, 2]
    with HistoryStore(filled[0], encoder) as store:
        store.append("eve", ["new"])
    (row,) = told(filled, "--encoder", other)
    assert (row["new"], row["known"]) == (3, 6)
    (row,) = told(filled, "--encoder", other)
    assert (row["new"], row["known"]) == (0, 9)
    assert held(filled[0], "ann") == held(filled[1], "ann")


def test_users_of_the_new_store_alone_are_said(filled, other):
    run(*words_of(filled, "--encoder", other))
    assert run("users", "forget", "bob", "--store", filled[0], "--yes").exit_code == 0
    assert "holds 1 users that" in run(*words_of(filled, "--encoder", other)).stderr
    run("users", "forget", "bob", "--store", filled[1], "--yes")
    assert "note:" not in run(*words_of(filled, "--encoder", other)).stderr


def test_a_prefix_chooses_users(filled, other):
    (row,) = told(filled, "--encoder", other, "--prefix", "b")
    assert row["new"] == 3
    with HistoryStore(filled[1]) as store:
        assert [user.user_id for user in store.users()] == ["bob"]


def test_a_plugs_llm_reads_the_texts_too(folder, filled):  # noqa: F811
    plug, path = folder
    vectors, words = told(filled, "--plug", path)
    assert (vectors["new"], words["read"], words["known"]) == (8, 8, 0)
    again = json.loads(run("users", "remember", path, "--store", filled[1], "--device", "cpu", "--json").stdout)
    assert (again["read"], again["known"]) == (0, 8)
    vectors, words = told(filled, "--plug", path)
    assert (vectors["known"], words["known"]) == (8, 8)
    with HistoryStore(filled[1], plug.encoder) as store:
        known = plug.generate("the lamp is late", user="ann", store=store, max_new_tokens=4)
    with HistoryStore(filled[0], plug.encoder) as store:
        assert plug.generate("the lamp is late", user="ann", store=store, max_new_tokens=4) == known


def test_what_cannot_be_done_is_said_in_one_line(urls, filled, other, encoder, tmp_path):
    bare = f"sqlite:///{tmp_path}/bare.db"
    with HistoryStore(bare, encoder) as store:
        store.append("ann", ["x"])
    fails(*words_of([bare, urls[1]], "--encoder", other), say="keeps no texts to make vectors from")
    assert not (tmp_path / "new.db").exists()
    fails(*words_of(filled), say="give --encoder or --plug")
    fails(*words_of(filled, "--encoder", other, "--plug", "x"), say="give --encoder or --plug")
    fails(*words_of([filled[0], filled[0]], "--encoder", other), say="was made with encoder")
    fails(*words_of([filled[0], bare], "--encoder", "tiny-encoder"), say="was made with keep_text False")
    fails(*words_of([f"sqlite:///{tmp_path}/none.db", urls[1]], "--encoder", other), say="none.db")
