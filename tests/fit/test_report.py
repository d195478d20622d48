import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from persona_plug.data import synthetic
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData, prepare
from persona_plug.errors import ConfigError
from persona_plug.fit.plots import length_bins, plot_lift, plot_loss
from persona_plug.fit.report import FitReport
from persona_plug.measure.answers import evaluate, label_answers, rating_errors
from persona_plug.measure.contrasts import Contrast, contrasts
from persona_plug.measure.stats import Interval


def held(*outputs, users=None):
    return [Example((users or "u" * 99)[i], f"r {i}", o) for i, o in enumerate(outputs)]


def report_with(low, high, metric="nll", b="plug_shuffled"):
    row = Contrast("plug", b, metric, (low + high) / 2, low, high)
    metrics = {"plug": {"nll": Interval(1.0, 0.9, 1.1)}, "none": {"accuracy": Interval(0.5, 0.4, 0.6)}}
    return FitReport(metrics, [row], 12, 3, ["a note"])


# --- per-question values


def test_label_values_by_hand():
    p = np.array([[0.2, 0.7, 0.1], [0.5, 0.3, 0.2]])
    found = label_answers(p, held("b", " c "), ("a", "b", "c"))
    assert found.values["nll"] == pytest.approx([-math.log(0.7), -math.log(0.2)])
    assert found.values["accuracy"].tolist() == [1.0, 0.0]
    assert found.texts == ["b", "a"]
    assert set(found.values) == {"nll", "accuracy"}


def test_an_impossible_gold_answer_has_a_finite_nll():
    found = label_answers(np.array([[1.0, 0.0]]), held("b"), ("a", "b"))
    assert found.values["nll"] == pytest.approx([-math.log(1e-12)])


@pytest.mark.parametrize("order", [("1", "2", "3", "4", "5"), ("5", "3", "1", "4", "2")])
@pytest.mark.parametrize(
    ("p", "median"),
    [
        ([0.4, 0.0, 0.0, 0.0, 0.6], 5),  # the mean 3.4 would be another decision
        ([0.3, 0.3, 0.2, 0.1, 0.1], 2),  # the mode is 1 (or 2)
        ([0.5, 0.0, 0.0, 0.0, 0.5], 1),
        ([0.1, 0.2, 0.3, 0.2, 0.2], 3),
    ],
)
def test_ratings_decide_by_median_for_mae_and_by_mean_for_rmse(order, p, median):
    shuffled = np.array([[p[int(a) - 1] for a in order]])
    found = label_answers(shuffled, held("4"), order)
    mean = sum(x * (i + 1) for i, x in enumerate(p))
    assert found.values["mae"] == pytest.approx([abs(4 - median)])
    assert found.values["rmse"] == pytest.approx([(4 - mean) ** 2])  # squared; the root is taken of the mean


def test_median_and_mean_are_the_best_decisions_there_are():
    rng = np.random.default_rng(0)
    levels = np.arange(1, 6)
    for p in rng.dirichlet(np.ones(5), 50):
        absolute = [(p * abs(levels - d)).sum() for d in levels]
        squared = [(p * (levels - d) ** 2).sum() for d in np.linspace(1, 5, 401)]
        values = [label_answers(p[None], held(str(y)), tuple("12345")).values for y in levels]
        assert sum(w * v["mae"][0] for w, v in zip(p, values, strict=True)) == pytest.approx(min(absolute))
        assert sum(w * v["rmse"][0] for w, v in zip(p, values, strict=True)) <= min(squared) + 1e-9


def test_rating_errors():
    found = rating_errors(np.array([4.0, 1.0]), np.array([5.0, 1.0]), np.array([2.0, 1.5]))
    assert {k: v.tolist() for k, v in found.items()} == {"mae": [1, 0], "rmse": [4, 0.25]}


def test_labels_that_are_not_numbers_have_no_errors():
    assert not {"mae", "rmse"} & set(label_answers(np.array([[0.5, 0.5]]), held("a"), ("a", "b")).values)


# --- rouge


def test_rouge_is_the_plain_f_measure_without_stemming():
    from persona_plug.measure.answers import _with_overlaps

    pairs = [
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("the cat sat", "a dog ran"),
        ("the cat sat on the mat", "the mat the cat"),  # 4 of 6 words, 2 of them in order
        ("runs", "running"),  # a stemmer would call them the same
        ("Hello, World!", "hello world"),
        ("something", ""),
    ]
    data = held(*[gold for gold, _ in pairs])
    found = _with_overlaps({}, [text for _, text in pairs], data, list(range(len(pairs))))
    f = 2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6)
    fl = 2 * (2 / 4) * (2 / 6) / (2 / 4 + 2 / 6)
    assert found.values["rouge-1"] == pytest.approx([1, 0, f, 0, 1, 0])
    assert found.values["rouge-L"] == pytest.approx([1, 0, fl, 0, 1, 0])
    assert found.values["chrf"][0] == 100
    assert found.values["chrf"][-1] == 0


def test_rouge_of_some_questions_leaves_the_others_unmeasured():
    from persona_plug.measure.answers import _with_overlaps

    found = _with_overlaps({}, ["a"], held("x", "a", "y"), [1])
    assert all(np.isnan(values).tolist() == [True, False, True] for values in found.values.values())


# --- contrasts


def test_contrasts_are_positive_where_the_plug_is_better():
    users = list("aabbccdd")
    names = ("nll", "accuracy", "mae", "rmse", "rouge-1")
    good = {name: np.full(8, value) for name, value in zip(names, (1.0, 1.0, 0.0, 1.0, 1.0), strict=True)}
    bad = {name: np.full(8, value) for name, value in zip(names, (3.0, 0.0, 1.0, 9.0, 0.0), strict=True)}
    rows = contrasts({"plug": good, "plug_shuffled": bad}, users)
    assert {r.metric: r.delta for r in rows} == {"nll": 2, "accuracy": 1, "mae": 1, "rmse": 2, "rouge-1": 1}
    assert all(r.low == r.high == r.delta for r in rows)
    swapped = contrasts({"plug": bad, "plug_shuffled": good}, users)
    assert [r.delta for r in swapped] == [-r.delta for r in rows]


def test_contrasts_name_all_methods_lift_first_and_the_task_gain():
    v = {"nll": np.arange(4.0)}
    names = ("none", "task_prompt", "plug_empty", "plug_shuffled", "plug", "user_prior: majority", "user_prior: ridge")
    rows = contrasts(dict.fromkeys(names, v), list("abcd"))
    assert rows[0].pair == ("plug", "plug_shuffled")
    assert {r.b for r in rows if r.a == "plug"} == set(names) - {"plug"}
    assert [r.pair for r in rows if r.a != "plug"] == [("task_prompt", "none")]


def test_contrasts_compare_on_the_questions_both_have():
    a = {"rouge-1": np.array([1.0, np.nan, 0.0, 0.5])}
    b = {"rouge-1": np.array([0.0, 1.0, np.nan, 0.5])}
    (row,) = contrasts({"plug": a, "plug_shuffled": b}, list("abcd"))
    assert row.delta == pytest.approx(0.5)


# --- the report as text


@pytest.mark.parametrize(
    ("low", "high", "marked", "verdict"),
    [
        (0.1, 0.5, False, "Knows the user: yes, nll +0.300 [+0.100, +0.500] over another user's history."),
        (-0.1, 0.5, True, "Knows the user: not shown, nll +0.200 [-0.100, +0.500]"),
        (-0.5, -0.1, False, "Knows the user: harm, nll -0.300 [-0.500, -0.100]"),
        (0.0, 0.4, True, "Knows the user: not shown"),
    ],
)
def test_intervals_that_include_zero_are_marked_and_the_verdict_follows(low, high, marked, verdict):
    report = report_with(low, high)
    row = next(line for line in report.to_markdown().splitlines() if line.startswith("| plug −"))
    assert ("(includes 0)" in row) is marked
    assert report.verdict().startswith(verdict)
    assert "\n" not in report.verdict()
    assert all(sentence in str(report).splitlines() for sentence in report.sentences())


def test_without_the_shuffled_control_there_is_no_verdict():
    assert report_with(0.1, 0.2, b="none").verdict() == "Knows the user: not measured."


def test_markdown_has_a_row_a_method_and_a_column_a_metric():
    lines = report_with(0.1, 0.2).to_markdown().splitlines()
    assert lines[0].startswith("12 questions of 3 held-out users; 95% intervals")
    assert lines[2] == "| method | nll ↓ | accuracy ↑ |"
    assert lines[4] == "| plug | 1.000 [0.900, 1.100] | – |"
    assert lines[5] == "| none | – | 0.500 [0.400, 0.600] |"
    assert "- a note" in lines
    assert [line.split(":")[0] for line in lines if line.startswith(("- nll", "- accuracy"))] == ["- nll", "- accuracy"]


def test_an_empty_report_says_that_nothing_can_be_said():
    report = FitReport({}, [], 0, 0)
    assert "nothing can be said" in str(report)
    assert report.verdict() == "Knows the user: not measured."


def test_json_is_strict_and_complete(tmp_path):
    report = report_with(0.1, 0.2)
    report.save(tmp_path)
    text = (tmp_path / "fit_report.json").read_text()
    assert text == report.to_json()

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    raw = json.loads(text, parse_constant=refuse)
    assert set(raw) == {f.name for f in dataclasses.fields(FitReport)} - {"examples", "request"}
    assert raw["metrics"]["plug"] == {"nll": [1.0, 0.9, 1.1]}
    assert raw["contrasts"] == [
        {"a": "plug", "b": "plug_shuffled", "metric": "nll", "delta": pytest.approx(0.15), "low": 0.1, "high": 0.2}
    ]
    assert FitReport.from_json(text) == report
    assert (tmp_path / "fit_report.md").read_text() == str(report) + "\n"


def test_the_repr_of_a_report_is_one_line():
    report = dataclasses.replace(report_with(0.1, 0.2), examples=[{"input": "secret"}])
    assert repr(report) == f"<FitReport: 12 questions of 3 held-out users. {report.verdict()}>"


# --- texts of users stay out of what is shared


@pytest.mark.parametrize("answers", ["auto", None])
@pytest.mark.parametrize("keep", [False, True])
def test_a_folder_holds_users_texts_only_where_they_were_asked_for(make_plug, tmp_path, answers, keep):
    rows = [
        {"user_id": f"person-{u}", "input": f"asks {u} {i} privately", "output": f"secret{u % 2}"}
        for u in range(8)
        for i in range(4)
    ]
    plug = make_plug(max_answer_tokens=8)
    report = plug.fit(
        rows, output_dir=tmp_path / "plug", answers=answers, held_out=0.4, steps=1, batch_size=4, keep_texts=keep
    )
    assert report.examples or report.request
    assert "privately" in str(report)
    plug.save_pretrained(tmp_path / "saved")
    files = [f for f in tmp_path.rglob("*") if f.suffix in (".json", ".jsonl", ".md")]
    assert {"fit_report.json", "fit_report.md", "README.md", "log.jsonl", "run.json"} <= {f.name for f in files}
    texts = ("privately", "person-") + (("secret",) if answers is None else ())
    found = {f.name for f in files if any(text in f.read_text() for text in texts)}
    assert found == ({"fit_examples.md"} if keep else set())


def test_bad_records_leave_no_text_in_the_notes(make_plug, tmp_path):
    good = [{"user_id": f"u{n % 6}", "input": f"q {n}", "output": "ab"[n % 2]} for n in range(36)]
    bad = [{"user_id": "u1", "input": ["my secret"], "output": "a"}]
    report = make_plug().fit(
        good + bad, output_dir=tmp_path, held_out=0.3, steps=1, batch_size=4, skip_bad=True, answers=["a", "b"]
    )
    assert any("1 bad records skipped" in note for note in report.notes)
    assert "secret" not in report.to_json()


def test_texts_need_a_folder(make_plug, labelled):
    with pytest.raises(ConfigError, match="keep_texts=True writes into output_dir"):
        make_plug().fit(labelled[1], keep_texts=True)


# --- what fails in a report takes nothing else with it


def broken(what):
    def fail(*_, **__):
        raise what

    return fail


REPORT = "persona_plug.fit.report."
FAULTS = {
    "loss plot": (REPORT + "plot_loss", ValueError("no backend 'module://x'"), "loss.png"),
    "lift plot": (REPORT + "plot_lift", RuntimeError("no fonts"), "lift.png"),
    "examples": (REPORT + "side_by_side", KeyError("token"), "answers side by side"),
    "request": (REPORT + "one_request", IndexError("out of range"), "one request"),
    "generation": ("persona_plug.model.PlugModel.generate", ValueError("cannot generate from embeddings"), "chrF"),
    "counts": (REPORT + "truncation_notes", TypeError("tokenizer"), "the count of what was cut"),
    "files": (REPORT + "FitReport.save", OSError(28, "No space left on device"), "the files of the report"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_fails_leaves_plug_and_table_and_is_named(make_plug, tmp_path, monkeypatch, fault):
    target, error, named = FAULTS[fault]
    monkeypatch.setattr(target, broken(error))
    rows = [{"user_id": f"u{u}", "input": f"asks {u} {i}", "output": f"text {u}"} for u in range(8) for i in range(4)]
    plug = make_plug(max_answer_tokens=4)
    report = plug.fit(rows, output_dir=tmp_path, answers=None, held_out=0.3, steps=1, batch_size=4, generated=4)
    monkeypatch.undo()
    assert {"plug", "plug_shuffled", "none", "task_prompt"} <= set(report.metrics)
    (note,) = [note for note in report.notes if named in note and str(error.args[-1]) in note]
    assert note in str(report)
    loaded = type(plug).from_pretrained(tmp_path)
    assert all(bool((p == q).all()) for p, q in zip(loaded.parameters(), plug.parameters(), strict=True))
    assert fault == "files" or note in (tmp_path / "fit_report.json").read_text()


@pytest.mark.parametrize("where", ["run_methods", "contrasts"])
def test_the_plug_is_saved_before_anything_is_reported(make_plug, labelled, tmp_path, monkeypatch, where):
    monkeypatch.setattr(REPORT + where, broken(ZeroDivisionError("whatever")))
    plug = make_plug()
    with pytest.raises(ZeroDivisionError):
        plug.fit(labelled[1], output_dir=tmp_path, steps=1, batch_size=4)
    loaded = type(plug).from_pretrained(tmp_path)
    assert all(bool((p == q).all()) for p, q in zip(loaded.parameters(), plug.parameters(), strict=True))


def test_a_full_disk_behind_the_report_keeps_the_saved_plug(make_plug, labelled, tmp_path, monkeypatch):
    from persona_plug import persistence

    real, calls = persistence.save, []

    def save(folder, *args):
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(folder, *args)

    monkeypatch.setattr(persistence, "save", save)
    report = make_plug().fit(labelled[1], output_dir=tmp_path, steps=1, batch_size=4)
    assert any("the report beside the plug could not be made: [Errno 28] No space" in note for note in report.notes)
    make_plug().from_pretrained(tmp_path)


def test_few_held_out_users_are_told_of_before_the_work(make_plug, labelled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("persona_plug.fit.run.train_parts", broken(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        make_plug().fit(labelled[1], output_dir=tmp_path)
    users = len({e.user_id for e in labelled[1].held_out})
    assert f"{users} held-out users tell little" in capsys.readouterr().err


# --- plots


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 3000


def test_plots_are_drawn_and_leave_matplotlib_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "epoch": 1}, {"step": 2, "eval_loss": 1.7}]
    plot_loss(log, tmp_path / "loss.png")
    rng = np.random.default_rng(0)
    data = [Example(f"u{i % 5}", "r", "o", (HistoryItem("a", "b"),) * (i % 9)) for i in range(45)]
    plot_lift(rng.normal(size=45), data, tmp_path / "lift.png")
    assert is_png(tmp_path / "loss.png")
    assert is_png(tmp_path / "lift.png")
    assert plt.get_fignums() == before


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [0, 1], [0, 0, 0, 0, 50], list(range(20))])
def test_lift_groups_take_every_question_once(tmp_path, monkeypatch, lengths):
    from persona_plug.fit import plots

    seen = []
    real = plots.user_bootstrap
    monkeypatch.setattr(plots, "user_bootstrap", lambda v, u, *a: (seen.extend(v), real(v, u, *a))[1])
    data = [Example(f"u{i}", "r", "o", (HistoryItem("a", "b"),) * n) for i, n in enumerate(lengths)]
    plot_lift(np.arange(len(lengths), dtype=float), data, tmp_path / "lift.png")
    assert sorted(seen) == list(range(len(lengths)))


@pytest.mark.parametrize("lengths", [[3], [3, 3, 3], [0, 1], [0, 0, 0, 0, 50], list(range(20)), [1, 5, 5, 5, 5, 9, 9]])
def test_bins_hold_every_length_once(lengths):
    bins = [np.array(lengths)[b] for b in length_bins(np.array(lengths), 4)]
    assert sorted(np.concatenate(bins)) == sorted(lengths)
    assert len(bins) <= 4
    assert all(a.max() < b.min() for a, b in itertools.pairwise(bins))


@pytest.mark.parametrize(("loss", "valid", "noted"), [(2.0, 1.5, True), (1.5, 2.0, False), (2.0, None, False)])
def test_a_training_loss_above_validation_is_explained(tmp_path, monkeypatch, loss, valid, noted):
    said = []
    monkeypatch.setattr("matplotlib.figure.Figure.supxlabel", lambda _, text, **how: said.append(text))
    log = [{"step": 1, "loss": loss}, *([{"step": 1, "eval_loss": valid}] if valid else [])]
    plot_loss(log, tmp_path / "loss.png")
    assert bool(said) == noted


# --- evaluation with a model


@pytest.fixture(scope="module")
def labelled():
    made = synthetic.build("label", users=9, items_per_user=5, answers=3)
    return made, prepare(made.records, samples="leave_one_out", held_out=0.5, answers=made.answers, template="{input}")


def test_evaluate_scores_labels_with_the_temperature_but_not_the_plain_llm(make_plug, labelled):
    made, data = labelled
    plug = make_plug(differ=True, answers=made.answers, template="{input}")
    plug.embedder.score_temperature.fill_(3.0)
    inputs, histories = [e.input for e in data.held_out], [e.history for e in data.held_out]
    gold = [made.answers.index(e.output) for e in data.held_out]
    for personal, temperature in ((True, 3.0), (False, 1.0)):
        scores = plug.score(inputs, history=histories, personal=personal) / temperature
        expected = -scores.log_softmax(-1)[range(len(gold)), gold]
        found = evaluate(plug, data.held_out, personal=personal).values["nll"]
        assert found == pytest.approx(expected.double().numpy(), abs=1e-5)


def test_evaluate_free_text_is_the_mean_token_nll(make_plug):
    plug = make_plug(differ=True)
    data = [Example("u", "a request", "abc", (HistoryItem("x", "y"),)), Example("v", "another", "z", ())]
    found = evaluate(plug, data, generated=1)
    for e, value in zip(data, found.values["nll"], strict=True):
        loglik = plug.score(e.input, [e.output], e.history)[0, 0]  # end token included: one candidate
        assert value == pytest.approx(-float(loglik) / (len(e.output) + 1), abs=1e-5)
    assert np.isnan(found.values["rouge-1"]).tolist() == [False, True]
    assert len(found.texts) == 1


# --- a whole report


@pytest.fixture(scope="module")
def fitted(make_plug, labelled, tmp_path_factory):
    _, data = labelled
    folder = tmp_path_factory.mktemp("run")
    plug = make_plug()
    return plug.fit(data, output_dir=folder, steps=4, batch_size=4, eval_every=2), folder, plug


def test_the_table_has_every_method(fitted):
    report, folder, plug = fitted
    priors = {f"user_prior: {n}" for n in ("majority", "user_frequency", "classifier", "classifier_x_user")}
    controls = {
        "none",
        "task_prompt",
        "plug_empty",
        "plug_shuffled",
        "plug",
        "plug: LLM alone",
        "plug: answers head alone",
    }
    assert set(report.metrics) == controls | priors
    assert all(set(row) == {"nll", "accuracy"} for row in report.metrics.values())
    text = (folder / "fit_report.md").read_text()
    assert all(f"| {name} |" in text for name in report.metrics)
    assert all(sentence in text for sentence in report.sentences())
    assert len(report.sentences()) == 4
    assert plug.fit_report is report


def test_the_report_counts_users_and_questions(fitted, labelled):
    report, *_ = fitted
    _, data = labelled
    assert report.n == len(data.held_out)
    assert report.n_users == len({e.user_id for e in data.held_out})
    assert report.details["fit"]["steps"] == 4
    assert report.details["steps_done"] == 4
    assert report.details["score_temperature"] > 0


def test_both_plots_are_there(fitted):
    _, folder, _ = fitted
    assert is_png(folder / "loss.png")
    assert is_png(folder / "lift.png")


def test_intervals_contain_their_value_and_json_is_strict(fitted):
    report, folder, _ = fitted
    for row in report.metrics.values():
        assert all(i.low <= i.value <= i.high for i in row.values())
    json.loads((folder / "fit_report.json").read_text(), parse_constant=pytest.fail)


def test_examples_show_what_the_person_wrote_beside_the_controls(fitted, labelled):
    report, *_ = fitted
    made, data = labelled
    assert 1 <= len(report.examples) <= 3
    for e in report.examples:
        assert (e["input"], e["really wrote"]) in {(x.input, x.output) for x in data.held_out}
        assert {e["no user"], e["another user"], e["this user"]} <= set(made.answers)


def test_shuffled_histories_come_from_another_held_out_user(make_plug, labelled, tmp_path, monkeypatch):
    from persona_plug.fit import report as module

    _, data = labelled
    asked = []
    real = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda p, h, *a, **k: (asked.append(h), real(p, h, *a, **k))[1])
    make_plug().fit(data, output_dir=tmp_path, steps=1, batch_size=4, eval_every=1)
    owner = {i: e.user_id for p in (data.train, data.valid, data.held_out) for e in p for i in e.history}
    held_users = {e.user_id for e in data.held_out}
    shuffled = [h for h in asked if any(e.history and owner[e.history[0]] != e.user_id for e in h)]
    assert len(shuffled) == 1
    for e, own in zip(shuffled[0], data.held_out, strict=True):
        assert (e.input, e.output) == (own.input, own.output)
        assert e.history
        assert {owner[i] for i in e.history} <= held_users - {e.user_id}


def test_without_held_out_users_there_is_no_comparison(make_plug, labelled, tmp_path):
    _, data = labelled
    report = make_plug().fit(
        FitData(data.train, data.valid, [], data.template, data.answers), output_dir=tmp_path, steps=1, batch_size=4
    )
    assert report.metrics == {}
    assert (tmp_path / "fit_report.json").is_file()


def test_ratings_have_all_baselines_and_errors(make_plug, tmp_path):
    rows = [
        {"user_id": f"u{u}", "input": f"thing {u} {i}", "output": str((u + i % 2) % 3 + 1)}
        for u in range(10)
        for i in range(4)
    ]
    report = make_plug().fit(rows, output_dir=tmp_path, held_out=0.3, steps=1, batch_size=4, examples=1)
    assert {"user_prior: user_mean", "user_prior: user_median", "user_prior: ridge"} <= set(report.metrics)
    assert set(report.metrics["plug"]) == {"nll", "accuracy", "mae", "rmse"}
    assert set(report.metrics["user_prior: ridge"]) == {"mae", "rmse"}
    json.loads(report.to_json(), parse_constant=pytest.fail)
