"""Stores on SQLite, and on a real PostgreSQL server (marked `services`)."""

import uuid

import pytest

from tests.services_postgres import postgres


@pytest.fixture(scope="session")
def postgres_server():
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.services)])
def url(request, tmp_path):
    """The URL of a database of this test alone, empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/users.db"
    import psycopg

    server, name = request.getfixturevalue("postgres_server"), f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.rsplit("/", 1)[0] + f"/{name}"


@pytest.fixture
def make_store(url, encoder):
    """`make_store(**settings)` opens the test's database with the tiny encoder; all are closed at the end."""
    from persona_plug import HistoryStore

    opened = []

    def make(**settings):
        opened.append(HistoryStore(settings.pop("url", url), **{"encoder": encoder, **settings}))
        return opened[-1]

    yield make
    for store in opened:
        store.close()
