"""Paired contrasts: against enumeration by hand, known p values, and data where the truth is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.errors import ConfigError, DataError
from persona_plug.measure.contrasts import contrasts, difference, estimate, usual_pairs
from persona_plug.measure.metrics import METRICS, describe, find_metric, heading
from persona_plug.measure.significance import EXACT_USERS, FLIPS, holm, sign_flip, smallest_p
from persona_plug.measure.stats import identity, user_bootstrap


def people(n_users, per_user=3):
    return [f"u{i}" for i in range(n_users) for _ in range(per_user)]


def by_hand(a, b, users, transform):
    """All swaps, one user at a time, on the values themselves."""
    names = sorted(set(users))
    observed = abs(transform(np.mean(a)) - transform(np.mean(b)))
    extreme = 0
    for swaps in itertools.product([False, True], repeat=len(names)):
        swapped = [dict(zip(names, swaps, strict=True))[u] for u in users]
        first, second = np.where(swapped, b, a), np.where(swapped, a, b)
        extreme += abs(transform(first.mean()) - transform(second.mean())) >= observed - 1e-9
    return extreme / 2 ** len(names)


@pytest.mark.parametrize("transform", [identity, np.sqrt])
def test_few_users_are_enumerated(transform):
    rng = np.random.default_rng(1)
    users = [*people(5), "u0", "u4", "u4"]  # not everyone has as many questions
    a, b = rng.random(len(users)) ** 2, rng.random(len(users)) ** 2 + 0.2
    p = sign_flip(a, b, users, transform)
    assert p == pytest.approx(by_hand(a, b, users, transform))
    assert p == sign_flip(b, a, users, transform, seed=9)  # two-sided, and nothing is drawn


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(1, 4))
def test_ties_count_as_extreme(pairs, n_users):
    a, b = np.array(pairs, dtype=float).T / 3
    users = [f"u{i % n_users}" for i in range(len(pairs))]
    assert sign_flip(a, b, users) == pytest.approx(by_hand(a, b, users, identity))


def test_swaps_are_of_users_not_of_questions():
    """A hundred questions of two users are two observations."""
    users = ["ann"] * 50 + ["bob"] * 50
    (row,) = contrasts({"a": {"accuracy": np.ones(100)}, "b": {"accuracy": np.zeros(100)}}, users, [("a", "b")])
    assert row.p == 0.5
    assert row.delta == 1


@pytest.mark.parametrize("n", [1, 5, EXACT_USERS, EXACT_USERS + 1, 40])
def test_the_smallest_p_is_reached_and_not_passed(n):
    users = people(n, 1)
    p = sign_flip(np.ones(n), np.zeros(n), users)
    least = smallest_p(n)
    if n <= EXACT_USERS:
        assert p == least == 2 / 2**n
    else:  # of 13 users a few of the drawn swaps are as extreme
        assert least <= p <= 4 * least
    assert smallest_p(13) == 2 / 2**13
    assert smallest_p(40) == 1 / (FLIPS + 1)


def test_drawn_swaps_agree_with_all_swaps(monkeypatch):
    rng = np.random.default_rng(4)
    users = people(12)
    a, b = rng.normal(0.25, 1, len(users)), rng.normal(0, 1, len(users))
    exact = sign_flip(a, b, users)
    monkeypatch.setattr("persona_plug.measure.significance.EXACT_USERS", 0)
    drawn = sign_flip(a, b, users)
    assert 0.02 < exact < 0.9
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / FLIPS) ** 0.5)  # four standard errors
    assert drawn == sign_flip(a, b, users)
    assert drawn != sign_flip(a, b, users, seed=1)


def test_without_any_difference_p_is_uniform():
    """Of 200 comparisons of equal methods about a twentieth is below 0.05; above 8% the test would be too eager."""
    rng = np.random.default_rng(2)
    users = people(10)
    taste = np.repeat(rng.normal(size=10), 3)  # questions of one user go together
    ps = []
    for _ in range(200):
        lean = np.repeat(rng.normal(size=10), 3)
        ps.append(sign_flip(taste + lean, taste + rng.normal(size=30) * 0.1, users))
    assert np.mean(np.array(ps) < 0.05) < 0.08
    assert 0.4 < np.mean(ps) < 0.6
    assert sign_flip(taste, taste, users) == 1


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("mae", -1), ("rmse", -1)])
def test_positive_where_a_is_better_and_paired(metric, sign):
    rng = np.random.default_rng(3)
    users = people(30)
    hard = np.repeat(rng.random(30) * 5, 3)  # users differ far more than methods
    a, b = hard + 0.5 + rng.random(90) * 0.1, hard + rng.random(90) * 0.1
    transform = METRICS[metric].transform
    (row,) = contrasts({"a": {metric: a}, "b": {metric: b}}, users, [("a", "b")])
    assert (row.pair, row.metric) == (("a", "b"), metric)
    assert np.sign(row.delta) == sign
    assert abs(row.delta) == pytest.approx(abs(transform(a.mean()) - transform(b.mean())))
    assert row.low <= row.delta <= row.high
    alone = estimate(a, users, metric)
    assert alone == user_bootstrap(a, users, transform=transform)
    assert row.high - row.low < (alone.high - alone.low) / 3
    assert row.p == row.p_holm == pytest.approx(1 / (FLIPS + 1))


def test_unmeasured_questions_are_left_out_of_both():
    users = ["a", "a", "b", "c"]
    values = {"a": {"bleu": [1, None, 3, 9]}, "b": {"bleu": [0.5, 7, 2, float("nan")]}}
    (row,) = contrasts(values, users, [("a", "b")])
    assert row.delta == difference(values["a"]["bleu"], values["b"]["bleu"], users, "bleu").value == 0.75
    assert row.p == 0.5  # two users are left
    assert estimate(values["a"]["bleu"], users, "bleu").value == pytest.approx(13 / 3)
    with pytest.raises(DataError, match="accuracy: no question was answered by both"):
        difference([1, None], [None, 1], ["a", "b"], "accuracy")
    with pytest.raises(DataError, match="accuracy: no question was measured"):
        estimate([None, float("nan")], ["a", "b"], "accuracy")
    with pytest.raises(DataError, match="accuracy: 2 and 3 values for 2 questions"):
        difference([1, 2], [1, 2, 3], ["a", "b"], "accuracy")
    with pytest.raises(DataError, match="accuracy: 2 and 3 values for 2 questions"):
        contrasts({"a": {"accuracy": [1, 2]}, "b": {"accuracy": [1, 2, 3]}}, ["a", "b"], [("a", "b")])
    with pytest.raises(DataError, match="mae: 1 values for 2 questions"):
        estimate([1.0], ["a", "b"], "mae")


@pytest.mark.parametrize(
    ("raw", "corrected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        ([0.5, 0.4, 0.6], [1.0, 1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(raw, corrected):
    assert holm(raw) == pytest.approx(corrected)


def test_all_contrasts_of_a_report_are_corrected_together():
    rng = np.random.default_rng(5)
    users = people(8)
    names = ("none", "task_prompt", "plug_shuffled", "plug", "user_prior: majority")
    values = {n: {"accuracy": rng.random(24) + i, "nll": rng.random(24) - i} for i, n in enumerate(names)}
    values["user_prior: majority"].pop("nll")
    values["none"]["accuracy"] = [None] * 24  # not measured
    rows = contrasts(values, users)
    assert [row.pair for row in rows[:3]] == [("plug", "plug_shuffled")] * 2 + [("task_prompt", "none")]
    assert ("plug", "none", "accuracy") not in {(*row.pair, row.metric) for row in rows}
    assert len(rows) == 7
    assert [row.p_holm for row in rows] == holm([row.p for row in rows])
    assert max(row.p_holm for row in rows) > max(row.p for row in rows)
    gain = next(row for row in rows if row.a == "task_prompt")
    assert gain.delta > 0  # nll falls with the index
    without = contrasts(values, users, test=False)
    assert [(row.pair, row.metric, row.delta, row.low) for row in without] == [
        (row.pair, row.metric, row.delta, row.low) for row in rows
    ]
    assert {(row.p, row.p_holm) for row in without} == {(None, None)}
    with pytest.raises(ConfigError, match="no method 'lora' to compare; there are none, task_prompt"):
        contrasts(values, users, [("lora", "none")])
    with pytest.raises(ConfigError, match="metric 'perplexity' has no direction; known are nll"):
        contrasts({"a": {"perplexity": [1.0]}, "b": {"perplexity": [1.0]}}, ["u"], [("a", "b")])
    assert usual_pairs(["none", "bm25"]) == []
    assert usual_pairs(["uem", "plug", "uem_shuffled", "plug_shuffled"]) == [
        ("plug", "plug_shuffled"), ("uem", "uem_shuffled"), ("plug", "uem"), ("plug", "uem_shuffled"),
    ]  # fmt: skip


def test_every_metric_is_described_with_its_direction():
    lower = {"nll", "mae", "rmse", "ece", "length", "foreign", "copied"}
    assert {name for name, metric in METRICS.items() if metric.lower_is_better} == lower
    assert {name for name, metric in METRICS.items() if metric.transform is not identity} == {"rmse"}
    assert [line.partition(": ")[0] for line in describe([*METRICS, "unknown"])] == list(METRICS)
    assert (heading("nll"), heading("bleu"), heading("unknown")) == ("nll ↓", "bleu ↑", "unknown")
    assert METRICS["nll"].gain(1.0, 3.0) == METRICS["bleu"].gain(3.0, 1.0) == 2.0
    with pytest.raises(ConfigError, match="metric 'colour' has no direction; known are nll"):
        find_metric("colour")
