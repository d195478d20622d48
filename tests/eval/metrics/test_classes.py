"""Metric classes and calibration."""

import socket

import pytest

from eval.metrics import classes as metrics
from eval.metrics.lamp import official_rouge, score
from persona_plug.errors import ConfigError
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
    assert set(names) | {"nll", "ece", "length", "foreign", "copied"} == set(METRICS)
    for name in names:
        assert metrics.TextMetric(name).description == METRICS[name].description
