"""Errors a user can meet: one line each, naming the cause and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_DIGITS = re.compile(r"\d+")


class PersonaPlugError(Exception):
    """Base of every error that persona_plug raises on purpose; the CLI prints it as one line."""


class ConfigError(PersonaPlugError):
    """A configuration value is missing, unknown, out of range or contradicts another one."""


class DataError(PersonaPlugError):
    """A record, file or field cannot be used; the message names it."""


class ModelUnavailable(PersonaPlugError):
    """Weights are neither in the cache nor obtainable; the message says what to do."""


class MismatchError(PersonaPlugError):
    """Saved and present parts do not belong together (encoder, LLM, width); both fingerprints are shown."""


class CorruptFileError(PersonaPlugError):
    """A saved file is truncated, altered or not what its name says."""


def nearest(name: object, known: Iterable[str], lead: str = ", ") -> str:
    """Return "did you mean ...?" behind `lead`, with the known name that is most like a wrong one; or nothing.

    Names with other numbers in them are no misspellings of each other.
    """
    wrong = str(name).casefold()
    numbers = _DIGITS.findall(wrong)
    names = {one.casefold(): one for one in known if _DIGITS.findall(one) == numbers}
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    return f"{lead}did you mean {names[near[0]]!r}?" if near else ""


def unknown_setting(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error about a setting that does not exist; it names the nearest one, if any is near, and all."""
    names = list(known)
    return ConfigError(f"unknown setting {name!r}{nearest(name, names) or ';'} known are {', '.join(names)}")


def first_line(message: object) -> str:
    """Return the first line of an exception's or a server's message that is not empty, for a one-line error.

    A line that ends in a colon announces the next, which follows it.
    """
    nothing = type(message).__name__ if isinstance(message, BaseException) else "no reason given"
    lines = [line.strip() for line in str(message).splitlines() if line.strip()] or [nothing]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
