"""The documentation: what it names exists, what is generated is up to date, and the notebooks run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import persona_plug

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md")] if path.name != "changelog.md")
NOTEBOOKS = sorted(DOCS.glob("notebooks/*.ipynb"))
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)")


def load(name):
    """Import a generator of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "generators" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(notebook, kind):
    made = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in made["cells"] if cell["cell_type"] == kind]


def relative(path):
    return path.relative_to(ROOT).as_posix()


# References


@pytest.mark.parametrize("name", persona_plug.__all__)
def test_every_public_name_stands_in_the_reference(name):
    pages = "\n".join(path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("reference/*.md")))
    assert re.search(rf"^::: persona_plug\.{re.escape(name)}$", pages, re.MULTILINE)


def test_the_command_line_reference_is_up_to_date():
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert page == load("cli").page(), "run `python docs/generators/cli.py`"


def test_the_command_line_reference_holds_what_a_command_says():
    page = load("cli").page()
    assert "## persona-plug fit\n" in page
    assert "### persona-plug users forget\n" in page
    assert re.search(r"^\| `--steps` \| .*\[200\] \|$", page, re.MULTILINE)
    assert "| `--report`, `--no-report` | on |" in page
    assert "| `DATA` | required |" in page


# Links


def missing(path):
    """Links of a page whose file is neither there nor made by the site's build."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [path.parent / target for target in LINK.findall(text)]
    return [str(t) for t in targets if not (t.exists() or t.with_suffix(".ipynb") in NOTEBOOKS)]


@pytest.mark.parametrize("path", PAGES, ids=relative)
def test_links_lead_somewhere(path):
    assert not missing(path)


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "page.md").write_text("[a](page.md#part) [b](https://x.org) [c](gone.md)\n```\n[d](code.md)\n```\n")
    assert missing(tmp_path / "page.md") == [str(tmp_path / "gone.md")]


def test_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:persona_plug|training|eval|configs|docs)/[\w./]*)`", text)
    assert len(names) > 8
    assert not [name for name in names if not (ROOT / name).exists()]


def test_the_readme_names_where_the_common_questions_are_answered():
    """The four things a newcomer looks for, each by a file that does hold it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path, definition in {
        "persona_plug/measure/metrics.py": "METRICS",
        "persona_plug/splice/causal.py": "class CausalSplicer",
        "eval/methods.py": "METHODS",
        "persona_plug/store/deleting.py": "def forget",
    }.items():
        assert f"`{path}`" in text
        assert definition in (ROOT / path).read_text(encoding="utf-8"), path


def test_the_package_description_has_no_link_into_the_source():
    """A package index shows README.md alone: relative links and images would lead nowhere there."""
    command = [sys.executable, "-m", "hatch_fancy_pypi_readme"]
    text = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not LINK.findall(text)
    assert text.startswith("# persona_plug\n")
    assert "(`docs/quickstart.md`)" in text


# The site


def test_every_page_is_in_the_site():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for part in (entry.values() if isinstance(entry, dict) else entry) for leaf in leaves(part)]

    listed = set(leaves(settings["nav"]))
    made = {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    results = {name for name in written if re.match(r"results/20", name)}
    assert listed == (written | made) - results
    assert all(f"({name.removeprefix('results/')})" in (DOCS / "results" / "README.md").read_text() for name in results)


def test_the_site_is_strict_and_asks_nothing_of_the_network():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    build = (ROOT / "Makefile").read_text(encoding="utf-8").split("\ndocs:")[1].split("\n\n")[0]
    assert "mkdocs build --strict" in build
    assert "quiet" not in build  # MkDocs counts only those warnings that it shows
    assert settings["theme"]["font"] is False
    assert "analytics" not in settings.get("extra", {})
    assert not [line for line in (ROOT / "mkdocs.yml").read_text().splitlines() if "://" in line]


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_are_kept_without_outputs(path):
    assert cells(path, "code")
    assert not [cell for cell in cells(path, "code") if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
def test_notebooks_run(path, tmp_path):
    script = tmp_path / f"{path.stem}.py"
    script.write_text("\n\n".join("".join(cell["source"]) for cell in cells(path, "code")), encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    assert done.stdout


def test_a_notebook_becomes_a_page(tmp_path):
    made = {"cells": [{"cell_type": "markdown", "source": ["# A\n", "b"]}, {"cell_type": "code", "source": ["c = 1"]}]}
    (tmp_path / "n.ipynb").write_text(json.dumps(made))
    assert load("notebooks").page(tmp_path / "n.ipynb") == "# A\nb\n\n```python\nc = 1\n```"


# Files for people and hosts


def test_the_citation_names_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == persona_plug.__version__
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{citation['version']}] - {citation['date-released']}" in log


def test_the_hosted_checks_cover_what_is_promised():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "macos-latest"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert matrix["resolution"] == ["lowest-direct", "highest"]
