"""Profiles in words: counted ones, and those that the plain LLM writes once."""

import dataclasses
import logging
import sqlite3
import warnings
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from eval.prompts import summaries
from eval.prompts.lamp import count_tokens
from eval.prompts.summaries import REQUESTS, Summaries, fitting, profile_text, with_profile
from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, CorruptFileError
from persona_plug.models import zoo
from persona_plug.plug import PersonaPlug
from training.tasks import load_task

TAGS = load_task("LaMP_2")
SCORES = load_task("LaMP_3")
TITLES = load_task("LaMP_5")


def answers(*outputs):
    return [HistoryItem(f"request {i}", output) for i, output in enumerate(outputs)]


@pytest.fixture
def asked(monkeypatch):
    """Prompts that the LLM gets, one list a call; it answers with a number each."""
    calls = []

    def generate(self, inputs, **options):
        calls.append(list(inputs))
        assert options["personal"] is False
        assert options["no_repeat_ngram_size"] == summaries.NO_REPEAT
        return [f" Summary\n {sum(map(len, calls)) - len(inputs) + i} " for i in range(len(inputs))]

    monkeypatch.setattr(PersonaPlug, "generate", generate)
    return calls


@pytest.fixture
def make(make_plug, tmp_path):
    def make(llm="tiny-llama", folder=tmp_path, template="Rate it: {input}", **settings):
        options = {"max_tokens": 600, "max_new_tokens": 8, **settings}
        return Summaries(make_plug(llm, template=template), folder, **options)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes."""
    return AutoTokenizer.from_pretrained(zoo.pull("tiny-llama"))


# Counted profiles


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([], ""),
        (["", " "], ""),
        (["comedy"], 'This person mostly answers "comedy" (1 of 1).'),
        (["b", "a ", "a", "b", "b"], 'This person mostly answers "b" (3 of 5), also "a" (2).'),
        (
            ["5", "4", "5", "1"],
            'This person mostly answers "5" (2 of 4), also "1" (1) and "4" (1). The average is 3.8.',
        ),
        (
            [*"aaabbbbccdefg"],
            'This person mostly answers "b" (4 of 13), also "a" (3), "c" (2), "d" (1) and "e" (1).',
        ),
        (["nan", "1"], 'This person mostly answers "1" (1 of 2), also "nan" (1).'),
    ],
)
def test_a_counted_profile_says_what_the_user_mostly_answers(outputs, expected):
    assert profile_text(answers(*outputs)) == expected


@given(st.permutations(["a", "a", "b", "c", "c", "d"]))
def test_the_order_of_items_does_not_change_a_counted_profile(outputs):
    assert (
        profile_text(answers(*outputs)) == 'This person mostly answers "a" (2 of 6), also "c" (2), "b" (1) and "d" (1).'
    )


def test_a_profile_stands_in_front_of_the_request():
    assert with_profile("Likes {tea}.", "{input}?") == "Likes {tea}.\n\n{input}?"
    assert with_profile(" ", "What?") == "What?"


@given(st.text(max_size=30), st.text(max_size=30), st.integers(0, 80))
def test_a_profile_leaves_room_for_the_whole_request(tokenizer, profile, text, limit):
    kept = fitting(profile, text, tokenizer, limit)
    assert profile.startswith(kept)
    if count_tokens(tokenizer, with_profile(profile, text)) <= limit:
        assert kept == profile
    elif count_tokens(tokenizer, text) <= limit:
        assert count_tokens(tokenizer, with_profile(kept, text)) <= limit
    else:
        assert kept == ""


def test_as_much_of_a_profile_as_fits_is_kept(tokenizer):
    assert fitting("Likes tea.", "What?", tokenizer, 12) == "Likes"  # bytes: 5 + 2 line breaks + 5


# What the LLM is asked


def test_the_llm_sees_items_and_what_is_asked_but_not_the_plugs_instruction(make, asked):
    assert make().of(SCORES, [answers("5", "1")]) == ["Summary 0"]
    expected = '5 is the score for "request 0", and 1 is the score for "request 1".\n\n' + REQUESTS["rating"]
    assert asked == [[expected]]


def test_a_long_history_is_sampled_evenly_up_to_its_end(make, asked):
    make(sample=3).of(TAGS, [answers(*(f"tag{i}" for i in range(10)))])
    shown = [part.split('"')[0] for part in asked[0][0].split('is "')[1:]]
    assert shown == ["tag2", "tag5", "tag9"]


@pytest.mark.parametrize(
    ("name", "output", "kind"),
    [
        ("LaMP_2", "comedy", "label"),
        ("LaMP_3", "5", "rating"),
        ("LaMP_5", "Title", "text"),
        ("LaMP_1", "Title", "text"),
    ],
)
def test_what_is_asked_fits_what_the_items_hold(make, asked, name, output, kind):
    make().of(load_task(name), [answers(output)])
    assert asked[0][0].endswith(".\n\n" + REQUESTS[kind])
    assert output in asked[0][0]


def test_items_are_cut_to_fit_and_the_question_is_not(make, asked):
    make(max_tokens=400).of(TITLES, [[HistoryItem("abstract " * 99, f"Title {i}") for i in range(3)]])
    (prompt,) = asked[0]
    assert len(prompt) <= 400
    assert prompt.endswith(REQUESTS["text"])
    assert '"Title 2" is a title for "abs' in prompt


def test_nothing_is_asked_about_a_user_without_answers(make, asked):
    assert make().of(SCORES, [[], [HistoryItem("text", " ")]]) == ["", ""]
    assert asked == []


# Each summary is written once


def test_a_summary_is_written_once_and_found_again(make, asked):
    one = make()
    assert one.of(SCORES, [answers("5"), answers("1"), answers("5")]) == ["Summary 0", "Summary 1", "Summary 0"]
    assert one.of(SCORES, [answers("1")]) == ["Summary 1"]
    other = make()
    assert other.of(SCORES, [answers("2"), answers("1")]) == ["Summary 2", "Summary 1"]
    assert [len(call) for call in asked] == [2, 1]
    assert (one.count, other.count) == (2, 1)


def test_a_summary_costs_the_same_whenever_it_was_written(make, asked, monkeypatch):
    ticks = iter([1.0, 9.0, 10.0, 13.0])
    monkeypatch.setattr(summaries, "clock", lambda _: next(ticks))
    one, other = make(), make()
    one.of(SCORES, [answers("5"), answers("1")])  # 4 seconds each
    assert (one.seconds, one.price) == (8.0, 8.0)
    other.of(SCORES, [answers("2"), answers("1"), answers("1")])
    assert (other.seconds, other.price) == (3.0, 7.0)


@pytest.mark.parametrize("change", ["llm", "weights", "items", "wording", "request", "length", "sample"])
def test_a_change_of_anything_that_matters_is_another_summary(make, asked, monkeypatch, change):
    make().of(SCORES, [answers("5", "1")])
    task = dataclasses.replace(SCORES, item="{output}: {input}") if change == "wording" else SCORES
    if change == "request":
        monkeypatch.setitem(REQUESTS, "rating", "Say something.")
    settings = {"llm": {"llm": "tiny-gpt2"}, "length": {"max_new_tokens": 9}, "sample": {"sample": 1}}.get(change, {})
    other = make(**settings)
    if change == "weights":
        other.plain.config = other.plain.config.replace(llm_fingerprint="of other weights")
    assert other.of(task, [answers("5", "2" if change == "items" else "1")]) == ["Summary 1"]


def test_a_change_of_the_plug_alone_is_the_same_summary(make, asked):
    make().of(SCORES, [answers("5")])
    make(template="Other: {input}").of(SCORES, [answers("5")])
    assert len(asked) == 1


def test_what_was_written_before_a_kill_is_kept(make, asked, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    real = PersonaPlug.generate
    monkeypatch.setattr(PersonaPlug, "generate", lambda *a, **o: (killed if len(asked) == 2 else real)(*a, **o))
    with pytest.raises(KeyboardInterrupt):
        make().of(SCORES, [answers(c) for c in "12345"], batch_size=2)
    monkeypatch.setattr(PersonaPlug, "generate", real)
    expected = [f"Summary {i}" for i in range(5)]
    assert make().of(SCORES, [answers(c) for c in "12345"], batch_size=2) == expected
    assert [len(call) for call in asked] == [2, 2, 1]


def test_an_empty_summary_is_told(make, monkeypatch, caplog):
    monkeypatch.setattr(PersonaPlug, "generate", lambda self, inputs, **_: ["" for _ in inputs])
    with caplog.at_level(logging.WARNING):
        assert make().of(SCORES, [answers("1"), answers("2")]) == ["", ""]
    assert "nothing for 2 of 2" in caplog.text
    monkeypatch.setattr(PersonaPlug, "generate", lambda *_, **__: pytest.fail("asked again"))
    assert make().of(SCORES, [answers("1")]) == [""]


# With an LLM


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_the_plain_llm_writes_it(make, llm):
    made = make(llm)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        (text,) = made.of(SCORES, [answers("5", "1")])
    assert not told
    prompt = made._prompt(SCORES, answers("5", "1"))
    with warnings.catch_warnings(action="ignore"):
        plain = made.plain.generate(prompt, personal=False, max_new_tokens=8, no_repeat_ngram_size=summaries.NO_REPEAT)
    assert text == " ".join(plain.split())
    assert text
    assert make(llm).of(SCORES, [answers("5", "1")]) == [text]


def test_the_plug_is_left_as_it_was(make_plug, tmp_path):
    plug = make_plug(template="Rate it: {input}", answers=("1", "5"))
    before = plug.config, plug.prompter, {k: v.clone() for k, v in plug.state_dict().items()}
    Summaries(plug, tmp_path, max_tokens=600, max_new_tokens=2).of(SCORES, [answers("5")])
    assert (plug.config, plug.prompter) == before[:2]
    assert all(bool((v == before[2][k]).all()) for k, v in plug.state_dict().items())


# Errors


def test_settings_that_cannot_work_are_refused(make):
    with pytest.raises(ConfigError, match="sample=0"):
        make(sample=0)
    with pytest.raises(ConfigError, match=r"max_tokens=60 leaves no room.*raise it"):
        make(max_tokens=60).of(SCORES, [answers("5")])


def test_a_damaged_file_is_named(make, tmp_path):
    (tmp_path / "summaries.sqlite").write_bytes(b"no database at all " * 99)
    with pytest.raises(CorruptFileError, match=r"summaries\.sqlite is damaged.*delete it"):
        make()


def test_a_locked_file_is_not_called_damaged(make, tmp_path, monkeypatch):
    made = make()
    monkeypatch.setattr(sqlite3, "connect", lambda path, timeout, real=sqlite3.connect: real(path, timeout=0.01))
    with closing(sqlite3.connect(tmp_path / "summaries.sqlite", timeout=1)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            made.of(SCORES, [answers("5")])
