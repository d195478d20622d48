"""Two runs side by side, as a command and as a function."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.compare import compare, differences, main
from eval.report.results import read_results
from persona_plug.errors import CorruptFileError, DataError

ROOT = Path(__file__).resolve().parents[2]


def run_of(**changes):
    def row(**metrics):
        return {"metrics": {m: {"value": v, "ci95": [v - 0.1, v + 0.1]} for m, v in metrics.items()}}

    made = {
        "task": "LaMP_3", "split": "dev", "n": 60, "n_users": 20, "llm": "smollm 12", "encoder": "minilm 34",
        "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
        "methods": {"none": row(nll=2.0, accuracy=0.25), "plug": row(nll=1.5, accuracy=0.5)},
    }  # fmt: skip
    return {**made, **changes}


@pytest.fixture
def folders(tmp_path):
    second = run_of(git="other", date="tomorrow")
    second["methods"]["plug"]["metrics"] = {
        "nll": {"value": 1.25, "ci95": [1.1, 1.4]},
        "accuracy": {"value": 0.25, "ci95": [0.2, 0.3]},
    }
    second["methods"]["bm25"] = {"metrics": {"accuracy": {"value": None, "ci95": [None, None]}}}
    for name, results in (("a", run_of()), ("b", second)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    return tmp_path


def command(*arguments):
    line = [sys.executable, "-X", "importtime", "-m", "eval.compare", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)


def messages(result):
    """What a command wrote to stderr besides the import times."""
    return [line for line in result.stderr.splitlines() if not line.startswith("import time:")]


def test_the_table_has_every_method_and_metric_and_says_who_is_better(folders):
    result = command(folders / "a", folders / "b" / "results.json")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert "| method | metric | A [95% interval] | B [95% interval] | B − A | better |" in lines
    assert "| plug | nll ↓ | 1.500 [1.400, 1.600] | 1.250 [1.100, 1.400] | -0.250 | B |" in lines
    assert "| plug | accuracy ↑ | 0.500 [0.400, 0.600] | 0.250 [0.200, 0.300] | -0.250 | A |" in lines
    assert "| none | nll ↓ | 2.000 [1.900, 2.100] | 2.000 [1.900, 2.100] | +0.000 | – |" in lines
    assert "| bm25 | accuracy ↑ | – | – | – | – |" in lines
    assert not [line for line in lines if line.startswith("Warning")]  # git and date may differ
    assert lines[0] == f"A: {folders / 'a'}"


def test_help_is_quick_and_reads_no_model():
    result = command("--help")
    assert result.returncode == 0
    assert "results.json" in result.stdout
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "LaMP_2"}, "task (LaMP_3 and LaMP_2)"),
        ({"split": "test"}, "split (dev and test)"),
        ({"n": 61, "n_users": 21}, "n (60 and 61); n_users (20 and 21)"),
        ({"llm": "smollm 13"}, "llm (smollm 12 and smollm 13)"),
        ({"encoder": "bge 1"}, "encoder (minilm 34 and bge 1)"),
        ({"versions": {"torch": "3", "scipy": "1"}}, "numpy (2.4.6 and ?); scipy (? and 1); torch (2.13.0 and 3)"),
    ],
)  # fmt: skip
def test_what_differs_is_said_in_one_line(changes, said):
    text = compare(run_of(), run_of(**changes))
    assert [line for line in text.splitlines() if line.startswith("Warning")] == [f"Warning: the runs differ in {said}"]
    assert "; ".join(differences(run_of(), run_of(**changes))) == said


@pytest.mark.parametrize("change", [{"task": "LaMP_2"}, {"split": "test"}, {"n": 61}, {"n_users": 21}])
def test_of_other_questions_neither_run_is_better(change):
    changed = copy.deepcopy(run_of())
    changed["methods"]["plug"]["metrics"]["nll"]["value"] += 0.5
    assert "| +0.500 | A |" in compare(run_of(), changed)
    text = compare(run_of(), {**changed, **change})
    assert not any(line.endswith(("| A |", "| B |")) for line in text.splitlines())
    assert "| – | – |" in text
    assert "| B |" in compare(changed, run_of(llm="another LLM may be better"))


def test_a_method_of_one_run_and_a_metric_without_direction_are_shown():
    other = run_of(methods={"lora": {"metrics": {"new": {"value": 1.0, "ci95": [0.0, 2.0]}}}})
    text = compare(other, run_of())
    assert "| lora | new | 1.000 [0.000, 2.000] | – | – | – |" in text
    assert "| plug | nll ↓ | – | 1.500 [1.400, 1.600] | – | – |" in text
    both = copy.deepcopy(other)
    both["methods"]["lora"]["metrics"]["new"]["value"] = 3.0
    assert "| +2.000 | – |" in compare(other, both)


def test_names_are_no_markup():
    hostile = run_of(
        task="<script>x</script>\n# y", methods={"a|b": {"metrics": {}}, "<b>": run_of()["methods"]["plug"]}
    )
    text = compare(hostile, run_of(), "<i>", "b")
    assert "<" not in text
    assert "\n# y" not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no such file; give the folder that `python -m eval.run` wrote"),
        ("", "not JSON"),
        ('{"methods": {', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        ("[1]", "holds no object"),
        ("{}", "has no methods"),
        ('{"methods": {}, "versions": [1]}', "its versions are no object"),
        ('{"methods": {"plug": 3}}', "method 'plug' has no metrics"),
        ('{"methods": {"plug": {"metrics": 3}}}', "method 'plug' has no metrics"),
        ('{"methods": {"plug": {"metrics": {"nll": 1.0}}}}', "metric 'nll' of method 'plug' has no value with ci95"),
        ('{"methods": {"plug": {"metrics": {"nll": {"value": "1", "ci95": [0, 2]}}}}}', "has no value with ci95"),
        ('{"methods": {"plug": {"metrics": {"nll": {"value": 1, "ci95": [0]}}}}}', "has no value with ci95"),
    ],
)
def test_a_missing_or_corrupt_file_is_named_in_one_line(folders, text, said):
    file = folders / "a" / "results.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((DataError, CorruptFileError)) as caught:
        main([str(folders / "b"), str(folders / "a")])
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


def test_the_command_ends_with_2_and_one_line(folders):
    (folders / "a" / "results.json").write_text("{")
    for arguments in ((folders / "a", folders / "b"), (folders / "b", folders / "gone")):
        result = command(*arguments)
        assert result.returncode == 2
        assert len(messages(result)) == 1
        assert messages(result)[0].startswith("error: ")
        assert result.stdout == ""
    assert command(folders / "a").returncode == 2


def test_reading_gives_back_what_was_written(folders):
    assert read_results(folders / "a") == run_of()
