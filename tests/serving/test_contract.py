"""What the gateway says of itself, and the shapes that clients ask in and read."""

import json
import os
import stat
from pathlib import Path

import httpx
import pytest

from persona_plug.data.rows import json_line
from persona_plug.errors import ConfigError
from persona_plug.files import write_atomically
from persona_plug.models.vector_cache import VectorCache
from persona_plug.serving.auth import Keyring, new_key, read_keys, revoke_key
from persona_plug.store.database import open_engine, shown, shown_url
from tests.serving.attacks import saying

BREAKS = "a\u2028b\u2029c\u0085d"


@pytest.fixture(scope="module")
def document(served):
    with served.http(served.keys.acme) as http:
        return http.get("/openapi.json").json()


def references(value):
    if isinstance(value, dict):
        yield from ([value["$ref"]] if isinstance(value.get("$ref"), str) else [])
        for inner in value.values():
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_the_document_is_whole(document):
    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"]
    ids = []
    for path, methods in document["paths"].items():
        for operation in methods.values():
            declared = {p["name"] for p in operation.get("parameters", []) if p["in"] == "path"}
            assert declared == {part.split("}")[0] for part in path.split("{")[1:]}, path
            assert all(p["required"] for p in operation.get("parameters", []) if p["in"] == "path")
            assert "422" not in operation["responses"]
            assert all(answer["description"] for answer in operation["responses"].values())
            ids.append(operation["operationId"])
    assert len(set(ids)) == len(ids)
    for reference in references(document):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
    used = {reference.rsplit("/", 1)[1] for reference in references(document)}
    assert used == set(document["components"]["schemas"])


ASKED = [
    ("post", "/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2}, {}),
    ("post", "/v1/completions", {"model": "tiny"}, {}),
    ("post", "/v1/completions", {"model": "other", "prompt": "x"}, {}),
    ("post", "/v1/chat/completions", {"model": "tiny", "messages": [], "n": 3}, {}),
    ("post", "/v1/chat/completions", {"model": "x" * 1_100_000}, {}),
    ("post", "/v1/chat/completions", {"model": ["x"] * 10_000}, {}),
    ("post", "/v1/users/{user}/events", {"output": "x"}, {}),
    ("post", "/v1/users/{user}/events", {"accept": "nothing"}, {}),
    ("post", "/v1/users/{user}/events", {"output": ""}, {}),
    ("put", "/v1/users/{user}/events/{event}", {"output": "x"}, {}),
    ("put", "/v1/users/{user}/events/{event}", {}, {}),
    ("get", "/v1/users/{user}/events", None, {}),
    ("get", "/v1/users/{user}/export", None, {}),
    ("delete", "/v1/users/{user}/events/{event}", None, {}),
    ("delete", "/v1/users/{user}", None, {}),
    ("get", "/v1/models", None, {}),
    ("get", "/v1/models/{name}", None, {}),
    ("get", "/v1/models", None, {"Authorization": "Bearer no"}),
    ("get", "/healthz", None, {}),
    ("head", "/healthz", None, {}),
    ("get", "/readyz", None, {}),
    ("get", "/metrics", None, {}),
]


@pytest.mark.parametrize(("method", "path", "body", "headers"), ASKED)
def test_what_is_sent_is_documented(served, document, method, path, body, headers):
    with served.http(served.keys.acme) as http:
        real = path.replace("{user}", "doc").replace("{event}", "nothing").replace("{name}", "other")
        answer = http.request(method, real, json=body, headers=headers)
    told = document["paths"][path][method]["responses"]
    assert str(answer.status_code) in told
    content = told[str(answer.status_code)].get("content", {})
    assert answer.headers["content-type"].split(";")[0] in content
    if answer.status_code >= 400:
        assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("code", ["401", "429", "503"])
def test_every_route_says_what_may_always_be_answered(document, code):
    for path, methods in document["paths"].items():
        if path.startswith("/v1/"):
            assert all(code in operation["responses"] for operation in methods.values()), path
    assert "504" in document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert "409" in document["paths"]["/v1/users/{user}/events"]["post"]["responses"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_probes_answer_head(served, path):
    answer = httpx.head(served.url + path)
    assert (answer.status_code, answer.text) == (200, "")


def test_a_page_shows_the_routes_and_fetches_nothing(gateway):
    server = gateway()
    with server.http() as http:
        for path in ("/", "/docs"):
            answer = http.get(path)
            assert answer.status_code == 200
            assert "/v1/users/{user}/events" in answer.text
            assert "curl" in answer.text
            assert "http://" not in answer.text
            assert "https://" not in answer.text


def test_the_start_says_what_an_operator_should_know(gateway):
    server = gateway(keep_text=False)
    ready = next(line for line in server.logged() if line["event"] == "ready")
    assert (ready["users"], ready["users_of_others"], ready["keeps_texts"]) == (0, 0, False)
    assert ready["try"].startswith("curl http://127.0.0.1:8000/v1/chat/completions")
    json.loads(ready["try"].split(" -d '")[1].rstrip("'"))


@pytest.mark.parametrize(("tenants", "seen"), [((), 2), (("acme",), 1), (("bolt",), 0)])
def test_users_of_others_are_counted_and_their_absence_told(start, serving_plug, tmp_path, tenants, seen):
    from persona_plug import HistoryStore
    from persona_plug.serving.auth import store_key
    from persona_plug.serving.engine import TransformersEngine
    from persona_plug.serving.gateway import Backend

    url = f"sqlite:///{tmp_path}/users.db"
    with HistoryStore(url, serving_plug.encoder, True) as store:
        for name in ("ann", store_key("local", "a/b"), store_key("acme", "ann")):
            store.append(name, ["x"])

    def load():
        return Backend(serving_plug, HistoryStore(url, serving_plug.encoder), TransformersEngine(serving_plug))

    server = start(tenants=tenants, load=load)
    try:
        ready = next(line for line in server.logged() if line["event"] == "ready")
        assert (ready["users"], ready["users_of_others"]) == (seen, 3 - seen)
        warned = [line["message"] for line in server.logged() if line["event"] == "warning"]
        assert bool(warned) == (not seen)
        assert "ann" not in "".join(warned)
    finally:
        server.close()


# Several answers


def test_a_list_of_prompts_as_langchain_sends_it(served, serving_plug):
    """`OpenAI().batch([a, b])` is one request with several prompts and `n`."""
    body = {"model": "tiny", "prompt": ["rate this", "K\u00f6ln?"], "n": 1, "max_tokens": 6, "user": "ann"}
    with served.http(served.keys.acme) as http:
        both = http.post("/v1/completions", json={**body, "logit_bias": {}, "best_of": 1}).json()
        alone = [http.post("/v1/completions", json={**body, "prompt": p}).json() for p in body["prompt"]]
    assert [c["index"] for c in both["choices"]] == [0, 1]
    assert [c["text"] for c in both["choices"]] == [one["choices"][0]["text"] for one in alone]
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert both["usage"][name] == sum(one["usage"][name] for one in alone)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_several_choices_and_their_stream(served, path):
    asked = {"messages": [{"role": "user", "content": "rate this"}]} if "chat" in path else {"prompt": "rate this"}
    body = {"model": "tiny", "n": 3, "temperature": 1.2, "seed": 5, "max_tokens": 5, "user": "ann", **asked}
    with served.http(served.keys.acme) as http:
        whole = http.post(f"/v1/{path}", json=body).json()["choices"]
        lines = http.post(f"/v1/{path}", json={**body, "stream": True}).text.split("\n\n")
        one = http.post(f"/v1/{path}", json={**body, "n": 1}).json()["choices"]
    texts = [c["text"] if "text" in c else c["message"]["content"] for c in whole]
    assert len(set(texts)) == 3
    assert one[0] == whole[0]
    pieces = ["", "", ""]
    ends = {}
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                pieces[choice["index"]] += text
                if choice["finish_reason"]:
                    ends[choice["index"]] = choice["finish_reason"]
    assert pieces == texts
    assert ends == {0: "length", 1: "length", 2: "length"}


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.8},
        {"frequency_penalty": 2},
        {"presence_penalty": 2},
    ],
)
def test_penalties_end_repetition(served, fields):
    with served.http(served.keys.acme) as http:

        def tokens(**more):
            body = {
                "model": "tiny",
                "prompt": "rate this",
                "user": "ann",
                "max_tokens": 60,
                "stop_loops": False,
                **more,
            }
            return http.post("/v1/completions", json=body).json()["choices"][0]["text"]

        plain, changed = tokens(), tokens(**fields)
    assert len(set(changed)) > len(set(plain))


def test_a_bias_bans_and_forces_tokens(served, serving_plug):
    token = serving_plug.tokenizer("Q", add_special_tokens=False)["input_ids"][0]
    body = {"model": "tiny", "prompt": "rate this", "max_tokens": 5}
    with served.http(served.keys.acme) as http:
        forced = http.post("/v1/completions", json={**body, "logit_bias": {str(token): 100}}).json()
        assert forced["choices"][0]["text"] == "QQQQQ"
        banned = http.post("/v1/completions", json={**body, "logit_bias": {str(token): -100}}).json()
        assert "Q" not in banned["choices"][0]["text"]
        beyond = http.post("/v1/completions", json={**body, "logit_bias": {"999999": 1}})
        assert (beyond.status_code, beyond.json()["error"]["param"]) == (400, "logit_bias")


# Lines


def test_a_json_line_is_one_line_for_every_reader():
    text = "".join(chr(n) for n in (*range(0x20), 0x7F, 0x85, 0x2028, 0x2029, 0xDFFF, 0xD800, 0x1F600)) + '"\\'
    line = json_line({"a": text})
    assert json.loads(line) == {"a": text}
    assert len(line.splitlines()) == 1
    assert len(json_line([text], compact=True).encode().decode().splitlines()) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_streams_and_exports_are_safe_for_readers_of_lines(gateway, stream):
    server = gateway(engine=saying(BREAKS))
    with server.http() as http:
        body = {"model": "tiny", "prompt": "x", "user": "ann", "stream": stream}
        text = http.post("/v1/completions", json=body).text
        told = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if "{" in line]
        assert "".join(one["choices"][0]["text"] for one in told if one["choices"]) == BREAKS
        http.post("/v1/users/ann/events", json={"input": BREAKS, "output": BREAKS, "id": BREAKS}).raise_for_status()
        (row,) = [json.loads(line) for line in http.get("/v1/users/ann/export").text.splitlines()]
        assert (row["input"], row["output"], row["id"]) == (BREAKS,) * 3
        (listed,) = http.get("/v1/users/ann/events").json()["data"]
        assert listed["output"] == BREAKS


# Files and addresses


@pytest.mark.parametrize("content", [b"\xff\xfe", "ä".encode("latin-1"), b"\x80" * 10, b"[" * 100_000, b'{"id": 1}'])
def test_a_key_file_that_is_damaged_is_refused_and_opens_nothing(tmp_path, content):
    path = tmp_path / "keys.jsonl"
    _, secret = new_key(path, "acme")
    ring = Keyring(path)
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))
    assert ring.find(f"Bearer {secret}") is None
    with pytest.raises(ConfigError, match=r"keys\.jsonl"):
        read_keys(path)


def test_a_gateway_with_a_damaged_key_file_refuses_everybody(gateway):
    server = gateway(tenants=("acme",))
    (server.folder / "keys.jsonl").write_bytes(b"\xff\xfe\x00")
    with server.http(server.keys.acme) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize("make", ["new", "again", "revoke", "store", "cache"])
def test_secret_files_are_their_owners_from_the_first_moment(tmp_path, monkeypatch, make, encoder):
    """Every mode that a file ever has is looked at: whoever opens it in between keeps it open."""
    seen = set()
    old = os.umask(0)
    try:
        chmod, replace = Path.chmod, Path.replace
        monkeypatch.setattr(Path, "chmod", lambda self, mode, **kw: seen.add(mode) or chmod(self, mode, **kw))

        def moved(self, target):
            seen.add(stat.S_IMODE(self.stat().st_mode))
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", moved)
        if make == "store":
            from persona_plug import HistoryStore

            with HistoryStore(f"sqlite:///{tmp_path}/users.db", encoder) as store:
                store.append("ann", ["x"])
                seen |= {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
        elif make == "cache":
            cache = VectorCache(tmp_path / "v" / "x.sqlite", 4)
            cache.delete([b"12345678"])
            seen |= {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "v").iterdir()}
        else:
            key, _ = new_key(tmp_path / "k", "acme")
            if make == "again":
                new_key(tmp_path / "k", "acme")
            elif make == "revoke":
                revoke_key(tmp_path / "k", key.id)
            seen |= {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    finally:
        os.umask(old)
    assert seen == {0o600}


def test_other_files_may_be_read_by_all(tmp_path):
    write_atomically(tmp_path / "x", b"")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:quince@db/plug",
        "postgresql://db/plug?user=me&password=quince",
        "postgresql://me@db/plug?sslpassword=quince&sslmode=require",
        "postgresql://me:quince@db/plug?options=-c%20x%3Dquince",
        "sqlite:////tmp/users.db?key=quince",
    ],
)
def test_nothing_secret_of_an_address_is_shown(url):
    assert "quince" not in shown_url(url)
    assert shown_url(url).startswith(url.split(":")[0])
    if url.startswith("sqlite"):
        return
    from sqlalchemy import create_mock_engine, make_url

    class Engine:
        pass

    engine = Engine()
    engine.url = make_url(url)
    assert create_mock_engine
    assert "quince" not in shown(engine)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:quince@db:port/plug",
        "postgresql+quince://me:quince@db/plug",
        "oracle://me:quince@db/plug",
        "//quince",
        "sqlite:////no/such/folder/users.db?key=quince",
    ],
)
def test_an_address_that_cannot_be_used_is_not_repeated(url, encoder):
    from persona_plug import HistoryStore

    with pytest.raises(ConfigError) as caught:
        HistoryStore(url, encoder)
    assert "me:quince" not in str(caught.value)
    assert "key=quince" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert open_engine
