"""The benchmarks of the LLM's passes compare what they say; counted work shows it on any machine."""

import pytest

from eval.bench.settings import BenchSettings
from eval.bench.steps import rows, steps

SETTINGS = BenchSettings(llm="tiny-llama", encoder="tiny-encoder", batch=2, input_tokens=64, answer_tokens=4, pairs=1)


def test_rows_of_unlike_length_cost_less_apart():
    found = rows(SETTINGS)
    assert 0.2 < found["FLOPs: rows apart / one pass"] < 0.7


def test_a_step_behind_the_input_costs_less_than_one_in_front():
    found = steps(SETTINGS)
    assert found["FLOPs: suffix step, states kept / prefix step"] < 0.5
    assert found["FLOPs: prefix step / floor"] == pytest.approx(1, abs=0.4)
