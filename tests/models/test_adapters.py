"""LoRA adapters: a copy of the LLM that shares its tensors, PEFT's files, and what is refused of them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from persona_plug.errors import ConfigError, CorruptFileError, MismatchError, PersonaPlugError
from persona_plug.models import zoo
from persona_plug.models.adapters import CONFIG, WEIGHTS, Adapters, read_adapters
from persona_plug.models.fingerprint import full_digest, llm_fingerprint
from persona_plug.models.llm import load_llm
from persona_plug.models.tensors import state_digest

LLMS = ["tiny-llama", "tiny-gpt2", "tiny-t5"]
IDS = torch.tensor([[5, 9, 17, 30, 41]])


def logits(llm, ids=IDS):
    more = {"decoder_input_ids": ids} if llm.config.is_encoder_decoder else {}
    with torch.no_grad():
        return llm(input_ids=ids, **more).logits


def shaken(adapters, seed=1):
    """Adapters that change what the LLM says."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters:
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return adapters


@pytest.mark.parametrize("name", LLMS)
def test_the_llm_itself_stays_as_it_is(load_parts, name):
    llm, _ = load_parts(name)
    before, plain, names = full_digest(llm), logits(llm), [n for n, _ in llm.named_modules()]
    adapters = Adapters(llm, 4)
    assert torch.equal(logits(adapters.llm), plain)
    shaken(adapters)
    assert not torch.allclose(logits(adapters.llm), plain, atol=1e-3)
    assert torch.equal(logits(llm), plain)
    assert full_digest(llm) == before
    assert [n for n, _ in llm.named_modules()] == names
    assert all(not p.requires_grad for p in llm.parameters())


@pytest.mark.parametrize("name", LLMS)
def test_all_but_the_adapters_is_shared_memory(load_parts, name):
    llm, _ = load_parts(name)
    adapters = Adapters(llm, 4)
    own = {p.data_ptr() for p in adapters.llm.parameters()} - {p.data_ptr() for p in llm.parameters()}
    assert own == {p.data_ptr() for p in adapters.parameters()}
    assert [p.requires_grad for p in adapters.parameters()] == [True] * len(adapters.names)
    assert adapters.llm not in list(adapters.modules())


def test_two_adapted_copies_share_no_adapter(load_parts):
    llm, _ = load_parts("tiny-llama")
    one, two, again = Adapters(llm, 4), Adapters(llm, 4, seed=1), Adapters(llm, 4)
    assert one.digest == again.digest != two.digest
    shaken(one)
    assert torch.equal(logits(two.llm), logits(llm))


def test_weights_are_float32_in_an_llm_of_half_precision():
    llm, _ = load_llm("tiny-llama", dtype="bfloat16", device="cpu")
    adapters = shaken(Adapters(llm, 4))
    assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    assert logits(adapters.llm).dtype == torch.bfloat16
    adapters.llm(input_ids=IDS).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_llm_is_shared_and_adapted(kind):
    pytest.importorskip("bitsandbytes")
    llm, _ = load_llm("tiny-llama", dtype="bfloat16", quantization=kind, device="cpu")
    before, plain = full_digest(llm), logits(llm)
    adapters = Adapters(llm, 4)
    assert torch.equal(logits(adapters.llm), plain)
    pointers = {p.data_ptr() for p in llm.parameters()}
    assert all(p.data_ptr() in pointers for n, p in adapters.llm.named_parameters() if "lora_" not in n)
    shaken(adapters)
    adapters.llm(input_ids=IDS).logits.float().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.parameters())
    assert not torch.allclose(logits(adapters.llm), plain, atol=1e-2)
    assert torch.equal(logits(llm), plain)
    assert full_digest(llm) == before


def test_an_llm_without_known_layers_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    llm = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ConfigError, match=r"family mamba have none of the layers that LoRA adapts.*lora=0"):
        Adapters(llm, 4)


def test_a_missing_package_is_named(load_parts, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"LoRA needs peft: pip install 'persona-plug\[lora\]'"):
        Adapters(load_parts("tiny-llama")[0], 4)


# --- files


@pytest.fixture(scope="module")
def made(load_parts):
    return shaken(Adapters(load_parts("tiny-llama")[0], 4))


@pytest.fixture
def saved(made, load_parts, tmp_path):
    made.save(tmp_path, "tiny-llama", llm_fingerprint(load_parts("tiny-llama")[0], None))
    return tmp_path


def fingerprint(load_parts):
    return llm_fingerprint(load_parts("tiny-llama")[0], None)


@pytest.mark.parametrize("name", LLMS)
def test_peft_itself_reads_the_files(load_parts, tmp_path, name):
    from peft import PeftModel

    llm, _ = load_parts(name)
    adapters = shaken(Adapters(llm, 4))
    adapters.save(tmp_path, str(zoo.pull(name)), llm_fingerprint(llm, None))
    loaded = PeftModel.from_pretrained(load_llm(name, device="cpu")[0], tmp_path)
    torch.testing.assert_close(logits(loaded), logits(adapters.llm), atol=1e-5, rtol=1e-5)


def test_what_is_saved_is_loaded(saved, made, load_parts):
    again = Adapters(load_parts("tiny-llama")[0], 4, seed=5)
    again.load(saved, read_adapters(saved, fingerprint(load_parts)))
    assert again.digest == made.digest
    assert torch.equal(logits(again.llm), logits(made.llm))


def rewrite(folder, change):
    """Write weights anew, with a checksum that fits."""
    from safetensors import safe_open

    with safe_open(str(folder / WEIGHTS), "pt") as file:
        told = file.metadata()
    state = load_file(folder / WEIGHTS)
    name = next(iter(sorted(state)))
    change(state, name, told)
    save_file(state, folder / WEIGHTS, {**told, "sha256": state_digest(state)})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda s, n, t: s[n].fill_(float("nan")), CorruptFileError, "not finite"),
        (lambda s, n, t: s[n].mul_(float("inf")), CorruptFileError, "not finite"),
        (lambda s, n, t: s.update({n: s[n].half()}), MismatchError, "float16, not float32"),
        (lambda s, n, t: s.update({n: s[n][:1].clone()}), MismatchError, r"is \[1, "),
        (lambda s, n, t: s.pop(n), MismatchError, "is None, not"),
        (lambda s, n, t: s.update(more=torch.ones(2)), MismatchError, r"more is \[2\], not None"),
        (lambda s, n, t: t.update(llm_fingerprint="a-b"), MismatchError, "belongs to LLM a-b"),
        (lambda s, n, t: t.pop("llm_fingerprint"), MismatchError, "belongs to LLM None"),
    ],
    ids=["nan", "inf", "dtype", "shape", "missing", "more", "llm", "no llm"],
)
def test_weights_that_are_not_this_llms_are_refused(saved, load_parts, change, kind, message):
    rewrite(saved, change)
    with pytest.raises(kind, match=message) as refusal:
        Adapters(load_parts("tiny-llama")[0], 4).load(saved, read_adapters(saved, fingerprint(load_parts)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", "flipped"])
def test_damaged_files_are_named(saved, load_parts, name, how):
    file = saved / name
    content = file.read_bytes()
    if how == "missing":
        file.unlink()
    elif how == "flipped" and name == CONFIG:
        file.write_text("[1, 2]")
    else:
        broken = {"cut": content[:-7], "empty": b"", "flipped": content[:-3] + bytes([content[-3] ^ 64]) + content[-2:]}
        file.write_bytes(broken[how])
    with pytest.raises(PersonaPlugError, match=name) as refusal:
        read_adapters(saved, fingerprint(load_parts))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value"), [("r", 8), ("lora_alpha", 1), ("target_modules", ["q_proj"]), ("fan_in_fan_out", True)]
)
def test_settings_that_would_change_what_weights_do_are_refused(saved, load_parts, field, value):
    file = saved / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(MismatchError, match=field):
        Adapters(load_parts("tiny-llama")[0], 4).load(saved, read_adapters(saved, fingerprint(load_parts)))
