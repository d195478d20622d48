"""Forgetting through the gateway is final, whichever gateway or command does it; and events are added once."""

import asyncio
import json
import threading

import httpx
import pytest
from typer.testing import CliRunner

from persona_plug import HistoryStore
from persona_plug.cli import app
from persona_plug.serving.engine import TransformersEngine
from persona_plug.serving.gateway import Backend
from tests.serving.attacks import Gate, saying, until


@pytest.fixture
def pair(start, serving_plug, tmp_path):
    """Two gateways on one store."""
    url = f"sqlite:///{tmp_path}/users.db"

    def load():
        return Backend(serving_plug, HistoryStore(url, serving_plug.encoder, True), TransformersEngine(serving_plug))

    made = [start(load=load) for _ in range(2)]
    yield (*made, url)
    for server in made:
        server.close()


def complete(http, user="ann", path="completions", **fields):
    body = {"model": "tiny", "prompt": "rate this", "user": user, "max_tokens": 4, **fields}
    return http.post("/v1/completions", json=body).raise_for_status().json()


def total(http, user="ann"):
    return http.get(f"/v1/users/{user}/events").json()["total"]


@pytest.mark.parametrize("how", ["there", "command line", "library"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_a_forgotten_user_is_accepted_nowhere(pair, how, stream):
    here, there, url = pair
    with here.http() as a, there.http() as b:
        a.post("/v1/users/ann/events", json={"output": "x"}).raise_for_status()
        if stream:
            body = {"model": "tiny", "prompt": "rate this", "user": "ann", "max_tokens": 4, "stream": True}
            first = a.post("/v1/completions", json=body).text.splitlines()[0]
            ident = json.loads(first.removeprefix("data: "))["id"]
        else:
            ident = complete(a)["id"]
        if how == "there":
            b.delete("/v1/users/ann").raise_for_status()
        elif how == "command line":
            assert CliRunner().invoke(app, ["users", "forget", "ann", "--store", url, "--yes"]).exit_code == 0
        else:
            with HistoryStore(url) as store:
                store.forget("ann")
        for http in (a, b):
            assert http.post("/v1/users/ann/events", json={"accept": ident}).status_code in (404, 409)
            assert total(http) == 0
        again = complete(a)["id"]
        assert b.post("/v1/users/ann/events", json={"accept": again}).json()["added"] == 1


def test_an_answer_is_accepted_at_any_gateway_once(pair):
    here, there, _ = pair
    with here.http() as a, there.http() as b:
        for turn in range(4):
            ident = complete(a if turn % 2 else b)["id"]
            answers = [http.post("/v1/users/ann/events", json={"accept": ident}).json() for http in (a, b, a)]
            assert [one["added"] for one in answers] == [1, 0, 0]
        assert total(a) == total(b) == 4


def test_each_choice_is_accepted_by_its_index(pair):
    here, there, _ = pair
    with here.http() as a, there.http() as b:
        made = complete(a, prompt=["one", "two"], n=2, temperature=1.5, seed=3)
        for index in (2, 0):
            ident = made["id"] + (f"-{index}" if index else "")
            assert b.post("/v1/users/ann/events", json={"accept": ident}).json()["added"] == 1
        rows = b.get("/v1/users/ann/events").json()["data"]
        texts = [choice["text"] for choice in made["choices"]]
        assert [(r["input"], r["output"]) for r in rows] == [("two", texts[2]), ("one", texts[0])]


def test_an_answer_that_is_written_while_its_user_is_forgotten_is_not_kept(gateway):
    server = gateway(engine=saying("slowly", 0.1))
    with server.http() as http:
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(complete(http)["id"]))
        thread.start()
        until(lambda: server.gateway.backend.engine.calls)
        http.delete("/v1/users/ann").raise_for_status()
        thread.join()
        assert http.post("/v1/users/ann/events", json={"accept": outcome[0]}).status_code == 404
        assert total(http) == 0


@pytest.mark.parametrize("what", ["event", "accept"])
def test_what_is_on_its_way_while_a_user_is_forgotten_is_refused(gateway, what):
    server = gateway()
    with server.http() as http:
        http.post("/v1/users/ann/events", json={"output": "first"}).raise_for_status()
        body = {"accept": complete(http)["id"]} if what == "accept" else {"output": "second"}
        store = server.gateway.backend.store
        gate = store.encode = Gate(store.encode)
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(http.post("/v1/users/ann/events", json=body)))
        thread.start()
        until(lambda: gate.waiting)
        assert http.delete("/v1/users/ann").json()["events"] == 1
        gate.open.set()
        thread.join()
        assert (outcome[0].status_code, outcome[0].json()["error"]["code"]) == (409, "deleted_meanwhile")
        assert total(http) == 0
        if what == "event":
            assert http.post("/v1/users/ann/events", json=body).json()["added"] == 1


def test_vectors_in_the_cache_go_through_the_gateway_too(start, make_plug, tmp_path, monkeypatch):
    """Events that the command line encoded, and an encoder that caches nothing since."""
    from persona_plug.models.encoder import HistoryEncoder
    from persona_plug.models.vector_cache import VectorCache

    caching = HistoryEncoder("tiny-encoder", device="cpu", cache_dir=tmp_path / "cache")
    url = f"sqlite:///{tmp_path}/users.db"
    with HistoryStore(url, caching) as store:
        store.append("ann", [{"input": "only ann", "output": "wrote this"}, {"output": "and that"}])
        store.append("bob", [{"output": "bob's own"}])
    plug = make_plug(encoder=caching)
    plug.keep_nothing()
    server = start(load=lambda: Backend(plug, HistoryStore(url, plug.encoder), TransformersEngine(plug)))
    try:
        with server.http() as http:
            events = http.get("/v1/users/ann/events").json()["data"]
            http.delete(f"/v1/users/ann/events/{events[0]['id']}").raise_for_status()
            assert len(VectorCache(caching.cache_path, caching.dim)) == 2
            http.delete("/v1/users/ann").raise_for_status()
            assert len(VectorCache(caching.cache_path, caching.dim)) == 1
    finally:
        server.close()


def test_many_are_forgotten_at_once_while_others_write(gateway):
    server = gateway()
    with server.http() as http:
        for n in range(12):
            http.post(f"/v1/users/u{n}/events", json={"output": "x"}).raise_for_status()

    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            gone = [http.delete(f"/v1/users/u{n}") for n in range(12)]
            added = [http.post("/v1/users/other/events", json={"output": f"x{n}"}) for n in range(12)]
            return await asyncio.gather(*gone, *added)

    answers = asyncio.run(run())
    assert {a.status_code for a in answers} == {200}
    with server.http() as http:
        assert total(http, "other") == 12
        assert [total(http, f"u{n}") for n in range(12)] == [0] * 12


# Events


def test_the_limit_holds_when_many_post_at_once(gateway):
    server = gateway(events=10)

    async def run():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            bodies = [{"events": [{"output": f"{n}-{i}"} for i in range(4)]} for n in range(8)]
            return await asyncio.gather(*(http.post("/v1/users/ann/events", json=body) for body in bodies))

    answers = asyncio.run(run())
    assert sorted({a.status_code for a in answers}) == [200, 409]
    with server.http() as http:
        assert total(http) == 8
        known = {"events": [{"output": "new", "id": "0"}, {"output": "new", "id": "1"}]}
        assert http.post("/v1/users/ann/events", json=known).json()["added"] == 2
        for body in (known, {"output": "other", "id": "1"}, {"events": known["events"] * 3}):
            answer = http.post("/v1/users/ann/events", json=body)
            assert (answer.status_code, answer.json()["added"]) == (200, 0)


@pytest.mark.parametrize(
    "body",
    [
        {"output": "plum"},
        {"input": "fruit?", "output": "plum", "timestamp": "2026-01-01"},
        {"events": [{"output": "plum"}, {"output": "plum"}, {"input": "q", "output": "pear"}]},
    ],
)
def test_an_event_that_is_sent_again_is_known(gateway, body):
    server = gateway()
    with server.http() as http:
        count = len(body.get("events", [body]))
        assert http.post("/v1/users/ann/events", json=body).json()["added"] == count
        for _ in range(2):
            assert http.post("/v1/users/ann/events", json=body).json() == {
                "object": "user.events",
                "added": 0,
                "known": count,
            }
        assert http.post("/v1/users/bob/events", json=body).json()["added"] == count
        assert total(http) == count


def test_an_event_is_corrected_in_its_place(gateway):
    server = gateway()
    with server.http() as http:
        events = [{"output": name, "id": name, "timestamp": n} for n, name in enumerate("abc")]
        http.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
        right = {"input": "q", "output": "B", "timestamp": 1}
        assert http.put("/v1/users/ann/events/b", json=right).json() == {
            "id": "b",
            "object": "user.event",
            "replaced": True,
        }
        assert [(r["id"], r["output"]) for r in http.get("/v1/users/ann/events").json()["data"]] == [
            ("a", "a"),
            ("b", "B"),
            ("c", "c"),
        ]
        assert http.put("/v1/users/ann/events/nothing", json=right).status_code == 404
        assert http.put("/v1/users/ann/events/b", json={"output": " "}).status_code == 400
        assert http.get("/v1/users/ann/events").json()["total"] == 3


def test_events_expire(gateway):
    server = gateway(keep_days=1)
    with server.http() as http:
        http.post("/v1/users/ann/events", json={"output": "x", "timestamp": "1999-01-01"}).raise_for_status()
        assert total(http) == 1
        store = server.gateway.backend.store
        assert store.expire(server.gateway.limits.keep_days) == 0
        assert store.expire(-1) == 1
        assert total(http) == 0
