"""The gateway through OpenAI's own client and plain HTTP, against a real server."""

import asyncio
import json
import threading
from urllib.parse import quote

import httpx
import openai
import pytest

REQUESTS = ["rate this", "Köln?", "what about a long evening with friends"]
USERS = ["ann", "bob", "eve"]


@pytest.fixture
def client(served):
    return served.openai(served.keys.acme)


@pytest.fixture
def http(served):
    with served.http(served.keys.acme) as made:
        yield made


def ask(client, text, user=None, **fields):
    extra = {"extra_body": {"personal": fields.pop("personal")}} if "personal" in fields else {}
    messages = fields.pop("messages", None) or [{"role": "user", "content": text}]
    fields = {"model": "tiny", "max_tokens": 12, **fields, **extra}
    return client.chat.completions.create(messages=messages, **({"user": user} if user else {}), **fields)


def expected(plug, people, text, user, **options):
    history = getattr(people, user) if user else []
    return plug.generate(text, history, max_new_tokens=12, **options)


# Answers


@pytest.mark.parametrize("user", [None, *USERS])
@pytest.mark.parametrize("text", REQUESTS)
def test_an_answer_is_the_plugs_own(client, serving_plug, people, text, user):
    whole = expected(serving_plug, people, text, user)
    answer = ask(client, text, user)
    assert answer.choices[0].message.content == whole
    chunks = list(ask(client, text, user, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert (
        client.completions.create(model="tiny", prompt=text, max_tokens=12, user=user or openai.omit).choices[0].text
        == whole
    )
    chunks = list(
        client.completions.create(model="tiny", prompt=text, max_tokens=12, user=user or openai.omit, stream=True)
    )
    assert "".join(c.choices[0].text for c in chunks) == whole


def test_users_answers_differ(serving_plug, people):
    """What other tests rest on: an answer tells whose history it came from."""
    for text in REQUESTS:
        assert len({expected(serving_plug, people, text, user) for user in [None, *USERS]}) == 4


def test_the_default_length_is_the_plugs(client, serving_plug, people):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "rate this"}], user="ann"
    )
    assert answer.choices[0].message.content == serving_plug.generate("rate this", people.ann)


def test_without_the_plug(client, serving_plug, people):
    answer = ask(client, "rate this", "ann", personal=False)
    assert answer.choices[0].message.content == expected(serving_plug, people, "rate this", "ann", personal=False)
    assert answer.persona_plug == {"personal": False, "input_tokens_cut": 0}
    assert answer.usage.prompt_tokens_details.soft_tokens == 0


def test_what_stands_behind_an_answer_is_told(client, serving_plug, people):
    answer = ask(client, "rate this", "ann")
    details = serving_plug.generate("rate this", people.ann, max_new_tokens=12, return_details=True)
    soft = serving_plug.config.soft_tokens
    assert answer.usage.prompt_tokens == details.prompt_tokens
    assert answer.usage.prompt_tokens_details.soft_tokens == soft
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    assert answer.persona_plug == {
        "personal": True,
        "history_items": len(people.ann),
        "items_dropped": 0,
        "input_tokens_cut": 0,
    }
    assert ask(client, "rate this").persona_plug["history_items"] == 0
    assert ask(client, "x " * 400, "ann").persona_plug["input_tokens_cut"] > 0


def test_a_stream_in_openais_shape(client):
    chunks = list(ask(client, "rate this", "ann", stream=True, stream_options={"include_usage": True}))
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-2].persona_plug["history_items"] == 5
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 12)
    assert chunks[-1].usage.prompt_tokens_details.soft_tokens > 0
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert len(chunks) > 4


def test_a_stream_breaks_no_character(http, serving_plug, people):
    """Random weights write many bytes that are no character; those that are one arrive whole."""
    body = {"model": "tiny", "prompt": "Köln?", "user": "eve", "max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    texts = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1]]
    whole = serving_plug.generate("Köln?", people.eve, max_new_tokens=200)
    assert "".join(texts) == whole
    assert any(ord(c) > 127 and c != "\ufffd" for c in whole)


def test_a_conversation(client, serving_plug, people):
    chat = [("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "rate this")]
    answer = ask(client, "", "ann", messages=[{"role": r, "content": t} for r, t in chat])
    import torch

    parts, request = serving_plug.prompter.chat(chat)
    with torch.no_grad():
        inputs = serving_plug.splicer.generation_inputs([parts], serving_plug.soft_prompt(request, people.ann)[None])
        ids = serving_plug.llm.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert answer.choices[0].message.content == serving_plug.tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_sampling(client):
    def text(**options):
        return ask(client, "rate this", "ann", **options).choices[0].message.content

    assert text(temperature=1.5, seed=1) == text(temperature=1.5, seed=1)
    assert len({text(temperature=1.5, seed=seed) for seed in range(4)}) == 4
    assert text(temperature=1.5, top_p=1e-6, seed=1) == text()


def test_stop(client, serving_plug, people):
    whole = expected(serving_plug, people, "rate this", "ann")
    answer = ask(client, "rate this", "ann", stop=[whole[5], "never"])
    assert answer.choices[0].message.content == whole[: whole.index(whole[5])].strip()
    assert answer.choices[0].finish_reason == "stop"


def test_the_asynchronous_client_with_mixed_users(served, serving_plug, people):
    """Many at once, each answer its own user's."""
    pairs = [(text, user) for text in REQUESTS for user in [None, *USERS]] * 3

    async def run():
        client = openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=served.keys.acme, max_retries=0, timeout=60)
        async with client:
            return await asyncio.gather(*(ask(client, text, user) for text, user in pairs))

    for (text, user), answer in zip(pairs, asyncio.run(run()), strict=True):
        assert answer.choices[0].message.content == expected(serving_plug, people, text, user)


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "persona_plug"
    with pytest.raises(openai.NotFoundError, match="this gateway serves 'tiny'"):
        client.models.retrieve("gpt")


# Refusals


def test_refusals_are_openais_own_errors(client):
    with pytest.raises(openai.NotFoundError) as unknown:
        ask(client, "x", model="gpt")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="logprobs is not implemented here; leave it out") as many:
        ask(client, "x", logprobs=True)
    assert many.value.param == "logprobs"
    with pytest.raises(openai.BadRequestError) as hot:
        ask(client, "x", temperature=3)
    assert (hot.value.param, hot.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="top_k is no field of this API"):
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], extra_body={"top_k": 1}
        )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"messages": "x"}, "messages"),
        ({}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, None),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1025}, "max_tokens"),
        ({"messages": [{"role": "user", "content": "x"}], "user": "a\0b"}, "user"),
    ],
)
def test_the_field_is_named_and_nothing_repeated(http, body, param):
    answer = http.post("/v1/chat/completions", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert "wizard" not in answer.text


@pytest.mark.parametrize("content", ["{", "", "[1]", "[" * 100_000, '{"model": "tiny", "prompt": "\\ud800"}', "\xff"])
def test_a_body_that_is_no_request(http, content):
    headers = {"Content-Type": "application/json"}
    answer = http.post("/v1/completions", content=content.encode("latin-1"), headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_does_not_fit_the_llm(http, serving_plug):
    room = serving_plug.llm.config.max_position_embeddings
    chat = [{"role": "system", "content": "x" * room}, {"role": "user", "content": "x"}]
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": chat})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("PUT", "/v1/models", 405)])
def test_other_routes(http, method, path, status):
    answer = http.request(method, path)
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


# Histories


def test_a_history_through_its_life(http, client, serving_plug, people):
    path = "/v1/users/zoe/events"
    item = {"input": "rate the soup", "output": "1", "id": "e1", "timestamp": 5}
    assert http.post(path, json=item).json() == {"object": "user.events", "added": 1, "known": 0}
    assert http.post(path, json=item).json() == {"object": "user.events", "added": 0, "known": 1}
    assert (
        http.post(path, json={"events": [{"output": "no input"}, {"input": "q", "output": "a"}]}).json()["added"] == 2
    )
    listed = http.get(path).json()
    assert listed["total"] == 3
    assert listed["data"][0] == {
        "object": "user.event",
        "id": "e1",
        "timestamp": 5.0,
        "input": "rate the soup",
        "output": "1",
    }
    assert [row["output"] for row in http.get(path, params={"limit": 2}).json()["data"]] == ["no input", "a"]
    history = [{"input": "rate the soup", "output": "1"}, {"output": "no input"}, {"input": "q", "output": "a"}]
    answer = ask(client, "rate this", "zoe").choices[0].message.content
    assert answer == serving_plug.generate("rate this", history, max_new_tokens=12)

    assert http.delete(path + "/e1").json() == {"id": "e1", "object": "user.event.deleted", "deleted": True}
    assert http.delete(path + "/e1").status_code == 404
    assert http.get(path).json()["total"] == 2
    exported = [json.loads(line) for line in http.get("/v1/users/zoe/export").text.splitlines()]
    assert [(row["user_id"], row["output"]) for row in exported] == [("zoe", "no input"), ("zoe", "a")]
    assert all(any("vector" in name for name in row) for row in exported)

    gone = http.delete("/v1/users/zoe").json()
    assert gone == {"id": "zoe", "object": "user.deleted", "deleted": True, "events": 2}
    assert http.get(path).json() == {"object": "list", "data": [], "total": 0}
    assert http.get("/v1/users/zoe/export").text == ""
    nobody = ask(client, "rate this", "zoe")
    assert nobody.choices[0].message.content == expected(serving_plug, people, "rate this", None)
    assert http.delete("/v1/users/zoe").json()["events"] == 0


@pytest.mark.parametrize("user", ["a/events", "../bob", "%2e", "a b?c#d", "Zoë 🙂", "' OR 1=1 --", ".", "x" * 256])
def test_any_text_is_a_users_id(http, client, user):
    path = f"/v1/users/{quote(user, safe='').replace('.', '%2E')}"
    assert http.post(path + "/events", json={"output": "x", "id": "a/b"}).json()["added"] == 1
    assert ask(client, "rate this", user).persona_plug["history_items"] == 1
    assert http.delete(path + "/events/a%2Fb").status_code == 200
    assert http.delete(path).json() == {"id": user, "object": "user.deleted", "deleted": True, "events": 0}


@pytest.mark.parametrize("user", ["%00", "%ff", "x" * 257])
def test_what_no_database_holds_is_refused(http, user):
    assert http.get(f"/v1/users/{user}/events").json()["error"]["param"] == "user"
    assert http.delete(f"/v1/users/ann/events/{user}").json()["error"]["param"] == "event"


@pytest.mark.parametrize("body", [{"output": " "}, {"output": "x", "timestamp": "yesterday"}, {"output": "x" * 20_001}])
def test_bad_events_are_refused_and_none_is_added(http, body):
    answer = http.post("/v1/users/yan/events", json={"events": [{"output": "good"}, body]})
    assert answer.status_code == 400, answer.text
    assert http.get("/v1/users/yan/events").json()["total"] == 0


def test_an_accepted_answer_becomes_history(http, client):
    answer = ask(client, "rate this", "uma")
    stream = list(ask(client, "Köln?", "uma", stream=True))
    for ident in (answer.id, stream[0].id):
        accept = {"accept": ident}
        assert http.post("/v1/users/uma/events", json=accept).json()["added"] == 1
        assert http.post("/v1/users/uma/events", json=accept).json()["added"] == 0
        assert http.post("/v1/users/bob/events", json=accept).status_code == 404
    texts = [answer.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)]
    listed = http.get("/v1/users/uma/events").json()["data"]
    assert [(row["input"], row["output"]) for row in listed] == list(zip(["rate this", "Köln?"], texts, strict=True))
    http.delete("/v1/users/uma")
    assert http.post("/v1/users/uma/events", json={"accept": answer.id}).status_code == 404
    unknown = http.post("/v1/users/uma/events", json={"accept": "cmpl-0"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "completion_not_found")


def test_nothing_is_added_that_nobody_accepted(http, client):
    ask(client, "rate this", "ida")
    assert http.get("/v1/users/ida/events").json()["total"] == 0


def test_texts_are_kept_only_where_the_store_keeps_them(gateway):
    server = gateway(keep_text=False)
    with server.http() as http:
        assert http.post("/v1/users/ann/events", json={"input": "q", "output": "plum"}).json()["added"] == 1
        (row,) = http.get("/v1/users/ann/events").json()["data"]
        assert set(row) == {"object", "id", "timestamp"}
        assert "plum" not in http.get("/v1/users/ann/export").text
    answer = ask(server.openai(), "rate this", "ann")
    assert answer.persona_plug["history_items"] == 1


# Probes


def test_probes(gateway):
    goes_on = threading.Event()
    server = gateway(load_after=goes_on)
    with server.http() as http:
        assert http.get("/healthz").json() == {"status": "ok"}
        assert http.get("/readyz").status_code == 503
        early = http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert (early.status_code, early.json()["error"]["code"], early.headers["retry-after"]) == (503, "loading", "5")
        assert http.get("/v1/users/ann/events").status_code == 503
        goes_on.set()
        server.wait()
        assert http.get("/readyz").json() == {"status": "ready"}
        assert http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200


def test_a_model_that_cannot_be_loaded(gateway):
    server = gateway(load=lambda: 1 / 0)
    server.wait()
    assert isinstance(server.gateway.failure, ZeroDivisionError)
    assert httpx.get(server.url + "/readyz").status_code == 503


def test_metrics(gateway):
    server = gateway()
    client = server.openai()
    usage = ask(client, "rate this", "ann").usage
    list(ask(client, "rate this", "ann", stream=True))
    with pytest.raises(openai.BadRequestError):
        ask(client, "x", logprobs=True)
    shown = httpx.get(server.url + "/metrics").text
    for line in (
        'persona_plug_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'persona_plug_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        f'persona_plug_tokens_total{{kind="completion"}} {2.0 * usage.completion_tokens}',
        f'persona_plug_tokens_total{{kind="soft"}} {2.0 * usage.prompt_tokens_details.soft_tokens}',
        "persona_plug_first_token_seconds_count 1.0",
        "persona_plug_batch_rows_count 2.0",
        "persona_plug_pending 0.0",
    ):
        assert line in shown.splitlines(), line
