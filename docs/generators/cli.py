"""Writes docs/cli.md, the reference of the command line, from the commands: `python docs/generators/cli.py`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).parents[1] / "cli.md"
SHELL = ("help", "install_completion", "show_completion")  # what every command of typer has
HEAD = """\
# Command line

This page is written from the code by `python docs/generators/cli.py`. `persona-plug COMMAND --help` says the same.
Exit codes: 0 for success, 1 for an error that one line explains, 2 for a wrong call.
"""


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:  # noqa: ANN401
    """Yield (words, command) of a command and all below it; click's types differ between typer's versions."""
    yield words, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, (*words, name))


def cell(text: str) -> str:
    """Return a text on one line, safe in a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def default(param: Any) -> str:  # noqa: ANN401
    """Return a parameter's value where a call leaves it out, or nothing for no value and for a flag that is off."""
    if param.required:
        return "required"
    value = param.default
    if value is True:
        return "on"
    return f"`{value}`" if isinstance(value, str | int | float) and value is not False else ""


def row(param: Any) -> str:  # noqa: ANN401
    """Return the table's row of one argument or option."""
    if param.param_type_name == "argument":
        name = f"`{(param.metavar or param.name).upper()}`"
    else:
        name = ", ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
    return f"| {name} | {default(param)} | {cell(param.help or '')} |"


def section(words: tuple[str, ...], command: Any) -> str:  # noqa: ANN401
    """Return a command's part of the page: its call, what it does, its arguments and options."""
    about = inspect.cleandoc(command.help or "").replace("\f", "")
    parts = [f"{'##' if len(words) < 3 else '###'} {' '.join(words)}", about]
    if params := [p for p in command.params if not p.hidden and p.name not in SHELL]:
        table = ["| argument or option | default | what it is |", "|---|---|---|", *map(row, params)]
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def page() -> str:
    """Return the page."""
    from persona_plug.cli import app

    command = typer.main.get_command(app)
    return "\n".join([HEAD, "\n\n".join(section(*entry) for entry in walk(command, ("persona-plug",))), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    sys.stdout.write(f"written to {PAGE}\n")
