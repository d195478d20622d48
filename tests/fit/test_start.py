"""A saved plug that is trained further."""

import pytest
import torch

from persona_plug.errors import ConfigError, MismatchError
from tests.fit.test_run import QUICK, labels, same, weights

FEW = QUICK | {"steps": 2, "report": False}


@pytest.fixture(scope="module")
def data():
    return labels()


@pytest.fixture(scope="module")
def saved(make_plug, data, tmp_path_factory):
    """A fitted plug's folder, and its weights."""
    folder = tmp_path_factory.mktemp("saved")
    plug = make_plug(lora=2)
    plug.fit(data, output_dir=folder, **FEW)
    return folder, weights(plug)


@pytest.fixture
def first(monkeypatch):
    """What a training begins with."""
    seen = {}

    def look(plug, *_, **__):
        seen.update(weights(plug))
        return []

    monkeypatch.setattr("persona_plug.fit.run.train", look)
    return seen


def test_training_begins_with_the_saved_weights(make_plug, data, saved, first):
    folder, trained = saved
    make_plug(lora=2).fit(data, start=folder, **FEW)
    assert same(first, trained)


def test_another_start_is_another_training(make_plug, data, saved, tmp_path):
    folder, trained = saved
    plug = make_plug(lora=2)
    plug.fit(data, output_dir=tmp_path, start=folder, **FEW)
    assert not same(weights(plug), trained)
    with pytest.raises(MismatchError, match=r"another training: start '\w+' there, None here"):
        make_plug(lora=2).fit(data, output_dir=tmp_path, resume=True, **FEW)
    again = make_plug(lora=2)
    again.fit(data, output_dir=tmp_path, start=folder, resume=True, **FEW)
    assert same(weights(again), weights(plug))


@pytest.mark.parametrize(
    ("change", "named"), [({"lora": 0}, "lora 2 there, 0 here"), ({"task_tokens": 9}, "task_tokens None there, 9 here")]
)
def test_a_plug_of_other_settings_is_refused(make_plug, data, saved, first, change, named):
    with pytest.raises(MismatchError, match=named):
        make_plug(**{"lora": 2, **change}).fit(data, start=saved[0], **FEW)
    assert not first


def test_nothing_is_trained_from_a_start_without_training(make_plug, data, saved):
    with pytest.raises(ConfigError, match="leave start out"):
        make_plug().fit(data, start=saved[0], adapt="none", retrieve=1)
    assert torch.is_grad_enabled()
