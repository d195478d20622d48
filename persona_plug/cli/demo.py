"""`persona-plug demo`: the page for trying a plug."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from persona_plug.cli.common import (
    RECORDS,
    Columns,
    Device,
    Plug,
    PlugsEncoder,
    PlugsLlm,
    columns_of,
    one_line_errors,
    quiet,
    say,
)

LOCAL = ("localhost", "127.0.0.1", "::1")


@one_line_errors
def demo(
    plug: Plug,
    store: Annotated[str | None, typer.Option(help="URL of the store; default a temporary file.")] = None,
    data: Annotated[Path | None, typer.Option(help=f"{RECORDS} events to begin with.")] = None,
    columns: Columns = None,
    host: Annotated[str, typer.Option(help="Address to listen on; the page has no login.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 7860,
    llm: PlugsLlm = None,
    encoder: PlugsEncoder = None,
    device: Device = None,
) -> None:
    """Open a page where answers with and without the plug stand side by side."""
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else `datasets` reports every file that is read
    from persona_plug.data.splits import held_out_users
    from persona_plug.page.page import Page
    from persona_plug.page.session import Session
    from persona_plug.persistence import local_folder
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

    quiet()
    with tempfile.TemporaryDirectory(prefix="persona-plug-demo-") as scratch:
        # Histories must not outlive the page: a polite kill goes through the `with` as Ctrl+C does.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        loaded = PersonaPlug.from_pretrained(plug, llm=llm, encoder=encoder, device=device)
        url = store or f"sqlite:///{scratch}/users.db"
        with HistoryStore(url, encoder=loaded.encoder, keep_text=True) as opened:
            if data is not None:
                opened.load_file(data, columns=columns_of(columns))
            held_out = held_out_users(data) if data is not None else ()
            session = Session(loaded, opened, local_folder(plug), held_out)
            page = Page(session, kept_where(store), Path(scratch) / "uploads")
            if host not in LOCAL:
                sys.stderr.write(f"warning: everybody who reaches {host} can read and change all histories\n")
            say(f"{page.serve(host, port)} (Ctrl+C ends it)")
            page.blocks.block_thread()


def kept_where(store: str | None) -> str:
    """Say where histories are kept, without a password."""
    if store is None:
        return "Histories and their texts are in a temporary file, deleted when the page is stopped."
    from persona_plug.store.database import shown_url

    return f"Histories and their texts are in {shown_url(store)}."
