import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import persona_plug
from persona_plug.data import _words, synthetic
from persona_plug.errors import ConfigError, DataError

LABEL = synthetic.build("label", users=60, items_per_user=8, seed=3)
STYLE = synthetic.build("style", users=60, items_per_user=8, seed=3)


def by_user(records):
    users = {}
    for record in records:
        users.setdefault(record["user_id"], []).append(record)
    return users


# --- records


@pytest.mark.parametrize("made", [LABEL, STYLE], ids=["label", "style"])
def test_records_have_the_event_format(made):
    assert len(made.records) == 480
    assert len({r["id"] for r in made.records}) == 480
    for user, rows in by_user(made.records).items():
        assert [r["timestamp"] for r in rows] == list(range(8))
        assert all(r["id"].startswith(user) for r in rows)
        assert all(r["input"] and r["output"] for r in rows)
    assert {key for r in made.records for key in r} == {"user_id", "input", "output", "timestamp", "id"}
    assert made.template.format(input="X").endswith("X")
    assert made.meta["counts"]["records"] == 480
    json.dumps(made.meta)


def test_first_records_stay_what_they_were():
    known = {
        "user_id": "user-0000",
        "input": "the fast sprinter serves near the ball",
        "timestamp": 0,
        "id": "user-0000-0000",
    }
    assert synthetic.build("label", 1, 1).records == [known | {"output": "blue"}]
    assert synthetic.build("style", 1, 1).records == [known | {"output": "the fast sprinter."}]


@pytest.mark.parametrize("kind", ["label", "style"])
def test_more_users_and_items_leave_the_first_ones_alone(kind):
    small = synthetic.build(kind, 3, 4, seed=7).records
    large = by_user(synthetic.build(kind, 5, 9, seed=7).records)
    assert small == [row for user in sorted(large)[:3] for row in large[user][:4]]
    assert small != synthetic.build(kind, 3, 4, seed=8).records


@pytest.mark.parametrize("made", [LABEL, STYLE], ids=["label", "style"])
def test_parameters_in_meta_make_the_set_again(made, tmp_path):
    side = made.write(tmp_path / "e.jsonl").with_suffix(".meta.json")
    meta = json.loads(side.read_text())["meta"]
    assert synthetic.build(**meta["parameters"]) == made
    assert synthetic.build(**meta["parameters"]).meta == meta


@pytest.mark.parametrize("kind", ["label", "style"])
def test_negative_control_changes_nothing_but_the_outputs(kind):
    real, control = (synthetic.build(kind, 30, 6, seed=5, personal=p) for p in (True, False))
    strip = [[{k: v for k, v in r.items() if k != "output"} for r in s.records] for s in (real, control)]
    assert strip[0] == strip[1]
    assert [r["output"] for r in real.records] != [r["output"] for r in control.records]
    if kind == "label":
        for record in real.records:
            np.testing.assert_allclose(real.prior(record["input"]), control.prior(record["input"]), rtol=1e-12)
    else:
        assert all((real.prior()[h] == control.prior()[h]).all() for h in real.habits)


SCRIPT = """
import sys, hashlib, json
from persona_plug.data import synthetic
for kind in ("label", "style"):
    s = synthetic.build(kind, 5, 5)
    print(hashlib.sha256(json.dumps([s.records, s.meta, s.template, str(s.bounds())]).encode()).hexdigest())
assert not {"torch", "sklearn"} & set(sys.modules)
"""


def test_result_does_not_depend_on_pythonhashseed_and_import_is_light():
    environment = {**os.environ, "PYTHONPATH": str(Path(persona_plug.__file__).parents[1])}
    printed = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert len(set(printed[0].split())) == 2


def test_no_word_has_two_meanings():
    words = [word for topic in _words.TOPICS.values() for group in topic for word in group]
    words += [*_words.LINKS, *_words.ANSWERS, "the"]
    words += [value.rstrip(",") for habit in ("opening", "closing") for value in _words.HABITS[habit] if value]
    assert [word for word, times in Counter(words).items() if times > 1] == []
    assert all(math.isclose(sum(shares.values()), 1) for shares in _words.HABITS.values())


# --- labels: the predictors


def joint(made, history, text, answer):
    """P(answers of the history, answer): the sum over types, written out."""
    total = 0.0
    for z, weight in enumerate(made.weights):
        product = float(weight)
        for item in [*history, {"input": text, "output": answer}]:
            product *= made.table[z, made.topic_of(item["input"]), made.answers.index(item["output"])]
        total += product
    return total


def test_label_posterior_equals_brute_force():
    for history, target in LABEL.examples()[::37]:
        mass = [joint(LABEL, history, target["input"], answer) for answer in LABEL.answers]
        np.testing.assert_allclose(LABEL.bayes(history, target["input"]), np.array(mass) / sum(mass), rtol=1e-9)


def test_label_posterior_averages_to_the_prior_over_all_histories():
    texts = [r["input"] for r in LABEL.records[:3]]
    mean = np.zeros(len(LABEL.answers))
    for answers in itertools.product(LABEL.answers, repeat=2):
        history = [{"input": t, "output": a} for t, a in zip(texts, answers, strict=False)]
        weight = joint(LABEL, history[:1], texts[1], answers[1])
        mean += weight * LABEL.bayes(history, texts[2])
    np.testing.assert_allclose(mean, LABEL.prior(texts[2]), rtol=1e-9)


def test_label_posterior_equals_monte_carlo():
    made = synthetic.build("label", users=20_000, items_per_user=2, seed=1, topics=1, answers=3, types=3)
    seen = Counter(tuple(r["output"] for r in rows) for rows in by_user(made.records).values())
    for first in made.answers:
        counts = np.array([seen[first, second] for second in made.answers])
        text = made.records[0]["input"]
        expected = made.bayes([{"input": text, "output": first}], text)
        tolerance = 5 * np.sqrt(expected * (1 - expected) / counts.sum())
        assert (np.abs(counts / counts.sum() - expected) < tolerance).all()


def test_label_population_follows_the_prior_of_each_topic():
    made = synthetic.build("label", users=4000, items_per_user=1, seed=2)
    for topic in made.topics:
        rows = [r for r in made.records if made.topics[made.topic_of(r["input"])] == topic]
        shares = np.array([sum(r["output"] == a for r in rows) for a in made.answers]) / len(rows)
        expected = made.prior(rows[0]["input"])
        assert (np.abs(shares - expected) < 5 * np.sqrt(expected * (1 - expected) / len(rows))).all()
        assert len(rows) > 800


def test_history_matters_much_and_bounds_are_calibrated():
    bounds = synthetic.build("label", users=150, items_per_user=15, seed=0).bounds()
    assert bounds.n == 2250
    assert bounds.bayes.nll < bounds.prior.nll - 0.8
    assert bounds.bayes.accuracy > bounds.prior.accuracy + 0.4
    for score in (bounds.prior, bounds.bayes):
        assert score.nll == pytest.approx(score.expected_nll, abs=0.08)
        assert score.accuracy == pytest.approx(score.expected_accuracy, abs=0.05)


def test_without_persons_the_history_is_worth_nothing():
    made = synthetic.build("label", users=300, items_per_user=6, seed=0, personal=False)
    bounds = made.bounds()
    assert bounds.bayes.nll == pytest.approx(bounds.prior.nll, abs=1e-12)
    assert bounds.bayes.expected_nll == pytest.approx(bounds.prior.expected_nll, abs=1e-12)
    assert agreement(made) == pytest.approx(expected_agreement(made), abs=0.04)
    real = synthetic.build("label", users=300, items_per_user=6, seed=0)
    assert agreement(real) > expected_agreement(real) + 0.3


def agreement(made):
    """Share of equal answers among pairs of items of one user and one topic."""
    pairs = [
        (a["output"], b["output"])
        for rows in by_user(made.records).values()
        for a, b in itertools.combinations(rows, 2)
        if made.topic_of(a["input"]) == made.topic_of(b["input"])
    ]
    return sum(a == b for a, b in pairs) / len(pairs)


def expected_agreement(made):
    """The same share if the answers did not depend on the user."""
    return float(np.mean([np.sum(made.prior(r["input"]) ** 2) for r in made.records]))


@given(data=st.data())
def test_label_predictions_are_probabilities_and_ignore_order(data):
    row = st.sampled_from(LABEL.records)
    history = data.draw(st.lists(row, max_size=12))
    text = data.draw(row)["input"]
    found = LABEL.bayes(history, text)
    assert found.shape == (len(LABEL.answers),)
    assert found.sum() == pytest.approx(1)
    assert (found > 0).all()
    np.testing.assert_allclose(LABEL.bayes(history[::-1], text), found, rtol=1e-9)
    if not history:
        np.testing.assert_allclose(found, LABEL.prior(text), rtol=1e-9)


def test_a_long_history_neither_underflows_nor_leaves_doubt():
    rows = synthetic.build("label", users=1, items_per_user=3000, seed=3)
    found = rows.bayes(rows.records, rows.records[0]["input"])
    assert np.isfinite(found).all()
    assert found.max() == pytest.approx(0.85 + 0.15 / 5, abs=1e-6)


def test_bounds_of_given_examples_are_the_means_written_out():
    history, target = LABEL.records[1:3], LABEL.records[0]
    item = SimpleNamespace(input=target["input"], output=target["output"])
    bounds = LABEL.bounds([(history, item), ([], item)])
    told = [LABEL.bayes(history, item.input), LABEL.prior(item.input)]
    y = LABEL.answers.index(item.output)
    assert bounds.n == 2
    assert bounds.bayes.nll == pytest.approx(-(math.log(told[0][y]) + math.log(told[1][y])) / 2)
    assert bounds.prior.nll == pytest.approx(-math.log(told[1][y]))
    assert bounds.bayes.accuracy == sum(p.argmax() == y for p in told) / 2
    assert bounds.bayes.expected_nll == pytest.approx(-sum(float(p @ np.log(p)) for p in told) / 2)
    assert bounds.prior.expected_nll == pytest.approx(-sum(float(p @ np.log(told[1])) for p in told) / 2)
    assert bounds.bayes.expected_accuracy == pytest.approx(sum(p.max() for p in told) / 2)
    assert bounds.prior.expected_accuracy == pytest.approx(sum(p[told[1].argmax()] for p in told) / 2)


def test_examples_leave_the_target_and_other_users_out():
    examples = LABEL.examples()
    assert [target["id"] for _, target in examples] == [r["id"] for r in LABEL.records]
    for history, target in examples[::50]:
        assert len(history) == 7
        assert target not in history
        assert {r["user_id"] for r in history} == {target["user_id"]}


# --- styles: rewriting and the predictors


def all_values(made):
    return [dict(zip(made.habits, values, strict=True)) for values in itertools.product(*made.habits.values())]


@given(row=st.sampled_from(STYLE.records), brief=st.integers(1, 6))
@settings(max_examples=30)
def test_reading_undoes_rewriting(row, brief):
    made = STYLE if brief == 3 else synthetic.build("style", 1, 1, brief_words=brief)
    outputs = set()
    for values in all_values(made):
        output = made.rewrite(row["input"], values)
        outputs.add(output)
        assert made.read(row["input"], output) == values
    assert len(outputs) == 4 * 2 * 2 * 3 * 4


@given(text=st.text(max_size=40), output=st.text(max_size=40))
def test_any_text_can_be_read(text, output):
    found = STYLE.read(text, output)
    assert list(found) == list(STYLE.habits)
    assert all(value in STYLE.habits[habit] or (value is None and habit == "length") for habit, value in found.items())


def test_reading_a_text_of_another_length_still_tells_the_other_habits():
    found = STYLE.read("the sour soup melts near the onion", "Hello, some soup! thanks")
    assert found == {"opening": "hello,", "case": "upper", "length": None, "punctuation": "!", "closing": "thanks"}
    assert STYLE.read("the sour soup", "well,known soup")["opening"] == ""
    assert STYLE.read("the sour soup", "the nocheers")["closing"] == ""


def test_style_posterior_equals_brute_force():
    for history, _ in STYLE.examples()[::61]:
        found = STYLE.bayes(history)
        for habit, prior in STYLE.priors.items():
            shown = [STYLE.habits[habit].index(STYLE.read(r["input"], r["output"])[habit]) for r in history]
            mass = []
            for x in range(len(prior)):
                total = 0.0
                for v, weight in enumerate(prior):
                    steps = [(0.85 if y == v else 0) + 0.15 * prior[y] for y in [*shown, x]]
                    total += weight * math.prod(steps)
                mass.append(total)
            np.testing.assert_allclose(found[habit], np.array(mass) / sum(mass), rtol=1e-9)


def test_style_posterior_equals_monte_carlo():
    made = synthetic.build("style", users=6000, items_per_user=2, seed=4, slip=0.4)
    pairs = list(by_user(made.records).values())
    for habit, values in made.habits.items():
        seen = Counter(tuple(made.read(r["input"], r["output"])[habit] for r in rows) for rows in pairs)
        for first in values:
            row = next(rows[0] for rows in pairs if made.read(rows[0]["input"], rows[0]["output"])[habit] == first)
            expected = made.bayes([row])[habit]
            counts = np.array([seen[first, second] for second in values])
            tolerance = 5 * np.sqrt(expected * (1 - expected) / counts.sum())
            assert (np.abs(counts / counts.sum() - expected) < tolerance).all()


def test_style_history_matters_only_when_it_is_personal():
    for habit, bounds in STYLE.bounds().items():
        assert bounds.bayes.nll < bounds.prior.nll - 0.2, habit
        assert bounds.bayes.accuracy > bounds.prior.accuracy + 0.2, habit
        assert bounds.bayes.expected_accuracy == pytest.approx(bounds.bayes.accuracy, abs=0.07), habit
    control = synthetic.build("style", 60, 8, seed=3, personal=False)
    for habit, bounds in control.bounds().items():
        assert bounds.bayes.nll == pytest.approx(bounds.prior.nll, abs=1e-12), habit
        assert bounds.prior.accuracy == pytest.approx(max(control.priors[habit]), abs=0.1), habit


# --- refusals


@pytest.mark.parametrize(
    "arguments",
    [
        {"users": 0},
        {"items_per_user": 0},
        {"seed": -1},
        {"topics": 7},
        {"topics": 0},
        {"answers": 1},
        {"answers": 9},
        {"types": 1},
        {"brief_words": 7},
        {"slip": 0.0},
        {"slip": 1.5},
        {"slip": float("nan")},
        {"kind": "colour"},
    ],
)
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ConfigError, match=name):
        synthetic.build(**arguments)


def test_what_is_not_of_the_set_is_refused():
    good = LABEL.records[0]
    with pytest.raises(DataError, match="no single topic"):
        LABEL.prior("rain near the soup")
    with pytest.raises(DataError, match="no single topic"):
        LABEL.prior("the leafy rose grows near the weed")  # a topic that four topics do not have
    with pytest.raises(DataError, match=r"unknown answer 'mauve'.*red"):
        LABEL.bayes([good | {"output": "mauve"}], good["input"])
    with pytest.raises(DataError, match="no rewrite"):
        STYLE.bayes([{"input": "the sour soup", "output": "Something else"}])
    with pytest.raises(DataError, match="no rewrite"):
        STYLE.bayes([{"input": "the sour soup", "output": "the  sour soup"}])
    with pytest.raises(DataError, match="no examples"):
        LABEL.bounds([])


def test_digest_of_a_written_set_is_that_of_its_file(tmp_path):
    path = LABEL.write(tmp_path / "e.jsonl")
    side = json.loads(path.with_suffix(".meta.json").read_text())
    assert side["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
