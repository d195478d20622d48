"""Several processes train the plug that one process trains with all their rows."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eval import tiny
from persona_plug.fit.trainer import COMPLETE, is_whole, last_checkpoint
from training import run

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "accelerate"
QUIET = {"dropout": 0.0, "history_dropout": 0.0, "empty_history": 0.0}
PARTS = ["llm=tiny-llama", "encoder=tiny-encoder", "valid=0.25"]


def words(data, task, out, recipes=("plug",), **fit):
    settings = {"data": data, "task": task, "out": out, "recipes": list(recipes), "fit": fit}
    return PARTS + [f"{k}={v if isinstance(v, Path) else json.dumps(v)}" for k, v in settings.items()]


def launch(*arguments, config=CONFIGS / "cpu2.yaml"):
    """Run `training.run` under accelerate and return what its processes printed."""
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    done = subprocess.run(
        [*map(str, start), "-m", "training.run", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def log(out, recipe="plug"):
    lines = (out / "seed-0" / "fitted" / recipe / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def weights(out, recipe="plug"):
    return load_file(out / "seed-0" / "fitted" / recipe / "fitted.safetensors")


def assert_losses_alike(one, two, recipe="plug"):
    """They differ by rounding only: sums over rows are taken in two parts instead of one."""
    for key in ("loss", "eval_loss"):
        curves = [[(r["step"], r[key]) for r in log(out, recipe) if key in r] for out in (one, two)]
        assert [s for s, _ in curves[0]] == [s for s, _ in curves[1]]
        assert [v for _, v in curves[1]] == pytest.approx([v for _, v in curves[0]], rel=1e-5)


def assert_alike(one, two, recipe):
    assert_losses_alike(one, two, recipe)
    a, b = weights(one, recipe), weights(two, recipe)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-5), name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for shape in ("label", "own_text"):
        tiny.write(folder / shape, shape, 32, personal=True)
    return folder


@pytest.mark.slow
def test_two_processes_train_what_one_does_for_labels(data, tmp_path):
    task, both = tiny.SHAPES["label"][0], {"steps": 6, "eval_every": 3, **QUIET}
    recipes = ["plug", "uem"]  # uem leaves some numbers without a gradient
    run.main(words(data / "label", task, tmp_path / "one", recipes, batch_size=8, **both))
    printed = launch(*words(data / "label", task, tmp_path / "two", recipes, batch_size=4, **both))
    for recipe in recipes:
        assert_alike(tmp_path / "one", tmp_path / "two", recipe)
    assert printed.count("plug, seed 0: 6 steps") == 1  # the main process alone speaks and writes
    assert len(log(tmp_path / "two")) == len(log(tmp_path / "one"))
    assert (tmp_path / "two" / "plug-0" / "model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_count_tokens_and_stop_as_one_does_for_texts(data, tmp_path):
    """Answers of different lengths: the token loss is divided by the tokens of all rows, not of a process's own."""
    task, both = tiny.SHAPES["own_text"][0], {"steps": 20, "eval_every": 1, "patience": 1, "lr": 5.0, **QUIET}
    alone = "plug={words: false}"  # such a rate leaves nothing to fit a memory to
    run.main([*words(data / "own_text", task, tmp_path / "one", batch_size=8, **both), alone])
    launch(*words(data / "own_text", task, tmp_path / "two", batch_size=4, **both), alone)
    assert 1 < log(tmp_path / "one")[-1]["step"] < 20  # such a learning rate is soon worse than before
    assert_losses_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on_bit_by_bit(data, tmp_path):
    task = tiny.SHAPES["label"][0]
    settings = words(data / "label", task, tmp_path, batch_size=4, steps=4, eval_every=2)  # with all dropout
    launch(*settings)
    folder = tmp_path / "seed-0" / "fitted" / "plug"
    draws = [torch.load(folder / "checkpoint-4" / f"rng_state_{i}.pth", weights_only=False)["cpu"] for i in (0, 1)]
    assert not torch.equal(*draws)  # each process draws its own
    before = weights(tmp_path)
    shutil.rmtree(folder / "checkpoint-4")
    for name in ("fitted.safetensors", "fitted.json"):
        (folder / name).unlink()
    assert last_checkpoint(folder).name == "checkpoint-2"
    launch(*settings)
    after = weights(tmp_path)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [r["step"] for r in log(tmp_path) if "eval_loss" in r][-1] == 4


def test_a_checkpoint_of_several_processes_is_whole_with_all_their_draws(tmp_path):
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state_0.pth"):
        (tmp_path / name).touch()
    (tmp_path / COMPLETE).write_text("2\n")
    assert not is_whole(tmp_path)
    (tmp_path / "rng_state_1.pth").touch()
    assert is_whole(tmp_path)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_every_config(config):
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(config)).to_dict()
    written = yaml.safe_load(config.read_text())
    assert {k: read[k] for k in ("num_processes", "mixed_precision")} == {
        k: written[k] for k in ("num_processes", "mixed_precision")
    }
