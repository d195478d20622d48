"""A run's settings: one YAML file, overridden by key=value arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from persona_plug.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML alone reads it as a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(text: str) -> Any:  # noqa: ANN401
    """Return what a YAML text says."""
    return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)


def load(arguments: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """Merge defaults, the YAML file named first (if any) and key=value overrides; values are read as YAML.

    Raises:
        ConfigError: A key is unknown (the known ones are named) or the file is not a mapping.
    """
    settings = dict(defaults)
    for i, argument in enumerate(arguments):
        if i == 0 and "=" not in argument:
            path = Path(argument)
            if not path.is_file():
                raise ConfigError(f"{path}: no such config file")
            found = read_yaml(path.read_text(encoding="utf-8")) or {}
            if not isinstance(found, dict):
                raise ConfigError(f"{path}: a config is a mapping of settings")
        elif "=" in argument:
            key, _, value = argument.partition("=")
            found = {key: read_yaml(value)}
        else:
            raise ConfigError(f"{argument!r} is neither a config file nor key=value")
        if unknown := sorted(set(found) - set(defaults)):
            raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(defaults))}")
        settings.update(found)
    return settings
