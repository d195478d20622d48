"""A plug with a words memory: fitted, used, saved."""

import math
import random

import numpy as np
import pytest
import torch

from persona_plug import PersonaPlug
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError, DataError
from persona_plug.fit import run as fit_module
from persona_plug.fit import words
from persona_plug.fit.config import FitConfig
from persona_plug.fit.report import FitReport
from persona_plug.fit.words import fit_words, split_users
from persona_plug.heads.recollection import Recollection, join_spans
from persona_plug.measure.answers import evaluate
from persona_plug.splice.prompts import AnswerTree

GREETINGS = ["hello", "howdy", "servus", "ahoy", "moin", "salve"]
THINGS = ["lamp", "chair", "table", "clock", "radio", "piano", "spoon", "towel"]


def people(count, seed):
    """Users who greet in one of six ways; each asks about things."""
    draw = random.Random(seed)  # noqa: S311
    samples = []
    for u in range(count):
        greeting = GREETINGS[(u + seed) % 6]
        items = [HistoryItem(f"the {t} is late", f"{greeting}, the {t}!") for t in draw.sample(THINGS, 5)]
        for i, item in enumerate(items):
            others = tuple(items[:i] + items[i + 1 :])
            samples.append(Example(f"user-{seed}-{u}", item.input, item.output, others))
    return samples


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("persona_plug.heads.fitting.STEPS", 75)
        yield


@pytest.fixture(scope="module")
def data():
    return FitData(people(18, 0), people(6, 1), people(6, 2), "{input}", None)


def fitted(make_plug, data, llm="tiny-llama"):
    plug = make_plug(llm, recipe="words", task_tokens=2, words=True, template=data.template, max_answer_tokens=40)
    soft, gate = split_users(data, 0)
    assert not {e.user_id for e in soft} & {e.user_id for e in gate}
    fit_words(plug, gate, data.valid)
    return plug


@pytest.fixture(scope="module")
def plug(make_plug, data):
    return fitted(make_plug, data)


def others(samples):
    """The samples with the histories of users who greet in another way."""
    histories = [e.history for e in samples]
    turned = histories[5:] + histories[:5]
    return [Example(e.user_id, e.input, e.output, h) for e, h in zip(samples, turned, strict=True)]


def nll(plug, samples):
    return float(evaluate(plug, samples, generated=0).values["nll"].mean())


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_the_users_own_words_lower_the_loss_and_anothers_do_less(make_plug, data, llm):
    plug = fitted(make_plug, data, llm)
    empty = [Example(e.user_id, e.input, e.output) for e in data.held_out]
    own, other, nobody = (nll(plug, part) for part in (data.held_out, others(data.held_out), empty))
    assert own < other - 0.05
    assert own < nobody - 0.5


def test_with_no_history_nothing_of_a_memory_is_left(plug, data):
    gate = plug.words.gate
    reader = plug.recollection.reader("xyz", [])
    logits = torch.randn(3, plug.llm.get_output_embeddings().weight.shape[0])
    _, weights = reader.mix(logits, [5, 6])
    assert weights[:, [1, 3]].tolist() == [[0.0, 0.0]] * 3
    assert gate.mask.all()


def test_scores_are_what_generation_mixes(plug, data):
    """Greedy text has the highest score of all first tokens, and beams, samples and batches run."""
    sample = data.held_out[0]
    text = plug.generate(sample.input, sample.history, max_new_tokens=6)
    alone = plug.generate(sample.input, max_new_tokens=6)
    assert text != alone
    batch = plug.generate([sample.input, "xyz"], [sample.history, []], max_new_tokens=6)
    assert batch[0] == text
    assert plug.generate(sample.input, sample.history, max_new_tokens=6, num_beams=2)
    assert plug.generate(sample.input, sample.history, max_new_tokens=6, do_sample=True)


def test_greedy_tokens_are_the_mixtures_best(plug, data):
    sample = data.held_out[0]
    (row,) = plug.readers([sample])
    parts = plug.prompter.parts(sample.input)
    soft = plug._nobodys_tokens([sample.input])
    text = plug.generate(sample.input, sample.history, max_new_tokens=8)
    tokens = plug.prompter.ids(text)[:8]
    tree = AnswerTree.build([tuple(tokens)], plug.prompter.eos, gold=0)
    (logits,) = plug.splicer.answer_logits([parts], soft, [tree])
    best = row.mix(logits, [*tokens, plug.prompter.eos])[0].argmax(-1)
    assert best[: len(tokens)].tolist() == tokens


def test_a_saved_plug_remembers_alike(plug, data, tmp_path):
    plug.save_pretrained(tmp_path)
    loaded = PersonaPlug.from_pretrained(tmp_path, device="cpu")
    request = data.held_out[0]
    before, after = (p.score([request], [request.output]) for p in (plug, loaded))
    assert torch.equal(before, after)


def test_a_pause_ends_after_an_error_too(plug, data):
    sample = data.held_out[0]
    mixed = plug.score([sample], [sample.output])
    with plug.recollection.paused():
        assert not torch.equal(mixed, plug.score([sample], [sample.output]))

    def fail():
        with plug.recollection.paused():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(mixed, plug.score([sample], [sample.output]))


def test_fit_trains_both_parts_and_reports_what_each_adds(make_plug, data, tmp_path):
    plug = make_plug(recipe="words", task_tokens=2, max_answer_tokens=40)
    settings = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_samples": 4}
    report = plug.fit(data, output_dir=tmp_path, generated=4, examples=1, **settings)
    rows = {name: row["nll"].value for name, row in report.metrics.items() if "nll" in row}
    assert rows["plug"] < rows["plug_shuffled"] - 0.05
    assert rows["plug"] < rows["task_prompt"] - 0.5
    assert rows["plug"] < rows["plug_empty"] - 0.3  # which copies from the request alone
    assert any("without its words memory" in note for note in report.notes)
    users = report.request["users"]
    assert [set(user) for user in users] == [{"wrote", "turns", "plug"}]
    assert users[0]["wrote"] in {i.output for e in data.held_out for i in e.history}
    assert "One request, 1 held-out users" in str(report)
    assert FitReport.from_json(report.to_json()).request is None  # files hold no texts of users
    both = make_plug(recipe="words", user_tokens=1, task_tokens=1, max_answer_tokens=40)
    names = both.fit(data, output_dir=tmp_path / "both", generated=0, examples=0, **settings).metrics
    assert {"task_prompt", "plug: without words"} <= set(names)


def test_nothing_is_mixed_before_the_head_is_fitted(make_plug, data):
    plug = make_plug(recipe="words", task_tokens=2)
    assert plug.readers(data.held_out) is None
    assert make_plug().recollection is None


def test_labels_have_no_words_memory(make_plug):
    assert make_plug(recipe="words", answers=("yes", "no")).words is None


def test_an_llm_whose_output_layer_is_unfit_is_refused_for_free_text_alone(make_plug, load_parts, monkeypatch):
    llm, _ = load_parts("tiny-llama")
    layer = torch.nn.Linear(*reversed(llm.get_output_embeddings().weight.shape), bias=True)
    monkeypatch.setattr(llm, "get_output_embeddings", lambda: layer)
    with pytest.raises(ConfigError, match=r"this LLM's is Linear.*words=False"):
        make_plug(words=True)
    assert make_plug(words=True, answers=("yes", "no")).words is None


def test_too_few_users_are_named():
    with pytest.raises(DataError, match=r"1 training users are too few.*words=False \(--no-words\)"):
        split_users(FitData(people(1, 0), [], [], "{input}", None), 0)


def test_items_are_read_once(plug, data, monkeypatch):
    plug.recollection.remember(data.held_out[0].history)
    monkeypatch.setattr(plug.splicer, "answer_logits", lambda *_: pytest.fail("read again"))
    plug.recollection.remember(data.held_out[0].history)


def test_the_length_habit_is_that_of_the_answers(plug, data):
    reader = plug.recollection.reader("x", data.held_out[0].history)
    lengths = [len(plug.prompter.ids(i.output)) + 1 for i in data.held_out[0].history]
    assert reader.memory.length == pytest.approx(sum(math.log1p(n) for n in lengths) / len(lengths))


@pytest.mark.parametrize(
    "more", [{"lora": 2}, {"retrieve": 2}, {"lora": 2, "retrieve": 1}, {"task_tokens": 0, "lora": 2}]
)
def test_the_memory_is_fitted_with_adapters_on_and_behind_turns(make_plug, data, tmp_path, monkeypatch, more):
    """The gate learns from what the LLM says in the very prompts that answers stand in."""
    plug = make_plug(**{"recipe": "words", "task_tokens": 2, "max_answer_tokens": 40, **more})
    seen = []
    usual = Recollection.passes

    def look(self, pairs, shown=None):
        seen.append((self.splicer.llm, {len(turns) for turns in (shown or {}).values()}))
        return usual(self, pairs, shown)

    monkeypatch.setattr(Recollection, "passes", look)
    settings = {"steps": 2, "batch_size": 4, "eval_every": 2, "eval_samples": 4, "generated": 0, "examples": 0}
    rows = plug.fit(data, output_dir=tmp_path, **settings).metrics
    assert all(llm is plug.llm for llm, _ in seen)
    assert {count for _, counts in seen for count in counts} == ({more["retrieve"]} if "retrieve" in more else set())
    assert rows["plug"]["nll"].value < rows["plug_shuffled"]["nll"].value - 0.05
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path / "plug"), device="cpu")
    some = data.held_out[:2]
    torch.testing.assert_close(again.score(some, ["yes"]), plug.score(some, ["yes"]), atol=1e-4, rtol=1e-4)


def test_adapters_and_gate_learn_from_different_users(make_plug, data, monkeypatch, tmp_path):
    plug, trained, fitted = make_plug(recipe="words", task_tokens=2, max_answer_tokens=40), [], []
    monkeypatch.setattr(fit_module, "train", lambda plug, data, *_: trained.extend(data.train) or [])
    monkeypatch.setattr(fit_module, "fit_words", lambda plug, train, *_: fitted.extend(train))
    fit_module.train_parts(plug, data, FitConfig(), tmp_path)
    users = [{e.user_id for e in part} for part in (trained, fitted)]
    assert all(users)
    assert not users[0] & users[1]


def test_marks_are_what_the_memory_brought(plug, data):
    """The mixture's tokens are the memory's where nothing else gives half of their probability."""
    sample = data.held_out[0]
    made = plug.generate(sample.input, sample.history, return_details=True, max_new_tokens=8)
    greeting = next(g for g in GREETINGS if made.text.startswith(g))
    assert greeting in sample.output
    assert made.marks
    assert all(0 <= start < end <= len(made.text) for start, end in made.marks)
    assert made.marks[0][0] == 0  # the greeting
    assert made.marks[0][1] >= len(greeting)
    alone = plug.generate(sample.input, return_details=True, max_new_tokens=8)
    assert alone.marks == []
    assert (
        plug.generate(sample.input, sample.history, personal=False, return_details=True, max_new_tokens=2).marks == []
    )
    batch = plug.generate(
        ["xyz", sample.input], [[], sample.history], return_details=True, max_new_tokens=8, num_return_sequences=2,
        num_beams=2,
    )  # fmt: skip
    assert [bool(g.marks) for g in batch] == [False, False, True, True]


def test_shares_are_of_the_written_tokens(plug, data):
    sample = data.held_out[0]
    (reader,) = plug.readers([sample])
    logits = torch.randn(4, plug.llm.get_output_embeddings().weight.shape[0])
    tokens = [*reader.memory.tokens[:2].tolist(), plug.prompter.eos, plug.prompter.ids("zebra")[0]]
    mixed, weights = reader.mix(logits, tokens)
    shares = reader.memory_share(logits, tokens)
    assert ((shares >= 0) & (shares <= 1 + 1e-5)).all()
    assert shares[0] > 0
    own = logits.log_softmax(-1).exp()
    for at, token in enumerate(tokens):  # what neither LLM nor memory gives is the request's or the end's
        rest = mixed[at, token].exp() - weights[at, 0] * own[at, token]
        assert shares[at] * mixed[at, token].exp() <= rest + 1e-6


@pytest.mark.parametrize(
    ("text", "spans", "joined"),
    [
        ("Hi Ben, yes", [(0, 2), (2, 6)], [(0, 6)]),
        ("Hi Ben, yes", [(0, 2), (3, 6), (7, 11)], [(0, 6), (8, 11)]),
        ("so 🌳 on", [(2, 4), (3, 4), (3, 4)], [(3, 4)]),
        ("a b", [(1, 2)], []),
        ("", [], []),
    ],
)
def test_spans_are_joined_over_white_space(text, spans, joined):
    assert join_spans(text, spans) == joined


def texts_of(group):
    return {(e.input, e.output) for e in group} | {(i.input, i.output) for e in group for i in e.history}


def test_what_the_gate_reads_is_bounded(plug, data, monkeypatch):
    """By users, by texts of each, and by tokens; some users are read in any case."""
    monkeypatch.setattr(words, "FEWEST", 3)

    def drawn(users=18, tokens=1e9):
        return words._by_user(plug, data.train, users, tokens, np.random.default_rng(0))

    every = drawn()
    assert len(every) == len({e.user_id for e in data.train}) == 18
    assert [group[0].user_id for group in drawn(users=5)] == [group[0].user_id for group in every[:5]]
    assert len(drawn(tokens=1)) == 3
    assert drawn(tokens=sum(words._tokens(plug, group) for group in every[:7])) == every[:7]
    monkeypatch.setattr(words, "TEXTS", 3)
    for group in drawn():
        assert len(texts_of(group)) == len(group) == 3
        assert all(len(e.history) == 2 for e in group)


def test_few_answers_are_read_with_some_of_the_other_texts(plug, data, monkeypatch):
    monkeypatch.setattr(words, "TEXTS", 4)
    one = [e for e in data.train if e.user_id == data.train[0].user_id][:1]
    (group,) = words._by_user(plug, one, 1, 1e9, np.random.default_rng(0))
    assert len(group) == 1
    assert len(texts_of(group)) == 4
    assert set(group[0].history) < set(one[0].history)
    assert [i for i in one[0].history if i in group[0].history] == list(group[0].history)  # in their order
