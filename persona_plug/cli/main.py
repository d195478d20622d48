"""The `persona-plug` command. Heavy packages are imported inside the commands, so that --help stays fast."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_plug.cli.common import (
    RECORDS,
    Columns,
    Device,
    Encoder,
    History,
    Json,
    Plug,
    PlugsEncoder,
    PlugsLlm,
    columns_of,
    one_line_errors,
    quiet,
    say,
    say_json,
)
from persona_plug.cli.data import data_app
from persona_plug.cli.demo import demo
from persona_plug.cli.export import export
from persona_plug.cli.fit import fit
from persona_plug.cli.models import models_app
from persona_plug.cli.serve import keys_app, serve
from persona_plug.cli.users import users_app
from persona_plug.files import write_any_text


class _Command(typer.Typer):
    """The command line; its output takes any text, on any terminal."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        write_any_text()
        return super().__call__(*args, **kwargs)


app = _Command(
    help="Make a frozen language model personal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

User = Annotated[str | None, typer.Option(help="Take this user's items from the history file or store.")]
Store = Annotated[str | None, typer.Option(help="URL of the store that holds the user's history.")]
Strength = Annotated[
    float, typer.Option(help="How much the history counts: 1 as trained, less nearer to nobody, 0 is the LLM alone.")
]


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        from persona_plug import __version__

        say(f"persona-plug {__version__}")
        raise typer.Exit


@app.callback()
def main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Make a frozen language model personal."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


app.command()(fit)


@app.command()
@one_line_errors
def generate(
    plug: Plug,
    input: Annotated[str, typer.Argument(help="The request; - reads it from standard input.")],
    history: History = None,
    columns: Columns = None,
    user: User = None,
    store: Store = None,
    llm: PlugsLlm = None,
    encoder: PlugsEncoder = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer at most.")] = None,
    beams: Annotated[int, typer.Option(help="Beam search width.")] = 1,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most probable token.")] = False,
    strength: Strength = 1.0,
    plain: Annotated[bool, typer.Option(help="The LLM without the plug.")] = False,
    stream: Annotated[bool, typer.Option(help="Print while generating.")] = False,
    details: Annotated[
        bool, typer.Option(help="Put [brackets] around what the words memory brought, and print the items' weights.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a request in the manner of the user whose history is given.

    A plug that was trained on labels answers with the most probable one; --plain writes text all the same.
    """
    from persona_plug.plug import PersonaPlug

    quiet()
    whose = _whose(history, user, store, columns)
    loaded = PersonaPlug.from_pretrained(plug, llm=llm, encoder=encoder, device=device)
    options: dict[str, Any] = {"num_beams": beams, "do_sample": sample}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    plain = plain or strength == 0
    stream = stream and (plain or not loaded.config.answers)
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(loaded.tokenizer, skip_prompt=False, skip_special_tokens=True)
    text = sys.stdin.read() if input == "-" else input
    how: dict[str, Any] = {"personal": not plain, "strength": strength}
    result = loaded.generate(text, **whose, **how, return_details=True, **options)
    weights = [{"weight": round(w, 4), "input": i.input, "output": i.output} for i, w in result.weights]
    row = {"text": result.text, "marks": result.marks, "weights": weights, "input_tokens_cut": result.input_tokens_cut,
           "items_dropped": result.items_dropped, "prompt_tokens": result.prompt_tokens}  # fmt: skip
    if store is not None:  # without texts the ids alone tell items apart
        weights = [{**w, "id": i.id} for w, (i, _) in zip(weights, result.weights, strict=True)]
        row["weights"] = weights
    if as_json:
        say(json.dumps(row))
        return
    if not stream:
        say(_bracketed(result.text, result.marks) if details else result.text)
    if result.input_tokens_cut or result.items_dropped:
        sys.stderr.write(f"cut: {result.input_tokens_cut} input tokens, {result.items_dropped} history items\n")
    if details:
        for w in weights:
            say(
                f"{w['weight']:.3f}  "
                + (f"{w['input']:.60} -> {w['output']:.60}" if w["output"] else f"item {w['id']}")
            )


def _bracketed(text: str, marks: Sequence[tuple[int, int]]) -> str:
    """Return a text with brackets around its marks."""
    for start, end in reversed(marks):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


@app.command()
@one_line_errors
def score(
    plug: Plug,
    input: Annotated[str, typer.Argument(help="The request; - reads it from standard input.")],
    candidate: Annotated[list[str] | None, typer.Option(help="An answer to score; default the plug's own.")] = None,
    history: History = None,
    columns: Columns = None,
    user: User = None,
    store: Store = None,
    strength: Strength = 1.0,
    llm: PlugsLlm = None,
    encoder: PlugsEncoder = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Give calibrated probabilities of candidate answers."""
    from persona_plug.plug import PersonaPlug

    quiet()
    whose = _whose(history, user, store, columns)
    loaded = PersonaPlug.from_pretrained(plug, llm=llm, encoder=encoder, device=device)
    names = candidate or list(loaded.config.answers or ())
    text = sys.stdin.read() if input == "-" else input
    _, probabilities = loaded.choose(text, names, **whose, strength=strength)
    rows = sorted(zip(names, probabilities[0].tolist(), strict=True), key=lambda row: -row[1])
    say_json(dict(rows)) if as_json else say("\n".join(f"{p:.3f}  {name}" for name, p in rows))


@app.command()
@one_line_errors
def encode(
    data: Annotated[Path, typer.Argument(help=f"{RECORDS} events.")],
    encoder: Encoder = "minilm-l6",
    columns: Columns = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip bad records and count them.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Encode all texts of a file into the vector cache, so that later commands need not."""
    from persona_plug.data.history import read_events
    from persona_plug.models.encoder import HistoryEncoder

    quiet()
    events = read_events(data, skip_bad, columns=columns_of(columns))
    made = HistoryEncoder(encoder, device=device)
    made.encode([t for e in events.events for t in (e.item.input, e.item.output)])
    row = {"events": len(events.events), "skipped": len(events.skipped), "encoded": made.stats.encoded,
           "truncated": made.stats.truncated, "encoder_fingerprint": made.fingerprint}  # fmt: skip
    say(json.dumps(row) if as_json else ", ".join(f"{k}: {v}" for k, v in row.items()))


def _whose(path: Path | None, user: str | None, store: str | None, columns: str | None) -> dict[str, Any]:
    """Return the arguments that say whose history counts: from a file, or from a store, which is not made here."""
    if store is None:
        return {"history": _history(path, user, columns)}
    from persona_plug.serving.auth import LOCAL_TENANT, store_key
    from persona_plug.store.history_store import HistoryStore

    if user is None or path is not None:
        raise typer.BadParameter("--store goes with --user, and without --history")
    opened = HistoryStore(store)
    name = store_key(LOCAL_TENANT, user)
    if not opened.read(name, 1).total:
        sys.stderr.write(f"note: {opened.name} holds no such user; the answer is that for an empty history\n")
    return {"user": name, "store": opened}


def _history(path: Path | None, user: str | None, columns: str | None) -> list[Any]:
    from persona_plug.data.history import by_user, read_events
    from persona_plug.errors import ConfigError, DataError, nearest

    if path is None:
        if user is not None or columns is not None:
            raise ConfigError("--user and --columns say what to take of a history: give --history FILE, or --store URL")
        return []
    users = by_user(read_events(path, owner=None if user else "-", columns=columns_of(columns)).events)
    if user is None and len(users) > 1:
        raise DataError(f"{path} holds {len(users)} users; choose one with --user")
    if user is not None and user not in users:
        raise DataError(f"{path} holds no user {user!r}{nearest(user, users)}")
    return users[user] if user is not None else next(iter(users.values()))


app.command()(demo)
app.command()(export)
app.command()(serve)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(users_app, name="users")
app.add_typer(keys_app, name="keys")
