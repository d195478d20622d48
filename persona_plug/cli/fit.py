"""`persona-plug fit`: training a plug."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from persona_plug.cli.common import (
    Columns,
    Device,
    Encoder,
    Json,
    Llm,
    Quantized,
    columns_of,
    one_line_errors,
    quiet,
    say,
    say_json,
    tell_stopped,
)
from persona_plug.cli.settings import plug_settings, training_settings, with_settings
from persona_plug.errors import ConfigError

OURS = ("config.json", "model.safetensors", "README.md", "fit_report.json", "fit_report.md", "fit_examples.md",
        "loss.png", "lift.png", "plug", "task_prompt", "adapter")  # fmt: skip
"""What `fit` writes into its folder."""


@one_line_errors
@with_settings
def fit(
    data: Annotated[Path, typer.Argument(help="JSONL, JSON, CSV, TSV or Parquet events, or a LaMP-shaped folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the plug, its report, plots and checkpoints.")],
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run in --out.")] = False,
    force: Annotated[bool, typer.Option(help="Replace what is in --out.")] = False,
    llm: Llm = "smollm2-135m",
    encoder: Encoder = "minilm-l6",
    recipe: Annotated[
        str,
        typer.Option(
            help="default, words (free text: no user tokens beside users' own words), mean, paper, or another."
        ),
    ] = "default",
    adapt: Annotated[str, typer.Option(help="train, or none: the items of --retrieve alone.")] = "train",
    start: Annotated[str | None, typer.Option(help="Saved plug whose weights are trained further.")] = None,
    columns: Columns = None,
    skip_bad: Annotated[bool, typer.Option(help="Skip bad records and count them.")] = False,
    template: Annotated[str | None, typer.Option(help="The LLM's instruction, with {input}.")] = None,
    answer: Annotated[list[str] | None, typer.Option(help="One answer of a labelling task; repeat it.")] = None,
    free_text: Annotated[bool, typer.Option(help="Outputs are texts, even where they look like labels.")] = False,
    samples: Annotated[str, typer.Option(help="auto, leave_one_out, or time.")] = "auto",
    held_out: Annotated[
        float | None, typer.Option(help="Share of users held out [0.2, or those the set names].")
    ] = None,
    valid: Annotated[float | None, typer.Option(help="Share of users for early stopping [0.1].")] = None,
    targets_per_user: Annotated[int, typer.Option(help="Training targets of one user at most.")] = 32,
    report: Annotated[bool, typer.Option(help="Hold users out and compare with the controls.")] = True,
    report_samples: Annotated[int, typer.Option(help="Held-out questions in the report at most.")] = 400,
    generated: Annotated[int, typer.Option(help="Free text: answers written by each method.")] = 48,
    examples: Annotated[int, typer.Option(help="Held-out answers shown side by side.")] = 3,
    keep_texts: Annotated[
        bool, typer.Option(help="Write these answers, texts of users, into --out as fit_examples.md.")
    ] = False,
    quantization: Quantized = None,
    dtype: Annotated[
        str | None, typer.Option(help="The LLM's dtype: float32, bfloat16, or auto for the one that is faster here.")
    ] = None,
    state_gigabytes: Annotated[float, typer.Option(help="Memory for frozen states of prompts.")] = 4,
    device: Device = None,
    as_json: Json = False,
    **settings: Any,  # noqa: ANN401
) -> None:
    """Train a plug on users' records and tell on held-out users whether it helps.

    The plug is saved in --out as soon as it is trained. A run that was stopped goes on with --resume, and only with the
    same data and settings.
    """
    from persona_plug.clock import tell
    from persona_plug.data.rows import local_path
    from persona_plug.data.splits import prepare
    from persona_plug.fit.config import FitConfig
    from persona_plug.fit.surroundings import check_launcher
    from persona_plug.plug import PersonaPlug

    quiet()
    folder = local_path(out)
    _check_folder(folder, resume, force)
    check_launcher()
    training = {name: value for name, value in training_settings(settings).items() if value is not None}
    seed = FitConfig.of(training).seed
    if free_text and answer:
        raise ConfigError("--free-text and --answer exclude each other: give one of them")
    made = prepare(
        data, samples=samples, valid=valid, held_out=held_out if report else 0.0, targets_per_user=targets_per_user,
        template=template, answers=None if free_text else answer or "auto", skip_bad=skip_bad,
        columns=columns_of(columns), seed=seed,
    )  # fmt: skip
    kind: Any = quantization  # load_llm checks it
    folder.mkdir(parents=True, exist_ok=True)  # where that cannot be, no model is loaded
    plug = PersonaPlug.build(
        llm, encoder, recipe=recipe, quantization=kind, dtype=dtype, device=device, seed=seed,
        answers=made.answers, state_budget=int(state_gigabytes * 2**30), **plug_settings(settings),
    )  # fmt: skip
    tell(f"device: {plug.llm.device}, LLM {llm} in {str(plug.llm.dtype).removeprefix('torch.')}, encoder {encoder}")
    with tell_stopped(f"the same command with --resume goes on from the newest checkpoint in {folder}"):
        result = plug.fit(
            made, output_dir=folder, resume=resume, report=report, report_samples=report_samples, generated=generated,
            examples=examples, keep_texts=keep_texts, adapt=adapt, start=start, **training,
        )  # fmt: skip
    if as_json:
        say_json(result.to_json())
    else:
        say(f"{result}\n\nPlug, report and plots are in {folder}")


def _check_folder(folder: Path, resume: bool, force: bool) -> None:
    """Refuse to write over what is in a folder without a word.

    Raises:
        ConfigError: Something is there; what to do is said.
    """
    if resume and force:
        raise ConfigError("--resume goes on with a run and --force replaces it: give one of them")
    found = [name for name in OURS if (folder / name).exists()]
    if resume and (folder / "model.safetensors").exists() and not (folder / "plug" / "run.json").exists():
        raise ConfigError(f"{folder} holds a plug, but no run to go on with: choose another --out, or --force")
    if found and not (resume or force):
        raise ConfigError(
            f"{folder} holds {found[0]} already: go on with --resume, replace it with --force, or choose another --out"
        )
    if force:
        (folder / "fit_examples.md").unlink(missing_ok=True)  # of the earlier plug's users
