"""LLM-free predictions from the same data and vectors: the bar that a plug must pass to be worth its LLM."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona_plug.encoder import HistoryEncoder
from persona_plug.history import Example

SMOOTHING = 1.0  # pseudo-counts over all answers in a user's label frequencies
INVERSE_L2 = (0.3, 1.0, 3.0, 10.0, 30.0)
RIDGE = (0.1, 1.0, 10.0, 100.0)


def label_priors(
    train: Sequence[Example],
    valid: Sequence[Example],
    test: Sequence[Example],
    answers: Sequence[str],
    encoder: HistoryEncoder,
) -> dict[str, np.ndarray]:
    """Return probabilities (N, C) of each label baseline on `test`.

    `majority` is the training frequency, `user_frequency` the user's own, smoothed; `classifier` is logistic regression
    on the request's vector, `classifier_x_user` multiplies it with the user's over the population's frequencies. What
    is to be chosen (regularisation, exponent) is chosen on `valid`.
    """
    from sklearn.linear_model import LogisticRegression

    index = {a: i for i, a in enumerate(answers)}
    gold = np.array([index[e.output.strip()] for e in train])
    population = (np.bincount(gold, minlength=len(answers)) + 1.0) / (len(gold) + len(answers))
    vectors = {id(part): encoder.encode([e.input for e in part]).numpy() for part in (train, valid, test)}
    valid_gold = np.array([index[e.output.strip()] for e in valid])
    valid_user, test_user = (_frequencies(p, index, population) for p in (valid, test))

    def predict(model: LogisticRegression, part: Sequence[Example]) -> np.ndarray:
        full = np.full((len(part), len(answers)), 1e-6)
        full[:, model.classes_] = model.predict_proba(vectors[id(part)])
        return _normalised(full)

    if len(set(gold.tolist())) < 2:
        return {"majority": np.tile(population, (len(test), 1)), "user_frequency": test_user}
    models = [LogisticRegression(C=c, max_iter=2000).fit(vectors[id(train)], gold) for c in INVERSE_L2]
    alone = min(models, key=lambda m: nll(predict(m, valid), valid_gold))
    pairs = [(m, power) for m in models for power in (0.5, 1.0, 1.5)]
    best, power = min(
        pairs, key=lambda p: nll(_product(predict(p[0], valid), valid_user, population, p[1]), valid_gold)
    )
    return {
        "majority": np.tile(population, (len(test), 1)),
        "user_frequency": test_user,
        "classifier": predict(alone, test),
        "classifier_x_user": _product(predict(best, test), test_user, population, power),
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
    """Return texts on `test`: the request's first words, or the output of the user's nearest item."""
    requests = encoder.encode([e.input for e in test]).numpy()
    nearest = []
    for example, request in zip(test, requests, strict=True):
        if not example.history:
            nearest.append("")
            continue
        keys = encoder.encode([i.input or i.output for i in example.history]).numpy()
        nearest.append(example.history[int((keys @ request).argmax())].output)
    return {"first_words": [" ".join(e.input.split()[:words]) for e in test], "nearest_own_output": nearest}


def nll(probabilities: np.ndarray, gold: np.ndarray) -> float:
    """Return the mean negative log-probability of the gold answers."""
    return float(-np.log(np.maximum(probabilities[np.arange(len(gold)), gold], 1e-12)).mean())


def is_rating(answers: Sequence[str] | None) -> bool:
    """Whether all answers are numbers, so that errors have a size."""
    try:
        return answers is not None and all(np.isfinite(float(a)) for a in answers)
    except ValueError:
        return False


def _frequencies(part: Sequence[Example], index: dict[str, int], population: np.ndarray) -> np.ndarray:
    rows = np.tile(SMOOTHING * population, (len(part), 1))
    for row, example in zip(rows, part, strict=True):
        for item in example.history:
            if item.output.strip() in index:
                row[index[item.output.strip()]] += 1
    return _normalised(rows)


def _product(classifier: np.ndarray, user: np.ndarray, population: np.ndarray, power: float) -> np.ndarray:
    return _normalised(classifier * (user / population) ** power)


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
