"""The configuration at the paper's size, run with tiny models in place of FlanT5-XXL and BGE-base."""

import json
from pathlib import Path

import pytest
import yaml

from eval import run as eval_run
from eval import tiny
from eval.settings import ComparisonSettings
from persona_plug import PersonaPlug
from training import run
from training.config import load
from training.recipes import RECIPES

PAPER = Path(__file__).parents[2] / "configs" / "paper.yaml"
QUESTIONS = {"LaMP_1": 6542, "LaMP_2": 5073, "LaMP_3": 20000, "LaMP_4": 12500, "LaMP_5": 14682, "LaMP_7": 13437}


@pytest.fixture(scope="module")
def settings():
    return load([str(PAPER), "data=nowhere"], ComparisonSettings)


def test_it_holds_the_papers_settings(settings):
    fit = settings.fit_config(0)
    assert (settings.llm, settings.encoder) == ("google/flan-t5-xxl", "BAAI/bge-base-en-v1.5")
    config = yaml.safe_load((PAPER.parent / "accelerate" / "ddp4.yaml").read_text())
    assert fit.batch_size * fit.gradient_accumulation * config["num_processes"] == 64
    assert (fit.lr, fit.weight_decay, fit.warmup, fit.bf16) == (1e-4, 1e-4, 0.05, True)
    assert (settings.plug["max_input_tokens"], settings.plug["max_history"]) == (256, 512)
    assert settings.beams == 4
    assert fit.eval_every == fit.steps // 10
    assert fit.patience * fit.eval_every + fit.eval_every > fit.steps  # no early stop
    assert set(settings.recipes) <= set(RECIPES)


@pytest.mark.parametrize("task", QUESTIONS)
def test_the_steps_it_names_are_two_epochs(task, settings):
    """LaMP-3: one. Every sample is taken to have more than two items, so that all have their copies."""
    epochs = 1 if task == "LaMP_3" else 2
    plain, copied = (round(epochs * QUESTIONS[task] * times / 64) for times in (1, 11))
    assert f"{task} {plain}/{copied}" in PAPER.read_text()
    if task == "LaMP_2":
        assert (settings.fit["steps"], settings.augment) == (copied, 10)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_it_runs_with_tiny_models(tmp_path, settings, scale):
    tiny.write(tmp_path / "data", "label", 8, personal=True)
    fit = {**settings.fit, "steps": 2, "eval_every": 1, "gradient_accumulation": 2, "bf16": False}
    plug = {**settings.plug, "projector_hidden": 32, "fixed_scale": scale}
    run.main(
        [
            str(PAPER),
            "llm=tiny-t5",
            "encoder=tiny-encoder",
            "valid=0.25",
            f"data={tmp_path / 'data'}",
            f"task={tiny.SHAPES['label'][0]}",
            f"out={tmp_path}",
            f"fit={json.dumps(fit)}",
            f"plug={json.dumps(plug)}",
        ]
    )
    made = PersonaPlug.from_pretrained(tmp_path / "plug-0")
    assert (made.config.aggregator, made.config.placement, made.config.soft_tokens) == ("paper", "prefix", 2)
    lengths = made.soft_prompt("a request", [{"input": "an item", "output": "its answer"}]).norm(dim=-1)
    if scale:
        assert lengths.tolist() == pytest.approx([scale / 7, scale])


def test_answers_are_searched_with_as_many_beams_as_asked(tmp_path):
    tiny.write(tmp_path / "own_text", "own_text", 4, personal=True)
    arguments = [f"data={tmp_path / 'own_text'}", f"task={tiny.SHAPES['own_text'][0]}", "llm=tiny-t5"]
    settings = load([*arguments, "encoder=tiny-encoder", "beams=3", f"out={tmp_path / 'out'}"], ComparisonSettings)
    questions, base = eval_run.prepare(settings)
    asked = questions.data.held_out[0].input
    greedy, searched = (base.generate(asked, max_new_tokens=12, **o) for o in ({"num_beams": 1}, {}))
    assert searched == base.generate(asked, max_new_tokens=12, num_beams=3)
    assert searched != greedy
