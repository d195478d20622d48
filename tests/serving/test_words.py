"""A plug with a words memory behind the gateway: the user's words count, and go with the user."""

import asyncio
import importlib
import sys
import types

import pytest
import torch

from persona_plug.cli.serve import _load
from persona_plug.data.history import Example
from persona_plug.errors import ConfigError
from persona_plug.export import export_soft_prompts
from persona_plug.serving.engine import Answer, Call, EngineError, TransformersEngine
from persona_plug.serving.gateway import Backend
from persona_plug.serving.offline import VllmOffline
from persona_plug.serving.vllm import VllmEngine, VllmServer
from persona_plug.serving.vllm_request import MEMORY, WORDS_FOLDER, WORDS_LOGITS, packed_words
from persona_plug.store.history_store import HistoryStore
from tests.fit.test_words import few_steps, fitted, people  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def plug(make_plug):
    from persona_plug.data.splits import FitData

    return fitted(make_plug, FitData(people(18, 0), people(6, 1), [], "{input}", None))


@pytest.fixture(scope="module")
def samples():
    return people(6, 2)[::5]


def test_a_mixed_batch_writes_what_the_plug_alone_does(plug, samples):
    engine = TransformersEngine(plug, max_batch=8)
    rows = [*samples, Example("nobody", "the lamp is late", "")]
    readers = plug.readers(rows)
    parts = [plug.prompter.parts(e.input) for e in rows]
    calls = [Call(p, plug.soft_prompt(e.input), 10, reader=r) for e, p, r in zip(rows, parts, readers, strict=True)]
    calls.append(Call(parts[0], plug.soft_prompt(rows[0].input), 10))

    async def run():
        answers = await asyncio.gather(*(engine.generate(call) for call in calls))
        await engine.close()
        return [answer.text for answer in answers]

    texts = asyncio.run(run())
    assert texts[:-1] == plug.generate(rows, max_new_tokens=10)
    assert texts[0] != texts[-1]


def test_the_gateway_reads_a_users_words_until_they_are_forgotten(plug, samples, start, tmp_path):
    def load():
        store = HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True)
        return Backend(plug, store, TransformersEngine(plug))

    server = start(load=load)
    sample = samples[0]
    try:
        with server.http() as http:

            def ask(user="ann"):
                body = {"model": "tiny", "prompt": sample.input, "max_tokens": 10, "user": user}
                return http.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

            before = ask()
            events = [{"input": i.input, "output": i.output} for i in sample.history]
            http.post("/v1/users/ann/events", json={"events": events}).raise_for_status()
            assert ask() == plug.generate(sample.input, sample.history, max_new_tokens=10) != before
            http.delete("/v1/users/ann").raise_for_status()
            assert ask() == before
    finally:
        server.close()


def test_a_store_without_texts_is_refused(plug, tmp_path):
    plug.save_pretrained(tmp_path / "plug")
    url = f"sqlite:///{tmp_path}/users.db"
    HistoryStore(url, plug.encoder).close()
    server = type("Gateway", (), {"metrics": type("Metrics", (), {"batch": type("B", (), {"observe": print})})})
    with pytest.raises(ConfigError, match=r"keeps no texts.*--keep-text"):
        _load(str(tmp_path / "plug"), url, None, None, None, None, "transformers", 4, "cpu", server)


def test_soft_prompts_alone_are_refused(plug, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read this plug's words memory"):
        export_soft_prompts(plug, people(1, 0), tmp_path / "soft.safetensors")


def test_vllm_in_process_needs_the_plugs_folder(plug):
    with pytest.raises(ConfigError, match="words=FOLDER"):
        VllmOffline.answer(type("Vllm", (), {"words": False}), plug, [])


class Vllm(VllmServer):
    """A server that refuses what it cannot read, or reads nothing."""

    def __init__(self, reads):
        super().__init__("http://127.0.0.1:1", "m")
        self.reads, self.asked = reads, []

    async def complete(self, embeds, sampling, salt=""):
        body = await self._body({}, sampling, salt)
        memory = body.get("vllm_xargs", {}).get(MEMORY)
        self.asked.append(memory)
        if self.reads and memory == "?":
            raise EngineError(f"vLLM refused with status 400: {MEMORY}: cannot be read")
        return Answer("yes", 1, "stop")


def _call(plug, sample):
    (reader,) = plug.readers([sample])
    return Call(plug.prompter.parts(sample.input), plug.soft_prompt(sample.input), 10, reader=reader)


def test_a_vllm_server_gets_each_requests_memory(plug, samples):
    server = Vllm(reads=True)
    engine, calls = VllmEngine(plug, server), [_call(plug, sample) for sample in samples[:2]]

    async def run():
        return [(await engine.generate(call)).text for call in calls]

    assert asyncio.run(run()) == ["yes", "yes"]
    assert server.asked == ["?", *(packed_words(call.reader) for call in calls)]


def test_a_vllm_server_that_would_ignore_memories_is_refused(plug, samples):
    with pytest.raises(ConfigError, match=rf"{WORDS_FOLDER}=PLUG.*--logits-processors {WORDS_LOGITS}"):
        asyncio.run(VllmEngine(plug, Vllm(reads=False)).generate(_call(plug, samples[0])))


@pytest.fixture
def processor(plug, tmp_path, monkeypatch):
    """The logits processor as a vLLM process makes it, of a saved plug; vLLM itself is left out."""
    module = types.ModuleType("vllm.v1.sample.logits_processor")
    module.AdapterLogitsProcessor = type("Adapter", (), {"__init__": lambda self, *_: None})
    for name in ("vllm", "vllm.v1", "vllm.v1.sample"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "persona_plug.serving.words_logits", raising=False)
    monkeypatch.setenv(WORDS_FOLDER, str(plug.save_pretrained(tmp_path / "plug")))
    config = types.SimpleNamespace(model_config=types.SimpleNamespace(hf_config=plug.llm.config))
    made = importlib.import_module("persona_plug.serving.words_logits")
    yield lambda: made.WordsLogits(config, torch.device("cpu"), False)
    del sys.modules["persona_plug.serving.words_logits"]


def test_in_vllm_a_memory_is_mixed_as_in_process(plug, samples, processor):
    (reader,) = plug.readers([samples[0]])
    params = types.SimpleNamespace(extra_args={MEMORY: packed_words(reader)})
    mix = processor().new_req_logits_processor(params)
    logits = torch.randn(1, len(plug.llm.get_output_embeddings().weight), generator=torch.Generator().manual_seed(0))
    for written in ([], [5], [5, 6, 7]):
        expected = reader.mix(logits, written, len(written))[0][0]
        torch.testing.assert_close(mix(written, logits[0]), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(mix([], logits[0]), logits[0].log_softmax(-1), atol=0.1)


def test_in_vllm_other_requests_are_left_alone_and_broken_memories_refused(processor):
    made = processor()
    assert made.new_req_logits_processor(types.SimpleNamespace(extra_args=None)) is None
    assert not made.is_argmax_invariant()
    for packed in ("?", "AAAA", 7):
        with pytest.raises(ValueError, match=MEMORY):
            made.validate_params(types.SimpleNamespace(extra_args={MEMORY: packed}))


def test_in_vllm_a_plug_without_words_is_refused(processor, make_plug, tmp_path, monkeypatch):
    monkeypatch.setenv(WORDS_FOLDER, str(make_plug().save_pretrained(tmp_path / "other")))
    with pytest.raises(ConfigError, match=f"{WORDS_FOLDER}=.* is no plug with a words memory"):
        processor()
