"""`python -m eval.run` on a small LaMP-shaped folder, its settings, and the paired timing."""

import json

import pytest

from eval import run
from eval.bench.timing import paired
from eval.session import Session
from eval.settings import ComparisonSettings
from persona_plug.errors import ConfigError, DataError, PersonaPlugError
from training import run as training_run
from training.data import load_data
from training.tasks import load_task

WORDS = ["storm", "river", "engine", "castle", "forest", "market", "violin", "desert"]


@pytest.fixture
def folder(tmp_path):
    """Six training and three dev users who rate short reviews, in LaMP-3's published shape."""
    for split, users in (("train", 6), ("dev", 3)):
        questions, golds = [], []
        for u in range(users):
            taste = str(1 + u % 5)
            items = [{"text": f"{WORDS[i]} review {u}", "score": taste, "id": f"{split}{u}-{i}"} for i in range(4)]
            for q in range(2):
                ident = f"{split}{u}-q{q}"
                text = f"What is the score of the following review? review: {WORDS[4 + q]} by {u}"
                questions.append({"id": ident, "user_id": f"{split}{u}", "input": text, "profile": items})
                golds.append({"id": ident, "output": taste})
        (tmp_path / f"{split}_questions.json").write_text(json.dumps(questions))
        (tmp_path / f"{split}_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    return tmp_path


ARGUMENTS = [
    "task=LaMP_3",
    "llm=tiny-llama",
    "encoder=tiny-encoder",
    "seeds=[0, 1]",
    "fit={steps: 2, batch_size: 4, eval_every: 1, eval_samples: 4}",
]


def test_a_comparison_has_every_method_and_repeats_nothing(folder, capsys, monkeypatch):
    arguments = [*ARGUMENTS, f"data={folder}", f"out={folder / 'out'}"]
    run.main(arguments)
    text = (folder / "out" / "results.json").read_text()
    assert not [word for word in (*WORDS, "train0", "dev0", str(folder)) if word in text]  # it can be committed
    assert len(text) < 20_000
    results = json.loads(text)
    assert f"out={(folder / 'out').name}" in results["command"]
    assert {"a", "b", "metric", "delta", "ci95", "p", "p_holm"} == set(results["contrasts"][0])
    assert (results["n"], results["n_users"], results["seeds"]) == (6, 3, [0, 1])
    assert {"none", "task_prompt", "plug", "plug_shuffled", "plug_empty"} <= set(results["methods"])
    for name in ("plug", "task_prompt"):
        row = results["methods"][name]
        assert set(row["metrics"]) == {"nll", "accuracy", "mae", "rmse", "ece"}
        assert len(row["per_seed"]) == 2
        seeds = [seed["nll"] for seed in row["per_seed"]]
        assert row["metrics"]["nll"]["value"] == pytest.approx(sum(seeds) / 2)
        low, high = row["metrics"]["nll"]["ci95"]
        assert low <= row["metrics"]["nll"]["value"] <= high
    assert "| plug − plug_shuffled | nll |" in capsys.readouterr().out
    monkeypatch.setattr("training.recipes.train_parts", lambda *_, **__: pytest.fail("trained again"))
    run.main(arguments)
    again = json.loads((folder / "out" / "results.json").read_text())
    assert again["methods"] == results["methods"]


def read(folder, **changes):
    settings, task = ComparisonSettings(data=str(folder), **changes), load_task("LaMP_3")
    return load_data(settings, task, settings.split, settings.questions)


def test_training_never_sees_the_split_it_reports_on(folder):
    data = read(folder)
    users = [{e.user_id for e in part} for part in (data.train, data.valid, data.held_out)]
    assert not users[0] & users[1]
    assert not (users[0] | users[1]) & users[2]
    assert len(data.held_out) == 6
    assert data.template.endswith("review: {input}")
    # Each training user: two questions and four leave-one-out samples.
    assert len(data.train) + len(data.valid) == 6 * (2 + 4)


def test_what_was_not_learned_from_or_asked_is_told(folder):
    path = folder / "train_outputs.json"
    path.write_text(path.read_text().replace('"output": "3"', '"output": "9"'))
    data = read(folder, profile_targets=20, questions=4)
    told = "\n".join(data.notes)
    assert "2 training samples left out: their output is none of the task's answers" in told
    assert f"{len(data.train)} training samples of 5 users, {len(data.valid)} of 1 users held back" in told
    assert "20 of 24 profile items are targets" in told
    assert "4 of 6 dev questions asked" in told


def test_dear_methods_may_have_one_seed(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(Session, "outcomes", lambda self, name, seed: asked.append((name, seed)) or {})
    names = ["plug", "prefix_tuning", "lora", "none"]
    models = {"llm": "tiny-llama", "encoder": "tiny-encoder"}
    methods = {"methods": names, "seeds": [5, 1], "one_seed": ["prefix_tuning", "lora"]}
    run.compare(ComparisonSettings(task="LaMP_3", data=str(folder), out=str(folder / "out"), **models, **methods))
    assert sorted(asked) == [("lora", 5), ("none", 1), ("none", 5), ("plug", 1), ("plug", 5), ("prefix_tuning", 5)]


def test_no_data_and_unknown_names_are_refused(folder):
    with pytest.raises(ConfigError, match=r"data=DIR is missing"):
        run.main([])
    with pytest.raises(ConfigError, match=r"no task .LaMP_99.*movie_tagging"):
        run.main([f"data={folder}", "task=LaMP_99"])
    with pytest.raises(ConfigError, match="no method 'lorra'"):
        run.main([f"data={folder}", f"out={folder / 'out'}", "one_seed=[lorra]"])


def test_paired_timing_alternates_and_divides():
    calls = []

    def work(name, count):
        calls.append(name)
        sum(range(count))

    ratio = paired(lambda: work("a", 2_000_000), lambda: work("b", 500_000), pairs=4, warmup=0)
    assert calls == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert ratio.pairs == 4
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.median > 1


def test_a_training_is_not_taken_for_one_with_other_settings_or_data(folder, monkeypatch):
    out = folder / "out"
    same = [*ARGUMENTS, f"data={folder}", f"out={out}"]
    training_run.main(same)
    monkeypatch.setattr("training.recipes.train_parts", lambda *_, **__: pytest.fail("trained again"))
    training_run.main(same)
    for more, key in (
        (["profile_targets=1"], "profile_targets"),
        (["fit={steps: 3}"], "fit"),
        (["valid=0.4"], "valid"),
    ):
        for main in (training_run.main, run.main):
            with pytest.raises(ConfigError, match=f"made with another {key}; choose another out="):
                main([*same, *more])
    run.main([*same, "methods=[plug]"])  # reads what was trained, and adds what a comparison depends on
    with pytest.raises(ConfigError, match="made with another generated;"):
        run.main([*same, "methods=[plug]", "generated=3"])
    training_run.main(same)
    file = folder / "train_outputs.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(ConfigError, match=r"made with another data \(train\)"):
        training_run.main(same)


def test_a_folder_without_results_takes_other_settings(folder):
    """A model that could not be loaded leaves nothing behind that its right name must not contradict."""
    same = [*ARGUMENTS, f"data={folder}", f"out={folder / 'out'}", "methods=[none]"]
    with pytest.raises(PersonaPlugError, match="nowhere"):
        run.main([*same, "llm=./nowhere"])
    run.main(same)
    with pytest.raises(ConfigError, match="made with another llm"):  # before a model is looked for
        run.main([*same, "llm=./nowhere"])


def test_a_task_that_lacks_an_answer_is_refused_before_any_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "build_plug", lambda *_: pytest.fail("loaded a model"))
    task = tmp_path / "stars.yaml"
    task.write_text("version: 1\nkind: rating\nanswers: [1, 2]\nfields: [text, score]\n")
    arguments = ["llm=tiny-llama", "encoder=tiny-encoder", f"data={folder}", f"task={task}", f"out={tmp_path / 'out'}"]
    with pytest.raises(DataError, match=r"dev_outputs\.json: question 'dev2-q0': '3' is no answer of task stars.*1, 2"):
        run.main(arguments)
    assert not (tmp_path / "out").exists()
    task.write_text("version: 1\nkind: label\nanswers: [good, bad]\nfields: [text, score]\n")
    with pytest.raises(DataError, match="0 training and 0 validation samples have an answer of task stars"):
        run.main(arguments)
