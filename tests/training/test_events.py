"""A file of events as samples: who is held out, what is asked, what gives an answer away."""

import json

import pytest

from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import ConfigError, DataError
from training import events
from training.data import load_data
from training.settings import RunSettings
from training.tasks import Task, load_task

TASK = Task("mine", 1, "text")


def write(folder, users=20, items=6, timed=True, held_out=None):
    file = folder / "replies.jsonl"
    rows = []
    for u in range(users):
        for i in range(items):
            row = {"user_id": f"u{u:02}", "input": f"ask {u} {i}", "output": f"say {u} {i}", "id": f"{u}-{i}"}
            rows.append(row | ({"timestamp": f"2020-01-{i + 1:02}"} if timed else {}))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if held_out:
        meta = {"template": "Answer: {input}", "meta": {"held_out": held_out}}
        file.with_suffix(".meta.json").write_text(json.dumps(meta))
    return file


def users_of(samples):
    return {e.user_id for e in samples}


@pytest.mark.parametrize("timed", [True, False])
def test_users_of_dev_and_test_are_different_people_and_not_trained_on(tmp_path, timed):
    file = write(tmp_path, timed=timed)
    of = {split: events.read_file(file, TASK, split, 0.1, None)[0] for split in ("dev", "test", "")}
    dev, test = users_of(of["dev"].held_out), users_of(of["test"].held_out)
    assert len(dev) == len(test) == 3  # halves of .3 x 20
    assert not dev & test
    for data in of.values():
        assert len(users_of(data.valid)) == 2
        assert not (users_of(data.train) | users_of(data.valid)) & (dev | test)
        assert (data.train, data.valid) == (of["dev"].train, of["dev"].valid)
    assert of[""].held_out == []
    assert of["dev"] == events.read_file(file, TASK, "dev", 0.1, None)[0]


def test_the_last_items_are_asked_with_what_came_before(tmp_path):
    data, _ = events.read_file(write(tmp_path), TASK, "dev", 0.1, None)
    user = data.held_out[0].user_id
    asked = [e for e in data.held_out if e.user_id == user]
    assert [e.id.split("-")[1] for e in asked] == ["2", "3", "4", "5"]
    assert [len(e.history) for e in asked] == [2, 3, 4, 5]


def test_users_that_the_sidecar_names_are_held_out(tmp_path):
    file = write(tmp_path, held_out=["u03", "u07"])
    dev, test = (events.read_file(file, TASK, split, 0.1, None)[0] for split in ("dev", "test"))
    assert users_of(dev.held_out) | users_of(test.held_out) == {"u03", "u07"}
    assert dev.template == "Answer: {input}"


def test_training_samples_are_bounded_and_the_same_in_every_run(tmp_path):
    file = write(tmp_path)
    few, again = (events.read_file(file, TASK, "dev", 0.1, 7)[0].train for _ in range(2))
    assert len(few) == 7
    assert few == again


@pytest.mark.parametrize(
    ("item", "leaks"),
    [
        (("red green", "blue black"), False),
        (("red green", "lamp black"), False),  # one of four words
        (("lamp chair", "blue black"), False),  # half of them
        (("lamp chair", "song black"), True),
        (("Lamp, CHAIR!", "Song"), True),  # letter case and marks do not hide one
    ],
)
def test_an_item_that_shares_most_of_its_words_leaves(item, leaks):
    sample = Example("u", "the lamp and chair", "a song", (HistoryItem(*item), HistoryItem("x y", "z")))
    (clean,), count = events.without_leaks([sample], 0.5)
    assert count == leaks
    assert len(clean.history) == 2 - leaks
    assert events.without_leaks([sample], 1.0) == ([sample], 0)


def test_leaks_are_counted_in_the_notes_of_a_comparison(tmp_path):
    file = write(tmp_path, items=3)
    task = tmp_path / "strict.yaml"
    task.write_text("version: 1\nkind: text\nleak: 0.5\n")
    settings = RunSettings(data=str(file), task=str(task), valid=0.1)
    data = load_data(settings, load_task(str(task)), "dev")
    assert all(e.history == () for e in data.held_out)  # "ask 1 0" and "ask 1 1" differ in a word of three
    assert any("more than 50% of their words" in note for note in data.notes)
    assert f"{len(data.held_out)} dev questions asked" in data.notes


def test_the_task_is_named_like_the_file():
    assert RunSettings(data="some/replies.jsonl").task_name == "replies"
    assert load_task("replies").leak == 1
    assert load_task("debian_synopsis").leak == load_task("rfc_title").leak == 0.5


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="split='train' is not one of dev, test"):
        events.read_file(write(tmp_path), TASK, "train", 0.1, None)
    with pytest.raises(ConfigError, match="leak=2 must be a share"):
        Task("mine", 1, "text", leak=2)
    with pytest.raises(DataError, match="too few"):
        events.read_file(write(tmp_path, users=2), TASK, "dev", 0.1, None)
