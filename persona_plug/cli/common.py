"""What the commands share: options, output, errors of one line."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_plug.errors import ConfigError, PersonaPlugError
from persona_plug.files import STOPPED

RECORDS = "JSONL, JSON, CSV, TSV or Parquet"
EXAMPLE = "user_id=agent,input=question,output=reply"

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Columns = Annotated[
    str | None, typer.Option(help="The file's own column names, as user_id=agent,input=question,output=reply.")
]
Device = Annotated[str | None, typer.Option(help="Torch device; default CUDA, Apple's GPU (mps), or the CPU.")]
Llm = Annotated[str, typer.Option(help="Frozen LLM: short name, folder or Hub id.")]
Encoder = Annotated[str, typer.Option(help="Frozen sentence encoder: short name, folder or Hub id.")]
Quantized = Annotated[str | None, typer.Option(help="int8 or nf4 for the LLM's matrices.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
Plug = Annotated[str, typer.Argument(help="Folder or Hub id of a plug.")]
PlugsLlm = Annotated[str | None, typer.Option("--llm", help="Another place of the plug's LLM.")]
PlugsEncoder = Annotated[str | None, typer.Option("--encoder", help="Another place of the plug's sentence encoder.")]
History = Annotated[Path | None, typer.Option(help=f"{RECORDS} of the user's items (input, output).")]


Url = Annotated[
    str,
    typer.Option(
        "--store", envvar="PERSONA_PLUG_STORE", help="sqlite:///users.db or postgresql://user:password@host/database."
    ),
]
Tenant = Annotated[str, typer.Option(help="Whose user it is; a gateway without keys has one tenant, local.")]


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")


def say_json(value: object, indent: int | None = None) -> None:
    """Write JSON to standard output; an output that is not UTF-8 gets it in ASCII, which means the same.

    Args:
        value: What has a JSON form; a text is JSON already.
        indent: Of a value that is no text.
    """
    ascii_only = (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8"
    if not isinstance(value, str):
        say(json.dumps(value, ensure_ascii=ascii_only, indent=indent))
    else:
        say(json.dumps(json.loads(value), indent=2) if ascii_only else value.rstrip("\n"))


def new_file(path: Path, force: bool) -> Path:
    """Return the place of a file to write.

    Raises:
        ConfigError: Something is there, and is not to be replaced.
    """
    from persona_plug.data.rows import local_path

    file = local_path(path)
    if file.exists() and not force:
        raise ConfigError(f"{file} is there already: choose another --out, or replace it with --force")
    return file


def columns_of(text: str | None) -> dict[str, str] | None:
    """Return what --columns says: field -> the file's name of it.

    Raises:
        ConfigError: A part has no "=", or names no field.
    """
    if text is None:
        return None
    from persona_plug.data.rows import check_columns

    pairs = [part.partition("=") for part in text.split(",")]
    wrong = [field for field, mark, name in pairs if not mark or not name.strip()]
    if wrong:
        raise ConfigError(f"--columns: {wrong[0]!r:.60} names no column; write {EXAMPLE}")
    columns = {field.strip(): name.strip() for field, _, name in pairs}
    if len(columns) < len(pairs):
        raise ConfigError(f"--columns names a field twice; write {EXAMPLE}")
    check_columns(columns)
    return columns


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


@contextmanager
def tell_stopped(remedy: str) -> Iterator[None]:
    """Say how to go on where Ctrl-C stops a command."""
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped; {remedy}\n")
        raise typer.Exit(STOPPED) from None


def quiet() -> None:
    """Show our own bars and lines only, not the libraries' loading bars."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # tells of its folders and fonts
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
