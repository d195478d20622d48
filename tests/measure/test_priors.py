import math

import numpy as np
import pytest
import torch

from persona_plug.data.history import Example, HistoryItem
from persona_plug.measure.priors import label_priors, nll, rating_priors, text_priors

RNG = np.random.default_rng(0)


class Words:
    """Stands in for the encoder: a text's vector counts the words it knows, normalised."""

    known = ("sport", "food", "music", "rain")
    dim = len(known)

    def encode(self, texts, progress=None):
        rows = torch.tensor([[float(t.split().count(w)) for w in self.known] for t in texts]).reshape(-1, self.dim)
        return torch.nn.functional.normalize(rows, dim=-1)


ENCODER = Words()


def example(user, request, output, *pairs):
    return Example(user, request, output, tuple(HistoryItem(i, o) for i, o in pairs))


def label_data(n, habits=(("sport", "a"), ("food", "b"), ("music", "c"))):
    rows = []
    for u in range(n):
        word, answer = habits[u % len(habits)]
        rows.append(example(f"u{u}", f"{word} {u}", answer, *[("x", answer)] * (u % 4)))
    return rows


# --- labels


def test_majority_and_user_frequency_are_smoothed_counts():
    train = [example("t", "sport", o) for o in "aaab"]
    test = [
        example("u", "sport", "a"),
        example("v", "sport", "b", ("x", "b"), ("x", " b "), ("x", "c"), ("x", "not an answer")),
    ]
    found = label_priors(train, train, test, ("a", "b", "c"), ENCODER)
    population = np.array([3 + 1, 1 + 1, 0 + 1]) / 7
    assert found["majority"] == pytest.approx(np.tile(population, (2, 1)))
    assert found["user_frequency"][0] == pytest.approx(population)  # no history: the population's
    assert found["user_frequency"][1] == pytest.approx((population + np.array([0, 2, 1])) / 4)


def test_every_row_is_a_distribution():
    found = label_priors(label_data(30), label_data(9), label_data(12), ("a", "b", "c", "never"), ENCODER)
    assert set(found) == {"majority", "user_frequency", "classifier", "classifier_x_user"}
    for rows in found.values():
        assert rows.shape == (12, 4)
        assert rows.sum(1) == pytest.approx(np.ones(12))
        assert (rows > 0).all()


def test_the_classifier_reads_the_request():
    data = label_data(60)
    found = label_priors(data[:40], data[40:], data[40:], ("a", "b", "c"), ENCODER)
    gold = np.array(["abc".index(e.output) for e in data[40:]])
    assert (found["classifier"].argmax(1) == gold).all()
    assert nll(found["classifier"], gold) < 0.3 < nll(found["majority"], gold)


def test_the_product_uses_both_and_its_power_is_chosen_on_validation_users():
    # The request says "a or b", the user says "b or c": only both together say b.
    def rows(n, offset):
        made = []
        for u in range(n):
            first, likes = (u + offset) % 2, (u + offset) // 2 % 2
            request, choices = (("sport", "ab"), ("food", "cd"))[first]
            answer = choices[likes]
            liked = ("ac", "bd")[likes]
            made.append(example(f"u{offset}-{u}", request, answer, *[("x", o) for o in liked * 3]))
        return made

    train, valid, test = rows(80, 0), rows(40, 1), rows(40, 2)
    found = label_priors(train, valid, test, tuple("abcd"), ENCODER)
    gold = np.array(["abcd".index(e.output) for e in test])
    scores = {name: nll(p, gold) for name, p in found.items()}
    assert scores["classifier_x_user"] < 0.4
    assert min(scores["classifier"], scores["user_frequency"]) > 0.65
    # by brute force over the powers that are tried, with the classifier as it came out
    users = found["user_frequency"] / found["majority"]
    products = [found["classifier"] * users**power for power in (0.5, 1.0, 1.5)]
    assert scores["classifier_x_user"] <= min(nll(p / p.sum(1, keepdims=True), gold) for p in products) + 0.1


def test_test_users_outputs_change_nothing():
    data = label_data(40)
    test = data[30:]
    other = [example(e.user_id, e.input, "c", *[(i.input, i.output) for i in e.history]) for e in test]
    a = label_priors(data[:20], data[20:30], test, ("a", "b", "c"), ENCODER)
    b = label_priors(data[:20], data[20:30], other, ("a", "b", "c"), ENCODER)
    assert all((a[name] == b[name]).all() for name in a)


def test_training_data_with_one_label_only():
    train = [example("t", "sport", "a")] * 3
    found = label_priors(train, train, train, ("a", "b"), ENCODER)
    for rows in found.values():  # nothing to learn from the request or the user
        assert rows[0] == pytest.approx([4 / 5, 1 / 5], abs=1e-6)


def test_nll_is_the_mean_over_the_gold_and_bounded():
    rows = np.array([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    assert nll(rows[:2], np.array([0, 1])) == pytest.approx((math.log(2) - math.log(0.1)) / 2)
    assert nll(rows[2:], np.array([1])) == pytest.approx(-math.log(1e-12))


# --- ratings


def test_user_mean_and_median():
    train = [example("t", "sport", o, ("food", o)) for o in ("1", "2", "3", "4")]
    test = [
        example("u", "sport", "1"),
        example("v", "sport", "1", ("food", "5"), ("food", "5"), ("food", "1"), ("food", "odd")),
        example("w", "sport", "1", ("food", "4"), ("food", "1")),
    ]
    found = rating_priors(train, train, test, ENCODER)
    overall = 2.5
    assert found["user_mean"] == pytest.approx([overall, (11 + overall) / 4, (5 + overall) / 3])
    assert found["user_median"] == pytest.approx([overall, 5, 2.5])


def test_ridge_learns_from_request_history_and_own_mean():
    def rows(n):
        made = []
        for u in range(n):
            level = 1 + RNG.integers(0, 4)
            bonus = int(RNG.integers(0, 2))
            request = ("sport", "food")[bonus]
            made.append(example(f"u{u}", request, str(level + bonus), *[("music", str(level))] * 3))
        return made

    train, valid, test = rows(120), rows(40), rows(40)
    found = rating_priors(train, valid, test, ENCODER)
    gold = np.array([float(e.output) for e in test])
    errors = {name: np.mean((gold - p) ** 2) for name, p in found.items()}
    assert errors["ridge"] < 0.05 < 0.3 < errors["user_mean"]


def test_ridge_copes_with_users_without_history():
    rows = [example(f"u{i}", "sport", str(i % 5 + 1), *[("food", "3")] * (i % 2)) for i in range(20)]
    assert np.isfinite(rating_priors(rows, rows, rows, ENCODER)["ridge"]).all()


# --- texts


def test_text_baselines_copy_what_they_say():
    history = (("food soup", "Soup!"), ("sport run", "Run!"), ("", "music is life"))
    test = [
        example("u", "sport in the rain and many many more words than ten in all", "gold", *history),
        example("v", "music  tonight", "gold", *history),
        example("w", "anything", "gold"),
    ]
    found = text_priors(test, ENCODER)
    assert found["whole_request"] == [e.input for e in test]
    assert found["nearest_own_output"] == ["Run!", "music is life", ""]
    assert found["first_words"] == ["sport in the rain and many many more words than", "music tonight", "anything"]
    assert text_priors(test, ENCODER, words=2)["first_words"][0] == "sport in"


def test_the_nearest_item_is_the_nearest_by_brute_force(encoder):
    texts = [f"about {w} {i}" for i, w in enumerate(["sport", "food", "music", "rain"] * 3)]
    test = [example("u", t, "gold", *[(o, f"answer to {o}") for o in texts if o != t]) for t in texts]
    for e, found in zip(test, text_priors(test, encoder)["nearest_own_output"], strict=True):
        request = encoder.encode([e.input])[0]
        distances = [float(encoder.encode([i.input])[0] @ request) for i in e.history]
        assert found == e.history[int(np.argmax(distances))].output
