"""Recipes: clean bases, adapters that train alone or beside soft tokens, users kept apart, runs that go on."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from eval import run, tiny
from eval.settings import ComparisonSettings
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig
from persona_plug.fit.run import WEIGHTS
from persona_plug.models.fingerprint import full_digest
from persona_plug.models.llm import loaded_as
from persona_plug.persistence import state_of
from persona_plug.splice.prompts import AnswerTree, PromptParts
from tests.fit.test_words import people
from training import recipes
from training.config import load
from training.lora import RANK, for_each_user
from training.prefix import with_prefix
from training.recipes import RECIPES, choose_lr, fit, make
from training.settings import RunSettings

ANSWERS = ("good", "bad")


@pytest.fixture
def data():
    def user(name, taste):
        items = [HistoryItem(f"rate {name} {i}", ANSWERS[taste], id=f"{name}-{i}") for i in range(4)]
        return [
            Example(name, item.input, item.output, tuple(o for o in items if o is not item), item.id) for item in items
        ]

    people = [user(f"u{i}", i % 2) for i in range(6)]
    return FitData(
        [e for p in people[:3] for e in p], people[3], [e for p in people[4:] for e in p], "{input}", ANSWERS
    )


@pytest.fixture
def base(make_plug):
    return make_plug(answers=ANSWERS)


FIT = {"steps": 2, "batch_size": 4, "eval_every": 1, "eval_samples": 4, "lr": 1e-2}
CONFIG = FitConfig(**FIT)


def settings(folder, **changes):
    return RunSettings(data="x", out=str(folder), fit=FIT, **{"plug": {"max_input_tokens": 64}, **changes})


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_trains_what_it_says_and_leaves_the_llm_alone(base, data, tmp_path, name):
    before = full_digest(base.llm)
    fitted = fit(name, base, data, settings(tmp_path), 0)
    assert full_digest(base.llm) == before
    assert not any(p.requires_grad for p in base.llm.parameters())
    assert fitted.steps == 2
    names = {n for n, p in fitted.plug.named_parameters() if p.requires_grad}
    assert any(n.startswith("adapters.") for n in names) == ("lora" in name)
    assert ("embedder.tokens" in names) == (name not in ("lora", "lora_turns", "prefix_tuning"))
    assert fitted.parameters == sum(p.numel() for p in fitted.plug.parameters() if p.requires_grad)
    scores = fitted.plug.score(data.held_out)
    assert torch.isfinite(scores).all()


@pytest.mark.parametrize("answers", [ANSWERS, None])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_no_recipe_has_a_parameter_without_dimensions(make_plug, name, answers):
    """DeepSpeed sends parameters as bytes and FSDP splits them along their first dimension: both refuse 0-d ones."""
    plug = make(name, make_plug(answers=answers), {}, 0)
    assert all(p.dim() for p in [*plug.embedder.parameters(), *(plug.adapters or ())])


@pytest.mark.parametrize("settings", [{}, {"words": False}], ids=str)
def test_which_trainings_have_a_words_memory(make_plug, settings):
    """Those of a default plug have one unless a run's settings leave it out; controls and neighbours never."""
    base = make_plug(answers=None, words=settings.get("words", True))
    plugs = {name: make(name, base, settings, 0) for name in RECIPES}
    default = {"plug", "plug_lora"} if not settings else set()
    named = {"words", "words_lora", "words_lora_turns"}
    assert {name for name, plug in plugs.items() if plug.config.remembers} == default | named
    assert {name for name, plug in plugs.items() if plug.words is not None} == default | named
    soft = base.config.soft_tokens
    assert (
        plugs["task_prompt"].config.soft_tokens == plugs["plug"].config.soft_tokens == soft == (8 if settings else 16)
    )
    assert plugs["prefix_tuning"].splicer.prefix.shape[3] == soft
    assert not any(plugs[name].config.soft_tokens for name in ("lora", "lora_turns"))


@pytest.mark.parametrize("name", ["plug", "plug_lora", "words", "words_lora"])
def test_a_finished_training_is_read_back_and_not_repeated(base, data, tmp_path, name, monkeypatch):
    first = fit(name, base, data, settings(tmp_path), 0)
    scores = first.plug.score(data.held_out)
    monkeypatch.setattr(recipes, "train_parts", lambda *_, **__: pytest.fail("trained again"))
    again = fit(name, base, data, settings(tmp_path), 0)
    torch.testing.assert_close(again.plug.score(data.held_out), scores, atol=1e-6, rtol=1e-6)
    assert (again.seconds, again.steps, again.parameters) == (first.seconds, first.steps, first.parameters)


def adapted(base, soft=True):
    return make("plug_lora" if soft else "lora", base, {}, 0)


def test_two_recipes_share_no_adapter(base):
    one, two = adapted(base), adapted(base)
    pointers = [{p.data_ptr() for p in plug.parameters() if p.numel()} for plug in (one, two, base)]
    assert not pointers[0] & pointers[1]
    assert not any("lora_" in n for n, _ in base.llm.named_parameters())


def test_untrained_adapters_change_nothing_and_trained_ones_do(base, data):
    plug = adapted(base, soft=False)
    torch.testing.assert_close(
        plug.score(data.held_out), base.score(data.held_out, personal=False), atol=1e-4, rtol=1e-4
    )
    with torch.no_grad():
        for p in plug.adapters:
            p.add_(0.05)
    assert not torch.allclose(plug.score(data.held_out), base.score(data.held_out, personal=False), atol=1e-3)


@pytest.mark.parametrize(("kind", "dtype"), [("int8", "bfloat16"), ("nf4", "bfloat16"), (None, "bfloat16")])
def test_recipes_train_on_the_llm_as_the_settings_load_it(tmp_path, kind, dtype):
    """LoRA on a dense copy would be compared with a plug on another LLM."""
    if kind:
        pytest.importorskip("bitsandbytes")
    tiny.write(tmp_path / "data", "label", 6, personal=True)
    asked = [f"data={tmp_path / 'data'}", f"task={tiny.SHAPES['label'][0]}", "llm=tiny-llama", "encoder=tiny-encoder"]
    asked += [f"dtype={dtype}", *([f"quantization={kind}"] if kind else [])]
    chosen = load([*asked, f"out={tmp_path}", f"fit={json.dumps(FIT)}"], ComparisonSettings)
    questions, base = run.prepare(chosen)
    before = full_digest(base.llm)
    for name in ("plug", "prefix_tuning", "lora") if kind else sorted(RECIPES, key="lora".__eq__):
        plug = fit(name, base, questions.data, chosen, 0).plug
        how = loaded_as(plug.llm)
        assert (how["quantization"], how["dtype"]) == (kind, getattr(torch, dtype))
        assert bool(getattr(plug.llm, "is_quantized", False)) == bool(kind)
        assert torch.isfinite(plug.score(questions.data.held_out)).all()
    # LoRA's second matrices start as zeros: they moved, so gradients came through.
    assert all(p.abs().sum() > 0 for p in plug.adapters if p.shape[1] == RANK)
    assert full_digest(base.llm) == before


def test_gradients_reach_adapters_in_front_of_the_soft_tokens(base, data):
    """Nothing of an LLM with adapters is reused: a state kept from before a step would be stale."""
    plug = adapted(base)
    before = plug.score(data.held_out[:2])
    with torch.no_grad():
        for p in plug.adapters:
            p.add_(0.05)
    assert not torch.allclose(plug.score(data.held_out[:2]), before, atol=1e-3)
    assert plug.splicer.cache.used == 0


def test_each_user_starts_from_the_shared_adapters(base, data, tmp_path):
    plug = fit("lora", base, data, settings(tmp_path), 0).plug
    start = {k: v.clone() for k, v in plug.adapters.state_dict().items()}
    config = dataclasses.replace(CONFIG, lr=1e-2)
    seen, scores = [], {}
    for indices, own in for_each_user(plug, data.held_out, config, 3):
        seen += indices
        assert any(not torch.equal(v, start[k]) for k, v in own.adapters.state_dict().items())
        scores[data.held_out[indices[0]].user_id] = own.score(data.held_out[:1])
    assert seen == list(range(len(data.held_out)))
    for key, value in plug.adapters.state_dict().items():
        torch.testing.assert_close(value, start[key], atol=0, rtol=0)
    # The same user alone gives the same: no user's training reaches the next.
    last = data.held_out[-1].user_id
    alone = [e for e in data.held_out if e.user_id == last]
    for _, own in for_each_user(plug, alone, config, 3):
        torch.testing.assert_close(own.score(data.held_out[:1]), scores[last], atol=1e-5, rtol=1e-5)


def test_a_users_adapter_is_undone_when_the_questions_are_not_finished(base, data):
    plug = adapted(base, soft=False)
    start = {k: v.clone() for k, v in plug.adapters.state_dict().items()}
    users = for_each_user(plug, data.held_out, CONFIG, 1)
    next(users)
    assert any(not torch.equal(v, start[k]) for k, v in plug.adapters.state_dict().items())
    users.close()
    assert all(torch.equal(v, start[k]) for k, v in plug.adapters.state_dict().items())


def test_an_adapter_for_each_user_needs_one_for_all(base, data):
    with pytest.raises(ConfigError, match="lora=8"):
        next(for_each_user(base, data.held_out, CONFIG, 1))


@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2"])
def test_a_prefix_made_of_words_is_those_words_in_front_of_every_prompt(make_plug, llm):
    """Trained keys and values are checked where they are known: as those of a text."""
    base = make_plug(llm=llm, max_answer_tokens=6)
    plug = with_prefix(base)
    words = [5, 6, 7, 8]
    state = base.splicer.states([tuple(words)])[0]
    plug.splicer.prefix = state
    texts = ["rate this", "and one that is much longer than the first"]
    parts = [plug.prompter.parts(t) for t in texts]
    trees = [AnswerTree.build([(9, 10), (11,)], plug.prompter.eos)] * 2
    soft = torch.zeros(2, 0, plug.config.llm_width)
    found = plug.splicer.loglik(parts, soft, trees)[0]
    shown = [PromptParts((*words, *p.left), p.right) for p in parts]
    with torch.no_grad():
        torch.testing.assert_close(found, base.splicer.loglik(shown, soft, trees)[0], atol=1e-4, rtol=1e-4)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": plug.prompter.eos}
    written = [
        plug.llm.generate(**plug.splicer.generation_inputs(p, soft[: len(p)]), **options) for p in (parts, parts[1:])
    ]
    for row, part in zip(written[0], shown, strict=True):
        ids = torch.tensor([[*part.left, *part.right]])
        alone = base.llm.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()
    assert written[1][0].tolist() == written[0][1][: written[1].shape[1]].tolist()


def test_prefix_tuning_trains_its_prefix_for_decoders_only(make_plug, base, data, tmp_path):
    plug = fit("prefix_tuning", base, data, settings(tmp_path, plug={}), 0).plug
    start = make("prefix_tuning", base, {}, CONFIG.seed)
    assert not torch.equal(plug.embedder.prefix, start.embedder.prefix)
    assert plug.splicer.prefix is plug.embedder.prefix
    assert plug.splicer.prefix_length == base.config.soft_tokens
    with pytest.raises(ConfigError, match="decoder-only"):
        with_prefix(make_plug(llm="tiny-t5"))


def test_every_seed_learns_at_the_rate_that_is_best_with_the_first(base, data, tmp_path, monkeypatch):
    trials = []

    def train(plug, data, config, folder, resume, what=""):
        trials.append((config.lr, config.steps, config.eval_every, config.seed, str(folder.relative_to(tmp_path))))
        folder.mkdir(parents=True)
        look = {"step": config.steps, "seconds": 1.0, "eval_loss": abs(config.lr - 0.003)}
        (folder / "log.jsonl").write_text(json.dumps(look) + "\n")
        save_file({k: v.clone() for k, v in state_of(plug.parts()).items()}, folder / WEIGHTS)

    monkeypatch.setattr(recipes, "train_parts", train)
    grid = settings(tmp_path, lr_grid=[1e-3, 3e-3, 1e-2], lr_steps=4, seeds=[3, 5])
    assert [fit("plug", base, data, grid, seed, "a name").lr for seed in (3, 5, 5)] == [3e-3] * 3
    assert trials == [
        *((lr, 4, 4, 3, f"lr/a name/lr-{lr:g}") for lr in grid.lr_grid),
        *((3e-3, 2, 1, seed, f"seed-{seed}/fitted/a name") for seed in (3, 5)),
    ]
    assert choose_lr("plug", base, data, settings(tmp_path), "plug") == CONFIG.lr


def test_shared_states_are_charged_to_every_training_that_uses_them(base, data, tmp_path, monkeypatch):
    """Which of two trainings computes a state first is chance; both pay for it."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr("persona_plug.splice.base.clock", lambda _: float(next(ticks)))
    bills = []
    for name in ("plug_mean", "plug"):
        fit(name, base, data, settings(tmp_path), 0)
        bills.append(base.splicer.bill)
    prices = base.splicer.cache.seconds
    for bill in bills:
        assert bill.owed == pytest.approx(sum(prices[left] for left in bill.used))
        assert bill.owed > 0
    assert bills[1].spent < bills[1].owed  # some were there already


def test_the_curve_holds_each_look_with_rising_seconds(base, data, tmp_path):
    fitted = fit("plug", base, data, settings(tmp_path), 0)
    steps, seconds, losses = zip(*fitted.curve, strict=True)
    assert steps == (1, 2)
    assert 0 < seconds[0] < seconds[1] <= fitted.seconds
    assert all(0 < loss < 100 for loss in losses)


def test_an_unknown_recipe_is_named(base):
    with pytest.raises(ConfigError, match=r"no recipe 'nonsense'; known are task_prompt"):
        make("nonsense", base, {}, 0)


@pytest.mark.parametrize("name", ["words", "words_lora"])
def test_a_words_memory_is_fitted_and_read_back(make_plug, tmp_path, monkeypatch, name):
    monkeypatch.setattr("persona_plug.heads.fitting.STEPS", 25)
    data = FitData(people(9, 0), people(3, 1), people(3, 2), "{input}", None)
    base = make_plug(max_answer_tokens=40)
    first = fit(name, base, data, settings(tmp_path, plug={}), 0)
    scores = first.plug.score(data.held_out[:2], [data.held_out[0].output])
    with first.plug.recollection.paused():
        assert not torch.allclose(first.plug.score(data.held_out[:2], [data.held_out[0].output]), scores)
    monkeypatch.setattr(recipes, "train_parts", lambda *_, **__: pytest.fail("trained again"))
    again = fit(name, base, data, settings(tmp_path, plug={}), 0)
    torch.testing.assert_close(again.plug.score(data.held_out[:2], [data.held_out[0].output]), scores)
