"""Metric classes and calibration."""

import socket
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics import classes as metrics
from eval.metrics.lamp import official_rouge, score
from persona_plug.errors import ConfigError, DataError
from training.tasks import load_task

GOLD = ["The cats sat on a mat", "running shoes", "Über-große Fragen?", "the same words here", "x"]
FOUND = ["the cat sat on the mat", "runs in shoes", "große Fragen", " the same words here\n", ""]


def no_network(*_args, **_kwargs):
    raise AssertionError("the network was asked")


# Metric classes


@pytest.mark.parametrize("task", ["LaMP_2", "LaMP_3", "LongLaMP_1"])
def test_classes_give_the_scores_without_network_or_traces(monkeypatch, tmp_path, task):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    found, gold = {"LaMP_2": (["comedy", "?"], ["comedy", "action"]), "LaMP_3": (["2", "?"], ["5", "1"])}.get(
        task, (FOUND, GOLD)
    )
    for name, value in score(task, found, gold).items():
        metric = metrics.TextMetric(name, cache_dir=str(tmp_path))
        options = {"answers": list(load_task(task).answers)} if name in ("f1", "mae", "rmse") else {}
        assert metric.compute(predictions=found, references=gold, **options) == {name: value}
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_classes_take_batches_and_a_seed():
    metric = metrics.TextMetric("lamp-rouge-1")
    metric.add_batch(predictions=FOUND[:2], references=GOLD[:2])
    metric.add(prediction=FOUND[2], reference=GOLD[2])
    expected = official_rouge("lamp-rouge-1", FOUND[:3], GOLD[:3]).mean()
    assert metric.compute() == {"lamp-rouge-1": pytest.approx(expected)}
    official = metrics.TextMetric("lamp-rouge-L").compute(predictions=FOUND, references=GOLD, seed=3)
    assert official["lamp-rouge-L"] == score("LaMP_4", FOUND, GOLD, official_rouge=True, seed=3)["lamp-rouge-L"]


def test_options_of_classes_are_checked():
    # The scale's ends are those of the given answers.
    found = metrics.TextMetric("rmse").compute(predictions=["x"], references=["3"], answers=["2", "4"])
    assert found == {"rmse": 1.0}
    with pytest.raises(ConfigError, match=r"f1: answers=\[...\] is missing"):
        metrics.TextMetric("f1").compute(predictions=["a"], references=["a"])
    with pytest.raises(ConfigError, match="accuracy: unknown option 'colour'; known are none"):
        metrics.TextMetric("accuracy").compute(predictions=["a"], references=["a"], colour=1)
    with pytest.raises(ConfigError, match="no metric 'colour' of texts; known are accuracy"):
        metrics.TextMetric("colour")


def test_every_rule_has_a_direction_and_a_description():
    from eval.metrics.lamp import QUESTION_RULES, SET_RULES
    from persona_plug.measure.metrics import METRICS

    names = [*QUESTION_RULES, *SET_RULES]
    assert set(names) | {"nll", "ece"} == set(METRICS)
    for name in names:
        assert metrics.TextMetric(name).description == METRICS[name].description


# Calibration


def test_calibration_error_by_hand():
    rows = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]]
    # Each row has a bin of its own: 0.9 right, 0.8 wrong, 0.7 right, 0.55 wrong.
    expected = (0.1 + 0.8 + 0.3 + 0.55) / 4
    assert metrics.expected_calibration_error(rows, [0, 1, 1, 0], bins=10) == pytest.approx(expected)
    # In a single bin: confidence 0.7375, accuracy a half.
    assert metrics.expected_calibration_error(rows, [0, 1, 1, 0], bins=1) == pytest.approx(0.2375)
    got = metrics.CalibrationError().compute(predictions=rows, references=[0, 1, 1, 0], bins=10)
    assert got == {"ece": pytest.approx(expected)}
    assert metrics.expected_calibration_error([[1.0, 0.0]], [0]) == 0
    # A half lies in the lower of two bins, apart from 0.7.
    assert metrics.expected_calibration_error([[0.5, 0.5], [0.7, 0.3]], [1, 0], bins=2) == pytest.approx(0.4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 99), st.integers(1, 20))
def test_calibration_error_as_defined(n, classes, seed, bins):
    rng = np.random.default_rng(seed)
    rows, gold = rng.dirichlet(np.ones(classes), n), rng.integers(classes, size=n)
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(n) if b / bins < rows[i].max() <= (b + 1) / bins]
        if inside:
            confidence = statistics.fmean(float(rows[i].max()) for i in inside)
            accuracy = statistics.fmean(float(rows[i].argmax() == gold[i]) for i in inside)
            total += len(inside) / n * abs(accuracy - confidence)
    assert metrics.expected_calibration_error(rows, gold, bins) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "gold", "message"),
    [
        ([[0.5, 0.6]], [0], "does not sum to 1"),
        ([[1.5, -0.5]], [0], "does not sum to 1"),
        ([[float("nan"), 1.0]], [0], "does not sum to 1"),
        ([[0.5, 0.5]], [2], "places from 0 to 1"),
        ([[0.5, 0.5]], [-1], "places from 0 to 1"),
        ([[0.5, 0.5]], [0, 1], "must be"),
        ([], [], "must be"),
    ],
)
def test_what_is_no_probability_is_refused(rows, gold, message):
    with pytest.raises(DataError, match=message):
        metrics.expected_calibration_error(rows, gold)
