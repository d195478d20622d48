"""`persona-plug fit` as people expect it: every setting, one's own columns, and nothing lost."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from safetensors.torch import load_file

from persona_plug.cli import app
from persona_plug.cli.fit import OURS
from persona_plug.config import SETTABLE
from persona_plug.fit.config import FitConfig
from persona_plug.plug import PersonaPlug
from tests.cli.test_main import TINY, fails, run

ROOT = Path(__file__).parents[2]
QUICK = ["--steps", 2, "--eval-every", 1, "--batch-size", 4]
COLUMNS = ["--columns", "user_id=agent,input=question,output=reply"]


def rows(reply):
    return [(f"agent {n % 8}", f"question {n} of agent {n % 8}", reply(n)) for n in range(48)]


def write_csv(path, reply):
    path.write_text("\n".join(["agent;question;reply", *(";".join(row) for row in rows(reply))]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("csv") / "tickets.csv", lambda n: ("good", "bad", "ugly")[n % 3])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("csv") / "replies.csv", lambda n: f"Dear {n}, greetings number {n}")


@pytest.fixture(scope="module")
def fitted(labels, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "plug"
    return out, run("fit", labels, "--out", out, *TINY, *QUICK, *COLUMNS)


# --- settings


def options(*words):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return {flag: param for param in command.params for flag in param.opts}


@pytest.mark.parametrize("name", [*SETTABLE, *(f.name for f in dataclasses.fields(FitConfig))])
def test_every_setting_is_an_option_with_its_meaning_and_default(name):
    option = options("fit")[f"--{name.replace('_', '-')}"]
    assert len(option.help) > 10
    assert option.default is not None or option.help.endswith("]")


def test_settings_of_every_kind_reach_plug_and_training(labels, tmp_path):
    given = {
        "heads": 1, "key_dim": 8, "user_tokens": 2, "max_history": 3, "item_outputs": False, "fixed_scale": 2.5,
        "aggregator": "mean", "task_tokens": 3, "words": False, "template_day": "2024-05-02",
        "patience": 2, "weight_decay": 0.3, "history_dropout": 0.1, "bf16": False, "seed": 3, "eval_samples": 5,
    }  # fmt: skip
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    words += ["--chat-template-args", '{"enable_thinking": false}']
    run("fit", labels, "--out", tmp_path / "p", *TINY, *QUICK, *COLUMNS, *words, "--no-report")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    config |= json.loads((tmp_path / "p" / "fit_report.json").read_text())["details"]["fit"]
    assert {name: config[name] for name in given} == given
    assert config["chat_template_args"] == {"enable_thinking": False}


def test_labels_may_be_texts(labels, tmp_path):
    run("fit", labels, "--out", tmp_path / "p", *TINY, *QUICK, *COLUMNS, "--free-text", "--no-words", "--no-report")
    assert json.loads((tmp_path / "p" / "config.json").read_text())["answers"] is None
    fails("fit", labels, "--out", tmp_path / "q", *TINY, "--free-text", "--answer", "a", say="exclude each other")


@pytest.mark.parametrize(
    ("words", "suggested"),
    [
        (["fit", "x", "--out", "y", "--stepss", 3], "--steps"),
        (["fit", "x", "--out", "y", "--user-token", 3], "--user-tokens"),
        (["fti"], "fit"),
        (["users", "ad"], "add"),
        (["data", "chek"], "check"),
    ],
    ids=str,
)
def test_a_wrong_word_suggests_the_right_one(words, suggested):
    assert suggested in run(*words, code=2).stderr


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda plug, data: plug.fit(data, task_tokens=4), "task_tokens is a setting of the plug.*PersonaPlug.build"),
        (lambda plug, data: plug.fit(data, placement="prefix"), "placement is a setting of the plug"),
        (lambda plug, data: plug.fit(data, heldout=0.5), "unknown setting 'heldout', did you mean 'held_out'"),
        (lambda plug, data: plug.fit(data, batchsize=5), "did you mean 'batch_size'"),
        (lambda plug, data: PersonaPlug.build("tiny-llama", "tiny-encoder", steps=5), "steps is a setting of training"),
        (lambda plug, data: PersonaPlug.build("tiny-llama", "tiny-encoder", head=5), "did you mean 'heads'"),
    ],
    ids=range(6),
)
def test_a_wrong_setting_says_where_it_belongs(make_plug, labels, call, named):
    from persona_plug.errors import ConfigError

    with pytest.raises(ConfigError, match=named):
        call(make_plug(), labels)


# --- own column names, everywhere


def test_columns_and_a_label_plug(fitted, labels, tmp_path):
    out, result = fitted
    assert "Knows the user:" in result.stdout
    whose = ["--history", labels, *COLUMNS, "--user", "agent 3"]
    probabilities = json.loads(run("score", out, "what now", *whose, "--json").stdout)
    assert set(probabilities) == {"good", "bad", "ugly"}
    best = max(probabilities, key=probabilities.get)
    assert run("generate", out, "what now", *whose).stdout == f"{best}\n"
    assert run("generate", out, "what now", *whose, "--stream", "--max-new-tokens", 1).stdout == f"{best}\n"
    details = json.loads(run("generate", out, "what now", *whose, "--json").stdout)
    assert details["text"] == best
    assert len(details["weights"]) == 6
    run(
        "export",
        out,
        "--out",
        tmp_path / "e",
        "--input",
        "what now",
        "--history",
        labels,
        *COLUMNS,
        "--user",
        "agent 3",
    )
    url = f"sqlite:///{tmp_path}/u.db"
    added = run("users", "add", labels, "--store", url, "--encoder", "tiny-encoder", *COLUMNS, "--keep-text", "--json")
    assert json.loads(added.stdout)["new"] == 48
    stored = run("generate", out, "what now", "--store", url, "--user", "agent 3").stdout
    assert stored == f"{best}\n"
    assert json.loads(run("data", "check", labels, *COLUMNS, "--json").stdout)["users"] == 8


def test_a_wrong_user_or_column_suggests_the_right_one(fitted, labels):
    out, _ = fitted
    whose = ["--history", labels, *COLUMNS]
    fails("generate", out, "x", *whose, "--user", "Agent 3", say="no user 'Agent 3', did you mean 'agent 3'?")
    fails("score", out, "x", "--history", labels, "--columns", "user_id=agnt", say="did you mean 'agent'?")
    fails("score", out, "x", "--history", labels, "--columns", "user-id=agent", say="did you mean 'user_id'?")
    fails("generate", out, "x", "--user", "agent 3", say="give --history FILE, or --store URL")


# --- a folder that is there


@pytest.mark.parametrize("name", OURS)
def test_what_is_there_is_not_written_over(labels, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    if "." in name:
        (out / name).write_text("precious")
    else:
        (out / name).mkdir()
    fails("fit", labels, "--out", out, *TINY, *COLUMNS, say=[f"holds {name} already", "--resume", "--force", "--out"])
    assert [path.name for path in out.iterdir()] == [name]
    assert (out / name).is_dir() or (out / name).read_text() == "precious"


def test_other_files_may_be_there(labels, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    run("fit", labels, "--out", tmp_path, *TINY, *QUICK, *COLUMNS, "--no-report")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def weights(folder):
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_force_replaces_and_resume_reads_back(fitted, labels, tmp_path):
    out = tmp_path / "plug"
    shutil.copytree(fitted[0], out)
    before = weights(out)
    common = ["fit", labels, "--out", out, *TINY, *QUICK, *COLUMNS]
    fails(*common, "--resume", "--force", say="one of them")
    again = run(*common, "--resume")
    assert weights(out) == before
    assert again.stdout.replace(str(out), "") == fitted[1].stdout.replace(str(fitted[0]), "")
    fails(*common, "--resume", "--seed", 5, say=["seed 0 there, 5 here"])
    assert weights(out) == before
    (out / "fit_examples.md").write_text("texts of the users before")
    run(*common, "--force", "--seed", 5, "--no-report")
    assert weights(out) != before
    assert not (out / "fit_examples.md").exists()


def test_a_plug_without_a_run_is_not_resumed(make_plug, labels, tmp_path):
    make_plug().save_pretrained(tmp_path / "p")
    fails("fit", labels, "--out", tmp_path / "p", *TINY, *COLUMNS, "--resume", say="no run to go on with")


def test_texts_are_kept_on_request(texts, tmp_path):
    common = [*TINY, *QUICK, *COLUMNS, "--no-words", "--max-answer-tokens", 8, "--generated", 2, "--held-out", 0.4]
    shown = run("fit", texts, "--out", tmp_path / "a", *common).stdout
    assert "greetings" in shown
    assert not (tmp_path / "a" / "fit_examples.md").exists()
    printed = run("fit", texts, "--out", tmp_path / "b", *common, "--keep-texts", "--json").stdout
    assert "greetings" not in printed
    assert "greetings" in (tmp_path / "b" / "fit_examples.md").read_text()


@pytest.mark.parametrize("kind", [["--kind", "label"], ["--kind", "style"], ["--kind", "replies"]], ids=" ".join)
def test_generated_data_replace_nothing_but_themselves(tmp_path, kind):
    out = tmp_path / "set.jsonl"
    make = ["data", "synthetic", *kind, "--users", 5, "--items", 3, "--out", out]
    run(*make)
    made = out.read_bytes()
    run(*make)  # the same
    fails(*make, "--seed", 4, say=["set.jsonl is there and holds something else", "--force"])
    assert out.read_bytes() == made
    run(*make, "--seed", 4, "--force")
    assert out.read_bytes() != made


# --- places


def test_places_with_a_tilde_and_models_that_moved(labels, tmp_path, monkeypatch):
    from persona_plug.models import zoo

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-llama", "tiny-encoder"):
        shutil.copytree(zoo.pull(name), tmp_path / "models" / name)
    shutil.copy(labels, tmp_path / "tickets.csv")
    relative = ["--llm", "models/tiny-llama", "--encoder", "models/tiny-encoder"]
    run("fit", "~/tickets.csv", "--out", "~/plug", *relative, *QUICK, *COLUMNS, "--no-report")
    assert not (tmp_path / "~").exists()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = ["--llm", tmp_path / "models" / "tiny-llama", "--encoder", tmp_path / "models" / "tiny-encoder"]
    whose = ["--history", "~/tickets.csv", *COLUMNS, "--user", "agent 1"]
    for command in ("score", "generate"):
        run(command, "~/plug", "what now", *whose, *moved)
    run("export", "~/plug", "--out", "~/soft", "--input", "x", *moved)
    assert (tmp_path / "soft" / "soft_prompts.safetensors").is_file()
    loaded = PersonaPlug.from_pretrained("~/plug", llm=str(moved[1]), encoder=str(moved[3]))
    assert loaded.save_pretrained("~/again") == tmp_path / "again"
    for name in ("demo", "serve", "export", "score", "generate"):
        assert {"--llm", "--encoder"} <= set(options(name))


# --- terminals, and Ctrl-C


def persona_plug(*words, **env):
    command = [sys.executable, "-m", "persona_plug", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, check=False, timeout=300)


@pytest.mark.parametrize(
    "flags", [["--version"], ["-h"], ["fit", "-h"], ["users", "add", "-h"], ["--help"]], ids=" ".join
)
def test_the_module_is_the_command(flags):
    done = persona_plug(*flags)
    assert done.returncode == 0, done.stderr
    assert (b"persona-plug 0." if flags == ["--version"] else b"Usage: persona-plug") in done.stdout


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp437"])
def test_terminals_of_every_encoding_show_texts_and_json(tmp_path, encoding):
    path = tmp_path / "e.jsonl"
    rows = [{"user_id": "日本", "input": "Привет 🙂", "output": "naïve – 你好"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = persona_plug("data", "check", path, PYTHONIOENCODING=encoding)
    assert plain.returncode == 0, plain.stderr
    assert b"Traceback" not in plain.stderr
    as_json = persona_plug("data", "check", path, "--json", PYTHONIOENCODING=encoding)
    example = json.loads(as_json.stdout.decode(encoding))["example"]
    assert {name: example[name] for name in rows[0]} == rows[0]
    bad = persona_plug("data", "check", tmp_path / "немає.jsonl", PYTHONIOENCODING=encoding)
    assert bad.returncode == 1
    assert b"no such file" in bad.stderr


def test_ctrl_c_says_how_to_go_on(labels, tmp_path):
    out = tmp_path / "out"
    words = ["fit", labels, "--out", out, *TINY, *COLUMNS, "--steps", 100_000, "--eval-every", 5, "--batch-size", 4]
    command = [sys.executable, "-m", "persona_plug", *map(str, words), "--patience", "100000"]
    with (tmp_path / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=err)
        until = time.monotonic() + 240
        while not list(out.glob("plug/checkpoint-*/complete")):
            assert process.poll() is None, (tmp_path / "err").read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    said = (tmp_path / "err").read_text()
    assert said.rstrip().endswith(
        f"stopped; the same command with --resume goes on from the newest checkpoint in {out}"
    )
    assert "Traceback" not in said
