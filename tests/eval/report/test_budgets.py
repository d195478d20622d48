"""Trained methods at equal steps and at equal seconds, from what a run recorded."""

import numpy as np
import pytest
import torch

from eval.clock import LLMClock, reading_seconds
from eval.methods import METHODS, PRIOR, find_method
from eval.report.budgets import budget_note, budget_table
from eval.session import _reads_request
from persona_plug.data.history import Example, HistoryItem
from persona_plug.embedder.task_prompt import NoTokens
from persona_plug.measure.answers import evaluate
from persona_plug.models.caching import uncached
from training.recipes import make

NAMES = [*(name for name in METHODS if name != PRIOR), "plug_shuffled"]


def row(curve, lr=0.001):
    return {"curve": curve, "lr": lr}


RESULTS = {
    "methods": {
        "none": {"curve": None},
        "plug": row([[10, 4.0, 1.5], [20, 8.0, 1.2]]),
        "plug_shuffled": row(((10, 4.0, 1.5), (20, 8.0, 1.2))),  # the same training, not yet read back
        "lora": row([[10, 40.0, 1.0], [20, 80.0, 0.9]], 0.0003),
        "persoma": row([[10, 8.0, 2.0], [20, 16.0, 2.5]]),
    }
}


def test_every_method_is_held_to_the_seconds_of_the_plug():
    table = budget_table(RESULTS)
    assert [list(r) for r in table.rows] == [
        ["plug", "0.001", "20", "8.0", "1.200", "20", "1.200"],
        ["lora", "0.0003", "20", "80.0", "0.900", "2", "–"],
        ["persoma", "0.001", "20", "16.0", "2.000", "10", "2.000"],
    ]
    assert "the seconds of plug" in budget_note(RESULTS)


def test_a_run_without_training_says_so():
    results = {"methods": {"none": {"curve": None}}}
    assert budget_table(results).rows[0][0] == "nothing was trained"
    assert "no method" in budget_note(results)


def test_the_clock_tells_the_llms_share(make_plug, monkeypatch):
    plug = make_plug()
    ticks = iter([0.0, 2.0, 5.0, 10.0])  # start, into the LLM, out of it, stop
    monkeypatch.setattr("eval.clock.clock", lambda _: next(ticks))
    with LLMClock(plug) as watch:
        plug.llm(input_ids=plug.llm.dummy_inputs["input_ids"])
    assert watch.cost() == (10.0, 0.7)
    plug.llm(input_ids=plug.llm.dummy_inputs["input_ids"])  # the hooks are gone: no tick is left to take


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_the_clock_leaves_llm_and_splicer_as_they_were_after_an_exception(make_plug, llm):
    plug = make_plug(llm)
    bill = plug.splicer.bill
    parts = [plug.llm, plug.llm.get_encoder()] if llm == "tiny-t5" else [plug.llm]

    def hooks():
        return [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts]

    def block():
        with LLMClock(plug):
            assert hooks() == [2] * len(parts)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        block()
    assert hooks() == [0] * len(parts)
    assert plug.splicer.bill is bill


def test_an_encoders_passes_are_the_llms_and_count_once(make_plug, monkeypatch):
    llm = (plug := make_plug("tiny-t5")).llm
    ticks = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])  # the encoder alone 1 to 3, then both 4 to 9
    monkeypatch.setattr("eval.clock.clock", lambda _: next(ticks))
    ids = torch.tensor([[5, 6, 7]])
    with LLMClock(plug) as watch:
        llm.get_encoder()(input_ids=ids)
        llm(input_ids=ids, decoder_input_ids=ids)
    assert watch.cost() == (10.0, pytest.approx(0.3))


@pytest.mark.parametrize("answers", [("good", "bad"), None])
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_prompts_read_once_say_the_same_and_leave_no_state(make_plug, people, llm, answers):
    plug = make_plug(llm, answers=answers)
    held = [Example(f"u{i}", text, "good" if i % 2 else "bad") for i, text in enumerate(people.requests)]
    with uncached():
        once = evaluate(plug, held, 0, personal=False)
    assert (plug.splicer.cache.misses, plug.splicer.cache.used) == (0, 0)
    ahead = evaluate(plug, held, 0, personal=False)
    np.testing.assert_allclose(once.values["nll"], ahead.values["nll"], atol=1e-4)
    assert plug.splicer.cache.used > 0


def test_the_clock_charges_for_states_that_were_there_already(make_plug, monkeypatch):
    plug = make_plug()
    left = plug.prompter.parts("a question").left
    ticks = iter([0.0, 4.0, 10.0, 12.0])  # the state's start and end, then those of what is measured
    for module in ("persona_plug.splice.base", "eval.clock"):
        monkeypatch.setattr(f"{module}.clock", lambda _: next(ticks))
    plug.splicer.states([left])
    with LLMClock(plug) as watch:
        plug.splicer.states([left, left])
    seconds, outside = watch.cost()
    assert seconds == 2.0 + 4.0
    assert outside == pytest.approx(2.0 / 6.0)


def test_encoding_items_is_no_questions_cost_and_reading_the_request_is(make_plug, monkeypatch):
    plug = make_plug()
    ticks = iter([0.0, 1.0, 8.0, 10.0])  # start, into the encoder, out of it, stop
    for module in ("persona_plug.models.encoder", "eval.clock"):
        monkeypatch.setattr(f"{module}.clock", lambda _: next(ticks))
    with LLMClock(plug) as watch:
        plug.encoder.encode(["an item nobody has encoded yet"])
    assert watch.cost(reading=1.0) == (10.0 - 7.0 + 1.0, 1.0)


def test_reading_requests_is_measured_past_the_cache(make_plug, monkeypatch):
    encoder = make_plug().encoder
    texts = [f"request {i}" * (1 + i % 3) for i in range(encoder.batch_size + 3)]
    encoder.encode(texts)
    seen = []
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda ids: seen.extend(map(tuple, ids)) or forward(ids))
    ticks = iter([3.0, 5.0])
    monkeypatch.setattr("eval.clock.clock", lambda _: next(ticks))
    assert reading_seconds(encoder, texts) == 2.0
    assert sorted(seen) == sorted(tuple(encoder.ids(t)) for t in texts)


def test_those_that_read_the_requests_vector_are_charged_for_it(make_plug):
    base = make_plug()
    plugs = {n: make(find_method(n).recipe, base, {}, 0) if find_method(n).recipe else base for n in NAMES}
    free = {n for n, plug in plugs.items() if not _reads_request(find_method(n), plug)}
    prompted = {"none", "random", "recency", "bm25", "summary", "summary_profile"}
    without_user = {"task_prompt", "prefix_tuning", "lora", "lora_rag", "lora_user"}
    history_alone = {"uem", "persoma", "persoma_mlp", "persoma_transformer", "persoma_lora"}
    on_the_clock = {"plug_paper_full", "words", "words_lora"}  # they read the request while they answer
    assert free == prompted | without_user | history_alone | on_the_clock


def test_what_is_said_to_see_no_request_does_not(make_plug):
    """The soft tokens of those that are not charged for the request's vector are the same for every request."""
    base = make_plug()
    history = [HistoryItem("what was asked", "what was answered"), HistoryItem("a song", "no, thank you")]
    for name in NAMES:
        recipe = find_method(name).recipe
        if not recipe or find_method(name).prompt or "turns" in name:  # what is nearest depends on the request
            continue
        plug = make(recipe, base, {}, 0)
        if isinstance(plug.embedder, NoTokens) or plug.config.train_request:
            continue
        torch.manual_seed(0)
        with torch.no_grad():  # an untrained plug says the same to everyone
            for parameter in plug.embedder.parameters():
                parameter.normal_()
        one, other = (plug.soft_prompt(text, history) for text in ("a film about love", "the price of coal"))
        assert _reads_request(find_method(name), plug) != torch.equal(one, other) or name == "task_prompt"
