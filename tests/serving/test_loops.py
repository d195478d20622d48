"""The gateway ends answers that repeat themselves, unless told not to."""

import asyncio

import pytest

from persona_plug.errors import DataError
from persona_plug.serving.engine import Call
from persona_plug.serving.gateway import Backend
from persona_plug.serving.vllm import VllmEngine, VllmServer
from persona_plug.serving.writing import Writer
from persona_plug.store.history_store import HistoryStore


def ask(http, route="completions", **fields):
    said = {"prompt": "rate this"} if route == "completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {"model": "tiny", "user": "ann", "max_tokens": 60, **said, **fields}
    return http.post(f"/v1/{route}", json=body)


@pytest.fixture
def http(served):
    with served.http(served.keys.acme) as made:
        yield made


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_loop_ends_the_answer(http, route):
    forced = {"logit_bias": {"70": 100}}
    whole = ask(http, route, **forced, stop_loops=False).raise_for_status().json()
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["completion_tokens"]) == ("length", 60)
    for fields in ({}, {"stop_loops": True}, {"stop_loops": None}):
        told = ask(http, route, **forced, **fields).raise_for_status().json()
        assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == ("stop", 24)
    streamed = ask(http, route, **forced, stream=True).raise_for_status().text
    assert '"finish_reason":"stop"' in streamed.replace(" ", "")
    assert ask(http, route, stop_loops=1).status_code == 400


def test_an_answer_without_a_loop_is_untouched(http, serving_plug, people):
    varied = {"temperature": 2.0, "seed": 7}
    one, other = (ask(http, **varied, stop_loops=stops).json()["choices"] for stops in (True, False))
    assert one == other
    assert one[0]["finish_reason"] == "length"
    text = ask(http, max_tokens=16).json()["choices"][0]["text"]
    assert text == serving_plug.generate("rate this", people.ann, max_new_tokens=16)


def test_a_stream_adds_up_to_the_whole_that_ended():
    def written(streams):
        writer = Writer(99, (), streams, lambda ids: "".join(map(chr, ids)), stop_loops=True)
        pieces = []
        for token in [97, 98, *range(99, 108), *range(99, 108), *range(99, 108), *range(99, 108)]:
            pieces.append(writer.add(token, False)[0])
            if writer.finish:
                break
        return "".join(pieces), writer.finish

    assert written(True) == written(False) == ("ab" + "cdefghijk" * 3, "stop")


def test_behind_vllm_it_is_refused_by_name(make_plug, start, tmp_path):
    plug = make_plug()

    class Server(VllmServer):
        async def complete(self, embeds, sampling, salt=""):
            raise AssertionError("nothing may be sent")

    engine = VllmEngine(plug, Server("http://127.0.0.1:1", "m"))
    call = Call(plug.prompter.parts("x"), plug.soft_prompt("x"), 8, stop_loops=True)
    with pytest.raises(DataError, match=r"stop_loops is not to be had behind vLLM.*repetition_penalty"):
        asyncio.run(engine.generate(call))

    def load():
        store = HistoryStore(f"sqlite:///{tmp_path}/users.db", plug.encoder, keep_text=True)
        return Backend(plug, store, engine)

    server = start(load=load)
    try:
        with server.http() as http:
            answer = ask(http, stop_loops=True)
            assert answer.status_code == 400
            assert "stop_loops" in answer.json()["error"]["message"]
            assert ask(http, stop_loops=True, stream=True).status_code == 400
    finally:
        server.close()
