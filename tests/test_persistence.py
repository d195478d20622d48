"""Saved plugs: what a file holds, what it gives back in another process, and what is refused."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from transformers import AutoTokenizer

from persona_plug import persistence
from persona_plug.errors import ConfigError, CorruptFileError, MismatchError, PersonaPlugError
from persona_plug.models import zoo
from persona_plug.models.encoder import HistoryEncoder
from persona_plug.models.fingerprint import full_digest, same_llm
from persona_plug.models.llm import load_llm
from persona_plug.models.tensors import state_digest
from persona_plug.pairing import pair
from persona_plug.plug import PersonaPlug
from persona_plug.splice.prompts import AnswerTree

ANSWERS = ("1", "10", "5")


@pytest.fixture(scope="module")
def plug(make_plug):
    return make_plug(answers=ANSWERS, template="Rate: {input}", differ=True)


@pytest.fixture(scope="module")
def saved(plug, tmp_path_factory):
    return plug.save_pretrained(tmp_path_factory.mktemp("plug"))


@pytest.fixture
def copy(saved, tmp_path):
    """A copy of the saved plug that a test may damage."""
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.fixture(scope="module")
def other_llm(tmp_path_factory):
    """A folder with an LLM of the same shape whose matrices, or embeddings too, are others."""

    def make(which):
        llm, tokenizer = load_llm("tiny-llama", device="cpu")
        folder = tmp_path_factory.mktemp("other-llm")
        with torch.no_grad():
            for name, parameter in llm.named_parameters():
                if which in name:
                    parameter.mul_(1.1)
        llm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_plug_with_quoted_tokens_is_refused_before_a_model_is_loaded(make_plug, tmp_path, monkeypatch):
    """Earlier plugs had the field; one that used none of them opens, without a word."""
    folder = make_plug(words=False).save_pretrained(tmp_path)
    edit_config(folder, quote_tokens=0)
    assert PersonaPlug.from_pretrained(folder, device="cpu").config.answers is None
    edit_config(folder, quote_tokens=8)
    monkeypatch.setattr("persona_plug.plug.load_llm", lambda *_, **__: pytest.fail("loaded the LLM"))
    with pytest.raises(ConfigError, match=r"^.*config\.json .*quote_tokens=8.* are gone: fit the plug again.*$"):
        PersonaPlug.from_pretrained(folder, device="cpu")


# What you save is what you load


SCORES = """
import json, sys
from persona_plug import PersonaPlug
plug = PersonaPlug.from_pretrained(sys.argv[1], device="cpu")
requests, histories = json.loads(sys.stdin.read())
print(json.dumps([[x.hex() for x in row] for row in plug.score(requests, history=histories).tolist()]))
"""


def test_a_fresh_process_gives_the_same_bits(plug, saved, people):
    histories = [[{"input": i.input, "output": i.output} for i in h] for h in people.histories]
    done = subprocess.run(
        [sys.executable, "-c", SCORES, str(saved)],
        input=json.dumps([people.requests, histories]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torch.set_num_threads(1)  # sums of floats depend on how they are split
    scores = plug.score(people.requests, history=people.histories).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == [[x.hex() for x in row] for row in scores]


def test_everything_comes_back(plug, saved, people):
    again = PersonaPlug.from_pretrained(saved, device="cpu")
    assert again.config == plug.config
    state, loaded = plug.embedder.state_dict(), again.embedder.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[n], loaded[n]) for n in state)
    assert not again.embedder.training
    assert again.generate(people.requests, people.histories) == plug.generate(people.requests, people.histories)


def test_the_score_temperature_is_saved(make_plug, tmp_path, people):
    plug = make_plug(answers=ANSWERS)
    plug.embedder.score_temperature.fill_(2.5)
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), encoder=plug.encoder, device="cpu")
    assert float(again.embedder.score_temperature) == 2.5
    torch.testing.assert_close(again.choose("a", history=people.ann)[1], plug.choose("a", history=people.ann)[1])


def test_the_encoders_settings_come_back(make_plug, tmp_path, people):
    encoder = HistoryEncoder("tiny-encoder", device="cpu", pooling="cls", max_length=20, prefix="passage: ")
    plug = make_plug(encoder=encoder, differ=True)
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), device="cpu")
    assert (again.encoder.pooling, again.encoder.max_length, again.encoder.prefix) == ("cls", 20, "passage: ")
    torch.testing.assert_close(again.soft_prompt("a", people.ann), plug.soft_prompt("a", people.ann), atol=0, rtol=0)


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
@pytest.mark.parametrize("recipe", ["default", "mean", "paper"])
def test_every_kind_of_plug_can_be_saved(make_plug, llm, recipe, tmp_path):
    plug = make_plug(llm, recipe=recipe, user_tokens=None, differ=True)
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), encoder=plug.encoder, device="cpu")
    torch.testing.assert_close(again.soft_prompt("a", ["b"]), plug.soft_prompt("a", ["b"]), atol=0, rtol=0)


def test_a_plug_without_user_tokens_can_be_saved(make_plug, tmp_path):
    plug = make_plug(user_tokens=0)
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), encoder=plug.encoder, device="cpu")
    torch.testing.assert_close(again.soft_prompt("a"), plug.soft_prompt("a"), atol=0, rtol=0)


def test_saving_again_replaces_the_old_plug(make_plug, tmp_path):
    folder = tmp_path / "deep" / "plug"
    make_plug(differ=True).save_pretrained(folder)
    new = make_plug(seed=5)
    new.save_pretrained(folder)
    assert torch.equal(load_file(folder / "model.safetensors")["tokens"], new.embedder.tokens.detach())
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# What the file holds


def test_the_file_holds_the_embedder_and_nothing_else(make_plug, tmp_path):
    plug = make_plug(projector_hidden=256, key_dim=64, differ=True)
    path = plug.save_pretrained(tmp_path) / "model.safetensors"
    header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    trained = sum(p.numel() * p.element_size() for p in plug.parameters())
    assert trained > 100_000
    assert path.stat().st_size <= 1.05 * trained + header
    assert header < 5000
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(plug.embedder.state_dict())


def test_no_text_of_a_user_is_saved(make_plug, tmp_path, people):
    plug = make_plug(differ=True)
    plug.generate(people.requests, people.histories)
    plug.save_pretrained(tmp_path)
    content = b"".join(p.read_bytes() for p in tmp_path.iterdir())
    texts = [t for h in people.histories for i in h for t in (i.input, i.output) if len(t) > 4] + people.requests[1:2]
    assert not [t for t in texts if t.encode() in content]


def test_the_model_card_says_what_it_is(saved, plug):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: persona-plug\n")
    for fact in (plug.config.llm_fingerprint, plug.config.encoder_fingerprint, "tiny-llama", "1, 10, 5", "suffix"):
        assert fact in card
    assert "from_pretrained" in card


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    persistence.write_atomically(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        persistence.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Safe files


def test_nothing_is_unpickled(saved, monkeypatch, people):
    def refuse(*_args, **_kwargs):
        raise AssertionError("something was unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    assert PersonaPlug.from_pretrained(saved, device="cpu").soft_prompt("a", people.ann).isfinite().all()


def test_a_pickle_called_safetensors_is_refused(copy):
    buffer = io.BytesIO()
    torch.save({"tokens": torch.zeros(1)}, buffer)
    assert zipfile.is_zipfile(buffer)
    for content in (buffer.getvalue(), pickle.dumps({"tokens": 1})):
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(CorruptFileError, match="damaged"):
            PersonaPlug.from_pretrained(copy)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(copy, keep):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))] if isinstance(keep, float) else content[:keep])
    with pytest.raises(CorruptFileError, match=r"model\.safetensors is damaged.*save the plug again"):
        PersonaPlug.from_pretrained(copy)


def test_a_flipped_bit_anywhere_is_refused(copy):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = [0, 7, 8, 9, *range(12, header, 37), header, header + 1, (header + len(content)) // 2, len(content) - 1]
    accepted = []
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            state = persistence.read_weights(copy)
        except CorruptFileError:
            continue
        accepted.append((place, bytes(damaged[max(0, place - 20) : place + 5]), set(state)))
    # The encoder's settings in the header are guarded by the encoder's fingerprint instead.
    assert [a for a in accepted if a[0] >= header or b"tokens" in a[1]] == []


def test_an_oversized_header_is_refused(copy):
    path = copy / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + path.read_bytes()[8:])
    with pytest.raises(CorruptFileError):
        PersonaPlug.from_pretrained(copy)


def test_a_damaged_encoder_setting_is_refused(copy):
    """The header also carries the encoder's pooling, length and prefix."""
    path = copy / "model.safetensors"
    content = path.read_bytes()
    for old, new in ((b'\\"mean\\"', b'\\"mexn\\"'), (b'\\"pooling\\"', b'\\"poolinh\\"'), (b'{\\"pool', b'[\\"pool')):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(PersonaPlugError):
            PersonaPlug.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(CorruptFileError, match=f"{name} is missing"):
        PersonaPlug.from_pretrained(copy)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "~/nothing-here"])
def test_a_missing_folder_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorruptFileError, match="no such folder"):
        PersonaPlug.from_pretrained(name)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "x").write_text("x")
    with pytest.raises(CorruptFileError, match="no such folder"):
        PersonaPlug.from_pretrained(tmp_path / "x")


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_args, **_kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr("persona_plug.persistence.hub_answers", lambda: True)
    with pytest.raises(CorruptFileError, match=r"someone/plug: neither a folder nor reachable .*no route\)$"):
        PersonaPlug.from_pretrained("someone/plug")


def test_a_hub_id_fetches_only_the_plugs_own_files(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def fetch(repo, **options):
        asked.update(options, repo=repo)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert PersonaPlug.from_pretrained("someone/plug", device="cpu").config.answers == ANSWERS
    assert asked["repo"] == "someone/plug"
    own = {"model.safetensors", "config.json", "README.md"}
    assert set(asked["allow_patterns"]) - own == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


# Mismatches


def test_another_encoder_is_refused_with_both_fingerprints(saved, plug):
    for other in (HistoryEncoder("tiny-encoder", pooling="cls", device="cpu"), HistoryEncoder("tiny-t5", device="cpu")):
        with pytest.raises(MismatchError) as info:
            PersonaPlug.from_pretrained(saved, encoder=other, device="cpu")
        assert plug.config.encoder_fingerprint in str(info.value)
        assert other.fingerprint in str(info.value)
    with pytest.raises(MismatchError, match=plug.config.encoder_fingerprint):
        PersonaPlug.from_pretrained(saved, encoder="tiny-t5", device="cpu")


@pytest.mark.parametrize("which", ["q_proj", "norm", "embed_tokens", ""])
def test_other_weights_of_the_same_shape_are_refused(saved, plug, other_llm, which):
    with pytest.raises(MismatchError, match="pass the same weights") as info:
        PersonaPlug.from_pretrained(saved, llm=other_llm(which), encoder=plug.encoder, device="cpu")
    assert plug.config.llm_fingerprint in str(info.value)
    present = str(info.value).split("the one given is ")[1].split(",")[0]
    assert present != plug.config.llm_fingerprint
    assert len(present) == len(plug.config.llm_fingerprint)


def test_another_llm_is_refused(saved, plug, tiny_gemma, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "narrow"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(zoo.pull("tiny-llama")).save_pretrained(folder)
    for name, width in (("tiny-gpt2", 64), ("tiny-t5", 64), (tiny_gemma, 64), (str(folder), 32)):
        with pytest.raises(MismatchError, match=rf"width 64\), the one given is .*, width {width};"):
            PersonaPlug.from_pretrained(saved, llm=name, encoder=plug.encoder, device="cpu")


def test_the_same_llm_elsewhere_is_welcome(saved, plug, tmp_path, people):
    folder = shutil.copytree(zoo.pull("tiny-llama"), tmp_path / "moved")
    for dtype in (None, "bfloat16"):
        again = PersonaPlug.from_pretrained(saved, llm=str(folder), encoder=plug.encoder, dtype=dtype, device="cpu")
        torch.testing.assert_close(
            again.soft_prompt("a", people.ann), plug.soft_prompt("a", people.ann), atol=0, rtol=0
        )


def test_a_newer_format_is_refused(copy):
    edit_config(copy, format_version=99)
    with pytest.raises(ConfigError, match=r"format version 99.*upgrade"):
        PersonaPlug.from_pretrained(copy)


def test_an_unknown_setting_warns(copy, plug):
    edit_config(copy, colour="blue")
    with pytest.warns(UserWarning, match="colour"):
        again = PersonaPlug.from_pretrained(copy, encoder=plug.encoder, device="cpu")
    assert again.config == plug.config


@pytest.mark.parametrize("changes", [{"user_tokens": 2}, {"aggregator": "mean"}, {"answers": None}, {"heads": 3}])
def test_config_and_weights_that_do_not_belong_together_are_refused(copy, plug, changes):
    edit_config(copy, **changes)
    with pytest.raises(MismatchError, match="do not belong together"):
        PersonaPlug.from_pretrained(copy, encoder=plug.encoder, device="cpu")


def test_altered_weights_are_refused_even_in_a_whole_file(copy):
    from safetensors.torch import save_file

    path = copy / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({n: t + 1 for n, t in load_file(path).items()}, path, metadata)
    with pytest.raises(CorruptFileError, match="checksum"):
        PersonaPlug.from_pretrained(copy)


# The Hub


class FakeHub:
    def __init__(self, fail=None):
        self.fail, self.calls, self.files = fail, [], {}

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, private, exist_ok):
        self.calls.append(("create", repo_id, private, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.fail:
            raise self.fail
        self.files = {p.name: p.read_bytes() for p in persistence.Path(folder_path).iterdir()}
        return f"https://hub.example/{repo_id}"


def test_push_uploads_what_save_writes(plug, saved, monkeypatch):
    import huggingface_hub

    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr("persona_plug.persistence.hub_answers", lambda: True)
    given = "".join(["a", "token"])
    assert plug.push_to_hub("someone/plug", token=given) == "https://hub.example/someone/plug"
    assert hub.calls == [("token", given), ("create", "someone/plug", True, True)]
    assert hub.files.keys() == {p.name for p in saved.iterdir()}
    for name in ("config.json", "README.md"):
        assert hub.files[name] == (saved / name).read_bytes()
    weights, expected = load(hub.files["model.safetensors"]), load_file(saved / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[n], expected[n]) for n in expected)
    plug.push_to_hub("someone/plug", private=False)
    assert hub.calls[-1][2] is False


def test_a_failed_push_is_one_line(plug, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub(RuntimeError("401 Unauthorized\nlong trace")))
    monkeypatch.setattr("persona_plug.persistence.hub_answers", lambda: True)
    with pytest.raises(PersonaPlugError, match=r"someone/plug: upload failed \(401 Unauthorized\)$"):
        plug.push_to_hub("someone/plug")


# Quantised LLMs


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_plug_of_dense_weights_runs_on_quantised_ones(saved, plug, other_llm, people, kind):
    pytest.importorskip("bitsandbytes")
    again = PersonaPlug.from_pretrained(saved, encoder=plug.encoder, quantization=kind, device="cpu")
    assert again.llm.is_quantized
    scores = again.score(people.requests, history=people.histories)
    dense = plug.score(people.requests, history=people.histories)
    assert torch.isfinite(scores).all()
    assert (scores - dense).abs().mean() < 2
    assert not torch.equal(scores, dense)
    alone = torch.cat([again.score(r, history=h) for r, h in zip(people.requests, people.histories, strict=True)])
    torch.testing.assert_close(scores, alone, atol=0.2 if kind == "int8" else 1e-3, rtol=0)
    texts = again.generate(people.requests, people.histories, min_new_tokens=4, max_new_tokens=4)
    assert len(texts) == len(people.requests)
    plain = again.generate(people.requests, personal=False, min_new_tokens=4, max_new_tokens=4)
    assert len(plain) == len(people.requests)
    with pytest.raises(MismatchError, match=kind):
        PersonaPlug.from_pretrained(
            saved, llm=other_llm("embed_tokens"), encoder=plug.encoder, quantization=kind, device="cpu"
        )


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_llms_keep_their_bits_and_pass_gradients_on(plug, people, tmp_path, kind):
    """Gradients of a quantised LLM must be near those of its dense original, also behind a pass without a graph."""
    pytest.importorskip("bitsandbytes")
    llm, tokenizer = load_llm("tiny-llama", quantization=kind, device="cpu")
    quantised = PersonaPlug.join(plug.config, llm, tokenizer, plug.encoder, kind)
    quantised.embedder.load_state_dict(plug.embedder.state_dict())
    assert quantised.config.llm_fingerprint.endswith(f"-{kind}")
    digest = full_digest(llm)
    quantised.score(people.requests, history=people.histories)
    examples = pair(plug.config, people.requests, people.histories)
    batch = plug.table(examples).batch(examples)
    parts = [plug.prompter.parts(r) for r in people.requests]
    tree = AnswerTree.build([plug.prompter.answer(a) for a in ANSWERS], plug.prompter.eos)
    grads = []
    for one in (quantised, plug):
        one.zero_grad()
        one(batch, parts, [tree] * len(parts))[0][:, 0].sum().backward()
        grads.append(one.embedder.tokens.grad.flatten().clone())
        one.zero_grad()
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.5
    assert full_digest(llm) == digest
    again = PersonaPlug.from_pretrained(quantised.save_pretrained(tmp_path), encoder=plug.encoder, device="cpu")
    assert again.score("a").isfinite().all()


def test_unknown_quantisation_is_refused():
    with pytest.raises(ConfigError, match="int4"):
        load_llm("tiny-llama", quantization="int4")


def test_fingerprints_of_quantised_llms_compare_their_dense_part():
    assert same_llm("a-b", "a-b")
    assert not same_llm("a-b", "a-c")
    assert not same_llm("a-b", "c-b")
    assert same_llm("a-b", "a-nf4")
    assert same_llm("a-int8", "a-b")
    assert not same_llm("a-b", "c-nf4")


def change_weights(folder, change):
    """Write the weights of a plug's folder anew, with a checksum that fits."""
    file = folder / "model.safetensors"
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    state = load_file(file)
    change(state)
    metadata["sha256"] = state_digest(state)
    save_file(state, file, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["out.weight"].fill_(float("nan")), "out.weight holds numbers that are not finite"),
        (lambda state: state["tokens"].fill_(float("inf")), "tokens holds numbers that are not finite"),
        (lambda state: state.update(tokens=state["tokens"].half()), "tokens: float16"),
        (lambda state: state.update(tokens=state["tokens"][:1]), "tokens: float32 .1, "),
        (lambda state: state.pop("out.weight"), "out.weight: nothing"),
        (lambda state: state.update(more=torch.ones(2)), "more: float32 .2., not nothing"),
    ],
    ids=["nan", "inf", "dtype", "shape", "missing", "more"],
)
def test_weights_that_are_no_plugs_are_refused_before_any_model_is_loaded(copy, change, message, monkeypatch):
    change_weights(copy, change)
    monkeypatch.setattr("persona_plug.plug.load_llm", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PersonaPlugError, match=message):
        PersonaPlug.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize("name", ["key_dim", "projector_hidden", "task_tokens", "user_tokens", "llm_width"])
@pytest.mark.parametrize("size", [10**8, 10**12])
def test_sizes_beyond_all_bounds_take_no_room(copy, name, size):
    file = copy / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: size}))
    with pytest.raises(PersonaPlugError) as error:
        PersonaPlug.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


def test_a_chat_template_that_changed_is_noticed(saved, plug, tmp_path):
    folder = shutil.copytree(zoo.pull("tiny-llama"), tmp_path / "llm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper")
    tokenizer.save_pretrained(folder)
    with pytest.raises(MismatchError, match="writes another prompt"):
        PersonaPlug.from_pretrained(saved, llm=str(folder), device="cpu")


def test_arguments_of_the_chat_template_are_saved(make_plug, tmp_path):
    plug = make_plug(chat_template_args={"enable_thinking": False})
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path), device="cpu")
    assert again.config == plug.config
    assert again.config.chat_template_args == {"enable_thinking": False}


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_temperature_that_is_none_is_refused(copy, value):
    change_weights(copy, lambda state: state["score_temperature"].fill_(value))
    with pytest.raises(CorruptFileError, match=r"score_temperature .* is not positive"):
        PersonaPlug.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize(
    "settings", [{"pooling": 5}, {"max_length": "x"}, {"max_length": True}, {"prefix": None}], ids=str
)
def test_an_encoder_setting_of_another_kind_is_named(copy, settings):
    file = copy / "model.safetensors"
    with safe_open(str(file), "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, {**metadata, "encoder": json.dumps(settings)})
    with pytest.raises(CorruptFileError, match=f"encoder setting {next(iter(settings))}=.* is damaged"):
        PersonaPlug.from_pretrained(copy, device="cpu")


@pytest.mark.parametrize("content", ["[" * 100_000, "", "[]", "null", "{", "5"], ids=lambda text: text[:4] or "empty")
def test_a_config_that_is_no_object_is_one_line(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"config\.json") as error:
        PersonaPlug.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("folder", ["/dev/null/x", "a\0b"], ids=ascii)
def test_a_folder_that_cannot_be_is_named_before_work(make_plug, folder, monkeypatch):
    plug = make_plug()
    with pytest.raises(ConfigError, match="cannot be a plug's folder"):
        plug.save_pretrained(folder)
    monkeypatch.setattr("persona_plug.fit.run.prepare", lambda *_, **__: pytest.fail("read the data"))
    with pytest.raises(ConfigError, match="cannot be a plug's folder"):
        plug.fit([], output_dir=folder)
