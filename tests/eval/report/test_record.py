"""A recorded result: the page of one screen and the plot that one command renders from its JSON."""

import json
import subprocess
import sys
from pathlib import Path
from xml.dom import minidom

import pytest

from eval.report.record import BEGIN, END, ROWS, page_methods, record, rendered_block, updated_page
from eval.report.results import portable, read_results, to_json
from persona_plug.errors import CorruptFileError, DataError

ROOT = Path(__file__).resolve().parents[3]
SCREEN = 48  # lines
CONTROLS = ("none", "task_prompt", "plug_empty", "plug_shuffled", "plug")


def results_of(methods):
    def row(value):
        return {
            "metrics": {"nll": {"value": value, "ci95": [value - 0.1, value + 0.1]}},
            "prompt_tokens_mean": 40.0,
            "seconds_per_query": 0.5,
        }

    pairs = [("plug", "plug_shuffled"), ("task_prompt", "none"), *(("plug", m) for m in methods if m != "plug")]
    return {
        "task": "LaMP_3",
        "split": "dev",
        "n": 60,
        "n_users": 20,
        "llm": "smollm 12",
        "encoder": "minilm 34",
        "seeds": [0],
        "git": "abc",
        "date": "2026-11-27",
        "machine": "x86_64, 2 cores",
        "data_notes": ["7 training samples left out"],
        "command": "python -m eval.run out=runs/one",
        "methods": {name: row(3.0 - i / 100) for i, name in enumerate(methods)},
        "contrasts": [
            {"a": a, "b": b, "metric": "nll", "delta": 1 / 3, "ci95": [0.1, 0.5], "p": 0.01, "p_holm": 0.02}
            for a, b in dict.fromkeys(pairs)
            if {a, b} <= set(methods)
        ],
    }


MANY = [f"method_{i}" for i in range(33)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "2026-11-27-ratings.json"
    path.write_text(to_json(results_of([*MANY, *CONTROLS])))
    return path


def test_one_command_renders_page_and_plot(file):
    command = [sys.executable, "-X", "importtime", "-m", "eval.report", str(file)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    page, plot = file.with_suffix(".md"), file.with_suffix(".svg")
    assert result.stdout.splitlines() == [str(page), str(plot)]
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    text = page.read_text()
    assert len(text.splitlines()) <= SCREEN
    assert text.startswith("# LaMP_3, dev: CLAIM\n")
    assert "| personal lift (plug − plug_shuffled) | nll | +0.333 [+0.100, +0.500] | 0.0100 | 0.0200 |" in text
    for part in ("| method | nll ↓ | prompt tokens | s per query |", "` python -m eval.run out=runs/one `"):
        assert part in text
    for part in (
        "26 further methods",
        "One seed:",
        "7 training samples left out",
        "](2026-11-27-ratings.svg)",
        "LIMITS",
    ):
        assert part in text
    drawing = minidom.parse(str(plot)).documentElement  # noqa: S318  # the file is our own
    assert (drawing.tagName, drawing.getAttribute("xmlns")) == ("svg", "http://www.w3.org/2000/svg")
    assert ">plug − plug_shuffled</text>" in drawing.toxml()


def test_a_large_comparison_shows_its_controls_and_the_best(file):
    results = read_results(file)
    names = page_methods(results)
    assert len(names) == ROWS
    assert set(CONTROLS) <= set(names)
    assert names[: ROWS - len(CONTROLS)] == MANY[-(ROWS - len(CONTROLS)) :]  # lower is better, and the last are lowest


def test_the_best_prior_of_each_metric_is_never_left_out():
    results = results_of([*MANY, *CONTROLS, "user_prior: copy", "user_prior: first_words"])
    for name, value in (("user_prior: copy", 0.5), ("user_prior: first_words", 0.25)):
        results["methods"][name]["metrics"] = {"rouge-1": {"value": value, "ci95": [0.0, 1.0]}}
    names = page_methods(results)
    assert len(names) == ROWS
    assert "user_prior: copy" in names
    assert "user_prior: first_words" not in names


def test_what_a_person_wrote_stays(file):
    record(file)
    page = file.with_suffix(".md")
    page.write_text(page.read_text().replace("CLAIM", "A claim").replace("LIMITS", "Its limits"))
    results = results_of(CONTROLS)
    file.write_text(to_json(results))
    record(file)
    text = page.read_text()
    assert "# LaMP_3, dev: A claim" in text
    assert "Its limits" in text
    assert "method_1" not in text
    assert text.count(BEGIN) == text.count(END) == 1


@pytest.mark.parametrize("text", ["an earlier page\n", f"{BEGIN}\nno end\n", f"{END}\n{BEGIN}\n"])
def test_a_page_without_marks_is_left_alone(file, text):
    page = file.with_suffix(".md")
    page.write_text(text)
    with pytest.raises(DataError, match=r"ratings\.md: lacks the marks"):
        record(file)
    assert page.read_text() == text


def test_what_others_wrote_is_no_markup(file):
    evil = "<script>x</script>\n# y | z"
    results = results_of([evil, *CONTROLS])
    results |= dict.fromkeys(("task", "split", "llm", "git", "command"), evil)
    results["data_notes"] = [evil]
    file.write_text(to_json(results))
    page, plot = record(file)
    text = page.read_text().replace(f"` {' '.join(evil.split())} `", "")  # a span of code shows everything as it is
    assert "<script>" not in text
    assert [line for line in text.splitlines() if line.startswith("# ")] == text.splitlines()[:1]
    assert "<script>" not in plot.read_text()


def test_a_run_without_contrasts_has_no_plot(file):
    file.write_text(to_json({"methods": {"none": {"metrics": {}}}}))
    assert record(file) == [file.with_suffix(".md")]
    assert "not recorded" in file.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "text", ["{", '{"methods": {}, "contrasts": [1]}', '{"methods": {}, "contrasts": [{"a": "x"}]}']
)
def test_a_corrupt_file_is_named(file, text):
    file.write_text(text)
    with pytest.raises(CorruptFileError, match=r"^\S*ratings\.json: "):
        record(file)


def test_results_are_small_and_the_same_after_reading(file):
    results = results_of(CONTROLS)
    results["methods"]["plug"]["metrics"]["nll"]["value"] = 1 / 3
    results["methods"]["plug"]["curve"] = ((1, 0.1, float("nan")),)
    text = to_json(results)
    assert "NaN" not in text
    back = json.loads(text)
    assert back["methods"]["plug"]["metrics"]["nll"]["value"] == pytest.approx(1 / 3, rel=1e-8)
    assert back["methods"]["plug"]["curve"] == [[1, 0.1, None]]
    assert to_json(back) == text
    assert {len([line for line in text.splitlines() if f'  "{name}": ' in line]) for name in CONTROLS} == {1}
    assert len(to_json(results_of([*MANY, *CONTROLS]))) < 20_000


def test_folders_of_a_machine_are_not_recorded(tmp_path):
    data = str(tmp_path / "movies")
    settings = {"data": data, "out": "~/runs/one", "llm": "smollm2-135m", "fit": {"steps": 3}, "n": [1]}
    assert portable(settings) == {**settings, "data": "movies", "out": "one"}
    arguments = [f"data={data}", "configs/compare.yaml", "task=LaMP_2", str(tmp_path / "a.yaml")]
    assert portable(arguments) == ["data=movies", "configs/compare.yaml", "task=LaMP_2", "a.yaml"]


def stale(folder):
    """Pages of recorded results that are not what their JSON renders."""
    pages = []
    for path in sorted(folder.glob("*.json")):
        page, plot = path.with_suffix(".md"), path.with_suffix(".svg")
        block = rendered_block(read_results(path), path.name, plot.name if plot.is_file() else None)
        if not page.is_file() or updated_page(page, block) != page.read_text():
            pages.append(page.name)
    return pages


def test_the_recorded_pages_are_those_of_their_json(file):
    record(file)
    assert stale(file.parent) == []
    page = file.with_suffix(".md")
    page.write_text(page.read_text().replace("+0.333", "+0.444"))
    assert stale(file.parent) == [page.name]
    assert stale(ROOT / "docs" / "results") == []
