"""A sentence-transformers folder is read as it says itself; padding and a batch's make-up change no vector."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from persona_plug.errors import ConfigError
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder, RequestEncoder

TEXTS = ["short", "A somewhat longer text about bread", "x", "a " * 60]
WIDTH = 32


@pytest.fixture
def folder(tmp_path):
    """`folder(pooling, dense=..., **settings)` writes a folder around the tiny encoder."""

    def make(pooling, dense=False, body="", kinds=(), prompts=None, **settings):
        root = tmp_path / "encoder"
        shutil.copytree(zoo.pull("tiny-encoder"), root / body)
        parts = [("Transformer", body), ("Pooling", "1_Pooling")]
        parts += [("Dense", "2_Dense")] * dense + [(kind, f"3_{kind}") for kind in kinds]
        for _, path in parts:
            (root / path).mkdir(exist_ok=True)
        modules = [
            {"idx": i, "path": path, "type": f"sentence_transformers.models.{k}"} for i, (k, path) in enumerate(parts)
        ]
        (root / "modules.json").write_text(json.dumps(modules))
        (root / body / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20, **settings}))
        (root / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        if prompts:
            (root / "config_sentence_transformers.json").write_text(json.dumps(prompts))
        if dense:
            torch.manual_seed(3)
            weights = {"linear.weight": torch.randn(8, WIDTH), "linear.bias": torch.randn(8)}
            save_file(weights, root / "2_Dense" / "model.safetensors")
            known = {"in_features": WIDTH, "out_features": 8, "bias": True}
            known["activation_function"] = "torch.nn.modules.activation.Tanh"
            (root / "2_Dense" / "config.json").write_text(json.dumps(known))
        return str(root)

    return make


def read(name, **settings):
    return HistoryEncoder(name, device="cpu", use_cache=False, **settings)


def hidden_states(encoder, text, length=20):
    ids = encoder.tokenizer(text, truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return encoder.model(ids).last_hidden_state[0]


def weighted(hidden):
    steps = torch.arange(1, len(hidden) + 1.0)[:, None]
    return (hidden * steps).sum(0) / steps.sum()


POOLINGS = {
    "cls": ({"pooling_mode_cls_token": True}, lambda h: h[0]),
    "mean": ({"pooling_mode_mean_tokens": True}, lambda h: h.mean(0)),
    "max": ({"pooling_mode_max_tokens": True}, lambda h: h.amax(0)),
    "root": ({"pooling_mode_mean_sqrt_len_tokens": True}, lambda h: h.sum(0) / len(h) ** 0.5),
    "weighted": ({"pooling_mode_weightedmean_tokens": True}, weighted),
    "last": ({"pooling_mode_lasttoken": True}, lambda h: h[-1]),
    "newer": ({"pooling_mode": "lasttoken"}, lambda h: h[-1]),
    "two": (
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        lambda h: torch.cat([h[0], h.mean(0)]),
    ),
}


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_and_length_are_the_folders_own(folder, kind):
    config, pool = POOLINGS[kind]
    encoder = read(folder(config))
    expected = torch.stack([normalize(pool(hidden_states(encoder, text.strip())), dim=0) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-3, rtol=0)
    assert encoder.max_length == 20
    assert encoder.dim == expected.shape[1]


def test_dense_layers_follow_the_pooling_and_enter_the_fingerprint(folder, tmp_path):
    encoder = read(folder({"pooling_mode_mean_tokens": True}, dense=True, kinds=["Normalize"]))
    torch.manual_seed(3)
    weight, bias = torch.randn(8, WIDTH), torch.randn(8)
    vectors = [torch.tanh(weight @ hidden_states(encoder, text.strip()).mean(0) + bias) for text in TEXTS]
    expected = normalize(torch.stack(vectors), dim=-1)
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-3, rtol=0)
    ids = [encoder.ids(text) for text in TEXTS]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(i) for i in ids], batch_first=True, padding_value=-1)
    torch.testing.assert_close(RequestEncoder(encoder)(padded), expected, atol=1e-3, rtol=0)
    known = encoder.fingerprint
    weights = {"linear.weight": torch.randn(8, WIDTH), "linear.bias": torch.randn(8)}
    save_file(weights, tmp_path / "encoder" / "2_Dense" / "model.safetensors")
    assert read(encoder.name).fingerprint != known


def test_prompt_lower_case_and_a_body_in_its_own_folder(folder):
    prompts = {"prompts": {"query": "ask: ", "note": "Note: "}, "default_prompt_name": "note"}
    encoder = read(
        folder({"pooling_mode_mean_tokens": True}, body="0_Transformer", prompts=prompts, do_lower_case=True)
    )
    assert encoder.prefix == "Note: "
    expected = normalize(hidden_states(encoder, "note: bread").mean(0), dim=0)
    torch.testing.assert_close(encoder.encode(["Bread"])[0], expected, atol=1e-3, rtol=0)


def test_a_prompt_may_be_left_out_of_the_pooling(folder):
    prompts = {"prompts": {"note": "Note: "}, "default_prompt_name": "note"}
    encoder = read(folder({"pooling_mode_mean_tokens": True, "include_prompt": False}, prompts=prompts))
    skip = len(encoder.tokenizer("Note: ")["input_ids"]) - 1
    expected = normalize(hidden_states(encoder, "Note: Bread")[skip:].mean(0), dim=0)
    torch.testing.assert_close(encoder.encode(["Bread"])[0], expected, atol=1e-3, rtol=0)


def test_what_is_given_wins(folder):
    encoder = read(folder({"pooling_mode_cls_token": True}), pooling="mean", max_length=30, prefix="q: ")
    assert (encoder.pooling, encoder.max_length, encoder.prefix) == ("mean", 30, "q: ")


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"kinds": ["LSTM"]}, "LSTM"), ({"transformer_task": "fill-mask"}, "fill-mask")],
)
def test_a_part_that_is_not_built_is_named(folder, changes, part):
    with pytest.raises(ConfigError, match=part):
        read(folder({"pooling_mode_mean_tokens": True}, **changes))


def test_an_unknown_pooling_is_named(folder):
    with pytest.raises(ConfigError, match="attentive"):
        read(folder({"pooling_mode": "attentive"}))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_padding_side_and_batch_change_nothing(pooling):
    usual = read("tiny-encoder", pooling=pooling)
    left = read("tiny-encoder", pooling=pooling, batch_size=2)
    left.tokenizer.padding_side = "left"
    torch.testing.assert_close(left.encode(TEXTS), usual.encode(TEXTS), atol=1e-3, rtol=0)
    for text, vector in zip(TEXTS, usual.encode(TEXTS), strict=True):
        torch.testing.assert_close(usual.encode([text])[0], vector, atol=1e-3, rtol=0)


def test_a_tokenizer_without_padding_token_serves(tmp_path):
    shutil.copytree(zoo.pull("tiny-encoder"), tmp_path / "encoder")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / "encoder" / name
        if file.exists():
            known = json.loads(file.read_text())
            known.pop("pad_token", None)
            file.write_text(json.dumps(known))
    encoder = read(str(tmp_path / "encoder"))
    assert encoder.tokenizer.pad_token_id is None
    torch.testing.assert_close(encoder.encode(TEXTS), read("tiny-encoder").encode(TEXTS), atol=1e-3, rtol=0)


def test_an_encoder_that_reads_its_padding_runs_texts_of_one_length_together(monkeypatch):
    encoder = read("tiny-encoder")
    usual = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda input_ids, attention_mask: usual(input_ids=input_ids))
    assert not encoder._bears_padding()
    encoder.pads = False
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode(TEXTS), alone, atol=1e-3, rtol=0)
