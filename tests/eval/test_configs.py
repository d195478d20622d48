"""Every config goes with every task, and names only what there is."""

from pathlib import Path

import pytest

from eval.methods import METHODS, find_method
from eval.settings import ComparisonSettings
from persona_plug.config import PlugConfig
from training.config import load
from training.recipes import RECIPES
from training.tasks import TASKS, load_task

CONFIGS = sorted(p for p in TASKS.parent.rglob("*.yaml") if p.parent.name not in ("tasks", "accelerate"))
SETS = sorted(p.stem for p in TASKS.glob("*.yaml"))


def test_there_is_a_config_of_each_size_and_a_task_for_each_set():
    assert {"tiny/all_methods.yaml", "laptop/all_methods.yaml", "paper.yaml"} <= {
        str(c.relative_to(TASKS.parent)) for c in CONFIGS
    }
    assert {"movie_tagging", "critic_rating", "product_rating", "offensiveness_rating", "scholarly_title"} < set(SETS)
    assert {f"LaMP_{n}" for n in (1, 2, "2N", 3, 4, 5, 6, 7)} | {f"LongLaMP_{n}" for n in (1, 2, 3, 4)} < set(SETS)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: str(Path(c).relative_to(TASKS.parent)))
def test_a_config_names_only_what_there_is(config):
    settings = load([str(config), "data=nowhere"], ComparisonSettings)
    assert settings.fit_config(3).seed == 3
    assert set(settings.recipes) <= set(RECIPES)
    for name in settings.methods:
        assert find_method(name)
    for name in SETS:
        task = load_task(name)
        lengths = {"max_answer_tokens": task.max_answer_tokens, "max_input_tokens": task.max_input_tokens}
        chosen = {**lengths, **settings.plug}
        made = PlugConfig.create(settings.llm, settings.encoder, chosen.pop("recipe", "default"), **chosen)
        assert made.replace(answers=task.answers).answers == task.answers


@pytest.mark.parametrize("size", ["tiny", "laptop"])
def test_every_method_is_in_the_configs_that_say_so(size):
    listed = load([str(TASKS.parent / size / "all_methods.yaml"), "data=nowhere"], ComparisonSettings).methods
    assert {*METHODS, "plug_shuffled", "plug_empty"} <= set(listed)
