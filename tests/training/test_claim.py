"""A folder's results are taken only for the settings, the task and the data that made them."""

import dataclasses
import json
from pathlib import Path

import pytest

from persona_plug.errors import ConfigError
from training.claim import FILE, claim
from training.settings import RunSettings
from training.tasks import Task

TASK = Task("mine", 1, "text")


@pytest.fixture
def settings(tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text("one\n")
    made = RunSettings(data=str(data), out=str(tmp_path / "out"), seeds=(0,))
    claim(made, ["valid"], TASK, ["train"])
    (tmp_path / "out" / "seed-0").mkdir()
    return made


def change(settings, edit):
    file = Path(settings.out) / FILE
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def test_the_same_run_goes_on(settings):
    claim(settings, ["valid"], TASK, ["train"])


def test_a_field_that_an_earlier_version_did_not_know_had_its_default(settings):
    change(settings, lambda content: content["task"].pop("leak"))
    claim(settings, ["valid"], TASK, ["train"])
    change(settings, lambda content: content["task"].pop("leak"))
    with pytest.raises(ConfigError, match="another task"):
        claim(settings, ["valid"], dataclasses.replace(TASK, leak=0.5), ["train"])


@pytest.mark.parametrize("what", ["task", "data", "valid"])
def test_another_one_is_refused(settings, what, tmp_path):
    task = dataclasses.replace(TASK, version=2) if what == "task" else TASK
    if what == "data":
        (tmp_path / "mine.jsonl").write_text("two\n")
    changed = dataclasses.replace(settings, valid=0.3) if what == "valid" else settings
    with pytest.raises(ConfigError, match=f"results made with another {what}"):
        claim(changed, ["valid"], task, ["train"])
