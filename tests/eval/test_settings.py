"""What a comparison needs to know, its documentation, and the command lines that read settings."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from eval import run, tiny
from eval.bench import __main__ as bench
from eval.bench.settings import BenchSettings, LoadSettings, ServingSettings, StoreSettings
from eval.methods import ALL, CONTROLS, METHODS, find_method
from eval.settings import ComparisonSettings, page
from persona_plug.errors import ConfigError
from training import run as training_run
from training.config import describe, load
from training.settings import RunSettings

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split=tset", "split='tset' is not one of dev, test"),
        ("methods=[]", "names none"),
        ("methods=plug", "methods='plug' must be a list of texts"),
        ("methods=[lorra]", "no method 'lorra'"),
        ("one_seed=[lorra]", "no method 'lorra'"),
        ("pairs=[[plug, lora]]", "pairs: 'lora' is none of the methods compared"),
        ("questions=0", "questions=0 must be at least 1"),
        ("generated=0", "generated=0 must be at least 1"),
        ("user_steps=0", "user_steps=0 must be at least 1"),
        ("beams=0", "beams=0 must be at least 1"),
        ("generator=pigeon", "generator='pigeon' is not one of transformers, vllm"),
        ("valid=2", "valid=2 must be in"),
        ("method=[plug]", r"unknown setting 'method', did you mean 'methods'\?"),
    ],
)
def test_an_impossible_setting_is_named(argument, message):
    with pytest.raises(ConfigError, match=message):
        load(["data=somewhere", argument], ComparisonSettings)


def test_rows_of_the_prior_may_be_contrasted():
    found = load(["data=x", "pairs=[['user_prior: whole_request', plug]]"], ComparisonSettings)
    assert found.pairs == (("user_prior: whole_request", "plug"),)


def test_all_stands_for_every_method_with_its_controls():
    found = load(["data=x", "methods=[bm25-8, all, plug]"], ComparisonSettings).methods
    assert found == ("bm25-8", *ALL)
    assert set(METHODS) <= set(found)
    controls = [name for name in found if name.endswith(tuple(CONTROLS))]
    shuffled = [
        "plug_shuffled",
        "turns_shuffled",
        "lora_user_shuffled",
        "plug_lora_shuffled",
        "words_shuffled",
        "words_lora_shuffled",
    ]
    assert sorted(controls) == sorted([*shuffled, "plug_empty", "words_empty"])
    assert all(find_method(name) for name in found)


def test_settings_are_recorded_as_they_were_before_they_had_types():
    """The keys of `settings` in results.json."""
    names = "data task split methods recipes seeds subject one_seed pairs out llm encoder dtype quantization plug fit "
    names += (
        "lr_grid lr_steps user_steps valid profile_targets augment questions generated generator vllm beams threads "
    )
    names += "threads state_gigabytes"
    assert set(dataclasses.asdict(ComparisonSettings(data="x"))) == set(names.split())


def test_the_documentation_lists_every_setting_as_it_is():
    assert (ROOT / "docs" / "settings.md").read_text() == page(), "python -m eval.settings > docs/settings.md"
    for name, default, text in describe(ComparisonSettings):
        assert f"| `{name}` | `{default}` | {text} |" in page()


COMMANDS = {
    "training.run": RunSettings,
    "eval.run": ComparisonSettings,
    "eval.tiny": tiny.TinySettings,
    "eval.bench": BenchSettings,
}


def command(module, *arguments):
    line = [sys.executable, "-X", "importtime", "-m", module, *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def imported(result):
    return {line.split("|")[-1].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("module", COMMANDS)
def test_help_lists_every_setting_and_loads_nothing_heavy(module):
    result = command(module, "--help")
    assert result.returncode == 0
    for name, default, _ in describe(COMMANDS[module]):
        assert f"\n  {name}={default}\n" in result.stdout
    for name, rows in COMMANDS[module].entries().items():
        assert all(f"\n  {name}.{entry}={default}\n" in result.stdout for entry, default, _ in rows)
    assert not imported(result) & {"torch", "transformers", "datasets", "matplotlib"}


def test_entries_of_plug_and_fit_are_settings_of_runs():
    rows = RunSettings.entries()
    assert {"heads", "words"} <= {name for name, *_ in rows["plug"]}
    assert {"lr", "patience"} <= {name for name, *_ in rows["fit"]}


@pytest.mark.parametrize("main", [training_run.main, run.main, tiny.main, bench.main])
@pytest.mark.parametrize("argument", ["--nonsense", "nonsense=1"])
def test_an_unknown_argument_is_named(main, argument):
    with pytest.raises(ConfigError, match="nonsense"):
        main([argument])


@pytest.mark.parametrize("kind", [BenchSettings, LoadSettings, ServingSettings, StoreSettings, tiny.TinySettings])
def test_benchmarks_refuse_what_cannot_work(kind):
    assert describe(kind)
    for field in dataclasses.fields(kind):
        if field.type == "int":
            with pytest.raises(ConfigError, match=f"{field.name}=-1 must be at least"):
                load([f"{field.name}=-1"], kind)


def test_int8_is_measured_with_a_plug_and_data():
    for argument in ("plug=x", "data=x"):
        with pytest.raises(ConfigError, match="go together"):
            load([argument], StoreSettings)


@pytest.mark.parametrize(
    ("argument", "message"),
    [("shapes=[label, square]", "'square' is not one of label"), ("fit.step=1", "'step'"), ("splitt=dev", "'split'")],
)
def test_the_tiny_comparison_checks_all_settings_before_it_writes(tmp_path, argument, message):
    with pytest.raises(ConfigError, match=message):
        tiny.main([f"out={tmp_path / 'out'}", argument])
    assert not (tmp_path / "out").exists()
