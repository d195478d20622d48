"""Options of generation that cannot work are one line."""

import pytest

from persona_plug.data.history import Example
from persona_plug.dataset import PlugDataset
from persona_plug.errors import ConfigError, DataError
from persona_plug.generation import OWN

HISTORY = [{"input": "a", "output": "b"}]


@pytest.fixture(scope="module")
def plug(make_plug):
    return make_plug(differ=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 5}, "no option 'max_tokens'; did you mean 'max_new_tokens'?"),
        ({"tempreature": 0.5}, "did you mean 'temperature'?"),
        ({"seed": 3}, "generate knows no option 'seed'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number from 1 up"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5' must be"),
        ({"num_beams": 0}, "num_beams=0 must be"),
        ({"num_return_sequences": -1}, "num_return_sequences=-1 must be"),
        ({"num_return_sequences": 3}, "num_return_sequences"),  # greedy
        ({"do_sample": True, "temperature": 0.0}, "do_sample=False"),
        ({"do_sample": True, "temperature": "hot"}, "cannot generate with these options"),
        ({"repetition_penalty": 0}, "strictly positive"),
        ({"num_beams": 2, "streamer": print}, "num_beams"),
    ],
    ids=repr,
)
def test_options_that_cannot_work_are_named(plug, options, said):
    with pytest.raises(ConfigError) as refusal:
        plug.generate("hello", HISTORY, **{"max_new_tokens": 2, **options})
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "options", [{"num_beams": None}, {"no_repeat_ngram_size": 2}, {"stop_strings": ["x"]}], ids=str
)
def test_what_transformers_takes_is_passed_on(plug, options):
    assert isinstance(plug.generate("hello", HISTORY, max_new_tokens=2, **options), str)


@pytest.mark.parametrize(
    ("request_", "history"), [("he\ud800llo", []), ("hello", ["a\udfff"]), ("hello", [("a\ud800", "b")])], ids=ascii
)
def test_half_a_character_is_named(plug, request_, history):
    for call in (plug.generate, plug.soft_prompt):
        with pytest.raises(DataError, match="half a character"):
            call(request_, history)


def test_a_batch_holds_something(plug):
    with pytest.raises(ConfigError, match="batch_size=0 must be at least 1"):
        plug.generate(["a", "b"], HISTORY, batch_size=0)


def test_candidates_are_texts(plug):
    with pytest.raises(ConfigError, match="candidates must be texts, not 1"):
        plug.choose("x", [1, 2])


@pytest.mark.parametrize("name", OWN)
def test_what_the_llm_reads_and_runs_is_no_option(plug, name):
    with pytest.raises(ConfigError, match=f"{name} is no option here"):
        plug.generate("hello", HISTORY, **{name: True})
    assert plug.generate("hello", HISTORY, max_new_tokens=1, **{name: None}) is not None


@pytest.mark.parametrize("llm", ["tiny-gpt2", "tiny-llama"])
def test_an_answer_ends_where_the_positions_end(make_plug, llm):
    plug = make_plug(llm)
    positions = plug.prompter.limits.positions
    room = positions - len(plug.prompter.parts("hello")) - plug.config.soft_tokens
    for count in (room, room + 1):  # the last token that is written is not read
        assert plug.score("hello", ["x" * count, "y"], HISTORY).isfinite().all()
    with pytest.raises(DataError, match=f"goes beyond the LLM's {positions}; lower max_input_tokens"):
        plug.score("hello", ["x" * (room + 2), "y"], HISTORY)
    with pytest.raises(DataError, match=f"goes beyond the LLM's {positions}; lower max_input_tokens"):
        plug.generate("hello", HISTORY, max_new_tokens=room + 2)


def test_samples_beyond_the_positions_are_refused_before_a_training(make_plug):
    plug = make_plug("tiny-gpt2", max_input_tokens=900, max_answer_tokens=300)
    with pytest.raises(DataError, match="goes beyond the LLM's 1024"):
        PlugDataset(plug, [Example("u", "w" * 890, "x" * 290)])
