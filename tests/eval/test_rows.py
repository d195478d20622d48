"""A method's row: means over seeds, values of whole sets, and costs."""

import numpy as np
import pytest

from eval.metrics.lamp import bleu, macro_f1
from eval.outcomes import Costs, Outcome
from eval.questions import Questions
from eval.rows import add_text_values, details, mean_values, method_row
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.measure.answers import Answers
from training.tasks import load_task


def questions_of(task, outputs, generated, answers=None):
    held_out = [
        Example(f"u{i // 2}", f"q{i}", output, (HistoryItem("a", "b"),) * i) for i, output in enumerate(outputs)
    ]
    return Questions(load_task(task), FitData([], [], held_out, "{input}", answers), generated)


def test_labels_have_their_set_metrics_for_the_mean_of_the_seeds():
    task = load_task("LaMP_2")
    outputs = [task.answers[i % 3] for i in range(6)]
    questions = questions_of("LaMP_2", outputs, 1, task.answers)
    tables = [np.eye(len(task.answers))[[i % k for i in range(6)]] for k in (3, 2)]
    texts = [[task.answers[row] for row in table.argmax(1)] for table in tables]
    runs = [
        Outcome(Answers({"accuracy": np.array([a == b for a, b in zip(t, outputs, strict=True)], float)}, t, table),
                Costs(seconds=seconds, lr=lr))
        for t, table, seconds, lr in zip(texts, tables, (1.0, 3.0), (None, 0.5), strict=True)
    ]  # fmt: skip
    row = method_row(mean_values(runs), runs, questions)
    assert set(row["metrics"]) == {"accuracy", "f1", "ece"}
    expected = np.mean([macro_f1(t, outputs, task.answers) for t in texts])
    assert row["metrics"]["f1"]["value"] == pytest.approx(expected)
    low, high = row["metrics"]["f1"]["ci95"]
    assert low <= expected <= high
    assert [seed["accuracy"] for seed in row["per_seed"]] == [1.0, pytest.approx(1 / 3)]
    assert row["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)
    assert row["metrics"]["ece"]["value"] == pytest.approx(1 / 3)  # certain, and right in all or in a third
    assert (row["seconds_per_query"], row["lr"], row["fit_seconds"]) == (2.0, 0.5, None)


def test_free_text_is_scored_where_it_was_written():
    outputs = ["the red fox runs home", "a blue bird sings now", "a green tree grows here", "x"]
    questions = questions_of("LongLaMP_1", outputs, 2)
    texts = ["the red fox runs home", "a green bird sings here"]
    outcome = Outcome(Answers({"nll": np.ones(4)}, texts))
    add_text_values(outcome, questions)
    row = method_row(mean_values([outcome]), [outcome], questions)
    assert set(row["metrics"]) == {"nll", "length", "foreign", "copied", *load_task("LongLaMP_1").metrics}
    assert np.isnan(outcome.answers.values["rouge-1"]).tolist() == [False, True, False, True]
    assert row["metrics"]["bleu"]["value"] == pytest.approx(bleu(texts, [outputs[0], outputs[2]]))
    extra = details({"plug": outcome.answers.values}, {"plug": [outcome]}, questions)
    assert extra["users"] == ["u0", "u0", "u1", "u1"]
    assert extra["history_lengths"] == [0, 1, 2, 3]
    assert [e["answers"]["plug"] for e in extra["examples"]] == texts
    assert [e["reference"] for e in extra["examples"]] == [outputs[0], outputs[2]]
