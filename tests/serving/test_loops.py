"""The gateway ends answers that repeat themselves, unless told not to."""

import asyncio
from dataclasses import replace

import pytest

from persona_plug.serving.engine import Answer, Call, Delta
from persona_plug.serving.vllm import VllmEngine, VllmServer
from persona_plug.serving.writing import Writer


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
    for fields in ({}, {"stop_loops": True}):
        told = ask(http, route, **forced, **fields).raise_for_status().json()
        assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == ("stop", 20)
    streamed = ask(http, route, **forced, stream=True).raise_for_status().text
    assert '"finish_reason":"stop"' in streamed.replace(" ", "")
    for value in (1, None):
        assert ask(http, route, stop_loops=value).status_code == 400


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
        for token in [97, 98, *range(99, 109), *range(99, 109), *range(99, 109)]:
            pieces.append(writer.add(token, False)[0])
            if writer.finish:
                break
        return "".join(pieces), writer.finish

    assert written(True) == written(False) == ("ab" + "cdefghijkl" * 2, "stop")


class Server(VllmServer):
    """A vLLM server that writes words, whole or piece by piece, and notes how many it was left to write."""

    def __init__(self, words):
        super().__init__("http://127.0.0.1:1", "m")
        self.words, self.written = words, 0

    async def complete(self, embeds, sampling, salt=""):
        return Answer("".join(self.words).strip(), len(self.words), "length")

    async def stream(self, embeds, sampling, salt=""):
        for i, word in enumerate(self.words):
            self.written += 1
            yield Delta(word, 1, "length" if i == len(self.words) - 1 else None)


@pytest.mark.parametrize("run", ["Thank you. ", "ha", "Let me check that for you, and come back to you. "])
def test_behind_vllm_the_text_is_watched(make_plug, run):
    plug = make_plug()
    server = Server(list("Hi Ben. " + run * 60))
    engine = VllmEngine(plug, server)
    call = Call(plug.prompter.parts("x"), plug.soft_prompt("x"), 8, stop_loops=True)

    async def streamed():
        return [delta async for delta in engine.stream(call)]

    answer, pieces = asyncio.run(engine.generate(call)), asyncio.run(streamed())
    assert answer.finish == pieces[-1].finish == "stop"
    assert answer.text == "".join(piece.text for piece in pieces)
    assert answer.text.count(run.strip(" .")) in range(2, 13)
    assert answer.tokens == len(pieces) < len(server.words) / 2
    assert server.written == 2 * len(pieces)
    whole = asyncio.run(engine.generate(replace(call, stop_loops=False)))
    assert (whole.text, whole.finish) == ("".join(server.words).strip(), "length")


def test_behind_vllm_an_answer_without_a_loop_is_untouched(make_plug):
    plug = make_plug()
    engine = VllmEngine(plug, Server(list("Hi Ben. Thank you. Goodbye, and thank you.")))
    call = Call(plug.prompter.parts("x"), plug.soft_prompt("x"), 8)
    answers = [asyncio.run(engine.generate(replace(call, stop_loops=stops))) for stops in (True, False)]
    assert answers[0] == answers[1]
