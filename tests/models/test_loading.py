"""Weights are loaded whole or not at all, no code of a model is run, and what fails says so in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_plug.errors import ConfigError, CorruptFileError, ModelUnavailable, PersonaPlugError
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


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["tiny-llama", "tiny-encoder"])
def test_any_file_may_be_a_pointer(copy, kind, file):
    folder = copy(kind)
    (folder / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CorruptFileError, match=rf"{file} is a Git-LFS pointer, not the file; run `git lfs pull`"):
        load_llm(str(folder), device="cpu") if kind == "tiny-llama" else encoder(folder)


def test_weights_of_other_sizes_than_the_config_says_are_refused(copy):
    folder = copy("tiny-llama", lambda weights: weights.update({"model.norm.weight": torch.ones(63)}))
    with pytest.raises(ModelUnavailable, match="weights of other sizes than its config"):
        load_llm(str(folder), device="cpu")


def test_a_cause_that_stands_on_the_second_line_is_told(copy):
    folder = copy("tiny-llama")
    change(folder / "config.json", num_attention_heads=7)
    with pytest.raises(ModelUnavailable, match="not a multiple of the number of attention heads") as error:
        load_llm(str(folder), device="cpu")
    assert "\n" not in str(error.value)


HABITS = [{"num_return_sequences": 3}, {"compile_config": {}}, {"num_beams": 3}, {"repetition_penalty": 9.0}, {}]


@pytest.mark.parametrize(
    ("file", "habits"),
    [("generation_config.json", habits) for habits in HABITS]
    + [("config.json", habits) for habits in HABITS if "compile_config" not in habits],
    ids=str,
)
def test_habits_of_generation_keep_no_llm_from_loading(copy, file, habits):
    folder = copy("tiny-llama")
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    change(folder / file, **habits)
    known = load_llm(str(folder), device="cpu")[0].generation_config
    usual = load_llm("tiny-llama", device="cpu")[0].generation_config
    assert (known.eos_token_id, known.bos_token_id, known.pad_token_id) == (2, usual.bos_token_id, usual.pad_token_id)
    assert not known.num_return_sequences


@pytest.mark.parametrize("dtype", ["int8", "bool", "foo", 5, torch.int8, "complex64", "nn"], ids=str)
def test_a_dtype_that_cannot_be_is_named(dtype):
    with pytest.raises(ConfigError, match="dtype must be auto, or name a torch dtype"):
        load_llm("tiny-llama", dtype=dtype, device="cpu")


def test_a_device_without_numbers_is_refused():
    with pytest.raises(ConfigError, match="device='meta' holds no numbers"):
        pick_device("meta")


def test_an_encoder_with_fewer_embeddings_than_tokens_is_refused(copy):
    name = "embeddings.word_embeddings.weight"
    folder = copy("tiny-encoder", lambda weights: weights.update({name: weights[name][:100].clone()}))
    change(folder / "config.json", vocab_size=100)
    with pytest.raises(ConfigError, match=r"its tokenizer writes .* as 100, but it has 100 embeddings"):
        encoder(folder)


def change(file, **settings):
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
