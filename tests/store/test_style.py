"""The style card of a stored user."""

import pytest

from persona_plug import HistoryStore
from persona_plug.errors import ConfigError, DataError
from persona_plug.store import style
from persona_plug.store.style import read_style


@pytest.fixture
def store(encoder, tmp_path):
    with HistoryStore(f"sqlite:///{tmp_path}/users.db", encoder, keep_text=True) as opened:
        for user, greeting in (("a/ann", "Servus"), ("a/bob", "Hello"), ("b/cid", "Servus")):
            opened.append(user, [{"input": f"q {i}", "output": f"{greeting} it is {i} now"} for i in range(6)])
        yield opened


def test_a_user_is_compared_with_all_others_or_with_a_tenants(store):
    everyone = read_style(store, "a/ann")
    assert everyone.others == 12
    own = read_style(store, "a/ann", "a/")
    assert own.others == 6
    assert own.openings[0].text == "Servus it is"
    assert own.openings[0].others == 0


def test_deleted_and_corrected_texts_change_the_card(store):
    before = read_style(store, "a/ann", "a/")
    for item in store.read("a/ann").texts[1:]:
        store.delete("a/ann", item.id)
    after = read_style(store, "a/ann", "a/")
    assert (before.texts, after.texts) == (6, 1)
    store.append("a/ann", ["GOOD DAY"])
    assert read_style(store, "a/ann", "a/").texts == 2


def test_the_sample_is_bounded(store, monkeypatch):
    monkeypatch.setattr(style, "OTHER_USERS", 1)
    monkeypatch.setattr(style, "OTHER_ITEMS", 2)
    assert read_style(store, "a/ann").others == 2


def test_no_texts_and_no_user_are_named(store, encoder, tmp_path):
    with pytest.raises(DataError, match="holds no such user"):
        read_style(store, "nobody")
    with (
        HistoryStore(f"sqlite:///{tmp_path}/vectors.db", encoder) as bare,
        pytest.raises(ConfigError, match=r"keeps no texts.*--keep-text"),
    ):
        read_style(bare, "ann")
