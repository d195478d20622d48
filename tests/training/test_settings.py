"""What a training needs to know: impossible values are named before any work is done."""

import pytest

from persona_plug.errors import ConfigError
from training import run
from training.config import load
from training.settings import RunSettings


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("valid=2", r"valid=2 must be in \(0, 1\)"),
        ("valid=0", r"valid=0 must be in \(0, 1\)"),
        ("lr_steps=x", "lr_steps='x' must be a whole number"),
        ("lr_steps=0", "lr_steps=0 must be at least 1"),
        ("lr_grid=[1e-3, 0]", "lr_grid=.* must hold positive numbers"),
        ("seeds=[]", r"seeds=\[\] must be one or more different numbers"),
        ("seeds=[1, 1]", "must be one or more different numbers"),
        ("seeds=[-1]", "numbers from 0 up"),
        ("seeds=3", "seeds=3 must be a list of whole numbers"),
        ("threads=0", "threads=0 must be at least 1"),
        ("augment=-1", "augment=-1 must be at least 0"),
        ("profile_targets=-1", "profile_targets=-1 must be at least 0"),
        ("state_gigabytes=-1", "state_gigabytes=-1 must be at least 0"),
        ("dtype=int3", "dtype='int3' is not one of auto, bfloat16, .*, or null"),
        ("quantization=int3", "quantization='int3' is not one of int8, nf4, or null"),
        ("fit.step=3", r"fit: unknown setting 'step', did you mean 'steps'\? known are"),
        ("fit.steps=x", "fit: steps='x' must be of type int"),
        ("fit.steps=0", "fit: steps=0 must be at least 1"),
        ("fit.lr=[1]", r"fit: lr=\[1\] must be of type float"),
        ("fit.bf16=1", "fit: bf16=1 must be of type bool"),
        ("fit.seed=3", r"fit.seed is not read by a run; give seeds="),
        ("plug.user_token=3", r"plug: unknown setting 'user_token', did you mean 'user_tokens'"),
        ("plug.heads=x", "plug: heads='x' must be of type int"),
        ("plug.recipe=x", "plug: recipe='x' is not one of default, "),
        ("plug.llm=x", "plug: unknown setting 'llm'"),
        ("plug.template=x", "plug: unknown setting 'template'"),
        ("methods=[plug]", "unknown setting 'methods'; known are augment, "),
    ],
)
def test_an_impossible_setting_is_named(argument, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load(["data=somewhere", argument], RunSettings)
    assert "\n" not in str(refusal.value)


def test_an_unknown_recipe_is_named_before_data_are_read():
    with pytest.raises(ConfigError, match="no recipe 'plugg'; known are task_prompt, "):
        run.main(["data=nowhere", "recipes=[plugg]"])


def test_data_are_needed():
    with pytest.raises(ConfigError, match="data=DIR is missing"):
        run.main([])


def test_a_seed_joins_the_settings_of_the_fit():
    config = RunSettings(data="x", fit={"steps": 3}).fit_config(7)
    assert (config.steps, config.seed, config.batch_size) == (3, 7, 32)
