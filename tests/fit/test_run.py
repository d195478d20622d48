import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from persona_plug.data import synthetic
from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData, prepare
from persona_plug.dataset import PlugDataset, score_outputs
from persona_plug.errors import ConfigError, DataError
from persona_plug.fit import run as fit_module
from persona_plug.fit.config import FitConfig
from persona_plug.fit.loop import calibrate, train
from persona_plug.fit.trainer import COMPLETE, PlugTrainer, last_checkpoint
from persona_plug.models.fingerprint import full_digest
from persona_plug.persistence import state_of

ROOT = Path(__file__).parents[2]
QUICK = {"steps": 4, "batch_size": 4, "eval_every": 2, "eval_samples": 8}
QUIET = {"dropout": 0.0, "history_dropout": 0.0, "empty_history": 0.0}


def labels(users=8, items=4, **options):
    made = synthetic.build("label", users=users, items_per_user=items, answers=3, **options)
    return prepare(
        made.records, samples="leave_one_out", held_out=0.25, valid=0.2, template="{input}", answers=list(made.answers)
    )


@pytest.fixture(scope="module")
def data():
    return labels()


def weights(plug):
    return {k: v.clone() for k, v in state_of(plug.parts()).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(log, key="loss"):
    return [row[key] for row in log if key in row]


def run(plug, data, folder, resume=False, **settings):
    """Train as `fit` does, without the report."""
    config = FitConfig.of({**QUICK, **settings})
    plug.seed = config.seed
    plug.reset(plug.config.replace(template=data.template, answers=data.answers))
    return train(plug, data, config, Path(folder), resume)


# --- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *((n, v) for n in ("steps", "batch_size", "gradient_accumulation", "eval_every", "patience") for v in (0, -1)),
        ("eval_samples", 0),
        *((n, v) for n in ("history_dropout", "dropout", "empty_history", "warmup") for v in (-0.1, 1.0, math.nan)),
        *(("lr", v) for v in (0.0, -1e-3, math.nan, math.inf)),
        *(("seed", v) for v in (-1, 2**32, 2**70, 0.5)),
        ("weight_decay", -0.1),
        ("token_weight", -0.1),
        *((n, v) for n in ("steps", "lr", "bf16") for v in ("x", None, [1])),
        *((n, v) for n, v in (("steps", 1.5), ("steps", True), ("lr", False), ("bf16", 1), ("report_to", 3))),
    ],
)
def test_a_setting_out_of_range_is_named(setting, value):
    with pytest.raises(ConfigError, match=f"^{setting}="):
        FitConfig(**{setting: value})


def test_an_unknown_setting_is_named_with_the_known_ones(make_plug, data):
    with pytest.raises(ConfigError, match=r"unknown setting 'learning_rate'; known are steps, .*lr, "):
        make_plug().fit(data, learning_rate=1.0)


def test_settings_that_cannot_work_stop_before_any_work(make_plug, data, tmp_path):
    with pytest.raises(ConfigError, match="batch_size"):
        make_plug().fit(data, output_dir=tmp_path / "run", batch_size=0)
    assert not (tmp_path / "run").exists()


def test_no_samples_is_an_error(make_plug, tmp_path):
    with pytest.raises(DataError, match="no samples"):
        run(make_plug(), FitData([], [], [], "{input}", None), tmp_path)


# --- the frozen parts


def test_llm_and_encoder_keep_every_byte(make_plug, data, tmp_path):
    plug = make_plug()
    before = full_digest(plug.llm), full_digest(plug.encoder.model)
    start = weights(plug)
    plug.fit(data, output_dir=tmp_path, **QUICK)
    assert (full_digest(plug.llm), full_digest(plug.encoder.model)) == before
    frozen = [*plug.llm.parameters(), *plug.encoder.model.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert not same(start, weights(plug))
    assert not any(m.training for m in plug.modules())


def test_checkpoints_hold_what_is_trained_alone(make_plug, data, tmp_path):
    plug = make_plug()
    run(plug, data, tmp_path)
    saved = load_file(last_checkpoint(tmp_path) / "model.safetensors")
    trained = {f"embedder.{k}" for k in plug.embedder.state_dict()} | {
        f"answers.{k}" for k in plug.answers.state_dict()
    }
    assert set(saved) == trained


def test_plain_generation_is_the_same_before_and_after(make_plug, data, tmp_path):
    plug = make_plug()
    before = plug.generate("the jazzy chorus", personal=False)
    run(plug, data, tmp_path, lr=0.1)
    assert plug.generate("the jazzy chorus", personal=False) == before


# --- what is learned


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-gpt2", "tiny-t5"])
def test_training_lowers_the_loss_on_labels(make_plug, data, tmp_path, llm, placement):
    plug = make_plug(llm, placement=placement, answer_head=False)  # the head is fitted before the first step
    log = run(plug, data, tmp_path, steps=12, eval_every=4, lr=0.01, **QUIET)
    assert min(losses(log, "eval_loss")[1:]) < losses(log, "eval_loss")[0]
    assert all(math.isfinite(x) for x in losses(log))


@pytest.mark.parametrize("placement", ["suffix", "prefix"])
@pytest.mark.parametrize("llm", ["tiny-llama", "tiny-t5"])
def test_free_text_is_learned_and_reported(make_plug, tmp_path, llm, placement):
    made = synthetic.build("style", users=6, items_per_user=4)
    plug = make_plug(llm, placement=placement, max_answer_tokens=16)
    report = plug.fit(made.records, output_dir=tmp_path, answers=None, held_out=0.3, lr=0.01, **QUICK | {"steps": 8})
    log = [json.loads(line) for line in (tmp_path / "plug" / "log.jsonl").read_text().splitlines()]
    evals = losses(log, "eval_loss")
    assert min(evals[1:]) < evals[0]
    assert set(report.metrics["plug"]) == {"nll", "rouge-1", "rouge-L", "chrf"}
    priors = {f"user_prior: {name}" for name in ("whole_request", "first_words", "nearest_own_output")}
    assert priors <= set(report.metrics)
    assert set(report.metrics["user_prior: first_words"]) == {"rouge-1", "rouge-L", "chrf"}
    assert report.examples == [] or set(report.examples[0]["weights"][0]) == {"input", "output", "weight"}
    assert report.metrics["plug"]["nll"].value < report.metrics["none"]["nll"].value


@pytest.mark.parametrize("recipe", ["default", "mean", "paper"])
def test_every_recipe_trains_all_of_its_parameters(make_plug, data, tmp_path, recipe):
    plug = make_plug(recipe=recipe)
    run(plug, data, tmp_path, steps=6, lr=0.01)
    start = dict(make_plug(recipe=recipe, answers=data.answers).embedder.named_parameters())
    learned = {n: p for n, p in plug.embedder.named_parameters() if p.numel() and p.requires_grad}
    assert [n for n, p in learned.items() if torch.equal(p, start[n])] == []


def test_fit_starts_over_each_time(make_plug, data, tmp_path):
    plug = make_plug()
    run(plug, data, tmp_path / "a")
    first = weights(plug)
    run(plug, data, tmp_path / "b")
    assert same(first, weights(plug))
    run(plug, data, tmp_path / "c", seed=1)
    assert not same(first, weights(plug))


def test_fit_prints_nothing(make_plug, data, tmp_path, capfd):
    make_plug().fit(data, output_dir=tmp_path, **QUICK)
    assert capfd.readouterr().out == ""


def test_the_temporary_folder_goes_away(make_plug, data, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    make_plug().fit(data, report=False, **QUICK)
    assert list(tmp_path.iterdir()) == []


# --- the log


def test_the_log_has_a_line_for_every_look(make_plug, data, tmp_path):
    run(make_plug(), data, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "eval_loss" in r] == [2, 4]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4]
    assert all(isinstance(r["loss"], float) for r in rows if "loss" in r)


# --- early stopping


@pytest.fixture
def scripted(monkeypatch):
    """`scripted(f)` makes the validation loss f(step)."""

    def script(curve):
        def step_loss(self, model, inputs, *_, **__):
            return torch.tensor(float(curve(self.state.global_step))), None, None

        monkeypatch.setattr(PlugTrainer, "prediction_step", step_loss)

    return script


def test_early_stopping_brings_back_the_best(make_plug, data, tmp_path, scripted):
    scripted(lambda step: abs(step - 4))
    plug = make_plug()
    log = run(plug, data, tmp_path, steps=40, patience=2, lr=0.01)
    assert max(r["step"] for r in log if "eval_loss" in r) == 8
    best = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    final = plug.embedder.state_dict()
    del final["score_temperature"]  # calibrated afterwards
    assert all(torch.equal(v, best[f"embedder.{k}"]) for k, v in final.items())
    assert not all(torch.equal(v, last[f"embedder.{k}"]) for k, v in final.items())


def test_patience_counts_on_after_an_interruption(make_plug, data, tmp_path, scripted):
    scripted(lambda step: step)  # best at the first look
    settings = {"steps": 40, "patience": 3}
    whole = run(make_plug(), data, tmp_path / "whole", **settings)
    assert max(r["step"] for r in whole) == 8
    with stop_at(7):
        run(make_plug(), data, tmp_path / "cut", **settings)
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-6"
    resumed = run(make_plug(), data, tmp_path / "cut", resume=True, **settings)
    assert max(r["step"] for r in resumed) == 8


class Stopped(Exception):
    pass


@contextmanager
def stop_at(step):
    """Interrupt training during the given step."""
    real = PlugTrainer.compute_loss

    def loss(trainer, model, inputs, *args, **kwargs):
        if model.training and trainer.state.global_step == step - 1:
            raise Stopped
        return real(trainer, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlugTrainer, "compute_loss", loss)
        with pytest.raises(Stopped):
            yield


# --- batch size and accumulation


def equal_batches(answers):
    """48 training samples, so that batches of 8 and of 4 end together."""
    return [
        Example(f"u{u}", f"request {u} {i}", answers[(u * i) % len(answers)], (HistoryItem(f"x {u}", answers[u % 2]),))
        for u in range(8)
        for i in range(6)
    ]


@pytest.mark.parametrize(
    ("answers", "known", "tolerance"),
    [
        (("one", "two", "six"), True, 1e-4),  # float32 sums in another order
        # Answers of different lengths: the token loss is a mean over the tokens of a micro-batch.
        (("a", "some words"), False, 0.35),
    ],
    ids=["labels", "free text"],
)
def test_batch_8_is_batch_4_accumulated_twice(make_plug, tmp_path, answers, known, tolerance):
    rows = equal_batches(answers)
    data = FitData(rows, rows[:6], [], "{input}", answers if known else None)
    settings = QUIET | {"steps": 12, "eval_every": 4}
    whole = losses(run(make_plug(), data, tmp_path / "8", **settings, batch_size=8))
    parts = losses(run(make_plug(), data, tmp_path / "4x2", **settings, batch_size=4, gradient_accumulation=2))
    assert len(whole) == len(parts) == 12
    residual = torch.tensor(whole) - torch.tensor(parts)
    assert residual.abs().max() < tolerance
    assert residual.mean().abs() < tolerance / 4  # a drift to one side would be a wrong scale
    assert abs(whole[0] - whole[-1]) > 10 * residual.mean().abs()


def test_the_first_gradient_does_not_depend_on_how_a_batch_is_split(make_plug, tmp_path):
    rows = equal_batches(("one", "two", "six"))
    data = FitData(rows, rows[:6], [], "{input}", ("one", "two", "six"))
    norms = []
    for size, times in ((8, 1), (4, 2), (2, 4)):
        log = run(
            make_plug(), data, tmp_path / str(size), **QUIET, steps=2, eval_every=2, batch_size=size,
            gradient_accumulation=times,
        )  # fmt: skip
        norms.append(losses(log, "grad_norm")[0])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


# --- calibration


def test_calibration_lowers_the_validation_nll_to_its_least(make_plug, data):
    plug = make_plug(differ=True, answers=data.answers)
    samples = data.valid + data.train
    scores = score_outputs(plug, samples)
    gold = torch.tensor([data.answers.index(e.output) for e in samples])

    def nll(t):
        return float(torch.nn.functional.cross_entropy(scores / t, gold))

    found, helps = calibrate(plug, samples)
    assert float(plug.embedder.score_temperature) == pytest.approx(found)
    assert helps == bool(plug.answers.llm_share)
    assert nll(found) < nll(1.0) - 1e-3
    assert nll(found) <= min(nll(1.03**i) for i in range(-70, 71) if 0.1 <= 1.03**i <= 10) + 1e-3


def test_calibration_happens_in_fit_and_is_saved(make_plug, data, tmp_path):
    plug = make_plug()
    run(plug, data, tmp_path / "run")
    temperature = float(plug.embedder.score_temperature)
    assert temperature != 1.0
    plug.save_pretrained(tmp_path / "plug")
    assert float(load_file(tmp_path / "plug" / "model.safetensors")["score_temperature"]) == temperature


# --- interruption


SCRIPT = """
import json, sys, time
from pathlib import Path
from persona_plug import PersonaPlug
from persona_plug.fit.trainer import PlugTrainer
from tests.fit.test_run import SETTINGS, labels, run
if sys.argv[2] == "slow":  # so that there is time to kill it; changes no number
    real = PlugTrainer.compute_loss
    def loss(*args, **kwargs):
        time.sleep(0.05)
        return real(*args, **kwargs)
    PlugTrainer.compute_loss = loss
plug = PersonaPlug.build("tiny-llama", "tiny-encoder", key_dim=16, projector_hidden=32)
folder = Path(sys.argv[1])
log = run(plug, labels(), folder, **SETTINGS)
plug.save_pretrained(folder / "final")
(folder / "losses.json").write_text(json.dumps([r for r in log if "loss" in r or "eval_loss" in r]))
"""
# 16 training samples: an epoch is 4 steps, so that runs are cut within and between epochs. Dropout, history dropout and
# empty histories are on; the run never stops early.
SETTINGS = {"steps": 30, "batch_size": 4, "eval_every": 3, "patience": 99, "lr": 3e-3, "eval_samples": 8}


@pytest.fixture
def start(tmp_path):
    """`start(folder, speed, seed)` begins a training process; all that still run are killed at the end."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    begun = []

    def start(folder, speed="fast", hash_seed="0"):
        folder.mkdir()
        command = [sys.executable, str(script), str(folder), speed]
        env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"}
        with (folder / "output").open("wb") as out:
            begun.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def wait_for(condition, process, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended before it could be killed"
        assert time.monotonic() < until, "nothing happened in time"
        time.sleep(0.01)


def finish(process, folder):
    assert process.wait(timeout=300) == 0, (folder / "output").read_text()[-2000:]
    return json.loads((folder / "losses.json").read_text()), load_file(folder / "final" / "model.safetensors")


@pytest.mark.slow
def test_processes_agree_and_a_killed_run_goes_on_as_if_nothing_had_happened(start, tmp_path):
    one, two, killed = tmp_path / "one", tmp_path / "two", tmp_path / "killed"
    running = start(one, hash_seed="1")
    victim = start(killed, "slow", hash_seed="3")
    wait_for(lambda: list(killed.glob(f"checkpoint-*/{COMPLETE}")), victim)
    delay = random.SystemRandom().uniform(0, 1.0)
    time.sleep(delay)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    assert not (killed / "final").exists()
    log, final = finish(running, one)

    # same seed, same result, whatever the hash seed
    again, final_again = finish(start(two, hash_seed="2"), two)
    assert [{k: r[k] for k in ("step", "loss", "eval_loss") if k in r} for r in log] == [
        {k: r[k] for k in ("step", "loss", "eval_loss") if k in r} for r in again
    ]
    assert same(final, final_again)

    # killed, then resumed: bit by bit the uninterrupted run
    from persona_plug import PersonaPlug

    at = last_checkpoint(killed).name
    plug = PersonaPlug.build("tiny-llama", "tiny-encoder", key_dim=16, projector_hidden=32)
    resumed = run(plug, labels(), killed, resume=True, **SETTINGS)
    assert same(final, weights(plug)), f"killed {delay:.2f} s after the first checkpoint, resumed from {at}"
    assert losses(resumed, "eval_loss") == losses(log, "eval_loss")


def test_a_half_written_checkpoint_is_ignored(make_plug, data, tmp_path):
    settings = SETTINGS | {"steps": 10}
    plug = make_plug()
    run(plug, data, tmp_path / "whole", **settings)
    with stop_at(9):
        run(make_plug(), data, tmp_path / "cut", **settings)
    newest = last_checkpoint(tmp_path / "cut")
    assert newest.name == "checkpoint-6"
    (newest / COMPLETE).unlink()
    with (newest / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    assert last_checkpoint(tmp_path / "cut").name == "checkpoint-3"
    resumed = make_plug()
    run(resumed, data, tmp_path / "cut", resume=True, **settings)
    assert same(weights(plug), weights(resumed))


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_resuming_at_any_step_gives_the_same_weights(make_plug, data, tmp_path, step, monkeypatch):
    """Before the first checkpoint, within an epoch and at its border."""
    ticks = itertools.count()
    monkeypatch.setattr("persona_plug.fit.trainer.clock", lambda _: float(next(ticks)))  # a step takes a second
    settings = SETTINGS | {"steps": 8}
    plug, resumed = make_plug(), make_plug()
    run(plug, data, tmp_path / "whole", **settings)
    with stop_at(step):
        run(make_plug(), data, tmp_path / "cut", **settings)
    run(resumed, data, tmp_path / "cut", resume=True, **settings)
    assert same(weights(plug), weights(resumed))
    whole, cut = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "cut")
    )
    assert [r["step"] for r in cut] == [r["step"] for r in whole]
    # Steps that are made twice count once.
    assert [r["seconds"] for r in cut] == pytest.approx([r["seconds"] for r in whole], abs=0.9)


def test_resuming_a_finished_run_changes_nothing(make_plug, data, tmp_path):
    plug, again = make_plug(), make_plug()
    run(plug, data, tmp_path, **SETTINGS | {"steps": 6})
    run(again, data, tmp_path, resume=True, **SETTINGS | {"steps": 6})
    assert same(weights(plug), weights(again))


def test_a_checkpoint_being_deleted_is_not_resumed_from(make_plug, data, tmp_path):
    """The oldest checkpoints are removed while the newest has no mark yet; a kill in between leaves a torso."""
    settings = SETTINGS | {"steps": 12}
    plug, resumed = make_plug(), make_plug()
    run(plug, data, tmp_path / "whole", **settings)
    real = shutil.rmtree

    def killed_while_deleting(path, *args, **kwargs):
        if "checkpoint-" in Path(path).name:
            (Path(path) / "model.safetensors").unlink()
            raise Stopped
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed_while_deleting)
        with pytest.raises(Stopped):
            run(make_plug(), data, tmp_path / "cut", **settings)
    chosen = last_checkpoint(tmp_path / "cut")
    assert chosen is None or (chosen / "model.safetensors").is_file()
    run(resumed, data, tmp_path / "cut", resume=True, **settings)
    assert same(weights(plug), weights(resumed))


def test_a_new_run_in_an_old_folder_does_not_mix_with_it(make_plug, data, tmp_path):
    settings = SETTINGS | {"steps": 8}
    plug, mixed = make_plug(), make_plug()
    run(plug, data, tmp_path / "clean", **settings, seed=1)
    run(make_plug(), data, tmp_path / "used", **SETTINGS | {"steps": 12}, seed=0)
    with stop_at(5):
        run(make_plug(), data, tmp_path / "used", **settings, seed=1)
    run(mixed, data, tmp_path / "used", resume=True, **settings, seed=1)
    assert same(weights(plug), weights(mixed))
    rows = [json.loads(line) for line in (tmp_path / "used" / "log.jsonl").read_text().splitlines()]
    assert max(r["step"] for r in rows) == 8


def test_fit_resumes_plug_and_task_prompt(make_plug, data, tmp_path):
    whole = make_plug()
    report = whole.fit(data, output_dir=tmp_path / "whole", **QUICK)
    for when in ("plug", "task_prompt"):
        folder = tmp_path / when
        with pytest.MonkeyPatch.context() as patch:
            real = fit_module.train

            def interrupted(plug, data, config, into, *rest, real=real, when=when):
                if Path(into).name != when:
                    return real(plug, data, config, into, *rest)
                with stop_at(4):
                    real(plug, data, config, into, *rest)
                raise Stopped  # as the interrupted process would

            patch.setattr(fit_module, "train", interrupted)
            with pytest.raises(Stopped):
                make_plug().fit(data, output_dir=folder, **QUICK)
        plug = make_plug()
        resumed = plug.fit(data, output_dir=folder, resume=True, **QUICK)
        assert same(weights(whole), weights(plug))
        assert resumed.metrics == report.metrics


# --- small parts


def test_fit_config_fields_are_settings():
    values = dataclasses.asdict(FitConfig())
    assert FitConfig.of(values) == FitConfig()


def test_held_out_questions_are_capped_and_this_is_noted(make_plug, data, tmp_path):
    report = make_plug().fit(data, output_dir=tmp_path, report_samples=5, **QUICK)
    assert report.n == 5
    assert any(f"{len(data.held_out) - 5} held-out questions left out" in n for n in report.notes)


def test_data_of_the_caller_stays_as_it_is(make_plug, data, tmp_path):
    before = dataclasses.replace(data, notes=list(data.notes))
    make_plug().fit(data, output_dir=tmp_path, report_samples=5, **QUICK)
    assert data == before


def test_a_tracker_that_is_not_installed_is_named(make_plug, people):
    data = [Example(f"u{i}", f"rate {i}", "5", tuple(people.bob), str(i)) for i in range(6)]
    with pytest.raises(ConfigError, match=r"report_to='comet_ml': .*installed"):
        make_plug().fit(data, report=False, steps=1, batch_size=2, eval_every=1, report_to="comet_ml")


# --- adapters, turns, and no training at all


def grown(plug):
    """Whether LoRA's second matrices, which start as zeros, have moved."""
    return all(
        bool(p.abs().sum() > 0) for name, p in zip(plug.adapters.names, plug.adapters, strict=True) if "_B" in name
    )


def test_adapters_are_trained_beside_the_soft_tokens(make_plug, data, tmp_path):
    plug = make_plug()
    before = full_digest(plug.plain_splicer.llm)
    report = plug.fit(data, output_dir=tmp_path, lora=2, **QUICK)
    assert plug.config.lora == 2
    assert grown(plug)
    assert not same(weights(plug), weights(make_plug(answers=data.answers, seed=0)))
    assert full_digest(plug.plain_splicer.llm) == before
    assert {"none", "task_prompt", "plug", "plug_shuffled"} <= set(report.metrics)
    plug.fit(data, lora=0, report=False, **QUICK)
    assert plug.adapters is None


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_adapters_are_trained_on_a_quantised_llm(data, kind):
    pytest.importorskip("bitsandbytes")
    from persona_plug import PersonaPlug

    small = {"key_dim": 16, "projector_hidden": 32, "max_input_tokens": 64, "max_answer_tokens": 16}
    plug = PersonaPlug.build("tiny-llama", "tiny-encoder", quantization=kind, dtype="bfloat16", device="cpu", **small)
    before = full_digest(plug.llm)
    plug.fit(data, lora=2, report=False, **QUICK)
    assert grown(plug)
    assert full_digest(plug.plain_splicer.llm) == before


def test_a_training_with_adapters_goes_on_bit_by_bit(make_plug, data, tmp_path):
    def state(plug):
        return {**weights(plug), **plug.adapters.state_dict()}

    whole, parts = make_plug(lora=2), make_plug(lora=2)
    run(whole, data, tmp_path / "whole", **QUIET)
    run(parts, data, tmp_path / "parts", **QUIET)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-4")
    run(parts, data, tmp_path / "parts", resume=True, **QUIET)
    assert same(state(whole), state(parts))


@pytest.mark.parametrize("lora", [0, 2])
def test_turns_stand_in_the_prompts_of_a_training(make_plug, data, monkeypatch, lora):
    seen = []
    usual = PlugDataset.__init__

    def look(self, plug, examples):
        usual(self, plug, examples)
        seen.append((plug.config.retrieve, max(len(p.left) for p in self.parts)))

    monkeypatch.setattr(PlugDataset, "__init__", look)
    plug = make_plug()
    report = plug.fit(data, retrieve=2, lora=lora, **QUICK)
    assert plug.config.retrieve == 2
    assert seen[0][0] == 2
    assert seen[0][1] > max(length for retrieve, length in seen if not retrieve)
    assert {"turns", "task_prompt"} <= set(report.metrics)
    assert report.tokens["plug"] > report.tokens["turns"] > report.tokens["none"] == 0


@pytest.mark.parametrize("kind", ["label", "text"])
def test_without_any_training_a_plug_is_its_turns(make_plug, tmp_path, monkeypatch, kind):
    from persona_plug import PersonaPlug

    made = labels() if kind == "label" else prepare(
        synthetic.build("style", users=8, items_per_user=4).records, samples="leave_one_out", held_out=0.25, valid=0.2
    )  # fmt: skip
    monkeypatch.setattr(fit_module, "train", lambda *_, **__: pytest.fail("trained"))
    plug = make_plug(words=True)
    report = plug.fit(made, adapt="none", retrieve=2, generated=2, output_dir=tmp_path / "run")
    assert (plug.config.soft_tokens, plug.config.lora, plug.config.retrieve) == (0, 0, 2)
    assert not list(plug.parameters())
    assert plug.words is None
    assert {"none", "plug", "plug_shuffled"} <= set(report.metrics)
    assert "task_prompt" not in report.metrics
    assert not (tmp_path / "run" / "loss.png").exists()
    assert report.metrics["plug"]["nll"].value != report.metrics["plug_shuffled"]["nll"].value
    assert report.tokens["plug"] > 0
    again = PersonaPlug.from_pretrained(plug.save_pretrained(tmp_path / "plug"), device="cpu")
    some = made.held_out[:3]
    said = list(made.answers or ("a", "b"))
    torch.testing.assert_close(again.score(some, said), plug.score(some, said), atol=1e-4, rtol=1e-4)
    assert again.generate(some, max_new_tokens=4) == plug.generate(some, max_new_tokens=4)
    assert (float(plug.embedder.score_temperature) != 1) == (kind == "label")


@pytest.mark.parametrize(
    ("settings", "asked", "say"),
    [
        ({}, {"adapt": "none"}, r"retrieve=4"),
        ({}, {"adapt": "none", "retrieve": 2, "lora": 4}, r"lora=4 is trained"),
        ({"lora": 2}, {"adapt": "none", "retrieve": 2}, r"lora=2 is trained"),
        ({}, {"adapt": "everything"}, r"adapt='everything' is not one of train, none"),
        ({}, {"lora": -1}, r"lora=-1 must not be negative"),
        ({}, {"retrieve": 1.5}, r"retrieve=1.5 must be of type int"),
        ({"user_tokens": 0, "task_tokens": 0, "retrieve": 2}, {}, r"nothing to train.*adapt='none'"),
    ],
)
def test_what_cannot_be_adapted_so_is_said_before_any_training(make_plug, data, monkeypatch, settings, asked, say):
    texts = dataclasses.replace(data, answers=None)
    monkeypatch.setattr(fit_module, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=say):
        make_plug(**settings).fit(texts, **asked, **QUICK)
