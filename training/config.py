"""A run's settings: one YAML file, overridden by key=value arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from persona_plug.errors import ConfigError


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
            found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            if not isinstance(found, dict):
                raise ConfigError(f"{path}: a config is a mapping of settings")
        elif "=" in argument:
            key, _, value = argument.partition("=")
            found = {key: yaml.safe_load(value)}
        else:
            raise ConfigError(f"{argument!r} is neither a config file nor key=value")
        if unknown := sorted(set(found) - set(defaults)):
            raise ConfigError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(defaults))}")
        settings.update(found)
    return settings
