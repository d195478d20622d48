"""A plug with a words memory behind the gateway: the user's words count, and go with the user."""

import asyncio

import pytest

from persona_plug.cli.serve import _load
from persona_plug.data.history import Example
from persona_plug.errors import ConfigError
from persona_plug.export import export_soft_prompts
from persona_plug.serving.engine import Call, TransformersEngine
from persona_plug.serving.gateway import Backend
from persona_plug.serving.offline import VllmOffline
from persona_plug.serving.vllm import VllmEngine, VllmServer
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
            owners = {owner for owner, _ in plug.recollection._cache}
            assert any(owner.endswith("ann") for owner in owners)
            http.delete("/v1/users/ann").raise_for_status()
            assert not any(owner.endswith("ann") for owner, _ in plug.recollection._cache)
            assert ask() == before
    finally:
        server.close()


def test_a_store_without_texts_is_refused(plug, tmp_path):
    plug.save_pretrained(tmp_path / "plug")
    url = f"sqlite:///{tmp_path}/users.db"
    HistoryStore(url, plug.encoder).close()
    server = type("Gateway", (), {"metrics": type("Metrics", (), {"batch": type("B", (), {"observe": print})})})
    with pytest.raises(ConfigError, match=r"keeps no texts.*--keep-text"):
        _load(str(tmp_path / "plug"), url, None, None, None, "transformers", 4, "cpu", server)


@pytest.mark.parametrize(
    "use",
    [
        lambda plug, tmp_path: VllmEngine(plug, VllmServer("http://127.0.0.1:1", width=64)),
        lambda plug, tmp_path: VllmOffline.answer(None, plug, []),
        lambda plug, tmp_path: export_soft_prompts(plug, people(1, 0), tmp_path / "soft.safetensors"),
    ],
    ids=["vLLM server", "vLLM offline", "export"],
)
def test_what_cannot_read_the_memory_says_so(plug, tmp_path, use):
    with pytest.raises(ConfigError, match=r"cannot read this plug's words memory"):
        use(plug, tmp_path)
