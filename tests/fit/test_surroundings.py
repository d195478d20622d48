"""A training leaves the caller's world as it was, and says in one line what around it is wrong."""

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from persona_plug.errors import ConfigError, PersonaPlugError
from persona_plug.fit.surroundings import check_launcher, room_on_disk
from persona_plug.fit.trainer import PlugTrainer, last_checkpoint
from persona_plug.persistence import state_of
from tests.fit.test_run import QUICK, labels, run, same, weights

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data():
    return labels()


# --- variables of a launcher

LEFT = {
    "torchrun": {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"},
    "sizes alone": {"WORLD_SIZE": "4"},
    "local rank": {"LOCAL_RANK": "0"},
    "PMI": {"PMI_SIZE": "2", "PMI_RANK": "1"},
    "Open MPI": {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3"},
    "MVAPICH": {"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "0"},
    "no number": {"WORLD_SIZE": "two"},
}


@pytest.mark.parametrize("left", LEFT)
def test_variables_that_are_left_over_are_named_with_the_way_on(make_plug, data, monkeypatch, left):
    for name, value in LEFT[left].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refusal:
        make_plug().fit(data, **QUICK)
    said = str(refusal.value)
    assert all(f"{name}=" in said or name in said.partition("`unset ")[2] for name in LEFT[left])
    assert "accelerate launch" in said
    assert "\n" not in said


@pytest.mark.parametrize("left", [{}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "4", "MASTER_PORT": "1"}])
def test_a_single_process_goes_on(monkeypatch, left):
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    check_launcher()


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"])
def test_a_launcher_at_work_is_let_through(monkeypatch, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "no")
    check_launcher()


@pytest.mark.parametrize("left", ["torchrun", "PMI"])
def test_the_command_line_says_it_in_one_line(tmp_path, left):
    events = tmp_path / "e.csv"
    events.write_text("\n".join(["user_id,input,output", *(f"u{n % 6},q {n},{'ab'[n % 2]}" for n in range(36))]))
    command = [sys.executable, "-m", "persona_plug", "fit", events, "--out", tmp_path / "o", "--llm", "tiny-llama"]
    done = subprocess.run(
        [*map(str, command), "--encoder", "tiny-encoder", "--steps", "1"],
        cwd=ROOT, env=os.environ | LEFT[left], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "unset" in errors[0]
    assert "Traceback" not in done.stderr


# --- the caller's random numbers and modes


def drawn():
    return random.random(), float(np.random.rand()), float(torch.rand(1))  # noqa: NPY002, S311


def test_the_callers_random_numbers_go_on(make_plug, data):
    plug = make_plug()

    def seeded():
        random.seed(11)
        np.random.seed(11)  # noqa: NPY002
        torch.manual_seed(11)

    seeded()
    expected = drawn()
    seeded()
    plug.fit(data, **QUICK)
    assert drawn() == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)])
def test_a_mode_around_fit_changes_nothing(make_plug, data, tmp_path, mode):
    one, two = make_plug(), make_plug()
    run(one, data, tmp_path / "one")
    with mode():
        report = two.fit(data, output_dir=tmp_path / "two", report=False, **QUICK)
    assert same(weights(one), weights(two))
    assert report.details["steps_done"] == 4


CASTS = {
    "half": lambda plug: plug.half(),
    "double": lambda plug: plug.double(),
    "bfloat16": lambda plug: plug.bfloat16(),
    "to a dtype": lambda plug: plug.to(torch.float16),
    "to a device": lambda plug: plug.to("meta"),
    "to both": lambda plug: plug.to("cpu", torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_plug_stays_float32_where_its_llm_is(make_plug, cast):
    plug = make_plug()
    with pytest.raises(ConfigError, match="build"):
        CASTS[cast](plug)
    assert {p.dtype for p in plug.parameters()} == {torch.float32}
    plug.choose("a request", ["a", "b"])


def test_what_casts_nothing_is_allowed(make_plug):
    plug = make_plug()
    assert plug.float().cpu().to("cpu") is plug


def test_a_default_dtype_of_the_caller_is_not_taken_over(make_plug, data, tmp_path):
    one = make_plug()
    run(one, data, tmp_path / "one")
    torch.set_default_dtype(torch.float64)
    try:
        two = make_plug()
        two.fit(data, output_dir=tmp_path / "two", report=False, **QUICK)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in state_of(two.parts()).values() if t.is_floating_point()} == {torch.float32}


# --- a full disk


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/3"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 13120 vs 13012"),
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["system", "quota", "torch", "torch at the end", "safetensors"],
)
def test_a_full_disk_at_a_checkpoint_is_one_line(make_plug, data, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(PlugTrainer, "_save_checkpoint", fail)
    with pytest.raises(PersonaPlugError, match="make room there, then resume") as refusal:
        make_plug().fit(data, output_dir=tmp_path, report=False, **QUICK)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert last_checkpoint(tmp_path / "plug") is None


def test_other_errors_pass(tmp_path):
    with pytest.raises(KeyError), room_on_disk(tmp_path):
        raise KeyError("x")
    with pytest.raises(ConfigError, match="mine"), room_on_disk(tmp_path):
        raise ConfigError("mine: No space left")
