"""What the commands share: options, output, errors of one line."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from persona_plug.errors import ConfigError, PersonaPlugError

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Columns = Annotated[
    str | None, typer.Option(help="The file's own column names, as user_id=agent,input=question,output=reply.")
]
Device = Annotated[str | None, typer.Option(help="Torch device; default CUDA if there is one, else CPU.")]


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def columns_of(text: str | None) -> dict[str, str] | None:
    """Return what --columns says: field -> the file's name of it.

    Raises:
        ConfigError: A part has no "=".
    """
    if text is None:
        return None
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := next((field for field, mark, name in pairs if not mark or not name.strip()), None):
        raise ConfigError(f"--columns: {wrong!r:.60} names no column; write user_id=agent,input=question,output=reply")
    return {field.strip(): name.strip() for field, _, name in pairs}


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turn the errors persona_plug raises on purpose into one line and exit code 1."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        try:
            command(*args, **kwargs)
        except PersonaPlugError as exc:
            sys.stderr.write(f"error: {exc}\n")
            raise typer.Exit(1) from exc
        except OSError as exc:  # a file or folder the user named cannot be read or written
            sys.stderr.write(f"error: {exc.filename or 'file'}: {exc.strerror or exc}; choose another place\n")
            raise typer.Exit(1) from exc

    return run


def quiet() -> None:
    """Show our own bars and lines only, not the libraries' loading bars."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of optional CPU kernels at every import
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
