import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from persona_plug.cli import app

ROOT = Path(__file__).parents[2]
COMMAND = Path(sys.executable).with_name("persona-plug")
TINY = ["--llm", "tiny-llama", "--encoder", "tiny-encoder"]


def commands(group=None, path=()):
    """Yield the words of every command and group."""
    group = typer.main.get_command(app) if group is None else group
    yield path
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


EVERY = sorted(commands())


def run(*words, code=0, stdin=None):
    """Run a command in this process and return its result, after a look at the exit code."""
    result = CliRunner().invoke(app, [str(w) for w in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{words}: a traceback instead of an error of one line") from result.exception
    assert result.exit_code == code, result.output
    return result


def strict_json(text):
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))


def fails(*words, say, stdin=None):
    """Run a command that must fail with one line that says what was wrong."""
    result = run(*words, code=1, stdin=stdin)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.rstrip().endswith(lines[0])
    assert result.stdout == ""
    for part in [say] if isinstance(say, str) else say:
        assert part in lines[0]


# --- help


def test_there_are_commands():
    assert {("fit",), ("generate",), ("score",), ("encode",), ("models", "list"), ("data", "check")} <= set(EVERY)


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_is_quick_and_loads_nothing_heavy(words):
    code = (
        "import sys; sys.argv[0] = 'persona-plug'\n"
        "from persona_plug.cli import app\n"
        "try: app()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy', 'sklearn', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "100"},
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.lstrip().startswith("Usage: ")
    # CPU time, so that a busy machine does not matter; about 0.3 s where this was written.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.9


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_option_and_command_is_explained(words):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    assert command.help or not words
    assert [p.name for p in command.params if not getattr(p, "help", "x")] == []


def test_the_installed_command_is_this_one():
    done = subprocess.run([str(COMMAND), "--help"], capture_output=True, text=True, check=True)
    assert "Make a frozen language model personal" in done.stdout


# --- exit codes and errors


@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["fit", "x.jsonl"],
        ["fit", "x.jsonl", "--out", "y", "--steps", "many"],
        ["fit", "x.jsonl", "--out", "y", "--nonsense"],
        ["nonsense"],
        ["models", "nonsense"],
        ["data", "check"],
        ["generate", "plug"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_code_2(words):
    result = run(*words, code=2)
    assert result.stderr.strip()
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    run("data", "synthetic", "--out", path, "--users", 8, "--items", 5)
    return path


@pytest.fixture(scope="module")
def plug(events, tmp_path_factory):
    """A fitted plug, and what `fit --json` printed."""
    out = tmp_path_factory.mktemp("fit") / "plug"
    result = run("fit", events, "--out", out, *TINY, "--steps", 2, "--eval-every", 2, "--batch-size", 4, "--json")
    return out, result.stdout


def test_missing_files_and_names(tmp_path, events):
    fails("data", "check", tmp_path / "no.jsonl", say=["no.jsonl", "no such file"])
    fails("encode", tmp_path / "no.jsonl", "--encoder", "tiny-encoder", say="no such file")
    fails("fit", tmp_path / "no.jsonl", "--out", tmp_path / "o", *TINY, say="no such file")
    fails("fit", events, "--out", tmp_path / "o", "--llm", "tiny-lama", say=["tiny-lama", "did you mean tiny-llama"])
    fails("models", "pull", "tiny-lama", say="did you mean tiny-llama")
    fails("models", "remove", "nothing-like-it", say="there are")
    fails("generate", tmp_path, "hello", say="not a saved plug")
    fails("data", "lamp", tmp_path / "q.json", "--out", tmp_path / "o", say="no such file")


def test_bad_values(tmp_path, events):
    for option, value, say in (
        ("--steps", 0, "steps=0"),
        ("--recipe", "best", "recipe='best' is not one of default, mean, paper"),
        ("--placement", "middle", "placement='middle'"),
        ("--template", "no place", "template must contain {input}"),
        ("--samples", "random", "samples='random'"),
        ("--answer", "only one", "answers must be two or more"),
        ("--device", "abacus", "abacus"),
        ("--quantization", "int1", "int1"),
        ("--lr", -1, "lr=-1"),
        ("--held-out", 1, "held_out=1 is a share of the users: give a number from 0 to 1"),
        ("--held-out", 2, "held_out=2 is a share of the users"),
        ("--valid", 20, "valid=20 is a share of the users"),
        ("--targets-per-user", 0, "targets_per_user=0"),
        ("--recipe", "word", "did you mean 'words'?"),
        ("--aggregator", "attentoin", "did you mean 'attention'?"),
        ("--chat-template-args", "[]", "--chat-template-args must be a JSON object"),
    ):
        fails("fit", events, "--out", tmp_path / "o", *TINY, option, value, say=say)
    fails("data", "synthetic", "--out", tmp_path / "o", "--kind", "odd", say="unknown kind 'odd'")
    fails("data", "synthetic", "--out", tmp_path / "o", "--users", 0, say="users=0")


def test_a_place_that_cannot_be_written(tmp_path, events):
    file = tmp_path / "file"
    file.write_text("")
    fails("data", "synthetic", "--out", file / "x.jsonl", say="cannot write")
    fails("fit", events, "--out", file, *TINY, "--steps", 1, "--no-report", say="file")


def test_a_plug_folder_with_a_damaged_file(plug, tmp_path):
    broken = tmp_path / "plug"
    broken.mkdir()
    for name in ("config.json", "model.safetensors"):
        (broken / name).write_bytes((plug[0] / name).read_bytes())
    with (broken / "model.safetensors").open("r+b") as file:
        file.truncate(50)
    fails("generate", broken, "hello", say="model.safetensors")
    (broken / "config.json").write_text("{}")
    fails("score", broken, "hello", say="config.json")


# --- data


def test_check_says_what_is_in_a_file(events):
    row = strict_json(run("data", "check", events, "--json").stdout)
    assert (row["events"], row["users"], row["median_items"], row["most_items"]) == (40, 8, 5, 5)
    assert row["with_timestamp"] == 40
    assert row["answers"] == sorted(["red", "blue", "green", "white", "black"]) or len(row["answers"]) == 5
    assert row["bad"] == []
    assert "users: 8" in run("data", "check", events).stdout


def test_check_fails_on_a_bad_record_and_lists_all_if_asked(events, tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text(events.read_text() + "oops\n{}\n")
    fails("data", "check", path, say=[f"{path}:41: not JSON"])
    row = strict_json(run("data", "check", path, "--skip-bad", "--json", code=1).stdout)
    assert (row["events"], len(row["bad"])) == (40, 2)
    assert "'user_id'" in row["bad"][1]


def test_lamp_files_become_events(tmp_path):
    profile = [{"id": "1", "text": "fine", "score": "4"}]
    questions = [{"id": str(i), "input": f"Rate this: thing {w}", "profile": profile} for i, w in enumerate("ab")]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    golds = [{"id": str(i), "output": "5"} for i in (0, 1)]
    (tmp_path / "o.json").write_text(json.dumps({"task": "LaMP_3", "golds": golds}))
    out = tmp_path / "e.jsonl"
    result = run("data", "lamp", tmp_path / "q.json", "--outputs", tmp_path / "o.json", "--out", out)
    assert result.stdout.startswith("4 events of 2 users")
    assert strict_json(run("data", "check", out, "--json").stdout)["events"] == 4


def test_synthetic_style_and_control(tmp_path):
    for name, options in {"style": ["--kind", "style"], "control": ["--no-personal"]}.items():
        out = tmp_path / f"{name}.jsonl"
        run("data", "synthetic", "--out", out, "--users", 3, "--items", 2, *options)
        assert len(out.read_text().splitlines()) == 6
    meta = json.loads((tmp_path / "control.meta.json").read_text())
    assert meta["meta"]["parameters"]["personal"] is False


# --- the chain


def test_a_second_encode_encodes_nothing(events):
    first = strict_json(run("encode", events, "--encoder", "tiny-encoder", "--json").stdout)
    assert (first["events"], first["skipped"]) == (40, 0)
    again = strict_json(run("encode", events, "--encoder", "tiny-encoder", "--json").stdout)
    assert again["encoded"] == 0
    assert again["encoder_fingerprint"] == first["encoder_fingerprint"]
    assert "encoded: 0" in run("encode", events, "--encoder", "tiny-encoder").stdout


def test_a_new_text_is_encoded_once(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_text('{"user_id": "a", "input": "never seen before", "output": "nor this"}\n' * 2)
    assert strict_json(run("encode", path, "--encoder", "tiny-encoder", "--json").stdout)["encoded"] == 2


def test_fit_prints_json_alone_and_leaves_plug_report_and_plots(plug):
    folder, out = plug
    report = strict_json(out)
    assert {"none", "task_prompt", "plug_empty", "plug_shuffled", "plug"} <= set(report["metrics"])
    names = {"config.json", "model.safetensors", "README.md"}
    names |= {"fit_report.json", "fit_report.md", "loss.png", "lift.png"}
    assert names <= {p.name for p in folder.iterdir()}
    assert (folder / "plug" / "log.jsonl").is_file()
    assert strict_json((folder / "fit_report.json").read_text()) == report


def test_fit_prints_table_and_verdict_without_json(events, tmp_path):
    options = ["--steps", 1, "--eval-every", 1, "--batch-size", 4, "--held-out", 0.2]
    out = run("fit", events, "--out", tmp_path / "p", *TINY, *options).stdout
    assert "| plug_shuffled |" in out
    assert "Knows the user: " in out
    assert out.rstrip().endswith(f"Plug, report and plots are in {tmp_path / 'p'}")


def test_fit_trains_adapters_and_shows_items(events, tmp_path):
    options = ["--steps", 1, "--eval-every", 1, "--batch-size", 4, "--lora", 2, "--retrieve", 1]
    run("fit", events, "--out", tmp_path / "p", *TINY, *options, "--no-report")
    config = json.loads((tmp_path / "p" / "config.json").read_text())
    assert (config["lora"], config["retrieve"]) == (2, 1)
    assert (tmp_path / "p" / "adapter" / "adapter_model.safetensors").is_file()
    rows = strict_json(run("score", tmp_path / "p", "hello", "--json").stdout)
    assert sum(rows.values()) == pytest.approx(1)


def test_fit_without_training_shows_items_alone(events, tmp_path):
    out = run("fit", events, "--out", tmp_path / "p", *TINY, "--adapt", "none", "--retrieve", 2).stdout
    assert "Recommended: " in out
    assert "| task_prompt |" not in out
    options = ["--history", events, "--user", "user-0001", "--max-new-tokens", 3, "--json"]
    rows = [strict_json(run("generate", tmp_path / "p", "hello", *options, *more).stdout) for more in ([], ["--plain"])]
    assert rows[0]["prompt_tokens"] > rows[1]["prompt_tokens"]
    fails("fit", events, "--out", tmp_path / "q", *TINY, "--adapt", "none", say="retrieve=4")


def test_score_gives_probabilities(plug, events):
    folder, _ = plug
    rows = strict_json(run("score", folder, "hello", "--history", events, "--user", "user-0000", "--json").stdout)
    assert len(rows) == 5
    assert sum(rows.values()) == pytest.approx(1)
    assert list(rows.values()) == sorted(rows.values(), reverse=True)
    two = strict_json(run("score", folder, "hello", "--candidate", "red", "--candidate", "blue", "--json").stdout)
    assert sum(two.values()) == pytest.approx(1)
    lines = run("score", folder, "hello").stdout.splitlines()
    assert len(lines) == 5
    assert all(0 <= float(line.split()[0]) <= 1 for line in lines)


def test_generate_gives_text_weights_and_what_was_cut(plug, events):
    folder, _ = plug
    options = ["--history", events, "--user", "user-0001", "--max-new-tokens", 3]
    row = strict_json(run("generate", folder, "hello", *options, "--json").stdout)
    assert set(row) == {"text", "marks", "weights", "input_tokens_cut", "items_dropped", "prompt_tokens"}
    assert len(row["weights"]) == 5
    assert 0 < sum(w["weight"] for w in row["weights"]) <= 1.001
    assert row["input_tokens_cut"] == 0
    from_stdin = strict_json(run("generate", folder, "-", *options, "--json", stdin="hello").stdout)
    assert from_stdin["text"] == row["text"]
    long = strict_json(run("generate", folder, "word " * 2000, *options, "--json").stdout)
    assert long["input_tokens_cut"] > 0
    plain = run("generate", folder, "hello", "--plain", "--max-new-tokens", 3).stdout
    assert plain.endswith("\n")
    assert run("generate", folder, "hello", *options, "--strength", 0).stdout == plain
    fails("generate", folder, "hello", *options, "--strength", 2, say="strength=2.0 must be a number from 0 to 1")
    assert " -> " in run("generate", folder, "hello", *options, "--details").stdout


def test_a_history_needs_its_user_named(plug, events, tmp_path):
    folder, _ = plug
    fails("generate", folder, "hello", "--history", events, say=["8 users", "--user"])
    fails("generate", folder, "hello", "--history", events, "--user", "nobody", say="no user 'nobody'")
    fails("score", folder, "hello", "--history", tmp_path / "no.jsonl", say="no such file")


def test_a_history_of_bare_items_is_one_users(plug, tmp_path):
    """The option's help says: JSONL of the user's items (input, output)."""
    path = tmp_path / "mine.jsonl"
    path.write_text('{"input": "a", "output": "red"}\n{"input": "b", "output": "blue"}\n')
    row = strict_json(run("generate", plug[0], "hello", "--history", path, "--max-new-tokens", 1, "--json").stdout)
    assert len(row["weights"]) == 2


def test_models_list_shows_the_cache(plug):
    rows = {r["name"]: r for r in strict_json(run("models", "list", "--json").stdout)}
    assert rows["tiny-llama"]["present"]
    assert rows["tiny-llama"]["bytes"] > 0
    assert not rows["smollm2-135m"]["present"]
    lines = run("models", "list").stdout.splitlines()
    assert len(lines) == len(rows)
    assert "MB to download" in next(line for line in lines if line.startswith("smollm2-135m"))


def test_pull_and_remove(monkeypatch, tmp_path):
    monkeypatch.setenv("PERSONA_PLUG_CACHE", str(tmp_path))
    folder = run("models", "pull", "tiny-gpt2").stdout.strip()
    assert (Path(folder) / "config.json").is_file()
    assert "removed" in run("models", "remove", "tiny-gpt2").stdout
    assert "was not in the cache" in run("models", "remove", "tiny-gpt2").stdout
