"""A plug that trains its own reading of requests: a copy of the encoder learns, the encoder itself does not."""

import pytest
import torch

from persona_plug import HistoryStore, PersonaPlug
from persona_plug.config import PlugConfig
from persona_plug.data.history import Example, HistoryItem
from persona_plug.errors import ConfigError, DataError
from persona_plug.models.fingerprint import full_digest

ITEMS = [HistoryItem("the loud guitar", "green", id="1"), HistoryItem("the soft flute", "blue", id="2")]


@pytest.fixture
def plug(make_plug):
    return make_plug(recipe="paper", train_request=True)


def test_untrained_it_reads_as_the_encoder_does(plug):
    texts = ["a loud drum", "one that is much longer than the first of them"]
    batch = plug.table([Example("u", t, "", tuple(ITEMS)) for t in texts]).batch(
        [Example("u", t, "", tuple(ITEMS)) for t in texts]
    )
    with torch.no_grad():
        found = plug.embedder.request_encoder(batch.request_ids)
    torch.testing.assert_close(found, batch.request, atol=2e-3, rtol=0)  # those of the table are rounded to fp16
    with torch.no_grad():  # in a batch or alone
        torch.testing.assert_close(plug.embedder.request_encoder(batch.request_ids[:1]), found[:1], atol=1e-6, rtol=0)


def test_it_is_what_learns_and_what_is_saved(plug, tmp_path):
    events = [
        {"user_id": f"u{u}", "input": f"the {w} sounds {i}", "output": ("green", "blue")[u % 2], "id": f"{u}-{i}"}
        for u in range(8)
        for i, w in enumerate(["guitar", "flute", "drum"])
    ]
    encoder, before = full_digest(plug.encoder.model), plug.embedder.request_encoder
    start = {k: v.clone() for k, v in before.state_dict().items()}
    plug.fit(events, steps=2, batch_size=4, eval_every=1, eval_samples=4, lr=1e-2, report=False, answers=None)
    after = plug.embedder.request_encoder.state_dict()
    assert any(not torch.equal(after[k], start[k]) for k in start)
    assert full_digest(plug.encoder.model) == encoder
    plug.save_pretrained(tmp_path / "plug")
    again = PersonaPlug.from_pretrained(tmp_path / "plug")
    one, two = (p.soft_prompt("the loud chorus", history=ITEMS) for p in (plug, again))
    torch.testing.assert_close(one, two, atol=0, rtol=0)


def test_a_store_gives_what_the_history_gives(plug, tmp_path):
    with HistoryStore(f"sqlite:///{tmp_path / 'users.db'}", encoder=plug.encoder) as store:
        store.append("ann", ITEMS)
        stored = plug.soft_prompt("the loud chorus", user="ann", store=store)
    torch.testing.assert_close(stored, plug.soft_prompt("the loud chorus", history=ITEMS), atol=0, rtol=0)


def test_what_cannot_work_is_refused(plug):
    with pytest.raises(ConfigError, match="train_request=True needs answer_head=False"):
        PlugConfig("llm", "encoder", train_request=True)
    batch = plug.table([Example("u", "a", "", ())]).batch([Example("u", "a", "", ())])
    object.__setattr__(batch, "request_ids", None)
    with pytest.raises(DataError, match="request_ids"):
        plug.embedder(batch)
