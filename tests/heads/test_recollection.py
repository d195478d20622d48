"""Words that a store keeps: read once, gone with their texts, read anew by another head."""

import pytest
import torch

from persona_plug.store.history_store import HistoryStore
from tests.fit.test_words import data, few_steps, fitted, people  # noqa: F401 (fixtures)


@pytest.fixture(scope="module")
def plug(make_plug, data):  # noqa: F811
    return fitted(make_plug, data)


@pytest.fixture
def store(plug, tmp_path):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True) as opened:
        yield opened


@pytest.fixture
def sample():
    return people(3, 2)[0]


def passes(plug, monkeypatch):
    """Count the items that the LLM reads."""
    seen, usual = [], plug.recollection.passes

    def count(pairs):
        seen.extend(pairs)
        return usual(pairs)

    monkeypatch.setattr(plug.recollection, "passes", count)
    return seen


def test_a_stored_history_answers_as_one_in_memory_does_and_is_read_once(plug, store, sample, monkeypatch):
    store.append("ann", sample.history)
    expected = plug.score([sample], [sample.output])
    seen = passes(plug, monkeypatch)
    for _ in range(3):
        torch.testing.assert_close(plug.score([sample.input], [sample.output], user="ann", store=store), expected)
    assert len(seen) == len(sample.history)
    store.append("ann", [{"input": "one more", "output": "hello, you!"}])
    plug.score([sample.input], [sample.output], user="ann", store=store)
    assert seen[len(sample.history) :] == [("one more", "hello, you!")]


def test_another_head_reads_anew(plug, store, sample, monkeypatch):
    store.append("ann", sample.history)
    seen = passes(plug, monkeypatch)
    plug.recollection.restore(store, store.read("ann"))
    before = plug.words.word_map.clone()
    plug.words.word_map.add_(1e-3)
    try:
        plug.recollection.forget()
        assert plug.recollection.restore(store, store.read("ann"))[1] == len(sample.history)
        assert len(seen) == 2 * len(sample.history)
    finally:
        plug.words.word_map.copy_(before)
        plug.recollection.forget()


@pytest.mark.parametrize("how", ["forget", "delete", "expire"])
def test_words_go_with_their_texts(plug, store, sample, how):
    store.append("ann", sample.history)
    history = store.read("ann")
    plug.recollection.restore(store, history)
    identity, items = plug.recollection.identity, history.texts
    assert set(store.words("ann", identity, items)) == {i.id for i in items}
    assert store.words("bob", identity, items) == {}
    if how == "forget":
        store.forget("ann")
    elif how == "delete":
        store.delete("ann", items[0].id)
    else:
        store.expire(-1)
    left = store.words("ann", identity, items)
    assert set(left) == ({i.id for i in items[1:]} if how == "delete" else set())


def test_words_are_not_kept_of_a_user_who_was_forgotten_meanwhile(plug, store, sample):
    store.append("ann", sample.history)
    history = store.read("ann")
    store.forget("ann")
    with pytest.raises(Exception, match=r"(?i)deleted|forgotten"):
        plug.recollection.restore(store, history)
    assert store.words("ann", plug.recollection.identity, history.texts) == {}


def test_what_is_left_in_the_file_cannot_be_read_without_the_texts(plug, store, sample, tmp_path):
    """Words are sealed with their item's texts: the packed form itself never stands in the file."""
    from persona_plug.heads.packing import pack_item

    store.append("ann", sample.history)
    words, _ = plug.recollection.restore(store, store.read("ann"))
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("users.db*"))
    for item in words:
        assert pack_item(item)[30:60] not in raw
