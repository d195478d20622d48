"""Settings of a command: read from a file and arguments, typed, checked, and shown by --help."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from persona_plug.errors import ConfigError, DataError
from training.config import Settings, describe, help_text, load, read_yaml, run_command


@dataclass(frozen=True, kw_only=True)
class Wide(Settings):
    """Settings of nothing.

    Attributes:
        name: A name,
            over two lines.
        count: A count.
        share: A share.
        on: A switch.
        kind: A kind.
        rates: Rates.
        pairs: Pairs.
        table: A table.
        limit: A limit.
        form: A form.
    """

    name: str = "x"
    count: int = 1
    share: float = 0.5
    on: bool = False
    kind: Literal["a", "b"] = "a"
    rates: tuple[float, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    table: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    form: Literal["c", "d"] | None = None


@dataclass(frozen=True, kw_only=True)
class Wider(Wide):
    """Settings of more.

    Attributes:
        more: More.
    """

    more: int = 2


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("count=x", "count='x' must be a whole number"),
        ("count=1.5", "count=1.5 must be a whole number"),
        ("count=true", "count=True must be a whole number"),
        ("count=null", "count=None must be a whole number"),
        ("share=half", "share='half' must be a number"),
        ("share=.inf", "share=inf must be a number"),
        ("share=.nan", "share=nan must be a number"),
        ("on=1", "on=1 must be true or false"),
        ("kind=c", "kind='c' is not one of a, b"),
        ("kind=[a]", r"kind=\['a'\] is not one of a, b"),
        ("rates=3", "rates=3 must be a list of numbers"),
        ("rates=[x]", r"rates=\['x'\] must be a list of numbers"),
        ("pairs=[[a]]", r"must be a list of lists of 2 texts"),
        ("table=3", "table=3 must be a mapping such as"),
        ("table={1: 2}", "must be a mapping such as"),
        ("limit=x", "limit='x' must be a whole number, or null"),
        ("form=a", "form='a' is not one of c, d, or null"),
        ("name=null", "name=None must be a text"),
        ("nam=3", r"unknown setting 'nam', did you mean 'name'\? known are count, .*table"),
        ("nonsense=1", "unknown setting 'nonsense'; known are count, .*table"),
        ("nonsense.x=1", "unknown setting 'nonsense'; known are"),
        ("rates.x=1", "rates.x: rates has no entries; those with entries are table"),
        ("table={a: [", r"table=\{a: \[: not YAML .*; quote the value"),
        ("--nonsense", "'--nonsense' is neither a config file nor key=value; see --help"),
        ("missing.yaml", r"missing.yaml: no such config file"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(argument, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        load([argument], Wide)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not YAML"), ("- 1", "mapping of settings"), ("count: x", "count='x' must be")]
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load([str(path)], Wide)


def test_a_second_file_is_none(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 2\n")
    assert load([str(path)], Wide).count == 2
    with pytest.raises(ConfigError, match="is neither"):
        load([str(path), str(path)], Wide)


def test_every_type_is_read_as_it_is_declared():
    arguments = ["count=3", "share=1", "on=true", "kind=b", "rates=[1e-3, 2]", "pairs=[[a, b]]", "limit=4", "form=d"]
    found = load([*arguments, "table={a: {b: 1}}"], Wide)
    assert (found.count, found.share, found.on, found.kind, found.limit, found.form) == (3, 1, True, "b", 4, "d")
    assert (found.rates, found.pairs, found.table) == ((0.001, 2), (("a", "b"),), {"a": {"b": 1}})


@pytest.mark.parametrize("text", ["2026", "2026-11-25", "on", "1e3"])
def test_a_text_stays_a_text(text):
    assert load([f"name={text}"], Wide).name == text


def test_a_file_is_read_and_arguments_win(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("count: 3\nkind: b\n")
    found = load([str(path), "kind=a"], Wide)
    assert (found.count, found.kind, found.share) == (3, "a", 0.5)


def test_a_dot_changes_one_entry_of_a_mapping(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("table: {a: 1, b: {c: 2, d: 3}}\ntable.e: 4\n")
    assert load([str(path), "table.a=5", "table.b.c=6"], Wide).table == {"a": 5, "b": {"c": 6, "d": 3}, "e": 4}
    assert load([str(path), "table={a: 5}"], Wide).table == {"a": 5}
    assert load(["table.x.y=1"], Wide).table == {"x": {"y": 1}}
    with pytest.raises(ConfigError, match=r"table.a.x: 1 has no entries"):
        load([str(path), "table.a.x=5"], Wide)


def test_a_shared_file_may_hold_what_is_not_read_here_and_it_is_named(tmp_path, caplog):
    path = tmp_path / "c.yaml"
    path.write_text("count: 3\nmore: 4\nother.entry: 5\n")
    assert load([str(path)], Wide, shared=True).count == 3
    assert "passed over, as settings of other commands: more, other.entry" in caplog.text
    with pytest.raises(ConfigError, match="unknown setting 'more'"):
        load([str(path)], Wide)
    with pytest.raises(ConfigError, match="unknown setting 'more'"):
        load(["more=4"], Wide, shared=True)  # an argument is meant for this command


def test_a_mapping_is_copied():
    table = {"a": 1}
    found = Wide(table=table)
    table["a"] = 2
    assert found.table == {"a": 1}


def test_numbers_with_an_exponent_are_numbers():
    """PyYAML reads 1e-3 as a text; a learning rate is a number."""
    assert read_yaml("[3e-4, 1E-3, 2.5e+1, 1e]") == [3e-4, 1e-3, 25.0, "1e"]


def test_help_describes_every_field_inherited_ones_included():
    rows = {name: (default, text) for name, default, text in describe(Wider)}
    assert rows["name"] == ("x", "A name, over two lines.")
    assert (rows["table"], rows["limit"], rows["more"]) == (("{}", "A table."), ("null", "A limit."), ("2", "More."))
    assert help_text(Wider).startswith("Settings of more.\n\n  name=x\n      A name, over two lines.\n")


def test_a_field_without_a_description_is_an_error():
    @dataclass(frozen=True)
    class Silent(Settings):
        """Settings without words."""

        count: int = 1

    with pytest.raises(KeyError, match="count"):
        describe(Silent)


@pytest.mark.parametrize(
    ("error", "failure", "code"), [(ConfigError, 1, 2), (DataError, 1, 1), (DataError, 2, 2), (None, 1, 0)]
)
def test_a_command_ends_with_one_line_and_a_code(monkeypatch, capsys, error, failure, code):
    def main(arguments):
        assert arguments == ["count=1"]
        if error:
            raise error("what is wrong; what to do")

    monkeypatch.setattr(sys, "argv", ["command", "count=1"])
    try:
        run_command(main, Wide, failure)
        ended = 0
    except SystemExit as end:
        ended = end.code
    assert ended == code
    assert capsys.readouterr().err == ("error: what is wrong; what to do\n" if error else "")


def test_an_error_that_nobody_raised_on_purpose_keeps_its_trace(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(lambda arguments: 1 / 0, Wide)


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_runs_nothing(monkeypatch, capsys, flag):
    monkeypatch.setattr(sys, "argv", ["command", "count=1", flag])
    run_command(lambda arguments: pytest.fail("it ran"), Wide)
    assert capsys.readouterr().out == help_text(Wide)


@pytest.mark.parametrize("text", ["[none", "{a: 1", "[a, b}", "'open", "a: b: c", "@x", "[1, 2]]"])
def test_broken_yaml_is_told_in_words(text):
    with pytest.raises(ConfigError, match=r"^rates=.*: not YAML \(") as refusal:
        load([f"rates={text}"], Wide)
    said = str(refusal.value)
    assert "unicode string" not in said
    assert "\n" not in said
