"""Fields of a dataclass as options of a command: each setting can be given, and `--help` says what it is."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from persona_plug.config import SETTABLE, PlugConfig, field_texts
from persona_plug.errors import ConfigError
from persona_plug.fit.config import FitConfig

PLUG = tuple(name for name in SETTABLE if name != "recipe")  # which has an option of its own
TRAINING = tuple(field.name for field in dataclasses.fields(FitConfig))
_TYPES: dict[str, Any] = {"int": int, "float": float, "bool": bool, "str": str, "int | None": int}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Add every setting of a plug and of its training to the options of a command, which gets them as `**settings`."""
    own = inspect.signature(command, eval_str=True)
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [*_options(PlugConfig, PLUG, "Plug"), *_options(FitConfig, TRAINING, "Training")]

    @functools.wraps(command)
    def run(**values: Any) -> None:  # noqa: ANN401
        command(**values)

    run.__signature__ = own.replace(parameters=[*named, *added])  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {p.name: p.annotation for p in [*named, *added]} | {"return": None}
    return run


def plug_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of a command's settings that are the plug's.

    Raises:
        ConfigError: A setting that is an object is no JSON.
    """
    found = {name: settings[name] for name in PLUG}
    for field in dataclasses.fields(PlugConfig):
        if field.name in found and str(field.type) not in _TYPES and found[field.name] is not None:
            found[field.name] = _object(field.name, found[field.name])
    return found


def training_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of a command's settings that are the training's."""
    return {name: settings[name] for name in TRAINING}


def _options(kind: type[Any], names: Collection[str], whose: str) -> list[inspect.Parameter]:
    """Return keyword parameters for fields of a dataclass; without a value the dataclass or its recipe decides."""
    texts = field_texts(kind)
    options = []
    for field in dataclasses.fields(kind):
        if field.name in names:
            plain = str(field.type) in _TYPES
            about = f"{whose}: {texts.get(field.name, '')}" + ("" if plain else " As JSON.")
            default = field.default if plain else "{}"
            hint: Any = _TYPES.get(str(field.type), str) | None
            options.append(
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=None,
                    annotation=Annotated[hint, typer.Option(help=f"{about} [{default}]")],
                )
            )
    return options


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        option = name.replace("_", "-")
        raise ConfigError(f'--{option} must be a JSON object such as {{"enable_thinking": false}}, got {text!r:.60}')
    return value
