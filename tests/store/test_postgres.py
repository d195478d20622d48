"""What only a real PostgreSQL shows: files without a byte, readers of old states, and roles that own nothing."""

import pytest

from persona_plug import HistoryStore
from persona_plug.store.database import StoreUnavailable
from tests.store.test_deleted import item

pytestmark = pytest.mark.services


@pytest.fixture
def database(postgres_server):
    """The URL of an empty database, for a superuser."""
    import uuid

    import psycopg

    name = f"d{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres_server.rsplit("/", 1)[0] + f"/{name}"


def bytes_of(url):
    """All bytes of all files of the store's tables, indexes and long values."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CHECKPOINT")
        question = """
            SELECT pg_read_binary_file(pg_relation_filepath(oid)) FROM pg_class
            WHERE relkind IN ('r', 'i', 't', 'S') AND pg_relation_filepath(oid) IS NOT NULL
                AND (relname LIKE 'persona%' OR oid IN
                    (SELECT reltoastrelid FROM pg_class WHERE relname LIKE 'persona%')
                    OR relname LIKE 'pg_toast%' OR relname = 'pg_statistic')
        """
        return b"".join(bytes(row[0]) for row in connection.execute(question))


@pytest.fixture
def store(database, encoder):
    with HistoryStore(database, encoder, keep_text=True, wait=1) as opened:
        for n in range(40):
            for user in ("kept-user", "unmistakable-user"):
                opened.append(user, [item(user, n, 20 if n % 3 else 9000)])
        yield opened


def test_no_byte_is_left_in_any_file(database, store):
    assert b"unmistakable-user" in bytes_of(database)
    assert store.forget("unmistakable-user").items == 40
    there = bytes_of(database)
    assert b"unmistakable-user" not in there
    assert b"kept-user" in there
    assert store.read("kept-user").total == 40


def test_an_item_goes_with_its_id(database, store):
    assert store.delete("unmistakable-user", "unmistakable-user#7")
    assert b"unmistakable-user wrote 7 " not in bytes_of(database)
    assert store.read("unmistakable-user").total == 39


def test_deleted_is_said_only_when_no_old_reader_is_left(database, store):
    import psycopg

    with psycopg.connect(database) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM persona_store")
        with pytest.raises(StoreUnavailable, match=r"began before goes on reading.*forget once more"):
            store.forget("unmistakable-user")
        assert store.read("unmistakable-user").total == 0
        assert store.append("kept-user", [item("kept-user", 99)]) == 1
    store.forget("unmistakable-user")
    assert b"unmistakable-user" not in bytes_of(database)


def test_deleted_is_not_said_by_a_role_that_may_not_rewrite(database, store, encoder):
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS guest")
        connection.execute("CREATE ROLE guest LOGIN")
        connection.execute("GRANT ALL ON ALL TABLES IN SCHEMA public TO guest")
        connection.execute("GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO guest")
    with (
        HistoryStore(database.replace("postgres@", "guest@"), encoder, wait=1) as guest,
        pytest.raises(StoreUnavailable, match=r"bytes are left.*own the tables"),
    ):
        guest.forget("unmistakable-user")
    store.forget("unmistakable-user")
    assert b"unmistakable-user" not in bytes_of(database)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP OWNED BY guest")
        connection.execute("DROP ROLE guest")


def test_a_store_of_the_first_schema_is_migrated(database, encoder, monkeypatch):
    from alembic import command
    from alembic.config import Config

    from persona_plug.store import database as module
    from persona_plug.store.rows import rows

    engine = module.open_engine(database, create=True)
    config = Config()
    config.set_main_option("script_location", str(module.MIGRATIONS))
    with module.alone(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.execute(
            module.sql(
                "INSERT INTO persona_store (id, encoder, dim, vectors, keep_text) VALUES (1, :e, :d, 'fp16', true)"
            ),
            {"e": encoder.fingerprint, "d": encoder.dim},
        )
        from persona_plug.data.history import HistoryItem

        made = rows([HistoryItem("q", f"answer {n}", float(n), str(n)) for n in range(3)], encoder, "fp16", True)
        for key, user in ((1, "ann"), (2, "bob")):
            connection.execute(
                module.sql("INSERT INTO persona_users (key, name, items, next, updated) VALUES (:k, :u, 3, 3, 0)"),
                {"k": key, "u": user},
            )
            for n, row in enumerate(made):
                names = ", ".join(row)
                values = ", ".join(f":{name}" for name in row)
                connection.execute(
                    module.sql(f"INSERT INTO persona_items (id, user_key, {names}) VALUES (:i, :k, {values})"),  # noqa: S608
                    {"i": key * (1 << 32) + n, "k": key, **row},
                )
    engine.dispose()
    with HistoryStore(database, encoder) as store:
        assert [(u.user_id, u.items) for u in store.users()] == [("ann", 3), ("bob", 3)]
        assert [i.output for i in store.read("bob").items] == ["answer 0", "answer 1", "answer 2"]
        assert store.append("bob", [{"output": "more", "id": "2"}, {"output": "more", "id": "3"}]) == 1
