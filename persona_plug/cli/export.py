"""`persona-plug export`: what another engine needs of a plug."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from persona_plug.cli.common import (
    RECORDS,
    Columns,
    Device,
    Force,
    Json,
    Plug,
    PlugsEncoder,
    PlugsLlm,
    columns_of,
    new_file,
    one_line_errors,
    quiet,
    say,
)
from persona_plug.errors import ConfigError, DataError, nearest


@one_line_errors
def export(
    plug: Plug,
    out: Annotated[Path, typer.Option(help="Folder to write into.")],
    onnx: Annotated[bool, typer.Option(help="Write plug.onnx: request and history vectors to soft tokens.")] = False,
    input: Annotated[list[str] | None, typer.Option(help="A request, for soft_prompts.safetensors; repeat it.")] = None,
    history: Annotated[Path | None, typer.Option(help=f"{RECORDS} of users' items (input, output).")] = None,
    columns: Columns = None,
    user: Annotated[list[str] | None, typer.Option(help="Only this user of the history file; repeat it.")] = None,
    llm: PlugsLlm = None,
    encoder: PlugsEncoder = None,
    force: Force = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Write a plug as ONNX (--onnx), soft tokens of requests as safetensors (--input), or both.

    Each request is exported for each user of the history file, or for nobody where there is none. The ONNX graph is
    checked against torch before it is written.
    """
    if not (onnx or input):
        raise ConfigError("nothing to export: give --onnx, or requests with --input")
    if user and history is None:
        raise ConfigError("--user chooses from a history file: give --history too")
    from persona_plug.data.history import Example, by_user, read_events
    from persona_plug.export import export_onnx, export_soft_prompts
    from persona_plug.plug import PersonaPlug

    quiet()
    # Without --user the records of a file that is one user's may leave their owner out.
    names = columns_of(columns)
    prompts, graph = (new_file(out / name, force or not wanted) for name, wanted in
                      (("soft_prompts.safetensors", input), ("plug.onnx", onnx)))  # fmt: skip
    users = {} if history is None else by_user(read_events(history, owner=None if user else "-", columns=names).events)
    if unknown := [name for name in user or [] if name not in users]:
        raise DataError(f"{history} holds no user {unknown[0]!r}{nearest(unknown[0], users)}; choose one that it holds")
    owners = {name: tuple(users[name]) for name in user or users} or {"-": ()}
    loaded = PersonaPlug.from_pretrained(plug, llm=llm, encoder=encoder, device=device)
    written: dict[str, str | int] = {}
    if input:
        requests = [Example(name, text, "", items, str(i)) for name, items in owners.items() for i, text in
                    enumerate(input)]  # fmt: skip
        written["soft_prompts"] = str(export_soft_prompts(loaded, requests, prompts))
        written["count"] = len(requests)
    if onnx:
        written["onnx"] = str(export_onnx(loaded, graph))
    say(json.dumps(written) if as_json else "\n".join(f"{key}: {value}" for key, value in written.items()))
