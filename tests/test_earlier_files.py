"""A plug, a store and a run folder that the first layout of the code wrote still open.

`fixtures/first_layout.zip` was written by commit c5f07ef with the tiny random models; the scores are that commit's.
"""

import json
import shutil
import zipfile
from pathlib import Path

import pytest

from eval import run
from persona_plug import HistoryStore, PersonaPlug
from persona_plug.models.fingerprint import llm_fingerprint

FILES = Path(__file__).parent / "fixtures" / "first_layout.zip"
LLM, ENCODER = b"37bb99b9d550d7a8-14bd1cb00d333081", b"db0cde297b63142c"  # fingerprints of the tiny models, then
REQUEST = "rate thing 3 of the shop 2"
HISTORY = [
    {"input": "rate thing 1 of the shop 0", "output": "good"},
    {"input": "rate thing 2 of the shop 1", "output": "bad"},
]
CLOSE = {"abs": 1e-3}  # other processors round otherwise


@pytest.fixture(scope="module")
def earlier(tmp_path_factory, load_parts, encoder):
    """The unpacked files. The tiny models are drawn anew on each machine, so their last bits may differ from then."""
    folder = tmp_path_factory.mktemp("earlier")
    with zipfile.ZipFile(FILES) as archive:
        archive.extractall(folder)
    present = {LLM: llm_fingerprint(load_parts("tiny-llama")[0], None).encode(), ENCODER: encoder.fingerprint.encode()}
    for file in (folder / "plug" / "config.json", folder / "users.db"):
        content = file.read_bytes()
        for then, now in present.items():
            content = content.replace(then, now)
        file.write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def plug(earlier):
    return PersonaPlug.from_pretrained(earlier / "plug", device="cpu")


def test_a_plug_scores_as_it_did(plug):
    assert plug.score(REQUEST, history=HISTORY)[0].tolist() == pytest.approx([-2.0574, -2.5189], **CLOSE)


def test_a_store_opens_with_its_users(plug, earlier):
    with HistoryStore(f"sqlite:///{earlier / 'users.db'}", encoder=plug.encoder) as store:
        assert [(u.user_id, u.items) for u in store.users()] == [(f"user-{i}", 5) for i in range(3)]
        scores = plug.score(REQUEST, user="user-1", store=store)
    assert scores[0].tolist() == pytest.approx([-2.1457, -2.4403], **CLOSE)


def test_a_run_folder_is_read_back_and_nothing_is_trained(earlier, tmp_path, monkeypatch):
    out = shutil.copytree(earlier / "run", tmp_path / "run")
    monkeypatch.setattr("training.recipes.train_parts", lambda *_, **__: pytest.fail("trained again"))
    run.main(
        [
            *("task=LaMP_3", "llm=tiny-llama", "encoder=tiny-encoder", "methods=[none, plug, lora]"),
            *("plug={key_dim: 16, projector_hidden: 32}", f"data={earlier / 'lamp'}", f"out={out}"),
            "fit={steps: 2, batch_size: 4, eval_every: 1, eval_samples: 4}",
        ]
    )
    results = json.loads((out / "results.json").read_text())
    texts = json.loads((earlier / "run" / "seed-0" / "plug.json").read_text())["texts"]
    assert [a["output"] for a in json.loads((out / "predictions" / "plug.json").read_text())["golds"]] == texts
    assert set(results["methods"]) == {"none", "plug", "lora"}
