"""Going on with a training: only with the same one, and what is finished is not trained on."""

import dataclasses
import json
import shutil

import pytest
import torch

from persona_plug.data.splits import FitData, prepare
from persona_plug.errors import CorruptFileError, MismatchError
from persona_plug.fit.config import FitConfig
from persona_plug.fit.run import WEIGHTS, train_parts
from persona_plug.fit.trainer import PlugTrainer, last_checkpoint
from persona_plug.persistence import state_of
from tests.fit.test_run import QUICK, labels, same, stop_at, weights

SETTINGS = QUICK | {"steps": 6}


@pytest.fixture(scope="module")
def data():
    return labels()


def run(plug, data, folder, resume=False, **settings):
    config = FitConfig.of(settings)
    plug.seed = config.seed
    plug.reset(plug.config.replace(template=data.template, answers=data.answers))
    return train_parts(plug, data, config, folder, resume)


def interrupted(make_plug, data, folder, **settings):
    with stop_at(4):
        run(make_plug(), data, folder, **SETTINGS | settings)
    assert last_checkpoint(folder) is not None
    return {path.name for path in folder.iterdir()}


def with_item(data, part):
    """The data with another word in one history item of a part."""
    first, *rest = getattr(data, part)
    item, *items = first.history
    changed = dataclasses.replace(first, history=(dataclasses.replace(item, input=item.input + "!"), *items))
    return dataclasses.replace(data, **{part: [changed, *rest]})


@pytest.fixture(scope="module")
def kept(make_plug, data, tmp_path_factory):
    """Folders of a run that was interrupted, and of a finished one."""
    folder = tmp_path_factory.mktemp("kept")
    interrupted(make_plug, data, folder / "interrupted")
    run(make_plug(), data, folder / "finished", **SETTINGS)
    return folder


@pytest.mark.parametrize("state", ["interrupted", "finished"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"llm": "tiny-gpt2"}, "llm fingerprint"),
        ({"seed": 5}, "seed 0 there, 5 here"),
        ({"lr": 0.5}, "lr 0.001 there, 0.5 here"),
        ({"steps": 8}, "steps 6 there, 8 here"),
        ({"batch_size": 2}, "batch_size 4 there, 2 here"),
        ({"history_dropout": 0.0}, "history_dropout 0.5 there, 0.0 here"),
        ({"plug": {"user_tokens": 2}}, "user_tokens 4 there, 2 here"),
        ({"plug": {"placement": "prefix"}}, "placement 'suffix' there, 'prefix' here"),
        ({"plug": {"max_input_tokens": 32}}, "max_input_tokens 64 there, 32 here"),
        ({"template": "Choose: {input}"}, "template '{input}' there, 'Choose: {input}' here"),
        ({"part": "train"}, "other training samples"),
        ({"part": "valid"}, "other validation samples"),
        ({"fewer": True}, "other training samples"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_another_training_does_not_go_on(make_plug, data, kept, change, named, state):
    folder = kept / state
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = {k: v for k, v in change.items() if k not in ("llm", "plug", "part", "template", "fewer")}
    plug = make_plug(change.get("llm", "tiny-llama"), **change.get("plug", {}))
    changed = with_item(data, change["part"]) if "part" in change else data
    if "template" in change:
        changed = dataclasses.replace(changed, template=change["template"])
    if "fewer" in change:
        changed = dataclasses.replace(changed, train=data.train[:-1])
    with pytest.raises(MismatchError) as refusal:
        run(plug, changed, folder, resume=True, **SETTINGS | other)
    assert named in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_several_differences_are_named(make_plug, data, kept):
    with pytest.raises(
        MismatchError, match=r"user_tokens 4 there.*; lr 0.001 there.*; and 1 more; repeat its settings"
    ):
        run(
            make_plug(user_tokens=2),
            data,
            kept / "finished",
            resume=True,
            **SETTINGS | {"seed": 1, "lr": 0.1, "patience": 9},
        )


def test_places_and_trackers_may_differ(make_plug, data, tmp_path):
    interrupted(make_plug, data, tmp_path / "a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    plug = make_plug()
    plug.config = plug.config.replace(llm="elsewhere/llm", encoder="elsewhere/encoder")
    log = run(plug, data, tmp_path / "b", resume=True, **SETTINGS)
    assert max(row["step"] for row in log) == 6


def test_a_moved_run_ends_with_its_best_weights(make_plug, data, tmp_path, monkeypatch):
    """transformers remembers the best checkpoint by its whole path, and takes the last one where it finds none."""
    curve = lambda step: abs(step - 2)  # noqa: E731
    loss = lambda self, *_, **__: (torch.tensor(float(curve(self.state.global_step))), None, None)  # noqa: E731
    monkeypatch.setattr(PlugTrainer, "prediction_step", loss)
    whole, moved = make_plug(), make_plug()
    run(whole, data, tmp_path / "whole", **SETTINGS)
    with stop_at(6):
        run(make_plug(), data, tmp_path / "cut", **SETTINGS)
    shutil.move(tmp_path / "cut", tmp_path / "moved")
    run(moved, data, tmp_path / "moved", resume=True, **SETTINGS)
    assert same(weights(whole), weights(moved))


@pytest.mark.parametrize("content", [None, "", "[]", "{", "null"])
def test_checkpoints_of_an_unknown_run_do_not_go_on(make_plug, data, tmp_path, content):
    interrupted(make_plug, data, tmp_path)
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"run\.json .*start over without resume$"):
        run(make_plug(), data, tmp_path, resume=True, **SETTINGS)


@pytest.mark.parametrize("settings", [{"steps": 6}, {"steps": 40, "patience": 1}], ids=["all steps", "early stop"])
def test_a_finished_run_is_read_back_without_a_step(make_plug, data, tmp_path, monkeypatch, settings):
    losses = iter(range(100))  # worse at each look
    monkeypatch.setattr(
        PlugTrainer, "prediction_step", lambda *_, **__: (torch.tensor(float(next(losses))), None, None)
    )
    first, again = make_plug(), make_plug()
    log = run(first, data, tmp_path, **SETTINGS | settings)
    steps = max(row["step"] for row in log)
    assert steps == 6 if settings["steps"] == 6 else steps < 40
    lines = (tmp_path / "log.jsonl").read_text()

    def refuse(*_, **__):
        raise AssertionError("trained on")

    monkeypatch.setattr(PlugTrainer, "train", refuse)
    read = run(again, data, tmp_path, resume=True, **SETTINGS | settings)
    assert same(weights(first), weights(again))
    assert (tmp_path / "log.jsonl").read_text() == lines
    assert max(row["step"] for row in read) == steps
    assert [row["eval_loss"] for row in read if "eval_loss" in row] == [
        row["eval_loss"] for row in log if "eval_loss" in row
    ]


def test_starting_over_forgets_what_was_finished(make_plug, data, tmp_path):
    run(make_plug(), data, tmp_path, **SETTINGS)
    with stop_at(2):
        run(make_plug(), data, tmp_path, **SETTINGS | {"seed": 3})
    assert not (tmp_path / WEIGHTS).exists()
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 3
    assert last_checkpoint(tmp_path) is None


def test_what_is_written_down_holds_no_text(make_plug, data, tmp_path):
    run(make_plug(), data, tmp_path, **SETTINGS)
    text = (tmp_path / "run.json").read_text()
    assert not any(example.input in text or example.user_id in text for example in data.train)


def test_fit_refuses_before_the_control_is_trained(make_plug, data, tmp_path):
    whole = FitData(data.train, data.valid, data.held_out, data.template, data.answers)
    make_plug().fit(whole, output_dir=tmp_path, report=False, **QUICK)
    with pytest.raises(MismatchError, match="seed 0 there, 5 here"):
        make_plug().fit(whole, output_dir=tmp_path, resume=True, seed=5, **QUICK)
    assert not (tmp_path / "task_prompt").exists()


@pytest.mark.parametrize("kind", [{"lora": 2}, {"recipe": "words", "task_tokens": 2}, {"retrieve": 2}], ids=str)
def test_all_parts_of_a_finished_run_are_read_back(make_plug, tmp_path, kind):
    rows = [
        {"user_id": f"u{u}", "input": f"asks {u} {i}", "output": f"Dear {i}, yours {u}"}
        for u in range(8)
        for i in range(4)
    ]
    data = prepare(rows, answers=None, valid=0.2, held_out=0.2)
    plugs = [make_plug(max_answer_tokens=24, **kind) for _ in range(2)]
    for plug, resume in zip(plugs, (False, True), strict=True):
        run(plug, data, tmp_path, resume=resume, **QUICK)
    one, two = (state_of(plug.parts()) for plug in plugs)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    request = data.held_out[0]
    assert plugs[0].score([request], [request.output]) == plugs[1].score([request], [request.output])
