"""How strongly a user's history counts, by request: through the gateway, in a mixed batch, and to vLLM."""

import asyncio
import base64

import pytest
import torch

from persona_plug.data.history import Example
from persona_plug.data.splits import FitData
from persona_plug.heads.packing import unpack_memory
from persona_plug.serving.engine import Call, TransformersEngine
from persona_plug.serving.gateway import Backend
from persona_plug.serving.vllm import VllmEngine
from persona_plug.serving.vllm_request import MEMORY, packed_words
from persona_plug.store.history_store import HistoryStore
from tests.fit.test_words import few_steps, fitted  # noqa: F401 (a fixture)
from tests.fit.test_words import people as greeters
from tests.serving.test_words import Vllm
from tests.test_lora import shaken

STRENGTHS = [1, 1.0, 0.5, 0.25, 0, 0.0]


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-t5"])
def plug(request, make_plug):
    return shaken(make_plug(request.param, differ=True, lora=2, max_input_tokens=256))


@pytest.fixture
def http(plug, start, tmp_path, people_items):
    def load():
        store = HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True)
        return Backend(plug, store, TransformersEngine(plug))

    server = start(load=load)
    with server.http() as http:
        for user, items in people_items.items():
            http.post(f"/v1/users/{user}/events", json={"events": items}).raise_for_status()
        yield http
    server.close()


def test_a_request_says_how_much_its_users_history_counts(plug, people, http):
    for user in ("ann", "bob"):
        for strength in STRENGTHS:
            body = {"model": "tiny", "user": user, "max_tokens": 8, "prompt": "rate this", "strength": strength}
            told = http.post("/v1/completions", json=body).raise_for_status().json()
            wanted = plug.generate("rate this", getattr(people, user), strength=strength, max_new_tokens=8)
            assert told["choices"][0]["text"] == wanted
            assert told["persona_plug"]["personal"] == (strength > 0)
    history = people.ann
    texts = [plug.generate("rate this", history, strength=s, max_new_tokens=8) for s in STRENGTHS]
    assert texts[-1] == plug.generate("rate this", personal=False, max_new_tokens=8)
    if not plug.llm.config.is_encoder_decoder:  # the random one says one thing to everybody
        assert len(set(texts)) > 2


@pytest.mark.parametrize("strength", [-0.1, 1.5, "1", True, None])
def test_other_values_are_refused(http, strength):
    body = {"model": "tiny", "user": "ann", "prompt": "rate this", "strength": strength}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "strength"
    assert "\n" not in answer.json()["error"]["message"]


def test_a_token_for_each_item_is_refused_by_name(make_plug, start, tmp_path, people_items):
    plug = make_plug(aggregator="uem")

    def load():
        store = HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True)
        return Backend(plug, store, TransformersEngine(plug))

    server = start(load=load)
    try:
        with server.http() as http:
            body = {"model": "tiny", "user": "ann", "prompt": "rate this", "strength": 0.5}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 400
            assert "aggregator='uem'" in answer.json()["error"]["message"]
            assert http.post("/v1/completions", json={**body, "strength": 0}).status_code == 200
    finally:
        server.close()


@pytest.fixture(scope="module")
def words_plug(make_plug):
    return fitted(make_plug, FitData(greeters(18, 0), greeters(6, 1), [], "{input}", None))


def calls_of(plug, strengths):
    samples = greeters(6, 2)[:: len(greeters(6, 2)) // len(strengths)]
    rows = [Example("", e.input, "", e.history, strength=s or 1) for e, s in zip(samples, strengths, strict=False)]
    calls = []
    for row, strength, reader in zip(rows, strengths, plug.readers(rows), strict=True):
        if strength:
            soft = plug.embed(plug.table([row]).batch([row])).soft[0]
            calls.append(Call(plug.prompts([row])[0], soft, 10, reader=reader))
        else:
            calls.append(Call(plug.prompts([row], False)[0], plug.embed(None).soft[0], 10, plain=True))
    return rows, calls


def test_calls_of_one_batch_have_their_own(words_plug):
    strengths = [1.0, 0.5, 0, 0.05]
    rows, calls = calls_of(words_plug, strengths)

    async def run():
        engine = TransformersEngine(words_plug, max_batch=8)
        answers = await asyncio.gather(*(engine.generate(call) for call in calls))
        await engine.close()
        return [answer.text for answer in answers]

    alone = [
        words_plug.generate(row.input, row.history, strength=strength, max_new_tokens=10)
        for row, strength in zip(rows, strengths, strict=True)
    ]
    assert asyncio.run(run()) == alone
    assert alone[3] != words_plug.generate(rows[3].input, rows[3].history, max_new_tokens=10)


def test_a_vllm_server_is_told(words_plug):
    server, (_, calls) = Vllm(reads=True), calls_of(words_plug, [1.0, 0.5])
    engine = VllmEngine(words_plug, server)

    async def run():
        for call in calls:
            await engine.generate(call)

    asyncio.run(run())
    assert server.asked[0] == "?"
    strengths = [unpack_memory(base64.b64decode(packed))[-1] for packed in server.asked[1:]]
    assert strengths == [1.0, 0.5]


def test_in_vllm_a_memory_counts_less_too(words_plug, tmp_path, monkeypatch):
    from tests.serving.test_words import processor

    row = Example("", greeters(6, 2)[0].input, "", greeters(6, 2)[0].history, strength=0.5)
    (reader,) = words_plug.readers([row])
    makes = processor.__wrapped__(words_plug, tmp_path, monkeypatch)
    params = type("Params", (), {"extra_args": {MEMORY: packed_words(reader)}})
    logits = torch.randn(1, len(words_plug.llm.get_output_embeddings().weight))
    mixed = next(makes)().new_req_logits_processor(params)([5], logits[0])
    torch.testing.assert_close(mixed, reader.mix(logits, [5], 1)[0][0], atol=1e-4, rtol=0)
    next(makes, None)
