"""Samples as batches, which the Trainer moves to its device."""

import dataclasses

import pytest
import torch
from accelerate.utils import send_to_device

from persona_plug.data.history import Example, HistoryItem
from persona_plug.dataset import PlugDataset

SAMPLES = [
    Example("ann", "rate this", "good", (HistoryItem("tea", "good"), HistoryItem("a walk", "bad"))),
    Example("bob", "and this, too", "bad", ()),
]


@pytest.mark.parametrize("answers", [("good", "bad"), None])
def test_a_batch_goes_to_a_device_whole(make_plug, answers):
    """Accelerate moves what has a `to`; a device that holds no data shows it on any machine."""
    samples = PlugDataset(make_plug(answers=answers), SAMPLES)
    samples.folds = torch.zeros(2, dtype=torch.long) if answers else None
    batch = send_to_device({"batch": samples.collate([1, 0])}, torch.device("meta"))["batch"]
    tensors = [getattr(part, f.name) for part in (batch, batch.history) for f in dataclasses.fields(part)]
    devices = {t.device.type for t in tensors if isinstance(t, torch.Tensor)}
    assert devices == {"meta"}
    assert sum(isinstance(t, torch.Tensor) for t in tensors) == (7 if answers else 6)  # labels have folds


def test_a_batch_holds_the_samples_that_were_asked_for(make_plug):
    plug = make_plug(answers=("good", "bad"))
    samples = PlugDataset(plug, SAMPLES)
    batch = samples.collate([1, 0])
    assert batch.gold.tolist() == [1, 0]
    assert batch.parts == [plug.prompter.parts(SAMPLES[i].input) for i in (1, 0)]
    assert batch.history.mask.tolist() == [[False, False], [True, True]]
    assert batch.folds is None
