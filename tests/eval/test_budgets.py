"""Trained methods at equal steps and at equal seconds, from what a run recorded."""

from eval.budgets import budget_note, budget_table
from eval.session import LLMClock


def row(curve, lr=0.001):
    return {"curve": curve, "lr": lr}


RESULTS = {
    "methods": {
        "none": {"curve": None},
        "plug": row([[10, 4.0, 1.5], [20, 8.0, 1.2]]),
        "plug_shuffled": row([[10, 4.0, 1.5], [20, 8.0, 1.2]]),
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


def test_the_clock_tells_the_llms_share(load_parts, monkeypatch):
    llm, _ = load_parts("tiny-llama")
    ticks = iter([0.0, 2.0, 5.0, 10.0])  # start, into the LLM, out of it, stop
    monkeypatch.setattr("eval.session.clock", lambda _: next(ticks))
    watch = LLMClock(llm)
    llm(input_ids=llm.dummy_inputs["input_ids"])
    assert watch.stop() == (10.0, 0.7)
    llm(input_ids=llm.dummy_inputs["input_ids"])  # the hooks are gone: no tick is left to take
