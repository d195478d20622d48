"""A store with a few people, and sessions on tiny models."""

import pytest

from persona_plug.page.session import Session


@pytest.fixture
def open_store(encoder, people, tmp_path):
    """`open_store(filled=True)` opens an empty store of its own, with ann, bob and eve in it if filled."""
    from persona_plug.store.history_store import HistoryStore

    opened = []

    def make(filled=True, **settings):
        url = f"sqlite:///{tmp_path}/users-{len(opened)}.db"
        store = HistoryStore(url, encoder=encoder, **{"keep_text": True, **settings})
        opened.append(store)
        for name in ("ann", "bob", "eve") if filled else ():
            store.append(name, getattr(people, name))
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def open_session(make_plug, open_store):
    """`open_session(filled=True, **plug settings)` joins a perturbed plug and a store."""

    def make(filled=True, folder=None, **settings):
        return Session(make_plug(differ=True, **settings), open_store(filled), folder)

    return make
