"""A plug with LoRA adapters and turns behind both engines and the gateway."""

import asyncio
import json
import sys
import types
from contextlib import closing

import pytest
import torch

from persona_plug.cli.serve import _load
from persona_plug.data.history import Example
from persona_plug.errors import ConfigError
from persona_plug.serving.engine import Answer, Call, TransformersEngine
from persona_plug.serving.gateway import Backend
from persona_plug.serving.offline import VllmOffline
from persona_plug.serving.vllm import VllmEngine, VllmServer
from persona_plug.store.history_store import HistoryStore
from tests.test_lora import shaken

LLM = {"id": "smollm", "max_model_len": 1024, "parent": None}
OWN, OTHER = ({"id": name, "root": f"/plugs/{name}/adapter", "parent": "smollm"} for name in ("own", "other"))


@pytest.fixture(scope="module")
def plug(make_plug):
    return shaken(make_plug(differ=True, lora=2, retrieve=2, max_input_tokens=256))


@pytest.fixture(scope="module")
def examples(people):
    return [Example("", r, "", tuple(h)) for r, h in zip(people.requests, people.histories, strict=True)]


@pytest.fixture(scope="module")
def calls(plug, examples):
    """Every request as the plug answers it, and as the plain LLM does."""
    own = [
        Call(parts, plug.soft_prompt(e.input, e.history), 8)
        for e, parts in zip(examples, plug.prompts(examples), strict=True)
    ]
    plain = [Call(parts, plug.embed(None).soft[0], 8, plain=True) for parts in plug.prompts(examples, personal=False)]
    return [call for both in zip(own, plain, strict=True) for call in both]


def test_a_mixed_batch_runs_each_row_on_its_own_llm(plug, examples, calls):
    rows = []

    async def run():
        engine = TransformersEngine(plug, max_batch=16, seen=rows.append)
        answers = await asyncio.gather(*(engine.generate(call) for call in calls))
        await engine.close()
        return [answer.text for answer in answers]

    texts = asyncio.run(run())
    assert max(rows) > 1
    assert texts[::2] == plug.generate(examples, max_new_tokens=8)
    assert texts[1::2] == plug.generate(examples, personal=False, max_new_tokens=8)
    assert texts[::2] != texts[1::2]


@pytest.fixture
def gateway(plug, start, tmp_path, people_items):
    def load():
        store = HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True)
        return Backend(plug, store, TransformersEngine(plug))

    server = start(load=load)
    with server.http() as http:
        for user, items in people_items.items():
            http.post(f"/v1/users/{user}/events", json={"events": items}).raise_for_status()
        yield http
    server.close()


@pytest.mark.parametrize("user", ["ann", "bob", "nobody"])
def test_the_gateway_answers_as_the_plug_does(plug, people, gateway, user):
    history = getattr(people, user, [])
    body = {"model": "tiny", "user": user, "max_tokens": 8}
    for request in people.requests[:3]:
        for personal in (True, False):
            asked = {**body, "personal": personal}
            said = gateway.post("/v1/completions", json={**asked, "prompt": request}).raise_for_status().json()
            wanted = plug.generate([request], [history], personal=personal, max_new_tokens=8, return_details=True)[0]
            assert said["choices"][0]["text"] == wanted.text
            assert said["usage"]["prompt_tokens"] == wanted.prompt_tokens
            messages = [{"role": "user", "content": request}]
            said = gateway.post("/v1/chat/completions", json={**asked, "messages": messages}).raise_for_status().json()
            assert said["choices"][0]["message"]["content"] == wanted.text


def test_turns_stand_behind_what_the_system_says(plug, people, gateway):
    messages = [("system", "be kind"), ("user", "hello"), ("assistant", "hi"), ("user", "rate this")]
    body = {"messages": [{"role": role, "content": text} for role, text in messages]}
    told = gateway.post("/v1/chat/completions", json={"model": "tiny", "user": "eve", "max_tokens": 2, **body}).json()
    shown = [(i.input, i.output) for i in people.eve]
    parts, _ = plug.prompter.chat(messages, shown)
    soft = len(plug.soft_prompt("rate this", people.eve))
    assert told["usage"]["prompt_tokens"] == len(parts.left) + len(parts.right) + soft


def test_a_store_without_texts_is_refused_at_the_start(make_plug, tmp_path):
    plug = make_plug(retrieve=2)
    plug.save_pretrained(tmp_path / "plug")
    url = f"sqlite:///{tmp_path}/users.db"
    HistoryStore(url, plug.encoder).close()
    server = type("Gateway", (), {"metrics": type("Metrics", (), {"batch": type("B", (), {"observe": print})})})
    with pytest.raises(ConfigError, match=r"keeps no texts.*into the prompt.*--keep-text.*retrieve=0"):
        _load(str(tmp_path / "plug"), url, None, None, None, None, "transformers", 4, "cpu", server)


# --- vLLM as a server


class Vllm(VllmServer):
    """A server that lists some models and notes which one each request names."""

    def __init__(self, *cards, model=None):
        super().__init__("http://127.0.0.1:1", model)
        self.cards, self.asked, self.listed = cards, [], 0

    async def _listed(self):
        self.listed += 1
        return list(self.cards)

    async def complete(self, embeds, sampling, salt=""):
        self.asked.append((await self._body({}, sampling, salt))["model"])
        return Answer("yes", 1, "stop")


def answer_all(engine, calls):
    async def run():
        return [await engine.generate(call) for call in calls]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("cards", "named"),
    [([LLM, OWN], ""), ([OWN, LLM], ""), ([LLM, OTHER, OWN], "own"), ([LLM, OWN], "own")],
)
def test_personal_requests_name_the_adapter_and_others_the_llm(plug, calls, cards, named):
    server = Vllm(*cards)
    answer_all(VllmEngine(plug, server, named), calls[:4])
    assert server.asked == ["own", "smollm"] * 2
    assert server.listed <= 2  # once for the adapter, once for the LLM


def test_a_plug_without_adapters_names_the_llm_alone(make_plug, calls):
    server = Vllm(LLM, OWN)
    answer_all(VllmEngine(make_plug(), server), calls[:2])
    assert server.asked == ["smollm", "smollm"]


@pytest.mark.parametrize(
    ("cards", "named", "say"),
    [
        ([LLM], "", r"serves no LoRA adapter.*--enable-lora --lora-modules NAME=PLUG/adapter"),
        ([LLM], "own", r"serves no LoRA adapter"),
        ([LLM, OWN, OTHER], "", r"serves the adapters own, other; choose"),
        ([LLM, OTHER], "own", r"serves the adapters other; choose"),
    ],
)
def test_a_server_without_the_adapter_is_named(plug, calls, cards, named, say):
    server = Vllm(*cards)
    with pytest.raises(ConfigError, match=say) as refusal:
        answer_all(VllmEngine(plug, server, named), calls[:1])
    assert "\n" not in str(refusal.value)
    assert server.asked == []
    assert answer_all(VllmEngine(plug, server, named), calls[1:2])  # the plain LLM is there


def test_a_stream_names_the_adapter_too(plug, calls):
    from tests.serving.test_vllm import listening

    content = b'data: {"choices": [{"text": "a", "finish_reason": "stop"}]}\n\n'
    with listening(content=content) as (url, seen):
        server = VllmServer(url, "smollm")
        engine = VllmEngine(plug, server)
        engine.adapter, engine._adapter_found = "own", True

        async def run():
            return [delta.text async for delta in engine.stream(calls[0])]

        assert asyncio.run(run()) == ["a"]
    assert seen[0][2]["model"] == "own"


def test_the_models_of_a_real_listing_are_told_apart():
    from tests.serving.test_vllm import listening

    with listening(content=json.dumps({"data": [LLM, OWN]}).encode()) as (url, _):

        async def run():
            server = VllmServer(url)
            try:
                return await server.models(), await server.find_adapter()
            finally:
                await server.close()

        assert asyncio.run(run()) == ({"smollm": 1024}, "own")


# --- vLLM in this process


class FakeLLM:
    """Notes what it is asked."""

    def __init__(self, **options):
        self.options, self.asked = options, []
        width = types.SimpleNamespace(get_hidden_size=lambda: 64)
        core = types.SimpleNamespace(shutdown=lambda: None)
        self.llm_engine = types.SimpleNamespace(model_config=width, engine_core=core)

    def generate(self, prompts, settings, use_tqdm, lora_request):
        self.asked.append((len(prompts), lora_request))
        answer = types.SimpleNamespace(outputs=[types.SimpleNamespace(text=" yes ")])
        return [answer] * len(prompts)


@pytest.fixture
def fake_vllm(monkeypatch):
    made = types.ModuleType("vllm")
    made.LLM, made.SamplingParams = FakeLLM, lambda **fields: fields
    request = types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: types.SimpleNamespace(name=name, number=number, path=path)
    for name, module in {
        "vllm": made,
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("persona_plug.serving.offline.find_spec", lambda name: True)


def test_vllm_in_process_reads_the_adapters_from_pefts_files(plug, make_plug, examples, fake_vllm):
    from safetensors.torch import load_file

    other = shaken(make_plug(lora=2), 9)
    with VllmOffline("tiny-llama", enable_lora=True) as engine:
        assert engine.answer(plug, examples[:2]) == ["yes", "yes"]
        engine.answer(plug, examples[:1])
        engine.answer(other, examples[:1])
        engine.answer(plug, examples[:1], personal=False)
        first, again, second, plain = (request for _, request in engine.llm.asked)
        assert plain is None
        assert first is again
        assert (first.number, second.number) == (1, 2)
        state = load_file(f"{first.path}/adapter_model.safetensors")
        assert all(torch.equal(state[name], p) for name, p in plug.adapters.named_weights().items())


def test_vllm_in_process_needs_lora_switched_on(plug, examples, fake_vllm):
    with closing(VllmOffline("tiny-llama")) as engine, pytest.raises(ConfigError, match="enable_lora=True"):
        engine.answer(plug, examples[:1])
