"""Answers that repeat themselves end where it is asked for, and no others change."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.errors import ConfigError
from persona_plug.generation import is_loop, without_loop

RUN = list(range(70, 81))


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=14), st.integers(1, 5))
def test_a_loop_is_the_same_run_twice(start, run, times):
    text = start + run * times
    assert is_loop([ord(c) for c in text]) == bool(re.search(r"(.{10,})\1$", text))


def test_runs_are_ten_tokens_or_more():
    assert is_loop([1] * 20)
    assert not is_loop([1] * 19)
    assert is_loop([5, *RUN * 2])
    assert not is_loop([*RUN * 2, 5])
    assert not is_loop([*RUN, *RUN[:-1], 5])
    assert not is_loop([])


def test_a_loop_is_left_once():
    assert without_loop([5, *RUN * 2]) == [5, *RUN]
    assert without_loop([5, *RUN]) == [5, *RUN]
    assert without_loop([]) == []


class Forced:
    """Has the first row of a batch say the same run again and again, behind two tokens of its own."""

    def __init__(self, start):
        self.start = start

    def __call__(self, ids, scores):
        written = ids.shape[1] - self.start
        if written >= 2:
            scores = scores.clone()
            scores[0, RUN[(written - 2) % len(RUN)]] = 1e4
        return scores


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
@pytest.mark.parametrize("sample", [False, True])
def test_generate_ends_loops_unless_told_not_to(make_plug, people, llm, sample):
    plug = make_plug(llm, differ=True)
    start = len(plug.splicer.start)

    def write(count, **more):
        torch.manual_seed(5)
        options = {"max_new_tokens": count, "do_sample": sample, "temperature": 3.0, **more}
        return plug.generate(people.requests, people.histories, logits_processor=[Forced(start)], **options)

    once, whole, ended = write(2 + len(RUN)), write(40, stop_loops=False), write(40)
    assert write(40, stop_loops=True) == ended
    assert ended[0] == once[0] != whole[0]
    if sample:  # the others say something new all the time
        assert ended[1:] == whole[1:]


def test_other_values_are_refused(make_plug):
    with pytest.raises(ConfigError, match="stop_loops='yes' must be True or False"):
        make_plug().generate("x", stop_loops="yes")
    with pytest.raises(ConfigError, match="stop_loops=True does not go with num_beams"):
        make_plug().generate("x", stop_loops=True, num_beams=2)
