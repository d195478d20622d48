"""`persona-plug data`: checking one's own records, reading LaMP's, making sets to try with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_plug.cli.common import RECORDS, Columns, Force, Json, columns_of, one_line_errors, say, say_json
from persona_plug.errors import ConfigError

data_app: typer.Typer = typer.Typer(
    help="Data: check your own, read LaMP's, make sets to try with.", no_args_is_help=True
)


@data_app.command("check")
@one_line_errors
def data_check(
    file: Annotated[Path, typer.Argument(help=f"{RECORDS} events.")],
    columns: Columns = None,
    skip_bad: Annotated[bool, typer.Option(help="Go on after a bad record and list them all.")] = False,
    as_json: Json = False,
) -> None:
    """Check records and show what is in them and how fit will split them; exit code 1 if any is bad."""
    from persona_plug.data.summary import summarise

    row = summarise(file, columns_of(columns), skip_bad)
    say_json(row) if as_json else say("\n".join(f"{k}: {v}" for k, v in row.items()))
    if row["bad"]:
        raise typer.Exit(1)


@data_app.command("lamp")
@one_line_errors
def data_lamp(
    out: Annotated[Path, typer.Option(help="JSONL of events to write; with --task the folder of the files.")],
    questions: Annotated[Path | None, typer.Argument(help="LaMP's questions file, to convert it.")] = None,
    outputs: Annotated[Path | None, typer.Option(help="LaMP's gold file; its answers become events too.")] = None,
    task: Annotated[str | None, typer.Option(help="Download: 1 to 7, 2N (news), or LongLaMP_2 to _4.")] = None,
    split: Annotated[str, typer.Option(help="Download: user, or time (temporal).")] = "user",
    base: Annotated[str | None, typer.Option(help="Another address or folder to download from.")] = None,
    avocado: Annotated[Path | None, typer.Option(help="LaMP-6: data/text of the Avocado corpus (LDC2015T03).")] = None,
    force: Force = False,
) -> None:
    """Convert LaMP's own files into events, or download the official ones into a folder (--task).

    The instruction goes into a .meta.json beside the events. A folder is what `fit` and comparisons read; running
    again goes on where a download broke off.
    """
    if (questions is None) == (task is None):
        raise typer.BadParameter("give LaMP's questions file to convert, or --task to download")
    if task is not None:
        from persona_plug.data.lamp_download import download

        for line in download(task, split, out, base, avocado):
            say(line)
        return
    from persona_plug.data.lamp import read_lamp, write_events

    data = read_lamp(str(questions), outputs)
    say(f"{write_events(data, out, force)} events of {len({e.user_id for e in data.examples})} users in {out}")


@data_app.command("debian")
@one_line_errors
def data_debian(
    out: Annotated[Path, typer.Option(help="JSONL to write.")],
    task: Annotated[str, typer.Option(help="synopsis (free text) or section (labels).")] = "synopsis",
    users: Annotated[int, typer.Option(help="Maintainers at most.")] = 150,
    per_user: Annotated[int, typer.Option(help="Packages of one maintainer at most.")] = 40,
    least: Annotated[int, typer.Option(help="Packages of one maintainer at least.")] = 12,
    release: Annotated[str | None, typer.Option(help="Suite or codename; default the largest that apt knows.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    force: Force = False,
) -> None:
    """Make a set of real texts from Debian's package index, through the apt client."""
    from persona_plug.data import debian

    chosen: Any = task  # build checks it
    made = debian.build(chosen, release, min_packages=least, max_users=users, max_per_user=per_user, seed=seed)
    made.write(out, force)
    say_json(made.meta, indent=2)


@data_app.command("rfc")
@one_line_errors
def data_rfc(
    out: Annotated[Path, typer.Option(help="JSONL to write.")],
    users: Annotated[int | None, typer.Option(help="First authors at most; default all.")] = None,
    per_user: Annotated[int, typer.Option(help="Documents of one author at most, the latest.")] = 40,
    least: Annotated[int, typer.Option(help="Documents of one author at least.")] = 5,
    force: Force = False,
) -> None:
    """Make a set of titles and abstracts of RFCs from Debian's packages (270 MB, section non-free)."""
    from persona_plug.data import rfc

    made = rfc.build(least=least, max_users=users, max_per_user=per_user)
    made.write(out, force)
    say_json(made.meta, indent=2)


@data_app.command("synthetic")
@one_line_errors
def data_synthetic(
    out: Annotated[Path, typer.Option(help="JSONL to write.")],
    kind: Annotated[str, typer.Option(help="label, style (free text), or replies (support and mail).")] = "label",
    users: Annotated[int, typer.Option(help="Users.")] = 100,
    items: Annotated[int, typer.Option(help="Items a user.")] = 20,
    personal: Annotated[bool, typer.Option(help="--no-personal: outputs do not depend on the user (control).")] = True,
    held_out: Annotated[
        float | None, typer.Option(help="replies: share of users with forms of their own [0.2].")
    ] = None,
    facts: Annotated[Path | None, typer.Option(help="replies: JSON of habits and of each request's facts.")] = None,
    seed: Annotated[int, typer.Option(help="Seed.")] = 0,
    force: Force = False,
) -> None:
    """Generate users with known habits: labels, rewritten sentences, or replies to customers."""
    from persona_plug.data import replies, synthetic

    if kind == "replies":
        share = 0.2 if held_out is None else held_out
        made = replies.build(users, items, seed, held_out=share, personal=personal)
        if facts is not None:
            made.write_facts(facts, force)
        made.write(out, force)
    else:
        for name, value in (("--held-out", held_out), ("--facts", facts)):
            if value is not None:
                raise ConfigError(f"{name} belongs to --kind replies; leave it out for --kind {kind}")
        chosen: Any = kind  # build checks it
        synthetic.build(chosen, users=users, items_per_user=items, seed=seed, personal=personal).write(out, force)
    say(f"{users * items} records of {users} users in {out}")
