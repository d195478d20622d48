"""A plug with LoRA adapters: they work in its own calls alone, and are saved, loaded and refused with it."""

import json
import shutil

import pytest
import torch

from persona_plug import PersonaPlug
from persona_plug.errors import ConfigError, MismatchError, PersonaPlugError
from persona_plug.models.fingerprint import full_digest

LLMS = ["tiny-llama", "tiny-gpt2", "tiny-t5"]
SAID = ["yes", "no"]


def shaken(plug, seed=1):
    """A plug whose adapters change what its LLM says, as trained ones do."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in plug.adapters:
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return plug


def answers(plug, people, **how):
    scores = plug.score(people.requests, SAID, people.histories, **how)
    return scores, plug.generate(people.requests, people.histories, max_new_tokens=6, **how)


def same(one, other):
    return torch.equal(one[0], other[0]) and one[1] == other[1]


@pytest.mark.parametrize("llm", LLMS)
def test_adapters_change_personal_answers_and_no_others(make_plug, people, llm):
    base = make_plug(llm, differ=True)
    plug = make_plug(llm, differ=True, lora=2)
    torch.testing.assert_close(answers(plug, people)[0], answers(base, people)[0], atol=1e-4, rtol=1e-4)
    plain = answers(base, people, personal=False)
    shaken(plug)
    assert not torch.allclose(answers(plug, people)[0], answers(base, people)[0], atol=1e-2)
    assert same(answers(plug, people, personal=False), plain)


def test_plugs_on_one_llm_do_not_disturb_each_other(make_plug, people):
    base, one, two = (make_plug(differ=True, lora=rank) for rank in (0, 2, 3))
    shaken(one, 1), shaken(two, 2)
    alone = [answers(plug, people) for plug in (base, one, two)]
    assert len({tuple(texts) for _, texts in alone}) == 3
    before = full_digest(base.llm)
    for _ in range(2):
        for plug, known in zip((two, base, one), (alone[2], alone[0], alone[1]), strict=True):
            assert same(answers(plug, people), known)
            assert same(answers(plug, people, personal=False), answers(base, people, personal=False))
    assert full_digest(base.llm) == before


def test_a_plug_without_soft_tokens_is_its_adapters(make_plug, people):
    plug = shaken(make_plug(user_tokens=0, task_tokens=0, lora=2))
    assert plug.soft_prompt("x").shape == (0, plug.config.llm_width)
    scores = plug.score(people.requests, SAID)
    assert not torch.allclose(scores, plug.score(people.requests, SAID, personal=False), atol=1e-2)
    assert plug.generate("rate this", return_details=True, max_new_tokens=2).weights == []


def test_no_state_outlives_the_adapters_that_made_it(make_plug, people):
    plug = shaken(make_plug(differ=True, lora=2))
    before = answers(plug, people)
    shaken(plug, 3)
    assert not torch.allclose(answers(plug, people)[0], before[0], atol=1e-3)
    assert plug.splicer.cache.used == 0
    answers(plug, people, personal=False)
    assert plug.plain_splicer.cache.used > 0


def test_a_reset_draws_new_adapters_and_forgets_the_old_ones(make_plug, people):
    plug = shaken(make_plug(lora=2))
    changed = answers(plug, people)
    plug.reset(plug.config)
    assert same(answers(plug, people), answers(make_plug(lora=2), people))
    assert not torch.allclose(answers(plug, people)[0], changed[0], atol=1e-3)
    plug.reset(plug.config.replace(lora=0))
    assert plug.adapters is None
    assert plug.llm is plug.plain_splicer.llm


# --- on disk


@pytest.fixture(scope="module")
def plug(make_plug):
    return shaken(make_plug(differ=True, lora=2, answers=tuple(SAID)))


@pytest.fixture
def saved(plug, tmp_path):
    return plug.save_pretrained(tmp_path / "plug")


@pytest.mark.parametrize("llm", LLMS)
def test_what_is_saved_is_what_is_loaded(make_plug, people, tmp_path, llm):
    plug = shaken(make_plug(llm, differ=True, lora=2))
    plug.save_pretrained(tmp_path)
    again = PersonaPlug.from_pretrained(tmp_path, device="cpu")
    assert again.config == plug.config
    assert same(answers(again, people), answers(plug, people))
    assert same(answers(again, people, personal=False), answers(plug, people, personal=False))


def test_the_weights_lie_in_pefts_files_alone(saved, plug):
    from safetensors.torch import load_file

    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert files == {
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    }
    assert not any("lora" in name for name in load_file(saved / "model.safetensors"))
    assert len(load_file(saved / "adapter" / "adapter_model.safetensors")) == len(plug.adapters.names)
    assert "LoRA of rank 2" in (saved / "README.md").read_text()


def test_another_plugs_adapters_are_refused(saved, make_plug, tmp_path):
    other = shaken(make_plug(differ=True, lora=2), 5).save_pretrained(tmp_path / "other")
    shutil.rmtree(saved / "adapter")
    shutil.copytree(other / "adapter", saved / "adapter")
    with pytest.raises(MismatchError, match="another plug's adapters"):
        PersonaPlug.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize("lost", ["adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"])
def test_lost_adapters_are_named_before_any_model_is_loaded(saved, lost, monkeypatch):
    path = saved / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setattr("persona_plug.plug.load_llm", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(PersonaPlugError, match=r"adapter.* is missing"):
        PersonaPlug.from_pretrained(saved, device="cpu")


def test_a_config_that_asks_for_another_rank_is_refused(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora": 4}))
    with pytest.raises(MismatchError, match=r"is \[2, .*, not \[4, "):
        PersonaPlug.from_pretrained(saved, device="cpu")


def test_a_config_of_the_version_before_has_no_adapters(make_plug, tmp_path):
    file = make_plug().save_pretrained(tmp_path) / "config.json"
    fields = json.loads(file.read_text())
    old = {name: value for name, value in fields.items() if name not in ("lora", "retrieve")}
    file.write_text(json.dumps({**old, "format_version": 2}))
    loaded = PersonaPlug.from_pretrained(tmp_path, device="cpu")
    assert (loaded.config.lora, loaded.config.retrieve) == (0, 0)
    assert loaded.adapters is None


def test_a_plug_without_adapters_leaves_no_earlier_ones_beside_it(saved, make_plug):
    """An engine that is given the folder would serve those of another plug."""
    note = saved / "adapter" / "notes.txt"
    note.write_text("mine")
    make_plug(answers=tuple(SAID)).save_pretrained(saved)
    assert [path.name for path in (saved / "adapter").iterdir()] == ["notes.txt"]
    assert PersonaPlug.from_pretrained(saved, device="cpu").adapters is None


def test_a_rank_above_the_llms_width_is_refused_before_room_is_made(make_plug):
    with pytest.raises(ConfigError, match="lora=1000000000 is above the LLM's width 64; give a rank such as 8"):
        make_plug(lora=10**9)
