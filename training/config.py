"""Settings of a command: a frozen, checked dataclass, read from one YAML file and key=value arguments."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from persona_plug.config import field_texts
from persona_plug.errors import ConfigError, PersonaPlugError, unknown_setting
from persona_plug.files import STOPPED, write_any_text

logger = logging.getLogger(__name__)

_WORDS = {str: ("a text", "texts"), int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}
_UNIONS = (UnionType, Union)  # `int | None`, and the same of a Literal


@dataclass(frozen=True)
class Settings:
    """Base of a command's settings, whose docstring describes each field under `Attributes:`.

    A field is a `str`, `int`, `float`, `bool`, a `Literal` of texts, a `tuple` or a `Mapping`, or one of them or None.
    Lists become tuples, and mappings are copied.
    """

    def __post_init__(self) -> None:
        """Refuse values of another type than the field's, and values that cannot work."""
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, _typed(value, hint))
            except TypeError:
                raise ConfigError(f"{name}={value!r} {_requirement(hint)}") from None
        self.check()

    def check(self) -> None:
        """Refuse values that cannot work; a subclass extends it."""

    @classmethod
    def entries(cls) -> dict[str, list[tuple[str, str, str]]]:
        """Return what the mappings among the fields may hold: field -> rows as those of `describe`."""
        return {}

    def require_at_least(self, least: float, *names: str) -> None:
        """Refuse fields below a bound; None passes.

        Raises:
            ConfigError: A field is too small; the message names it.
        """
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value!r} must be at least {least}")


S = TypeVar("S", bound=Settings)


def load(arguments: Sequence[str], kind: type[S], shared: bool = False) -> S:
    """Read settings from the YAML file named first (if any) and from key=value arguments, which win.

    Values are read as YAML. A name with a dot changes one entry of a mapping: `fit.steps=40`.

    Args:
        arguments: Those of the command line.
        kind: The command's settings.
        shared: Whether the file serves other commands, too. It may then hold names that `kind` lacks: they are passed
            over, and a warning lists them.

    Raises:
        ConfigError: A name is unknown (the known ones are listed), a value is impossible, or the file is no mapping.
    """
    hints, values = get_type_hints(kind), dict[str, Any]()
    for position, argument in enumerate(arguments):
        name, assigns, text = argument.partition("=")
        if assigns:
            _assign(values, hints, name, _parse(name, text, hints))
        elif position == 0 and not argument.startswith("-"):
            content = _read_file(Path(argument))
            if shared and (foreign := [n for n in content if n.partition(".")[0] not in hints]):
                logger.warning("%s: passed over, as settings of other commands: %s", argument, ", ".join(foreign))
                content = {n: value for n, value in content.items() if n not in foreign}
            for name, value in content.items():
                _assign(values, hints, name, value)
        else:
            raise ConfigError(f"{argument!r} is neither a config file nor key=value; see --help")
    return kind(**values)


def run_command(
    main: Callable[[Sequence[str]], None],
    kind: type[Settings] | None = None,
    failure: int = 1,
    resumes: bool = False,
) -> None:
    """Run a module's `main` as a command: errors are one line, and `--help` shows the settings.

    Exits with 2 where an argument or setting is wrong, with `failure` after any other error that is raised on purpose,
    and with 130 after Ctrl-C, with a line on how to go on.

    Args:
        main: Takes the arguments.
        kind: The command's settings; None where `main` itself answers `--help`.
        failure: Exit code of errors that are not about settings.
        resumes: Whether the same command goes on where it was stopped.
    """
    arguments = sys.argv[1:]
    write_any_text()
    if kind and {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text(kind))
        return
    logging.basicConfig(level=logging.WARNING)
    try:
        main(arguments)
    except PersonaPlugError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else failure)
    except KeyboardInterrupt:
        sys.stderr.write(f"\nstopped{'; the same command goes on from there' if resumes else ''}\n")
        sys.exit(STOPPED)


def help_text(kind: type[Settings]) -> str:
    """Return the settings of a command with defaults and descriptions, for a terminal."""
    lines = [(inspect.getdoc(kind) or "").partition("\n")[0], ""]
    rows = [*describe(kind), *((f"{name}.{n}", *rest) for name, of in kind.entries().items() for n, *rest in of)]
    for name, default, description in rows:
        lines += [
            f"  {name}={default}",
            *textwrap.wrap(description, 100, initial_indent=" " * 6, subsequent_indent=" " * 6),
        ]
    return "\n".join(lines) + "\n"


def describe(kind: type[Any]) -> list[tuple[str, str, str]]:
    """Return (name, default as YAML, description) of each field of a dataclass that has a default.

    Descriptions are those under `Attributes:` in the docstrings of the class and of the classes that it extends.
    """
    texts = field_texts(kind)
    rows = []
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        default = factory() if factory is not MISSING else field.default
        if default is not MISSING:
            rows.append((field.name, _as_yaml(default), texts[field.name]))
    return rows


def read_yaml(text: str) -> Any:  # noqa: ANN401
    """Return what a YAML text says."""
    return yaml.load(text, _Loader)  # noqa: S506 (it is a SafeLoader)


def yaml_problem(exc: Exception) -> str:
    """Return in words what is wrong with a YAML text, and where."""
    problem, mark = getattr(exc, "problem", None), getattr(exc, "problem_mark", None)
    if problem is None:
        return " ".join(str(exc).split())
    return problem if mark is None else f"{problem}, line {mark.line + 1}, column {mark.column + 1}"


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in YAML 1.2; PyYAML alone reads it as a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: not YAML ({yaml_problem(exc)})") from exc
    if not isinstance(content, dict | type(None)):
        raise ConfigError(f"{path}: a config is a mapping of settings")
    return {str(name): value for name, value in (content or {}).items()}


def _parse(name: str, text: str, hints: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the value of an argument. What stands for a text is one, even where YAML reads a number or a date."""
    try:
        value = read_yaml(text)
    except yaml.YAMLError as exc:
        raise ConfigError(
            f"{name}={text}: not YAML ({yaml_problem(exc)}); quote the value, or close its brackets"
        ) from exc
    is_text = str in (hints.get(name), *get_args(hints.get(name))) and get_origin(hints[name]) in (None, *_UNIONS)
    return text if is_text and value is not None and not isinstance(value, str) else value


def _assign(values: dict[str, Any], hints: Mapping[str, Any], name: str, value: object) -> None:
    """Set a setting, or with dots in its name one entry of a mapping."""
    field, *keys = name.split(".")
    if field not in hints:
        raise unknown_setting(field, sorted(hints))
    if keys and get_origin(hints[field]) is not Mapping:
        mappings = [n for n, hint in hints.items() if get_origin(hint) is Mapping]
        raise ConfigError(f"{name}: {field} has no entries; those with entries are {', '.join(mappings) or 'none'}")
    values[field] = _with_entry(values.get(field, {}), keys, value, name)


def _with_entry(mapping: object, keys: Sequence[str], value: object, name: str) -> object:
    """Return a copy of nested mappings with one entry set; without keys the value itself."""
    if not keys:
        return value
    if not isinstance(mapping, dict):
        raise ConfigError(f"{name}: {mapping!r} has no entries, as it is no mapping")
    return {**mapping, keys[0]: _with_entry(mapping.get(keys[0], {}), keys[1:], value, name)}


def _typed(value: object, hint: Any) -> object:  # noqa: ANN401
    """Return a value as its type has it.

    Raises:
        TypeError: It is none of that type.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return None if value is None else _typed(value, parts[0])
    if origin is Literal and value in parts and isinstance(value, str):
        return value
    if origin is tuple and isinstance(value, list | tuple) and (parts[-1] is Ellipsis or len(value) == len(parts)):
        return tuple(_typed(item, parts[0]) for item in value)
    if origin is Mapping and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return dict(value)
    same = type(value) is hint or (hint is float and type(value) is int)
    if same and (not isinstance(value, float) or math.isfinite(value)):
        return value
    raise TypeError


def _requirement(hint: Any) -> str:  # noqa: ANN401
    """Say what a value of a type must be."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return f"{_requirement(parts[0])}, or null"
    if origin is Literal:
        return f"is not one of {', '.join(parts)}"
    if origin is tuple:
        return f"must be a list of {_plural(parts[0])}"
    if origin is Mapping:
        return "must be a mapping such as {name: value}"
    return "must be true or false" if hint is bool else f"must be {_WORDS[hint][0]}"


def _plural(hint: Any) -> str:  # noqa: ANN401
    if get_origin(hint) is tuple:
        return f"lists of {len(get_args(hint))} {_plural(get_args(hint)[0])}"
    return ", ".join(get_args(hint)) if get_origin(hint) is Literal else _WORDS[hint][1]


def _as_yaml(value: object) -> str:
    plain = json.loads(json.dumps(value))
    return str(yaml.safe_dump([plain], default_flow_style=True, width=10_000)).strip()[1:-1]
