"""The `persona-plug` command. Heavy packages are imported inside the commands, so that --help stays fast."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from persona_plug.cli.common import Columns, Device, Json, columns_of, one_line_errors, quiet, say
from persona_plug.cli.data import data_app
from persona_plug.cli.demo import demo
from persona_plug.cli.export import export
from persona_plug.cli.models import models_app
from persona_plug.cli.serve import keys_app, serve
from persona_plug.cli.users import users_app

app = typer.Typer(
    help="Make a frozen language model personal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Store = Annotated[str | None, typer.Option(help="URL of the store that holds the user's history.")]


@app.callback()
def main(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False) -> None:
    """Make a frozen language model personal."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


@app.command()
@one_line_errors
def fit(
    data: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV, TSV or Parquet events, or a LaMP-shaped folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the plug, its report, plots and checkpoints.")],
    llm: Annotated[str, typer.Option(help="Frozen LLM: short name, folder or Hub id.")] = "smollm2-135m",
    encoder: Annotated[str, typer.Option(help="Frozen sentence encoder: short name, folder or Hub id.")] = "minilm-l6",
    recipe: Annotated[
        str, typer.Option(help="default, words (free text: reads users' own words), mean, or paper.")
    ] = "default",
    placement: Annotated[str | None, typer.Option(help="Where soft tokens go: suffix or prefix.")] = None,
    quantization: Annotated[str | None, typer.Option(help="int8 or nf4 for the LLM's matrices.")] = None,
    template: Annotated[str | None, typer.Option(help="The LLM's instruction, with {input}.")] = None,
    answer: Annotated[list[str] | None, typer.Option(help="One answer of a labelling task; repeat it.")] = None,
    samples: Annotated[str, typer.Option(help="auto, leave_one_out, or time.")] = "auto",
    steps: Annotated[int, typer.Option(help="Optimiser steps at most.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 32,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    eval_every: Annotated[int, typer.Option(help="Steps between looks at the validation users.")] = 20,
    held_out: Annotated[
        float | None, typer.Option(help="Share of users held out [0.2, or those the set names].")
    ] = None,
    targets_per_user: Annotated[int, typer.Option(help="Training targets of one user at most.")] = 32,
    max_input_tokens: Annotated[int | None, typer.Option(help="Tokens of a request at most.")] = None,
    max_answer_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of split, weights, order and dropout.")] = 0,
    report_to: Annotated[str, typer.Option(help="none, tensorboard, trackio, ...")] = "none",
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --out.")] = False,
    columns: Columns = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip bad records and count them.")] = False,
    report: Annotated[bool, typer.Option(help="Hold users out and compare with the controls.")] = True,
    report_samples: Annotated[int, typer.Option(help="Held-out questions in the report at most.")] = 400,
    generated: Annotated[int, typer.Option(help="Free text: answers generated a method for ROUGE.")] = 48,
    examples: Annotated[int, typer.Option(help="Held-out answers shown side by side.")] = 3,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a plug on users' records and tell on held-out users whether it helps."""
    from persona_plug.plug import PersonaPlug

    quiet()
    kind: Any = quantization  # load_llm checks it
    plug = PersonaPlug.build(
        llm, encoder, recipe=recipe, quantization=kind, device=device, seed=seed, placement=placement,
        max_input_tokens=max_input_tokens, max_answer_tokens=max_answer_tokens,
    )  # fmt: skip
    result = plug.fit(
        data, output_dir=out, resume=resume, samples=samples, held_out=held_out, targets_per_user=targets_per_user,
        template=template, answers=answer or "auto", columns=columns_of(columns), skip_bad=skip_bad, report=report,
        steps=steps, batch_size=batch_size, lr=lr, eval_every=eval_every, seed=seed, report_to=report_to,
        report_samples=report_samples, generated=generated,
        examples=examples,
    )  # fmt: skip
    plug.save_pretrained(out)
    say(result.to_json() if as_json else f"{result}\n\nPlug, report and plots are in {out}")


@app.command()
@one_line_errors
def generate(
    plug: Annotated[str, typer.Argument(help="Folder or Hub id of a plug.")],
    input: Annotated[str, typer.Argument(help="The request; - reads it from standard input.")],
    history: Annotated[Path | None, typer.Option(help="JSONL of the user's items (input, output).")] = None,
    user: Annotated[str | None, typer.Option(help="Take this user's items from the history file or store.")] = None,
    store: Store = None,
    llm: Annotated[str | None, typer.Option(help="Another place of the plug's LLM.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Tokens of the answer at most.")] = None,
    beams: Annotated[int, typer.Option(help="Beam search width.")] = 1,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the most probable token.")] = False,
    plain: Annotated[bool, typer.Option(help="The LLM without the plug.")] = False,
    stream: Annotated[bool, typer.Option(help="Print while generating.")] = False,
    details: Annotated[bool, typer.Option(help="Also print which items weighed how much, and what was cut.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer a request in the manner of the user whose history is given."""
    from persona_plug.plug import PersonaPlug

    quiet()
    loaded = PersonaPlug.from_pretrained(plug, llm=llm, device=device)
    options: dict[str, Any] = {"num_beams": beams, "do_sample": sample}
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    if stream:
        from transformers import TextStreamer

        options["streamer"] = TextStreamer(loaded.tokenizer, skip_prompt=False, skip_special_tokens=True)
    text = sys.stdin.read() if input == "-" else input
    whose = _whose(history, user, store)
    result = loaded.generate(text, **whose, personal=not plain, return_details=True, **options)
    weights = [{"weight": round(w, 4), "input": i.input, "output": i.output} for i, w in result.weights]
    row = {"text": result.text, "weights": weights, "input_tokens_cut": result.input_tokens_cut,
           "items_dropped": result.items_dropped, "prompt_tokens": result.prompt_tokens}  # fmt: skip
    if store is not None:  # without texts the ids alone tell items apart
        weights = [{**w, "id": i.id} for w, (i, _) in zip(weights, result.weights, strict=True)]
        row |= {"weights": weights, "items_unquoted": result.items_unquoted}
    if as_json:
        say(json.dumps(row))
        return
    if not stream:
        say(result.text)
    if result.input_tokens_cut or result.items_dropped:
        sys.stderr.write(f"cut: {result.input_tokens_cut} input tokens, {result.items_dropped} history items\n")
    if details:
        for w in weights:
            say(
                f"{w['weight']:.3f}  "
                + (f"{w['input']:.60} -> {w['output']:.60}" if w["output"] else f"item {w['id']}")
            )


@app.command()
@one_line_errors
def score(
    plug: Annotated[str, typer.Argument(help="Folder or Hub id of a plug.")],
    input: Annotated[str, typer.Argument(help="The request.")],
    candidate: Annotated[list[str] | None, typer.Option(help="An answer to score; default the plug's own.")] = None,
    history: Annotated[Path | None, typer.Option(help="JSONL of the user's items (input, output).")] = None,
    user: Annotated[str | None, typer.Option(help="Take this user's items from the history file or store.")] = None,
    store: Store = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Give calibrated probabilities of candidate answers."""
    from persona_plug.plug import PersonaPlug

    quiet()
    loaded = PersonaPlug.from_pretrained(plug, device=device)
    names = candidate or list(loaded.config.answers or ())
    _, probabilities = loaded.choose(input, names, **_whose(history, user, store))
    rows = sorted(zip(names, probabilities[0].tolist(), strict=True), key=lambda row: -row[1])
    say(json.dumps(dict(rows)) if as_json else "\n".join(f"{p:.3f}  {name}" for name, p in rows))


@app.command()
@one_line_errors
def encode(
    data: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV, TSV or Parquet events.")],
    encoder: Annotated[str, typer.Option(help="Sentence encoder: short name, folder or Hub id.")] = "minilm-l6",
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


def _whose(path: Path | None, user: str | None, store: str | None) -> dict[str, Any]:
    """Return the arguments that say whose history counts: from a file, or from a store, which is not made here."""
    if store is None:
        return {"history": _history(path, user)}
    from persona_plug.store.history_store import HistoryStore

    if user is None or path is not None:
        raise typer.BadParameter("--store goes with --user, and without --history")
    opened = HistoryStore(store)
    if not opened.read(user, 1).total:
        sys.stderr.write(f"note: {opened.name} holds no such user; the answer is that for an empty history\n")
    return {"user": user, "store": opened}


def _history(path: Path | None, user: str | None) -> list[Any]:
    if path is None:
        return []
    from persona_plug.data.history import by_user, read_events
    from persona_plug.errors import DataError

    users = by_user(read_events(path, owner=None if user else "-").events)
    if user is None and len(users) > 1:
        raise DataError(f"{path} holds {len(users)} users; choose one with --user")
    if user is not None and user not in users:
        raise DataError(f"{path} holds no user {user!r}")
    return users[user] if user is not None else next(iter(users.values()))


app.command()(demo)
app.command()(export)
app.command()(serve)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(users_app, name="users")
app.add_typer(keys_app, name="keys")
