"""Calls that run together: they join and leave between tokens, each with its own length, faults and end."""

import asyncio
from dataclasses import replace

import pytest
import torch

from persona_plug.serving import engine as engine_module
from persona_plug.serving.engine import Call, EngineError, TransformersEngine
from persona_plug.serving.steps import CHUNK, BatchedSteps, SingleSteps


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-gpt2"])
def plug(request, make_plug):
    return make_plug(request.param, differ=True, max_input_tokens=600)


@pytest.fixture
def engine(plug):
    made = TransformersEngine(plug, max_batch=8)
    yield made
    asyncio.run(made.close())


def call(plug, people, text="rate this", tokens=12, history=None, **options):
    soft = plug.soft_prompt(text, people.ann if history is None else history)
    return Call(plug.prompter.parts(text), soft, tokens, **options)


def alone(plug, people, text, tokens):
    return plug.generate(text, people.ann, max_new_tokens=tokens)


def together(engine, calls):
    async def run():
        return await asyncio.gather(*(engine.generate(one) for one in calls), return_exceptions=True)

    return asyncio.run(run())


def test_these_llms_share_passes(engine):
    assert isinstance(engine._steps, BatchedSteps)


def test_a_short_call_is_answered_beside_a_long_one(engine, plug, people):
    """It waits neither for the end of what runs, nor for the whole of a prompt that is read."""

    async def run():
        long = asyncio.ensure_future(engine.generate(call(plug, people, "y" * 500, 300)))
        await asyncio.sleep(0.05)
        for _ in range(3):
            assert (await engine.generate(call(plug, people, "x", 1))).tokens == 1
            assert not long.done()
        return (await long).tokens

    assert asyncio.run(run()) == 300


def test_rows_of_unlike_length_run_apart_and_answer_as_alone(engine, plug, people, monkeypatch):
    widths = []
    real = engine._steps._token
    monkeypatch.setattr(engine._steps, "_token", lambda group: widths.append(list(group.lengths)) or real(group))
    texts = ["x", "rate this", "y" * 40, "long " * 60, "z" * 550]
    answers = together(engine, [call(plug, people, text, 10 + n) for n, text in enumerate(texts)])
    assert [a.text for a in answers] == [alone(plug, people, text, 10 + n) for n, text in enumerate(texts)]
    assert max(map(len, widths)) > 1
    assert all(max(w) <= 2 * min(w) + 64 or max(w) - min(w) <= 64 + 24 for w in widths)


def test_calls_join_and_leave_a_running_batch(engine, plug, people):
    async def run():
        tasks = []
        for n in range(12):
            tasks.append(asyncio.ensure_future(engine.generate(call(plug, people, f"rate {n}", 3 + 5 * (n % 4)))))
            await asyncio.sleep(0.01)
        return [task.result().text for task in tasks if await asyncio.wait([task])]

    texts = asyncio.run(run())
    assert texts == [alone(plug, people, f"rate {n}", 3 + 5 * (n % 4)) for n in range(12)]
    assert engine._steps.groups == []
    assert engine._steps.reading == {}


def test_a_prompt_that_nobody_waits_for_is_not_read_further(plug, people, monkeypatch):
    engine = TransformersEngine(plug)
    reads = []
    real = engine._steps._read
    monkeypatch.setattr(engine._steps, "_read", lambda job: reads.append(job) or real(job))
    monkeypatch.setattr(engine._steps, "chunk", 8)
    one = call(plug, people, "w" * 560, 4)
    assert one.prompt_tokens > 60 * 8

    async def run():
        task = asyncio.ensure_future(engine.generate(one))
        while not reads:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        short = await engine.generate(call(plug, people, "x", 2))
        return short.tokens

    assert asyncio.run(run()) == 2
    assert len(reads) < 60
    asyncio.run(engine.close())


def test_parts_of_a_prompt_change_nothing(plug, people):
    texts = []
    for chunk in (1, 7, CHUNK, 10_000):
        engine = TransformersEngine(plug)
        engine._steps.chunk = chunk
        texts.append(together(engine, [call(plug, people, "a rather long request " * 4, 8)])[0].text)
        asyncio.run(engine.close())
    assert set(texts) == {alone(plug, people, "a rather long request " * 4, 8)}


@pytest.mark.parametrize("fault", ["temperature", "numbers", "width", "reader", "bias", "penalty"])
def test_a_rows_fault_is_its_own(engine, plug, people, fault):
    """Beside it others get what they would get alone."""

    class Reader:
        def mix(self, *_):
            raise ValueError("quince")

    good = call(plug, people, tokens=20)
    bad = {
        "temperature": replace(good, temperature=1e-310),
        "numbers": replace(good, soft=good.soft * float("nan")),
        "width": replace(good, soft=good.soft[:, :-1]),
        "reader": replace(good, reader=Reader()),
        "bias": replace(good, logit_bias=((1 << 30, 1.0),)),
        "penalty": replace(good, logit_bias=tuple((n, float("-inf")) for n in range(len(plug.tokenizer) + 64))),
    }[fault]
    answers = together(engine, [good, bad, call(plug, people, "x", 20), good])
    expected = alone(plug, people, "rate this", 20)
    assert [answers[0].text, answers[3].text] == [expected, expected]
    assert answers[2].text == alone(plug, people, "x", 20)
    if fault == "temperature":
        assert answers[1].text == expected  # so cold that the most probable is taken
    else:
        assert isinstance(answers[1], EngineError)
        assert "quince" not in str(answers[1])


@pytest.mark.parametrize("temperature", [1e-310, 5e-324, 1e-30, 1e-6])
def test_a_very_small_temperature_takes_the_most_probable(engine, plug, people, temperature):
    (answer,) = together(engine, [call(plug, people, temperature=temperature, seed=1)])
    assert answer.text == alone(plug, people, "rate this", 12)


def test_positions_are_a_rows_own(engine, plug, people):
    """Together a long prompt and a long answer have more columns than an LLM has positions; each alone fits."""
    room = plug.llm.config.max_position_embeddings
    soft = plug.soft_prompt("x", people.ann)
    left = min(room, 1024) - len(soft) - 14
    from persona_plug.splice.prompts import PromptParts

    long = Call(PromptParts((70,) * left, (71,)), soft, 12)
    short = Call(PromptParts((70,), (71,)), soft, min(room, 1024) // 3)
    engine.ends = frozenset()
    one, two = together(engine, [long, short])
    assert (one.tokens, two.tokens) == (12, short.max_tokens)
    assert [one.text, two.text] == [together(engine, [single])[0].text for single in (long, short)]


def test_a_pass_that_fails_for_several_is_repeated_for_each(plug, people, monkeypatch):
    engine = TransformersEngine(plug)
    real, failed = engine._steps._token, []

    def token(group):
        if len(group.jobs) > 1 and len(failed) < 2:
            failed.append(len(group.jobs))
            raise RuntimeError("out of memory")
        real(group)

    monkeypatch.setattr(engine._steps, "_token", token)
    answers = together(engine, [call(plug, people, f"rate {n}", 15) for n in range(4)])
    assert failed
    assert [a.text for a in answers] == [alone(plug, people, f"rate {n}", 15) for n in range(4)]
    asyncio.run(engine.close())


def test_tenants_take_turns(plug, people):
    engine = TransformersEngine(plug, max_batch=1)
    order = []
    one = call(plug, people, tokens=6)

    async def ask(tenant):
        await engine.generate(replace(one, tenant=tenant))
        order.append(tenant)

    async def run():
        first = [asyncio.ensure_future(ask("greedy")) for _ in range(6)]
        await asyncio.sleep(0)
        await asyncio.gather(*first, *(ask(tenant) for tenant in ("modest", "other", "modest")))

    asyncio.run(run())
    assert set(order[:4]) == {"greedy", "modest", "other"}
    assert order[-1] == "greedy"
    asyncio.run(engine.close())


def test_what_ends_leaves_nothing_behind(engine, plug, people):
    together(engine, [call(plug, people, f"x{n}", 5) for n in range(5)])
    asyncio.run(asyncio.sleep(0.2))
    assert (engine._steps.groups, engine._steps.reading) == ([], {})


# LLMs whose rows cannot share a pass


@pytest.fixture(params=["tiny-t5", "tiny-llama"])
def single(request, make_plug, monkeypatch):
    monkeypatch.setattr(engine_module, "steps_for", SingleSteps)
    made = TransformersEngine(make_plug(request.param, differ=True), max_batch=3)
    assert isinstance(made._steps, SingleSteps)
    yield made
    asyncio.run(made.close())


def test_calls_of_any_llm_take_turns_at_every_token(single, people):
    plug = single.plug

    async def run():
        long = asyncio.ensure_future(single.generate(call(plug, people, "rate this", 200)))
        await asyncio.sleep(0.05)
        short = [(await single.generate(call(plug, people, f"x{n}", 2))).text for n in range(3)]
        assert not long.done()
        return short, (await long).text

    short, long = asyncio.run(run())
    assert short == [alone(plug, people, f"x{n}", 2) for n in range(3)]
    assert long == alone(plug, people, "rate this", 200)
    assert single._steps.turns == {}


def test_leaving_and_failing_end_a_call_of_any_llm_alone(single, people):
    plug = single.plug
    good = call(plug, people, tokens=10)

    async def run():
        left = asyncio.ensure_future(single.generate(replace(good, max_tokens=100_000)))
        await asyncio.sleep(0.1)
        left.cancel()
        bad = asyncio.ensure_future(single.generate(replace(good, soft=good.soft[:, :-1])))
        answer = await single.generate(good)
        return answer.text, await asyncio.gather(bad, return_exceptions=True)

    text, (error,) = asyncio.run(run())
    assert text == alone(plug, people, "rate this", 10)
    assert isinstance(error, EngineError)


def test_a_generation_config_that_asks_for_more_is_kept(make_plug, people, monkeypatch):
    plug = make_plug(differ=True)
    monkeypatch.setattr(plug.llm.generation_config, "repetition_penalty", 1.7)
    engine = TransformersEngine(plug)
    assert isinstance(engine._steps, SingleSteps)
    (answer,) = together(engine, [call(plug, people, tokens=20)])
    assert answer.text == alone(plug, people, "rate this", 20)
    asyncio.run(engine.close())
    assert torch.is_grad_enabled()
