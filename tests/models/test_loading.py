"""Weights are loaded whole or not at all, no code of a model is run, and what fails says so in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_plug.errors import ConfigError, CorruptFileError, PersonaPlugError
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.llm import load_llm, pick_device


@pytest.fixture
def copy(tmp_path):
    """`copy(name, change)` is a copied model folder whose weights `change` has changed in place."""

    def make(name, change=lambda weights: None):
        folder = tmp_path / name
        shutil.copytree(zoo.pull(name), folder)
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def encoder(folder):
    return HistoryEncoder(str(folder), device="cpu", use_cache=False)


def test_an_llm_without_one_matrix_is_refused_by_its_name(copy):
    name = "model.layers.1.self_attn.q_proj.weight"
    with pytest.raises(PersonaPlugError, match=name):
        load_llm(str(copy("tiny-llama", lambda weights: weights.pop(name))), device="cpu")


def test_an_encoder_whose_weights_have_other_names_is_refused(copy):
    def rename(weights):
        for name in list(weights):
            weights[f"other.{name}"] = weights.pop(name)

    with pytest.raises(PersonaPlugError, match=r"lacks weights \(embeddings"):
        encoder(copy("tiny-encoder", rename))


def test_weights_that_a_config_has_no_place_for_are_refused(copy):
    def add(weights):
        weights["model.layers.7.mlp.up_proj.weight"] = torch.ones(2, 2)

    with pytest.raises(PersonaPlugError, match=r"no place for \(model.layers.7"):
        load_llm(str(copy("tiny-llama", add)), device="cpu")


def test_heads_of_other_tasks_are_no_fault(copy):
    def add(weights):
        weights["v_head.weight"] = torch.ones(2)

    load_llm(str(copy("tiny-llama", add)), device="cpu")


def test_a_pooler_that_a_checkpoint_lacks_never_enters_the_fingerprint(copy):
    def drop(weights):
        for name in [n for n in weights if n.startswith("pooler.")]:
            del weights[name]

    folder = copy("tiny-encoder", drop)
    first, second = encoder(folder), encoder(folder)
    assert first.fingerprint == second.fingerprint
    whole = HistoryEncoder("tiny-encoder", device="cpu", use_cache=False)
    torch.testing.assert_close(first.encode(["a text"]), whole.encode(["a text"]), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git-LFS pointer"),
        (None, "damaged or cut off"),
    ],
    ids=["pointer", "cut off"],
)
@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-encoder"])
def test_a_damaged_weight_file_is_named(copy, kind, content, message):
    folder = copy(kind)
    file = folder / "model.safetensors"
    file.write_bytes(content or file.read_bytes()[:2000])
    with pytest.raises(CorruptFileError, match=message) as error:
        load_llm(str(folder), device="cpu") if kind == "tiny-llama" else encoder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-encoder"])
def test_code_of_a_model_is_never_run_nor_asked_for(copy, kind, monkeypatch):
    folder = copy(kind)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my-own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(PersonaPlugError, match="code of its own"):
        load_llm(str(folder), device="cpu") if kind == "tiny-llama" else encoder(folder)


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "xpu"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ConfigError, match=device):
        pick_device(device)


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    [(True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")],
)
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, chosen):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: asked.append(device))
    assert str(pick_device(None)) == chosen
    assert [str(device) for device in asked] == [chosen]
