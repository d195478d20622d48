"""The engine in this process: many users at once, each with what they would get alone."""

import asyncio
import threading

import pytest

from persona_plug.serving.engine import Call, EngineError, TransformersEngine


@pytest.fixture(scope="module", params=["suffix", "prefix"])
def plug(request, make_plug):
    return make_plug(differ=True, placement=request.param)


@pytest.fixture(scope="module")
def rows():
    return []


@pytest.fixture(scope="module")
def engine(plug, rows):
    made = TransformersEngine(plug, max_batch=4, seen=rows.append)
    yield made
    asyncio.run(made.close())


@pytest.fixture
def calls(plug, people):
    def make(max_tokens=12, **options):
        pairs = zip(people.requests, people.histories, strict=True)
        return [Call(plug.prompter.parts(r), plug.soft_prompt(r, h), max_tokens, **options) for r, h in pairs]

    return make


def together(engine, calls):
    async def run():
        return await asyncio.gather(*(engine.generate(call) for call in calls))

    return asyncio.run(run())


def streamed(engine, call):
    async def run():
        return [delta async for delta in engine.stream(call)]

    return asyncio.run(run())


def test_users_in_one_batch_get_what_the_plug_alone_gives_them(engine, calls, plug, people, rows):
    rows.clear()
    texts = [answer.text for answer in together(engine, calls())]
    assert texts == [
        plug.generate(r, h, max_new_tokens=12) for r, h in zip(people.requests, people.histories, strict=True)
    ]
    assert len(set(texts)) > 3
    assert len(rows) == len(texts)
    assert 1 < max(rows) <= 4


def test_no_soft_tokens_is_the_plain_llm(engine, plug):
    call = Call(plug.prompter.parts("rate this"), plug.embed(None).soft[0], 12)
    assert together(engine, [call])[0].text == plug.generate("rate this", personal=False, max_new_tokens=12)


def test_a_stream_adds_up_to_the_whole(engine, calls):
    for call in calls():
        (whole,) = together(engine, [call])
        pieces = streamed(engine, call)
        assert "".join(p.text for p in pieces) == whole.text
        assert sum(p.tokens for p in pieces) == whole.tokens
        assert [p.finish for p in pieces] == [None] * (len(pieces) - 1) + [whole.finish]
        assert len(pieces) > 1


def test_rows_end_at_their_own_limits(engine, calls):
    limited = [Call(c.parts, c.soft, n) for n, c in enumerate(calls(), start=1)]
    for n, answer in enumerate(together(engine, limited), start=1):
        assert (answer.tokens, answer.finish) == (n, "length")


def test_the_end_token_ends_an_answer(engine, calls, monkeypatch):
    """A token that the answer holds is declared an end token."""
    call = calls()[0]
    (whole,) = together(engine, [call])
    ids = engine.tokenizer(whole.text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(engine, "ends", frozenset(ids))
    (ended,) = together(engine, [call])
    assert ended.finish == "stop"
    assert ended.tokens < whole.tokens


def test_a_stop_text_ends_an_answer(engine, calls):
    call = calls()[0]
    (whole,) = together(engine, [call])
    middle = whole.text[len(whole.text) // 2]
    stopping = Call(call.parts, call.soft, 12, stop=("nothing that occurs", middle))
    (answer,) = together(engine, [stopping])
    assert (answer.text, answer.finish) == (whole.text[: whole.text.index(middle)].strip(), "stop")
    assert "".join(p.text for p in streamed(engine, stopping)) == answer.text


def test_sampling_is_a_rows_own(engine, calls):
    greedy, warm = calls(), calls(temperature=1.5, seed=3)
    alone = [together(engine, [call])[0].text for call in warm[:2]]
    mixed = together(engine, [greedy[0], warm[0], greedy[1], warm[1]])
    assert [mixed[1].text, mixed[3].text] == alone
    assert [mixed[0].text, mixed[2].text] == [a.text for a in together(engine, greedy[:2])]
    assert mixed[0].text != mixed[1].text
    other = Call(warm[0].parts, warm[0].soft, 12, temperature=1.5, seed=4)
    assert together(engine, [other])[0].text != alone[0]


def test_leaving_a_stream_frees_its_place(engine, calls):
    """The batch ends long before the tokens that were asked for."""
    call = calls()[0]
    endless = Call(call.parts, call.soft, 100_000)

    async def run():
        stream = engine.stream(endless)
        await anext(stream)
        await stream.aclose()
        return await asyncio.wait_for(engine.generate(call), 20)

    assert asyncio.run(run()).tokens == 12


def test_cancelling_an_answer_frees_its_place(engine, calls):
    call = calls()[0]

    async def run():
        task = asyncio.ensure_future(engine.generate(Call(call.parts, call.soft, 100_000)))
        await asyncio.sleep(0.2)
        task.cancel()
        return await asyncio.wait_for(engine.generate(call), 20)

    assert asyncio.run(run()).tokens == 12


def test_one_bad_call_does_not_end_the_engine(engine, calls, caplog):
    call = calls()[0]
    bad = Call(call.parts, call.soft[:, :-1], 4)  # too narrow for the LLM
    with pytest.raises(EngineError, match=r"the LLM failed \(RuntimeError\)"):
        together(engine, [bad])
    assert "sizes" not in caplog.text.lower(), "messages of exceptions may quote texts"
    assert together(engine, [call])[0].tokens == 12


def test_nothing_of_a_prompt_is_kept(plug, engine, calls):
    together(engine, calls())
    assert plug.splicer.cache.used == 0


def test_closing_refuses_what_waits_and_ends_the_thread(plug, calls):
    engine = TransformersEngine(plug, max_batch=1)
    endless = Call(calls()[0].parts, calls()[0].soft, 100_000)

    async def run():
        tasks = [asyncio.ensure_future(engine.generate(endless)) for _ in range(3)]
        await asyncio.sleep(0.2)
        await asyncio.wait_for(engine.close(), 20)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for outcome in asyncio.run(run()):
        assert isinstance(outcome, EngineError)
        assert "shutting down" in str(outcome)
    with pytest.raises(EngineError, match="closed"):
        together(engine, calls())
    assert not engine._worker.is_alive()
    assert threading.active_count() < 20


def test_an_encoder_decoder_answers_too(make_plug, people):
    plug = make_plug("tiny-t5", differ=True)
    engine = TransformersEngine(plug)
    pairs = list(zip(people.requests, people.histories, strict=True))
    made = [Call(plug.prompter.parts(r), plug.soft_prompt(r, h), 8) for r, h in pairs]
    try:
        texts = [answer.text for answer in together(engine, made)]
    finally:
        asyncio.run(engine.close())
    assert texts == [plug.generate(r, h, max_new_tokens=8) for r, h in pairs]
