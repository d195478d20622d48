"""LLM-free predictions from the same data and vectors: the bar that a plug must pass to be worth its LLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from persona_plug.config import SMOOTHING
from persona_plug.data.history import Example
from persona_plug.models.encoder import HistoryEncoder

INVERSE_L2 = (0.3, 1.0, 3.0, 10.0, 30.0)
FOLDS = 5
POWERS = (0.5, 0.75, 1.0, 1.25, 1.5)
RIDGE = (0.1, 1.0, 10.0, 100.0)


@dataclass(frozen=True, slots=True)
class LabelModel:
    """p(c | request, user) proportional to softmax(weight . request + bias)_c * (p_user / p_all)_c ** power.

    Attributes:
        weight: (C, d) float32.
        bias: (C,) float32.
        alone: The weight and bias that do best without the user.
        population: (C,) float32, smoothed training frequencies p_all.
        power: Exponent of the user's frequencies.
        crossed: (N, C) float32, scores of the training samples by models that did not see their users.
    """

    weight: np.ndarray
    bias: np.ndarray
    alone: tuple[np.ndarray, np.ndarray]
    population: np.ndarray
    power: float
    crossed: np.ndarray


def fit_label_model(
    train: Sequence[Example], valid: Sequence[Example], answers: Sequence[str], encoder: HistoryEncoder
) -> LabelModel:
    """Fit logistic regression on the requests' vectors; penalty and exponent are chosen by NLL on `valid`."""
    from sklearn.linear_model import LogisticRegression

    index = {a: i for i, a in enumerate(answers)}
    gold, valid_gold = (np.array([index[e.output.strip()] for e in part]) for part in (train, valid))
    population = ((np.bincount(gold, minlength=len(answers)) + 1.0) / (len(gold) + len(answers))).astype(np.float32)
    x, x_valid = (encoder.encode([e.input for e in part]).numpy() for part in (train, valid))
    valid_user = _frequencies(valid, index, population)

    def fit(c: float, x: np.ndarray, gold: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = np.zeros((len(answers), encoder.dim), np.float32)
        bias = np.log(population)
        if c == 0 or len(set(gold.tolist())) < 2:
            return weight, bias
        regression = LogisticRegression(C=c, max_iter=2000).fit(x, gold)
        slopes, offsets = regression.coef_, regression.intercept_
        two = len(regression.classes_) == 2
        # An answer that does not occur keeps no weight and a bias below all others.
        bias = np.full(len(answers), (0.0 if two else float(offsets.min())) - 3.0, np.float32)
        weight[regression.classes_] = np.vstack([-slopes, slopes]) / 2 if two else slopes
        bias[regression.classes_] = np.hstack([-offsets, offsets]) / 2 if two else offsets
        return weight, bias

    models = [fit(c, x, gold) for c in (0.0, *INVERSE_L2)]
    probabilities = [_softmax(x_valid @ w.T + b) for w, b in models]
    alone = min(range(len(models)), key=lambda i: nll(probabilities[i], valid_gold))
    pairs = [(i, power) for i in range(len(models)) for power in POWERS]

    def product_nll(pair: tuple[int, float]) -> float:
        return nll(_product(probabilities[pair[0]], valid_user, population, pair[1]), valid_gold)

    best, power = min(pairs, key=product_nll)
    users = np.unique([e.user_id for e in train], return_inverse=True)[1] % FOLDS
    crossed = power * np.log(_frequencies(train, index, population) / population)
    for fold in range(FOLDS):
        inside = users == fold
        if inside.any():
            weight, bias = fit((0.0, *INVERSE_L2)[best], x[~inside], gold[~inside])
            crossed[inside] += x[inside] @ weight.T + bias
    return LabelModel(*models[best], models[alone], population, power, crossed.astype(np.float32))


def label_priors(
    train: Sequence[Example],
    valid: Sequence[Example],
    test: Sequence[Example],
    answers: Sequence[str],
    encoder: HistoryEncoder,
) -> dict[str, np.ndarray]:
    """Return probabilities (N, C) of each label baseline on `test`.

    `majority` is the training frequency, `user_frequency` the user's own, smoothed; `classifier` is logistic regression
    on the request's vector, `classifier_x_user` multiplies it with the user's over the population's frequencies.
    """
    model = fit_label_model(train, valid, answers, encoder)
    user = _frequencies(test, {a: i for i, a in enumerate(answers)}, model.population)
    x = encoder.encode([e.input for e in test]).numpy()
    classifier = _softmax(x @ model.weight.T + model.bias)
    return {
        "majority": np.tile(model.population, (len(test), 1)),
        "user_frequency": user,
        "classifier": _softmax(x @ model.alone[0].T + model.alone[1]),
        "classifier_x_user": _product(classifier, user, model.population, model.power),
    }


def rating_priors(
    train: Sequence[Example], valid: Sequence[Example], test: Sequence[Example], encoder: HistoryEncoder
) -> dict[str, np.ndarray]:
    """Return predicted ratings (N,) of each numeric baseline on `test`.

    `user_mean` and `user_median` look at the history alone; `ridge` regresses on the request's vector, the mean vector
    of the history and the user's smoothed mean rating; its penalty is chosen on `valid`.
    """
    from sklearn.linear_model import Ridge

    overall = float(np.mean([float(e.output) for e in train]))

    def features(part: Sequence[Example]) -> np.ndarray:
        requests = encoder.encode([e.input for e in part]).numpy()
        texts = sorted({i.input for e in part for i in e.history})
        rows = dict(zip(texts, encoder.encode(texts).numpy(), strict=True))
        zero = np.zeros(encoder.dim, dtype=np.float32)
        means = np.stack([np.mean([rows[i.input] for i in e.history], axis=0) if e.history else zero for e in part])
        own = np.array([[_smoothed_mean(e, overall)] for e in part])
        return np.hstack([requests, means, own])

    x, y = features(train), np.array([float(e.output) for e in train])
    x_valid, y_valid = features(valid), np.array([float(e.output) for e in valid])
    model = min(
        (Ridge(alpha=a).fit(x, y) for a in RIDGE), key=lambda m: float(np.mean((m.predict(x_valid) - y_valid) ** 2))
    )
    return {
        "user_mean": np.array([_smoothed_mean(e, overall) for e in test]),
        "user_median": np.array([float(np.median(_ratings(e) or [overall])) for e in test]),
        "ridge": model.predict(features(test)),
    }


def text_priors(test: Sequence[Example], encoder: HistoryEncoder, words: int = 10) -> dict[str, list[str]]:
    """Return texts on `test`: the request as it is, its first words, or the output of the user's nearest item."""
    requests = encoder.encode([e.input for e in test]).numpy()
    nearest = []
    for example, request in zip(test, requests, strict=True):
        if not example.history:
            nearest.append("")
            continue
        keys = encoder.encode([i.input or i.output for i in example.history]).numpy()
        nearest.append(example.history[int((keys @ request).argmax())].output)
    return {
        "whole_request": [e.input for e in test],  # where a text is to be rewritten, most of it is already right
        "first_words": [" ".join(e.input.split()[:words]) for e in test],
        "nearest_own_output": nearest,
    }


def nll(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Return the mean negative log-probability of the gold answers."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(gold)), gold], 1e-12)).mean())


def _frequencies(part: Sequence[Example], index: dict[str, int], population: np.ndarray) -> np.ndarray:
    rows = np.tile(SMOOTHING * population, (len(part), 1))
    for row, example in zip(rows, part, strict=True):
        for item in example.history:
            if item.output.strip() in index:
                row[index[item.output.strip()]] += 1
    return _normalised(rows)


def _product(classifier: np.ndarray, user: np.ndarray, population: np.ndarray, power: float) -> np.ndarray:
    return _normalised(classifier * (user / population) ** power)


def _softmax(scores: np.ndarray) -> np.ndarray:
    return _normalised(np.exp(scores - scores.max(1, keepdims=True)))


def _normalised(rows: np.ndarray) -> np.ndarray:
    return rows / rows.sum(1, keepdims=True)


def _ratings(example: Example) -> list[float]:
    values = []
    for item in example.history:
        try:
            values.append(float(item.output))
        except ValueError:
            continue
    return values


def _smoothed_mean(example: Example, overall: float) -> float:
    values = _ratings(example)
    return (sum(values) + overall) / (len(values) + 1)
