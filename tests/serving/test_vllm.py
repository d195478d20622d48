"""vLLM behind a plug: what leaves the process, and, with real weights, the same answers as in the process.

Tests marked `services` run where vLLM is installed: `.venv-serve/bin/python -m pytest -m services tests/serving`.
"""

import asyncio
import base64
import contextlib
import http.server
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from persona_plug import PersonaPlug
from persona_plug.data import replies
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import prepare
from persona_plug.errors import ConfigError, DataError, PersonaPlugError
from persona_plug.fit.words import fit_words
from persona_plug.serving import offline
from persona_plug.serving.engine import Call, EngineError, TransformersEngine
from persona_plug.serving.offline import VllmOffline
from persona_plug.serving.vllm import VllmEngine, VllmServer
from persona_plug.serving.vllm_request import WORDS_FOLDER, WORDS_LOGITS, Sampling, prompt_embeds
from persona_plug.splice.prompts import PromptParts

GREEDY = Sampling(16)
ANSWER = {"choices": [{"text": " yes\n", "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


def ask(server, use):
    """Run `use(server)` and close the server's connections."""

    async def main():
        try:
            return await use(server)
        finally:
            await server.close()

    return asyncio.run(main())


async def collect(stream):
    return [delta async for delta in stream]


# --- what leaves the process


@contextlib.contextmanager
def listening(status=200, content=b""):
    """A server on loopback that gives one answer to everything; yields its address and the requests that it got."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.path, dict(self.headers), json.loads(body) if body else None))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{made.server_port}", seen
        finally:
            made.shutdown()
            thread.join()


def test_prompts_are_what_the_llm_gets_in_process(make_plug, people):
    plug = make_plug(differ=True)
    examples = [Example("", r, "", tuple(h)) for r, h in zip(people.requests, people.histories, strict=True)]
    with torch.no_grad():
        soft = plug.embed(plug.table(examples).batch(examples)).soft
    parts = [plug.prompter.parts(r) for r in people.requests]
    padded = plug.splicer.generation_inputs(parts, soft)
    rows = prompt_embeds(plug, parts, soft)
    for row, wide, mask in zip(rows, padded["inputs_embeds"], padded["attention_mask"], strict=True):
        assert torch.equal(row, wide[mask.bool()])
        assert row.untyped_storage().nbytes() == row.numel() * 4
    (plain,) = prompt_embeds(plug, parts[:1], [torch.zeros(0, 64)])
    assert torch.equal(plain, plug.splicer.embed((*parts[0].left, *parts[0].right)))


def test_bad_soft_tokens_become_no_prompt(make_plug):
    plug, parts = make_plug(), [PromptParts((1, 2), (3,))]
    for soft, say in [(torch.full((4, 64), float("nan")), "NaN"), (torch.zeros(4, 63), "shape")]:
        with pytest.raises(DataError, match=say):
            prompt_embeds(plug, parts, [soft])


def test_encoder_decoders_are_refused(make_plug):
    with pytest.raises(ConfigError, match="decoder-only") as refusal:
        VllmEngine(make_plug("tiny-t5"), VllmServer("http://127.0.0.1:9"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(3, 7), torch.full((3, 8), float("inf"))])
def test_the_client_sends_no_bad_tensor(tensor):
    async def use(server):
        with pytest.raises(DataError):
            await server.complete(tensor, GREEDY)
        with pytest.raises(DataError):
            await server.chat([{"role": "user", "content": "x"}], tensor, GREEDY)
        with pytest.raises(DataError):
            await collect(server.stream(tensor, GREEDY))

    with listening() as (url, seen):
        ask(VllmServer(url, "m", width=8), use)
    assert not seen


def test_a_request_holds_its_own_rows_and_nothing_else():
    users = torch.randn(50, 3, 8)

    async def use(server):
        return await server.complete(users[7], Sampling(5, 0.5, 0.9, 3, ("\n",)), "ab12")

    with listening(content=json.dumps(ANSWER).encode()) as (url, seen):
        answer = ask(VllmServer(url + "/v1/", "m", "secret"), use)
    assert (answer.text, answer.tokens, answer.finish) == ("yes", 2, "stop")
    ((path, headers, body),) = seen
    assert path == "/v1/completions"
    assert headers["Authorization"] == "Bearer secret"
    raw = base64.b64decode(body.pop("prompt_embeds"))
    assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True), users[7])
    assert len(raw) < 4096  # all users' rows alone are 4800 bytes
    assert body == {
        "model": "m",
        "max_tokens": 5,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 0,
        "seed": 3,
        "stop": ["\n"],
        "cache_salt": "ab12",
    }


def test_requests_without_a_salt_share_none(make_plug):
    plug = make_plug()

    async def use(server):
        engine = VllmEngine(plug, server)
        for salt in ("", "", "ann"):
            await engine.generate(Call(PromptParts((1,), (2,)), torch.zeros(0, 64), 4, salt=salt))

    with listening(content=json.dumps(ANSWER).encode()) as (url, seen):
        ask(VllmServer(url, "m"), use)
    first, second, named = (body["cache_salt"] for _, _, body in seen)
    assert first != second
    assert len(first) == len(second) == 32
    assert named == "ann"


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
def test_chat_puts_soft_tokens_into_the_last_user_message(placement):
    soft = torch.randn(2, 8)
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "rate this"},
    ]
    content = json.dumps(ANSWER | {"choices": [{"message": {"content": "5"}, "finish_reason": "length"}]}).encode()
    with listening(content=content) as (url, seen):
        answer = ask(VllmServer(url, "m"), lambda server: server.chat(messages, soft, GREEDY, placement=placement))
    assert (answer.text, answer.finish) == ("5", "length")
    ((path, _, body),) = seen
    assert path == "/v1/chat/completions"
    assert body["messages"][:3] == messages[:3]
    pieces = body["messages"][3]["content"]
    assert [p["type"] for p in pieces] == ["text", "prompt_embeds"][:: 1 if placement == "suffix" else -1]
    assert len(messages[3]) == 2  # what was given is left alone


def test_chat_needs_a_user_message():
    async def use(server):
        with pytest.raises(DataError, match="no user message"):
            await server.chat([{"role": "system", "content": "x"}], torch.zeros(1, 8), GREEDY)

    ask(VllmServer("http://127.0.0.1:9", "m"), use)


# --- what can go wrong

ERROR = json.dumps({"error": {"message": "too long" + "!" * 500 + "\nand more"}}).encode()
BROKEN = b'data: {"choices": [{"text": "a", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("status", "content", "say"),
    [
        (400, ERROR, "status 400: too long"),
        (502, b"<html>\nbad gateway", "status 502: <html>"),
        (500, b"", "no reason given"),
        (200, b"<html>", "does not answer as vLLM does"),
        (200, b"{}", "does not answer as vLLM does"),
        (200, b"[]", "does not answer as vLLM does"),
        (200, json.dumps(ANSWER).replace("stop", "abort").encode(), "'abort'"),
    ],
)
def test_failures_are_one_line(status, content, say):
    async def use(server):
        with pytest.raises(EngineError) as failure:
            await server.complete(torch.zeros(1, 8), GREEDY)
        return str(failure.value)

    with listening(status, content) as (url, _):
        text = ask(VllmServer(url, "m"), use)
    assert say in text
    assert "\n" not in text
    assert len(text) < 300


def test_a_stream_that_breaks_off_is_no_answer():
    async def use(server):
        with pytest.raises(EngineError, match="broke off"):
            await collect(server.stream(torch.zeros(1, 8), GREEDY))

    with listening(content=BROKEN) as (url, _):
        ask(VllmServer(url, "m"), use)
    with listening(content=BROKEN + b"data: " + ERROR + b"\n\n") as (url, _):
        ask(VllmServer(url, "m"), use)


def test_pieces_add_up_to_the_stripped_text():
    """White space of the ends is left out, that of the middle kept, and a line separator is no end of a line."""
    pieces = [(" ", None, 1), (" yes", None, 2), ("\n", None, 3), ("\u2028no ", None, 5), (" ", "length", 6)]
    chunks = [
        {"choices": [{"text": text, "finish_reason": finish}], "usage": {"completion_tokens": count}}
        for text, finish, count in pieces
    ]
    content = "".join(f"data: {json.dumps(c, ensure_ascii=False)}\n\n" for c in [{"choices": []}, *chunks]).encode()
    with listening(content=content + b"data: [DONE]\n\n") as (url, _):
        deltas = ask(VllmServer(url, "m"), lambda server: collect(server.stream(torch.zeros(1, 8), GREEDY)))
    assert [(d.text, d.tokens, d.finish) for d in deltas] == [
        ("yes", 2, None),
        ("\n\u2028no", 3, None),
        ("", 1, "length"),
    ]


def test_a_server_that_is_not_there_is_named():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

        async def use(server):
            with pytest.raises(EngineError, match=rf"{url} cannot be reached .* running") as failure:
                await server.complete(torch.zeros(1, 8), GREEDY)
            assert "\n" not in str(failure.value)

        ask(VllmServer(url, "m"), use)


def test_the_served_model_is_found_or_chosen():
    one, two = ({"data": [{"id": name} for name in names]} for names in (["a"], ["a", "b"]))

    async def use(server):
        with contextlib.suppress(EngineError):  # the same answer again is none to a completion
            await server.complete(torch.zeros(1, 8), GREEDY)
        return server.model

    with listening(content=json.dumps(one).encode()) as (url, _):
        assert ask(VllmServer(url), use) == "a"
    with listening(content=json.dumps(two).encode()) as (url, _), pytest.raises(ConfigError, match="a, b; choose"):
        ask(VllmServer(url), use)


def test_wrong_settings_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="no address"):
        VllmServer("localhost:8000")
    monkeypatch.setattr(offline, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'persona-plug\[vllm\]'"):
        VllmOffline("tiny-llama")


# --- with vLLM and real weights

HISTORIES = {
    "ann": [("tea or coffee", "tea, always"), ("rate the film", "a wonderful little film"), ("a walk", "yes, please")],
    "bob": [("rate the soup", "awful"), ("rate the play", "too long"), ("a walk", "no"), ("mornings", "never")],
    "eve": [("Grüße aus Köln", "schöne Grüße")],
    "new": [],
}
REQUESTS = ["Rate the new bakery.", "Write a title for a story about rain.", "Shall we take a walk?", "Name a fruit."]


@pytest.fixture(scope="module")
def examples():
    return [
        Example(user, request, "", tuple(HistoryItem(i, o) for i, o in items))
        for user, items in HISTORIES.items()
        for request in REQUESTS
    ]


@pytest.fixture(scope="module")
def real_plug(tmp_path_factory, perturb):
    """A saved and loaded plug whose soft tokens depend on the user."""
    folder = tmp_path_factory.mktemp("plug")
    made = PersonaPlug.build("smollm2-135m", "minilm-l6", device="cpu", words=False, max_answer_tokens=16)
    perturb(made).save_pretrained(folder)
    return PersonaPlug.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def in_process(real_plug, examples):
    texts = real_plug.generate(examples)
    by_request = [{texts[u * len(REQUESTS) + r] for u in range(len(HISTORIES))} for r in range(len(REQUESTS))]
    assert min(map(len, by_request)) == len(HISTORIES)  # users differ, so an answer for the wrong one is seen
    return texts


@pytest.fixture(scope="module")
def vllm_offline():
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with VllmOffline("smollm2-135m", dtype="float32", max_model_len=1024, enforce_eager=True) as made:
        yield made


@contextlib.contextmanager
def served(*more, **variables):
    """Address of a real server on loopback, ended when the block is; with more options and variables."""
    from persona_plug.models import zoo

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", "--enable-prompt-embeds"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "smollm", "--api-key", "secret"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", zoo.resolve("smollm2-135m")]
    command += [*options, "--enable-prompt-tokens-details", *more]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", **os.environ, **variables}
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 600
        while True:
            assert process.poll() is None, "vLLM did not start"
            assert time.monotonic() < deadline, "vLLM did not start in time"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").is_success:
                    break
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def vllm_url():
    with served() as url:
        yield url


@pytest.fixture
def server(vllm_url):
    return VllmServer(vllm_url, "smollm", "secret", width=576)


@pytest.fixture(scope="module")
def calls(real_plug, examples):
    """The examples as the gateway hands them to an engine."""
    with torch.no_grad():
        soft = real_plug.embed(real_plug.table(examples).batch(examples)).soft
    return [
        Call(real_plug.prompter.parts(e.input), soft[i], 16, salt=e.user_id) for i, e in enumerate(examples)
    ]  # fmt: skip


def services(test):
    return pytest.mark.services(pytest.mark.real(pytest.mark.slow(test)))


@services
def test_offline_greedy_text_is_that_of_the_process(vllm_offline, real_plug, examples, in_process):
    assert vllm_offline.answer(real_plug, examples, batch_size=7) == in_process


@services
def test_offline_plain_text_is_that_of_the_process(vllm_offline, real_plug, examples):
    some = examples[: len(REQUESTS)]
    assert vllm_offline.answer(real_plug, some, personal=False) == real_plug.generate(some, personal=False)


@services
def test_offline_takes_no_bad_tensor_and_obeys_its_settings(vllm_offline, real_plug, calls):
    for bad in (torch.zeros(3, 575), torch.full((3, 576), float("nan"))):
        with pytest.raises(DataError):
            vllm_offline.generate([bad], GREEDY)
    prompts = prompt_embeds(real_plug, [c.parts for c in calls[:3]], [c.soft for c in calls[:3]])
    drawn = [vllm_offline.generate(prompts, Sampling(12, 1.0, 0.9, seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    (long,) = vllm_offline.generate(prompts[:1], GREEDY)
    stop = long[len(long) // 2 :][:3]
    assert vllm_offline.generate(prompts[:1], Sampling(16, stop=(stop,))) == [long[: long.find(stop)].strip()]


@services
def test_served_greedy_text_is_that_of_the_process(server, real_plug, calls, in_process):
    async def use(server):
        engine = VllmEngine(real_plug, server)
        return await asyncio.gather(*(engine.generate(call) for call in calls))

    assert [answer.text for answer in ask(server, use)] == in_process


@services
def test_both_engines_give_the_same_answers(server, real_plug, calls, in_process):
    """Text, tokens and ends, whole and in pieces, with stop texts and different lengths, for mixed users."""
    stop = in_process[0][len(in_process[0]) // 2 :][:2]
    changes = [{}, {"stop": (stop,)}, {"max_tokens": 5}, {"max_tokens": 64}]
    asked = [replace(call, **change) for call, change in zip(calls[::4], changes, strict=True)]

    async def answers(engine):
        whole = await asyncio.gather(*(engine.generate(call) for call in asked))
        pieces = await asyncio.gather(*(collect(engine.stream(call)) for call in asked))
        for answer, deltas in zip(whole, pieces, strict=True):
            assert "".join(d.text for d in deltas) == answer.text
            assert sum(d.tokens for d in deltas) == answer.tokens
            assert [d.finish for d in deltas] == [None] * (len(deltas) - 1) + [answer.finish]
        await engine.close()
        return whole

    async def both():
        return await answers(TransformersEngine(real_plug)), await answers(VllmEngine(real_plug, server))

    here, there = asyncio.run(both())
    assert [(a.text, a.finish) for a in there] == [(a.text, a.finish) for a in here]
    assert [a.tokens for a in there] == [a.tokens for a in here]


@services
def test_a_gateway_on_vllm_answers_as_the_process_does(vllm_url, real_plug, examples, in_process, tmp_path):
    """The whole way: HTTP, the store, the plug, vLLM."""
    folder = real_plug.save_pretrained(tmp_path / "plug")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(sys.executable).parent / "persona-plug"
    command = [script, "serve", folder, "--store", f"sqlite:///{tmp_path}/users.db"]
    command += ["--keep-text", "--engine", vllm_url, "--port", port]
    process = subprocess.Popen([str(c) for c in command], env={**os.environ, "VLLM_API_KEY": "secret"})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            deadline = time.monotonic() + 180
            while True:
                assert process.poll() is None
                assert time.monotonic() < deadline
                with contextlib.suppress(httpx.TransportError):
                    if http.get("/readyz").is_success:
                        break
                time.sleep(0.2)
            for user, items in HISTORIES.items():
                if items:
                    events = [{"input": i, "output": o} for i, o in items]
                    http.post(f"/v1/users/{user}/events", json={"events": events}).raise_for_status()
            said = []
            for e in examples:
                body = {"model": "plug", "user": e.user_id, "max_tokens": 16}
                body["messages"] = [{"role": "user", "content": e.input}]
                answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
                said.append(answer["choices"][0]["message"]["content"])
        assert said == in_process
    finally:
        process.terminate()
        process.wait(60)


@services
def test_chat_is_the_template_with_the_soft_tokens_behind_the_text(server, real_plug, calls):
    """What the server builds is known: text, a line break, soft tokens, inside the user's turn."""
    asked = [calls[0], calls[4], calls[8]]  # one request of three users

    async def use(server):
        messages = [{"role": "user", "content": REQUESTS[0]}]
        whole = await asyncio.gather(*(server.chat(messages, c.soft, GREEDY, c.salt) for c in asked))
        pieces = [await collect(server.stream_chat(messages, c.soft, GREEDY, c.salt)) for c in asked]
        assert ["".join(d.text for d in deltas) for deltas in pieces] == [a.text for a in whole]
        return [answer.text for answer in whole]

    prompter = real_plug.prompter
    left = (*prompter.before, *prompter.ids(REQUESTS[0] + "\n"))
    parts = [PromptParts(left, tuple(prompter.after))] * len(asked)
    inputs = real_plug.splicer.generation_inputs(parts, [c.soft for c in asked])
    out = real_plug.llm.generate(**inputs, max_new_tokens=GREEDY.max_tokens, do_sample=False, pad_token_id=2)
    wanted = [text.strip() for text in real_plug.tokenizer.batch_decode(out, skip_special_tokens=True)]
    assert len(set(wanted)) == len(asked)
    assert ask(server, use) == wanted


@services
def test_no_prefix_is_reused_across_salts(server):
    embeds = torch.randn(400, 576, generator=torch.Generator().manual_seed(3))

    async def cached(server, salt):
        body = await server._body(server._prompt(embeds), Sampling(1), salt)
        async with server._sent("POST", "completions", body) as response:
            usage = json.loads(await response.aread())["usage"]
        return (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    async def use(server):
        ann, bob = secrets.token_hex(8), secrets.token_hex(8)
        return [await cached(server, salt) for salt in (ann, ann, bob, "", "")]

    first, again, other, *unnamed = ask(server, use)
    assert again > 0  # so that the zeros say something
    assert [first, other, *unnamed] == [0, 0, 0, 0]


@services
def test_leaving_a_stream_ends_the_work(server, vllm_url, real_plug, calls):
    def running():
        lines = httpx.get(vllm_url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    async def use(server):
        stream = VllmEngine(real_plug, server).stream(replace(calls[1], max_tokens=900))
        await anext(stream)
        during = await asyncio.to_thread(running)
        await stream.aclose()
        for _ in range(50):
            if not await asyncio.to_thread(running):
                return during
            await asyncio.sleep(0.1)
        return None

    assert ask(server, use) == 1


@services
def test_refusals_of_the_server_are_one_line(vllm_url, real_plug, calls):
    def fails(server, embeds):
        async def use(server):
            with pytest.raises(PersonaPlugError) as failure:
                await server.complete(embeds, GREEDY)
            return str(failure.value)

        text = ask(server, use)
        assert "\n" not in text
        return text

    assert "status 404" in fails(VllmServer(vllm_url, "other", "secret"), torch.zeros(2, 576))
    assert "status 401" in fails(VllmServer(vllm_url, "smollm", "wrong"), torch.zeros(2, 576))
    assert "1024" in fails(VllmServer(vllm_url, None, "secret"), torch.zeros(1100, 576))
    assert "status 400" in fails(VllmServer(vllm_url, "smollm", "secret"), torch.zeros(2, 575))  # no width was given


@pytest.mark.services
@pytest.mark.real
def test_a_comparison_written_by_vllm_has_the_texts_of_transformers(tmp_path):
    from eval import run, tiny

    tiny.write(tmp_path / "data", "text")
    common = [f"data={tmp_path / 'data'}", "task=LaMP_5", "encoder=tiny-encoder", "methods=[none, plug, bm25]"]
    common += ["generated=4", "fit={steps: 2, batch_size: 4, eval_every: 1, eval_samples: 4}"]
    engine = "vllm={dtype: float32, max_model_len: 512, enforce_eager: true}"
    texts = []
    for name in ("transformers", "vllm"):
        out = tmp_path / name
        run.main([*common, f"generator={name}", engine, f"out={out}"])
        texts.append({m: (out / "predictions" / f"{m}.json").read_text() for m in ("none", "plug", "bm25")})
    assert texts[0] == texts[1]


# --- a user's own words in vLLM


ADAPTED = [0, 4]
LORA = {"enable_lora": True, "max_lora_rank": 8}


@pytest.fixture(scope="module", params=ADAPTED, ids=["frozen", "with adapters"])
def words_plug(tmp_path_factory, request):
    """A saved and loaded plug with a words memory, fitted on a few generated replies, and its folder."""
    made = replies.build(10, 5, held_out=0.0)
    data = prepare(made.records, template=made.template, held_out=0.0, valid=0.3, answers=None)
    plug = PersonaPlug.build(
        "smollm2-135m", "minilm-l6", device="cpu", recipe="words", max_answer_tokens=32, template=data.template,
        lora=request.param,
    )  # fmt: skip
    if request.param:
        torch.manual_seed(0)
        with torch.no_grad():
            for matrix in plug.adapters.parameters():  # an untrained adapter changes nothing
                matrix.normal_(std=0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persona_plug.heads.fitting.STEPS", 75)
        fit_words(plug, data.train, data.valid)
    folder = plug.save_pretrained(tmp_path_factory.mktemp("words"))
    return PersonaPlug.from_pretrained(folder, device="cpu"), folder


@pytest.fixture(scope="module")
def replies_asked():
    """Users of other replies, one of them without a history."""
    rows = replies.build(6, 5, 1, held_out=0.0).records
    users = {
        r["user_id"]: [HistoryItem(q["input"], q["output"]) for q in rows if q["user_id"] == r["user_id"]] for r in rows
    }
    asked = [Example(u, items[-1].input, "", tuple(items[:-1])) for u, items in users.items()]
    return [*asked[:3], replace(asked[3], history=())]


@services
def test_words_are_mixed_in_vllm_as_in_the_process(words_plug, replies_asked):
    """Greedy text of a mixed batch, and no change where there is no memory."""
    plug, folder = words_plug
    expected = plug.generate(replies_asked)
    with plug.recollection.paused():
        assert sum(a != b for a, b in zip(plug.generate(replies_asked), expected, strict=True)) >= 3
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    options = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": True}
    options |= LORA if plug.config.lora else {}
    with VllmOffline("smollm2-135m", words=folder, **options) as made:
        assert made.answer(plug, replies_asked) == expected
        assert made.answer(plug, replies_asked, personal=False) == plug.generate(replies_asked, personal=False)


@services
def test_a_server_mixes_each_requests_words(words_plug, replies_asked):
    plug, folder = words_plug
    expected = plug.generate(replies_asked)
    readers = plug.readers(replies_asked)
    soft = [plug.soft_prompt(e.input) for e in replies_asked]
    calls = [
        Call(plug.prompter.parts(e.input), s, 32, reader=r)
        for e, s, r in zip(replies_asked, soft, readers, strict=True)
    ]

    async def use(server):
        engine = VllmEngine(plug, server)
        return await asyncio.gather(*(engine.generate(call) for call in calls))

    more = ["--logits-processors", WORDS_LOGITS]
    if plug.config.lora:
        more += ["--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"mine={folder}/adapter"]
        more += ["--lora-target-modules", "q_proj", "k_proj", "v_proj"]
    with served(*more, **{WORDS_FOLDER: str(folder)}) as url:
        answers = ask(VllmServer(url, "smollm", "secret", width=576), use)
    assert [answer.text for answer in answers] == expected


@services
def test_a_real_server_without_the_processor_is_refused(server, words_plug, replies_asked):
    plug, _ = words_plug
    (reader,) = plug.readers(replies_asked[:1])
    call = Call(plug.prompter.parts("x"), plug.soft_prompt("x"), 4, reader=reader)
    with pytest.raises(ConfigError, match="--logits-processors"):
        ask(server, lambda server: VllmEngine(plug, server).generate(call))
