"""A server that stays what it is for others, whatever one client or the database does."""

import json
import re
import socket
import sqlite3
import threading
import time

import httpx
import pytest

from persona_plug.serving import connections, users
from persona_plug.store.database import StoreUnavailable
from persona_plug.store.format import StoredHistory
from tests.serving.attacks import Gate, saying, until


def complete(http, text="rate this", tokens=4, **fields):
    return http.post("/v1/completions", json={"model": "tiny", "prompt": text, "max_tokens": tokens, **fields})


# What is asked


def nested(depth, opening="[", closing="]"):
    return opening * depth + closing * depth


MANY = ",".join
BODIES = {
    "empty objects": '{"model":"tiny","messages":[{"role":"user","content":[' + MANY(["{}"] * 100_000) + "]}]}",
    "numbers": '{"model":"tiny","prompt":[' + MANY(["1"] * 300_000) + "]}",
    "keys": '{"model":"tiny","prompt":"x",' + MANY(f'"k{i}":1' for i in range(50_000)) + "}",
    "messages": '{"model":"tiny","messages":[' + MANY(['{"role":"user","content":"x"}'] * 20_000) + "]}",
    "events": '{"events":[' + MANY(['{"output":"x"}'] * 30_000) + "]}",
    "biases": '{"model":"tiny","prompt":"x","logit_bias":{' + MANY(f'"{i}":1' for i in range(40_000)) + "}}",
    **{f"depth {depth}": '{"model":"tiny","prompt":' + nested(depth) + "}" for depth in (40, 900, 946, 953, 5000)},
    "deep objects": '{"model":"tiny","metadata":' + nested(950, '{"a":', "}").replace(":}", ":1}") + "}",
    "deep in a harmless field": '{"model":"tiny","prompt":"x","metadata":' + nested(950) + "}",
    "behind a text": '{"model":"tiny","x":"a\\"b\\\\","prompt":' + nested(950) + "}",
}


@pytest.mark.parametrize("path", ["chat/completions", "completions", "users/ann/events"])
@pytest.mark.parametrize("name", BODIES)
def test_a_body_of_too_many_things_is_refused_before_it_is_read(served, name, path, monkeypatch):
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    headers = {"Content-Type": "application/json"}
    with served.http(served.keys.acme) as http:
        answer = http.post(f"/v1/{path}", content=BODIES[name].encode(), headers=headers)
    monkeypatch.undo()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "body_too_complex")
    assert len(answer.text) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_a_body_is_utf8(served, encoding):
    """Python would read others, in which brackets cannot be counted as bytes."""
    body = '{"model": "tiny", "prompt": "x"}'.encode(encoding)
    with served.http(served.keys.acme) as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_brackets_and_commas_in_a_text_are_text(served):
    with served.http(served.keys.acme) as http:
        for text in ("[" * 2000, "{" * 2000, "," * 20_000, '"[' * 1000, '\\"[{' * 900, "[\\" * 1000):
            assert complete(http, text, 1).status_code == 200


def test_the_most_that_may_be_asked_is_taken(served):
    with served.http(served.keys.bolt) as http:
        events = [{"input": f"q{i}", "output": "a", "id": str(i), "timestamp": i} for i in range(100)]
        assert http.post("/v1/users/most/events", json={"events": events}).json()["added"] == 100
        biases = {str(i): 0.5 for i in range(200)}
        assert complete(http, "x", 1, logit_bias=biases).status_code == 200
        http.delete("/v1/users/most")


# Long histories


def test_a_listing_reads_pages_and_each_text_once(gateway, monkeypatch):
    server = gateway()
    with server.http() as http:
        for start in range(0, 200, 100):
            events = [{"output": f"text {start + n}", "id": str(start + n)} for n in range(100)]
            http.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
        made, sizes = [], []
        real = StoredHistory.texts.fget
        monkeypatch.setattr(StoredHistory, "texts", property(lambda self: made.append(1) or real(self)))
        store = server.gateway.backend.store
        pages = store.pages
        monkeypatch.setattr(
            store, "pages", lambda *args: (sizes.append(len(page.ids)) or page for page in pages(*args))
        )
        listed = http.get("/v1/users/ann/events", params={"limit": 150}).json()
    assert [row["output"] for row in listed["data"]] == [f"text {n}" for n in range(50, 200)]
    assert listed["total"] == 200
    assert sizes == [users.PAGE] * 6
    assert len(made) == len(sizes)


@pytest.mark.parametrize("path", ["export", "events?limit=1000"])
def test_what_nobody_reads_is_not_held(gateway, monkeypatch, path):
    """A client that asks for much and reads nothing: few pages are read, and it is left."""
    from persona_plug.serving import routes, streaming

    server = gateway()
    monkeypatch.setattr(
        routes, "send_pieces", lambda send, pieces, kind: streaming.send_pieces(send, pieces, kind, stall=0.5)
    )
    with server.http() as http:
        for start in range(0, 600, 100):
            events = [{"output": "x" * 9000, "id": str(start + n)} for n in range(100)]
            http.post("/v1/users/ann/events", json={"events": events[:50]}).raise_for_status()
            http.post("/v1/users/ann/events", json={"events": events[50:]}).raise_for_status()
        reads = []
        store = server.gateway.backend.store
        real = store._tables.page if path == "export" else store._tables.rows
        name = "page" if path == "export" else "rows"
        monkeypatch.setattr(store._tables, name, lambda *args: reads.append(1) or real(*args))
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.socket.getsockname())
            client.sendall(f"GET /v1/users/ann/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            until(lambda: reads)
            until(lambda: server.gateway.writes.used == 0)
        assert len(reads) < 20
        assert http.get("/healthz").status_code == 200


def test_an_export_ends_with_its_client(gateway, monkeypatch):
    server = gateway()
    with server.http() as http:
        events = [{"output": f"x{n}", "id": str(n)} for n in range(100)]
        http.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
    store = server.gateway.backend.store
    gate = store._tables.page = Gate(store._tables.page)
    with socket.create_connection(server.socket.getsockname(), 10) as client:
        client.sendall(b"GET /v1/users/ann/export HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: gate.waiting == 1)
    gate.open.set()
    until(lambda: server.gateway.writes.used == 0)
    assert gate.calls <= 2


# Connections


@pytest.fixture
def patient(monkeypatch, start):
    """A gateway behind the protocol that `serve` uses, with little patience and few connections."""
    import uvicorn

    monkeypatch.setattr(connections, "PATIENCE", 0.6)
    monkeypatch.setattr(connections, "CONNECTIONS", 6)
    real = uvicorn.Config
    monkeypatch.setattr(
        uvicorn,
        "Config",
        lambda *args, **kwargs: real(*args, http=connections.PatientProtocol, limit_concurrency=8, **kwargs),
    )
    server = start()
    yield server
    server.close()


def ended(client):
    """Whether the server closes the connection, within the test's patience."""
    client.settimeout(20)
    try:
        while client.recv(4096):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "said", [b"", b"G", b"GET /healthz HTTP/1.1\r\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET "]
)
def test_a_silent_connection_is_ended(patient, said):
    with socket.create_connection(patient.socket.getsockname(), 10) as client:
        client.sendall(said)
        assert ended(client)


def test_a_head_that_never_ends_is_ended(patient):
    with socket.create_connection(patient.socket.getsockname(), 10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")

        def dribble():
            for number in range(200):
                client.sendall(f"X-{number}: y\r\n".encode())
                time.sleep(0.05)

        with pytest.raises(ConnectionError):
            dribble()


def test_silent_connections_take_nobodys_place(patient):
    silent = [socket.create_connection(patient.socket.getsockname(), 10) for _ in range(30)]
    with patient.http() as http:
        for _ in range(5):
            assert http.get("/healthz").status_code == 200
            assert complete(http).status_code == 200
    for client in silent:
        client.close()


def test_a_long_answer_is_no_silence(patient):
    with patient.http() as http, http.stream("GET", "/healthz") as answer:
        time.sleep(1)
        assert answer.read() == b'{"status":"ok"}'


# The database


@pytest.mark.parametrize("keys", ["read", "write"])
def test_who_names_no_user_never_waits_for_the_store(gateway, keys):
    server = gateway(store_seconds=0.5)
    store = server.gateway.backend.store
    names = ["read", "moment"] if keys == "read" else ["insert", "keep_answer"]
    gates = {name: Gate(getattr(store, name)) for name in names}
    for name, gate in gates.items():
        setattr(store, name, gate)
    with server.http() as http:
        outcome = []

        def ask():
            path = "/v1/users/ann/events"
            with server.http() as other:
                got = complete(other, user="ann") if keys == "read" else other.post(path, json={"output": "x"})
                outcome.append((got.status_code, got.json().get("error", {}).get("code")))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        until(lambda: sum(g.waiting for g in gates.values()))
        for _ in range(3):
            assert complete(http).status_code == 200
            assert http.get("/healthz").status_code == 200
            assert http.get("/v1/models").status_code == 200
        assert http.get("/readyz").json() == {"status": "store unavailable" if keys == "read" else "ready"}
        for thread in threads:
            thread.join()
        assert set(outcome) == {(503, "unavailable")}
        for gate in gates.values():
            gate.open.set()
        until(lambda: http.get("/readyz").status_code == 200)
        assert http.get("/v1/users/ann/events").status_code == 200


def test_a_lock_held_elsewhere_stops_writers_alone(gateway):
    server = gateway(store_seconds=1)
    with server.http() as http:
        http.post("/v1/users/ann/events", json={"output": "x"}).raise_for_status()
        other = sqlite3.connect(server.folder / "users.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        try:
            assert complete(http).status_code == 200
            assert complete(http, user="ann").json()["persona_plug"]["history_items"] == 1
            assert http.get("/v1/users/ann/events").json()["total"] == 1
            late = http.post("/v1/users/ann/events", json={"output": "y"})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
            assert late.headers["retry-after"]
        finally:
            other.close()
    causes = [line["cause"] for line in server.logged() if line["event"] == "failure"]
    assert any("did not answer within 1 s" in cause for cause in causes)


@pytest.mark.parametrize("why", ["database is locked", "database or disk is full", "connection refused"])
def test_the_log_names_the_cause_of_a_failure_of_the_store(gateway, why):
    server = gateway()

    def fail(*_, **__):
        raise StoreUnavailable(f"postgresql://plug@db/plug: {why}; try again when the database is there")

    server.gateway.backend.store.pages = fail
    with server.http() as http:
        answer = http.get("/v1/users/ann/events")
    assert answer.status_code == 503
    assert why not in answer.text
    assert any(why in line.get("cause", "") for line in server.logged())


# Events


def test_events_are_encoded_beside_answers(gateway):
    server = gateway()
    store = server.gateway.backend.store
    gate = store.encode = Gate(store.encode)
    with server.http() as http, server.http() as other:
        thread = threading.Thread(target=lambda: other.post("/v1/users/ann/events", json={"output": "x"}))
        thread.start()
        until(lambda: gate.waiting)
        assert complete(http).status_code == 200
        assert complete(http, user="bob").status_code == 200
        gate.open.set()
        thread.join()


def test_a_post_whose_client_is_gone_is_not_encoded_further(gateway):
    server = gateway()
    store = server.gateway.backend.store
    gate = store.encode = Gate(store.encode)
    body = json.dumps({"events": [{"output": f"x{n}"} for n in range(100)]})
    head = "POST /v1/users/ann/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.socket.getsockname(), 10) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        until(lambda: gate.waiting)
    until(lambda: server.gateway.writes.used == 0)
    gate.open.set()
    until(lambda: gate.waiting == 0)
    assert gate.calls == 1
    with server.http() as http:
        assert http.get("/v1/users/ann/events").json()["total"] == 0
    assert "persona_plug_cancelled_total 1.0" in httpx.get(server.url + "/metrics").text


def test_posts_have_places_and_a_time(gateway):
    server = gateway(writes=2, seconds=1.5)
    store = server.gateway.backend.store
    gate = store.encode = Gate(store.encode)
    outcome = []

    def post(user):
        with server.http() as http:
            answer = http.post(f"/v1/users/{user}/events", json={"output": "x"})
            outcome.append((answer.status_code, answer.json()["error"]["code"]))

    threads = [threading.Thread(target=post, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: server.gateway.writes.used == 2)
    with server.http() as http:
        full = http.post("/v1/users/ann/events", json={"output": "x"})
        assert (full.status_code, full.json()["error"]["code"], full.headers["retry-after"]) == (429, "overloaded", "1")
        assert "persona_plug_writing 2.0" in http.get("/metrics").text
        assert complete(http).status_code == 200
    for thread in threads:
        thread.join()
    assert outcome == [(504, "timeout")] * 2
    gate.open.set()


# Tenants


def test_one_key_cannot_take_every_place(gateway):
    server = gateway(tenants=("acme", "bolt"), engine=saying("slow" * 20, 0.05), pending=8)
    outcome = []

    def ask(key, times):
        with server.http(key) as http:
            outcome.append((key, complete(http, user=f"u{times}").status_code))

    threads = [threading.Thread(target=ask, args=(server.keys.acme, n)) for n in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: server.gateway.slots.used >= 6)
    with server.http(server.keys.bolt) as http:
        assert complete(http).status_code == 200
    for thread in threads:
        thread.join()
    assert sorted(status for _, status in outcome) == [200] * 6 + [429] * 6


def test_work_is_admitted_by_its_tokens(gateway):
    server = gateway(engine=saying("slow" * 5, 0.05), tokens=400)
    with server.http() as http:
        assert complete(http, tokens=100).status_code == 200
        for much in ({"text": ["a", "b", "c", "d"], "tokens": 100}, {"tokens": 100, "n": 8}):
            answer = complete(http, **much)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_tokens")
        outcome = []

        def ask():
            with server.http() as other:
                outcome.append(complete(other, tokens=200).status_code)

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcome) == [200, 429, 429, 429, 429]
        until(lambda: server.gateway.tokens.used == 0)


# The log


@pytest.mark.parametrize("where", ["method", "path", "header", "host", "key"])
def test_who_has_no_key_writes_no_long_line(served, where):
    long = "Z" * 30_000
    method, path, header, host, key = "GET", "/v1/models", "x", "localhost", "guess"
    if where == "method":
        method = long
    elif where == "path":
        path = "/" + long
    elif where == "header":
        header = long
    elif where == "host":
        host = long
    else:
        key = long
    before = len(served.lines)
    with socket.create_connection(served.socket.getsockname(), 10) as client:
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"X: {header}", f"Authorization: Bearer {key}"]
        client.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        assert re.match(rb"HTTP/1.1 4\d\d ", client.recv(200))
    until(lambda: len(served.lines) > before or where == "host")
    assert max([len(line) for line in served.lines[before:]] + [0]) < 1000
    assert "ZZZZ" not in "".join(served.lines[before:])


# The end


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_end_of_the_server_cuts_off_is_told_so(start, stream):
    server = start(engine=saying("slow" * 100, 0.1))
    server.server.config.timeout_graceful_shutdown = 1
    outcome = []

    def ask():
        with server.http() as http:
            outcome.append(complete(http, stream=stream))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.gateway.slots.used == 1)
    time.sleep(0.3)
    server.close()
    thread.join(20)
    (answer,) = outcome
    if stream:
        last = [line for line in answer.text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"]
        assert [line["status"] for line in server.logged() if line["event"] == "request"] == [503]
