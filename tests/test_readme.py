"""The commands and Python examples of the README and the quickstart, run one after the other on tiny models."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/quickstart.md")
BLOCK = re.compile(r"^<!-- test: tiny -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TINY = {"smollm2-135m": "tiny-llama", "minilm-l6": "tiny-encoder"}


def blocks(text):
    """Return (language, code) of the marked blocks in order, real models replaced by tiny ones."""
    found = BLOCK.findall(text)
    for real, tiny in TINY.items():
        found = [(language, code.replace(real, tiny)) for language, code in found]
    return found


def test_blocks_are_found():
    text = "x\n<!-- test: tiny -->\n```bash\na smollm2-135m\n```\n```bash\nb\n```\n"
    text += "<!-- test: tiny -->\n\n```python\nc\nd\n```\n"
    assert blocks(text) == [("bash", "a tiny-llama\n"), ("python", "c\nd\n")]


@pytest.mark.parametrize("page", PAGES)
def test_every_mark_stands_before_a_block(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert text.count("<!-- test: tiny -->") == len(blocks(text))
    assert all(language in ("bash", "python") for language, _ in blocks(text))


def test_every_page_with_marks_is_run():
    marked = [
        path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if "<!-- test: tiny -->" in path.read_text()
    ]
    assert {path.relative_to(ROOT).as_posix() for path in marked} == set(PAGES)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_page_runs(page, tmp_path):
    found = blocks((ROOT / page).read_text(encoding="utf-8"))
    assert len(found) >= 2
    assert {language for language, _ in found} == {"bash", "python"}
    programs = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    (tmp_path / "work").mkdir()
    for number, (language, code) in enumerate(found, 1):
        script = tmp_path / f"block{number}"
        script.write_text(code, encoding="utf-8")
        command = ["bash", "-eu", "-o", "pipefail"] if language == "bash" else [sys.executable]
        command.append(str(script))
        done = subprocess.run(
            command, cwd=tmp_path / "work", env=env, capture_output=True, text=True, timeout=600, check=False
        )
        said = f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        assert done.returncode == 0, f"block {number} of {page}:\n{code}\n{said}"
        assert "Traceback" not in done.stderr
