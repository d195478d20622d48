import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import persona_plug
from persona_plug.data import RecordSet, _apt, _deb822, debian
from persona_plug.errors import ConfigError, DataError

ANN, BOB = "Ann Other <Ann@example.org>", "Bob Builder <bob@example.org>"
TEAM = "Debian Widget Team <widgets@lists.example.org>"
ARCHIVE = {"codename": "tiny", "date": "Sat, 01 Jan 2000 00:00:00 UTC"}


def stanza(name, maintainer=ANN, synopsis="sorts widgets", section="utils", **fields):
    lines = [f"Package: {name}", f"Maintainer: {maintainer}", f"Section: {section}", f"Description: {synopsis}"]
    return "\n".join(lines + [f"{key.replace('_', '-')}: {value}" for key, value in fields.items()])


def translation(name, md5, synopsis, *body):
    lines = [f"Package: {name}", f"Description-md5: {md5}", f"Description-en: {synopsis}"]
    return "\n".join(lines + [f" {line}" for line in body])


def package(name, maintainer=ANN, **changes):
    values = {"source": name, "section": "utils", "synopsis": f"tool that does {name}"}
    values["description"] = f"A description of {name} that is long enough to keep."
    return _deb822.Package(name=name, maintainer=maintainer, **{**values, **changes})


def assemble(packages, task="synopsis", **limits):
    return debian.assemble(packages, ARCHIVE, task, **{"min_packages": 1, "min_section": 1, **limits})


# --- reading the lists


def test_stanzas_keep_continuations_and_skip_what_is_no_field():
    text = "-----BEGIN SIGNED-----\nHash: X\n\nA: 1\nNot a field\n more of nothing\nB: x\n y: z\n .\n\n\n\n stray\nC: 3"
    assert _deb822.parse_stanzas(text) == [{"hash": "X"}, {"a": "1", "b": "x\ny: z\n."}, {"c": "3"}]
    assert _deb822.parse_stanzas(text, frozenset({"b"})) == [{"b": "x\ny: z\n."}]


def test_release_facts_come_from_a_signed_file():
    text = "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: Debian\nSuite: stable\nCodename: tiny\n"
    text += "Date: Sat, 11 Jul 2026 10:16:37 UTC\nMD5Sum:\n 0123 5 main/Packages\n-----BEGIN PGP SIGNATURE-----\n"
    assert _deb822.parse_release(text) == {
        "origin": "Debian",
        "suite": "stable",
        "codename": "tiny",
        "date": "Sat, 11 Jul 2026 10:16:37 UTC",
    }
    assert _deb822.parse_release("nothing") == {}


def test_long_description_comes_from_the_translation_with_the_same_checksum():
    packages = "\n\n".join(
        [
            stanza("one", section="contrib/net", Source="src (1.0)", Description_md5="aa"),
            stanza("two", Description_md5="bb") + "\n",
            stanza("three", synopsis="old style\n Told in the\n .\n list itself."),
        ]
    )
    translations = "\n\n".join(
        [
            translation("one", "zz", "sorts", "Of another version."),
            translation("one", "aa", "sorts", "Sorts  all", ".", "your   widgets.", " * fast"),
        ]
    )
    one, two, three = _deb822.parse_packages(packages, translations)
    assert (one.source, one.section) == ("src", "net")
    assert one.description == "Sorts all your widgets. * fast"
    assert (two.source, two.section, two.description) == ("two", "utils", "")
    assert (three.synopsis, three.description) == ("old style", "Told in the list itself.")


def test_original_maintainer_wins_on_a_derivative():
    text = stanza("one", maintainer="Derivative Developers <x@y.z>", Original_Maintainer=ANN)
    assert _deb822.parse_packages(text)[0].maintainer == ANN


def test_addresses_and_credit_lines_are_cut_out_of_descriptions():
    body = "Mails go to <someone.else+x@mail.example.org> now.\nAuthor: Jane Doe <jane@example.org>"
    body += "\nUpstream-Maintainer: J"
    assert _deb822.flatten_description(body) == "Mails go to now."


def test_one_binary_a_source_the_namesake_or_the_first_that_is_no_sibling():
    found = _deb822.pick_binaries(
        [
            package("foo-dev", source="foo"),
            package("foo", source="foo"),
            package("a-doc", source="bar"),
            package("python3-bar", source="bar"),
            package("zbar", source="bar"),
            package("abc", source="xyz"),
            package("xyz", source="xyz"),
            package("libx-dev", source="x"),
            package("libx-doc-html", source="x"),
        ]
    )
    assert [(p.source, p.name) for p in found] == [
        ("bar", "python3-bar"),
        ("foo", "foo"),
        ("x", "libx-dev"),
        ("xyz", "xyz"),
    ]


# --- who is who


@pytest.mark.parametrize(
    ("maintainer", "team"),
    [
        (ANN, False),
        ("Marc H <mh+debian-packages@example.org>", False),
        ("Christian Listman <chris@listman.example.org>", False),
        ("Jim <jim@debian.org>", False),
        (TEAM, True),
        ("X <pkg-x@alioth-lists.debian.net>", True),
        ("Nobody <team+x@tracker.debian.org>", True),
        ("Debian QA Group <packages@qa.debian.org>", True),
        ("Foo Maintainers <foo@example.org>", True),
        ("Some Group <some@example.org>", True),
        ("foo <foo@packages.debian.org>", True),
    ],
)
def test_teams_are_told_from_persons(maintainer, team):
    assert debian.is_team(maintainer) is team


def test_user_is_the_hash_of_the_lower_cased_address():
    expected = "deb-" + hashlib.sha256(b"ann@example.org").hexdigest()[:12]
    assert {r["user_id"] for r in assemble([package("one")]).records} == {expected}
    assert debian.split_maintainer("ANN@example.org") == ("", "ann@example.org")
    assert debian.split_maintainer('"Ann, O." <A@b.c>, Bob <d@e.f>') == ("Ann, O.", "a@b.c")


# --- the synopsis must not stand in the input


@pytest.mark.parametrize(
    ("text", "synopsis", "rest"),
    [
        ("Sorts widgets. It is fast.", "sorts  widgets", "It is fast."),
        ("It is a tool that sorts\n widgets quickly", "sorts widgets", "It is a tool that quickly"),
        ("sorts sorts widgets widgets now", "sorts widgets", "now"),
        ("resorts widgets", "sorts widgets", "resorts widgets"),
        ("sorts widgetsmith", "sorts widgets", "sorts widgetsmith"),
        ("- kept as it is", "absent", "- kept as it is"),
        ("C++ (a language) here", "c++ (a language)", "here"),
        ("anything", "", "anything"),
    ],
)
def test_cut_synopsis(text, synopsis, rest):
    assert debian.cut_synopsis(text, synopsis) == rest


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "A", "B.", "(a", "ß", "SS", "-", "aab"]), max_size=12)


@given(text=WORDS, synopsis=WORDS)
def test_no_record_has_its_synopsis_in_its_input(text, synopsis):
    rows = [
        package("one", description=" ".join(text), synopsis=" ".join(synopsis)),
        package("two"),  # so that a record is left
    ]
    records = assemble(rows).records
    assert "two" in {r["id"] for r in records}
    for record in records:
        assert record["output"].casefold() not in record["input"].casefold()


def test_synopsis_that_only_stands_inside_words_drops_the_package():
    found = assemble([package("one", synopsis="the", description="Theatre lists for you and them."), package("two")])
    assert [r["id"] for r in found.records] == ["two"]
    assert found.meta["dropped"] == {"synopsis_inside_a_word": 1}


# --- choosing


def test_every_source_is_a_record_or_counted_as_dropped():
    rows = [package(f"p{i}") for i in range(6)] + [package(f"q{i}", BOB) for i in range(3)]
    rows += [
        package("orphan", "Debian QA Group <packages@qa.debian.org>"),
        package("old", synopsis="transitional package for new"),
        package("short", description="Too few words."),
        package("twin", description=package("p1").description.upper()),
        package("credit", description="Thanks go to bob  BUILDER for this tool."),
        package("p0-doc", source="p0"),
    ]
    found = assemble(rows, min_packages=4, max_per_user=5)
    assert found.meta["dropped"] == {
        "duplicate_description": 1,
        "names_a_maintainer": 1,
        "orphaned": 1,
        "over_max_per_user": 1,
        "too_short": 1,
        "transitional": 1,
        "user_with_few_packages": 3,
    }
    counts = found.meta["counts"]
    assert counts["records"] + sum(found.meta["dropped"].values()) == counts["source_packages"] == 14
    assert (counts["binary_packages"], counts["users"], counts["items_per_user_median"]) == (15, 1, 5)
    assert found.meta["archive"] == ARCHIVE
    assert found.template.count("{input}") == 1


def test_section_task_keeps_persons_and_frequent_sections():
    rows = [package(f"n{i}", section="net") for i in range(3)] + [package(f"u{i}", BOB) for i in range(4)]
    rows += [package(f"t{i}", TEAM) for i in range(9)] + [package("rare", section="mail")]
    rows += [package("b-net", BOB, section="net")]
    found = assemble(rows, "section", min_packages=2, min_section=3)
    assert {(r["id"], r["output"]) for r in found.records} == {
        *((f"n{i}", "net") for i in range(3)),
        *((f"u{i}", "utils") for i in range(4)),
        ("b-net", "net"),
    }
    assert found.meta["labels"] == ["net", "utils"]
    assert "net, utils" in found.template
    assert found.meta["dropped"] == {"rare_section": 1, "team": 9}
    assert found.template.format(input="X").endswith("X")


def test_dropping_a_rare_section_can_take_a_user_and_another_section_along():
    rows = [package(f"a{i}", section="net") for i in range(2)] + [package("a9", section="mail")]
    rows += [package(f"b{i}", BOB) for i in range(4)] + [package("b9", BOB, section="net")]
    found = assemble(rows, "section", min_packages=3, min_section=3)
    assert {r["output"] for r in found.records} == {"utils"}
    assert found.meta["dropped"] == {"rare_section": 2, "user_with_few_packages": 2}


def test_limits_keep_whole_users_and_the_seed_chooses():
    people = [f"P{i} X <p{i}@example.org>" for i in range(12)]
    rows = [package(f"s{u}-{i}", person) for u, person in enumerate(people) for i in range(6)]
    first, again, other = (assemble(rows, max_users=4, max_per_user=3, seed=s) for s in (0, 0, 1))
    assert first == again
    assert {r["user_id"] for r in first.records} != {r["user_id"] for r in other.records}
    assert first.records == sorted(first.records, key=lambda r: (r["user_id"], r["id"]))
    assert first.meta["counts"]["users"] == 4
    assert first.meta["counts"]["items_per_user_min"] == first.meta["counts"]["items_per_user_max"] == 3
    everyone = assemble(rows, max_users=None, max_per_user=None)
    assert everyone.meta["counts"]["records"] == 72
    assert {r["id"] for r in first.records} <= {r["id"] for r in everyone.records}


@given(st.randoms(use_true_random=False))
def test_order_of_the_lists_does_not_matter(rng: random.Random):
    rows = [package(f"p{i}", (ANN, BOB, TEAM)[i % 3], source=f"s{i // 2}") for i in range(24)]
    rows += [package("p0", source="s0", description="Another text of the same name and source.")]
    expected = assemble(rows, max_per_user=3)
    rng.shuffle(rows)
    assert assemble(rows, max_per_user=3) == expected


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"task": "colour"}, "colour"),
        ({"min_packages": 0}, "min_packages"),
        ({"max_users": 0}, "max_users"),
        ({"max_per_user": 3, "min_packages": 4}, "max_per_user=3"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_fetched(arguments, word, monkeypatch):
    monkeypatch.setattr(debian, "fetch", lambda *_: pytest.fail("fetched"))
    with pytest.raises(ConfigError, match=word):
        debian.build(**arguments)


def test_no_user_left_is_an_error_that_names_the_limit():
    with pytest.raises(DataError, match="no maintainer has 5"):
        assemble([package("one")], min_packages=5)


SCRIPT = """
import sys, hashlib, json
from persona_plug.data import debian
rows = debian.parse_packages(sys.stdin.read())
for task in ("synopsis", "section"):
    s = debian.assemble(rows, {}, task, min_packages=1, min_section=1, max_users=3, max_per_user=2)
    print(hashlib.sha256(json.dumps([s.records, s.meta]).encode()).hexdigest())
assert not {"torch", "sklearn", "numpy"} & set(sys.modules)
"""


def test_result_does_not_depend_on_pythonhashseed_and_import_is_light():
    rows = [
        stanza(f"p{i}", f"A{i % 5} B <a{i % 5}@e.org>", f"tool {i}\n Text {i} of a tool for you.", f"s{i % 3}")
        for i in range(30)
    ]
    root = Path(persona_plug.__file__).parents[1]
    printed = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            input="\n\n".join(rows),
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert len(set(printed[0].split())) == 2


# --- writing


def test_write_makes_records_and_sidecar_and_nothing_else(tmp_path):
    found = assemble([package("one", synopsis="löst Dinge"), package("two")])
    path = found.write(tmp_path / "new" / "deeper" / "events.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found.records
    assert "löst" in lines[0]
    side = json.loads(path.with_suffix(".meta.json").read_text(encoding="utf-8"))
    assert (side["template"], side["meta"]) == (found.template, found.meta)
    assert side["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(p.name for p in path.parent.iterdir()) == ["events.jsonl", "events.meta.json"]


def test_failed_write_leaves_the_old_files(tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    RecordSet([{"a": 1}], "{input}", {}).write(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError, match="No space left"):
        RecordSet([{"a": 2}], "{input}", {}).write(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("record", [{"x": float("nan")}, {"x": object()}, {"x": "\ud800"}])
def test_what_has_no_json_form_is_refused(tmp_path, record):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "e.jsonl"))):
        RecordSet([record], "", {}).write(tmp_path / "e.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "e.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        RecordSet([], "", {}).write(tmp_path / "e.jsonl")


# --- choosing and fetching the lists


def target(release, suite, kind="Packages", size=10, component="main", architecture="amd64"):
    row = {"origin": "Debian", "label": "Debian", "codename": release, "suite": suite, "release": release}
    row |= {"component": component, "created-by": kind, "bytes": str(size)}
    if kind == "Packages":
        row["architecture"] = architecture
    return row | {"filename": f"{release}-{component}-{architecture}-{kind}"}


TARGETS = [
    target("tiny", "stable"),
    target("tiny", "stable", "Translations"),
    target("tiny", "stable", component="non-free", size=900),
    target("tiny", "stable", architecture="i386", size=900),
    target("tiny-updates", "stable-updates", size=99),
    target("tiny-security", "stable-security", size=999),
    target("next", "testing", size=5),
    target("void", "void", "Translations", size=999),
]


def test_the_largest_full_release_is_chosen_unless_one_is_named():
    def names(release):
        return [t["filename"] for t in _apt.choose_targets(TARGETS, release, "amd64")]

    full = ["tiny-main-amd64-Packages", "tiny-main-amd64-Translations"]
    assert names(None) == names("stable") == names("tiny") == full
    assert names("testing") == ["next-main-amd64-Packages"]
    assert names("stable-security") == ["tiny-security-main-amd64-Packages"]
    with pytest.raises(DataError, match=r"release 'sid' .*offered: next/testing, .*tiny/stable.*synthetic"):
        names("sid")


FAKE = """#!/bin/sh
config="$2"
state=$(sed -n 's/^Dir::State "\\(.*\\)";$/\\1/p' "$config")
case "$*" in
*update) test -d "$state/lists/partial" || exit 9
  printf 'Package: one\\nMaintainer: A B <a@b.c>\\nSection: net\\nDescription: says hello\\nDescription-md5: x\\n' \\
    > "$state/lists/tiny_Packages"
  printf 'Package: one\\nDescription-md5: x\\nDescription-en: says hello\\n Greets you in many a language.\\n' \\
    > "$state/lists/tiny_Translation-en"
  printf 'Origin: Other\\nCodename: tiny\\nDate: wrong\\n' > "$state/lists/a_Release"
  printf 'Origin: Debian\\nSuite: stable\\nCodename: tiny\\nDate: today\\n' > "$state/lists/b_InRelease"
  ;;
*indextargets) for kind in Packages Translations; do
  name=$kind; test $kind = Packages || name=Translation-en
  printf 'Created-By: %s\\nFilename: %s/lists/tiny_%s\\nComponent: main\\n' $kind "$state" $name
  printf 'Origin: Debian\\nSuite: stable\\nCodename: tiny\\nRelease: tiny\\n\\n'; done ;;
*) echo "A='amd64'" ;;
esac
"""


@pytest.fixture
def fake_apt(tmp_path, monkeypatch):
    """Put a stand-in for the apt client before the real one and watch the temporary folder."""

    def install(script):
        folder, scratch = tmp_path / "bin", tmp_path / "tmp"
        folder.mkdir()
        scratch.mkdir()
        for name in ("apt-get", "apt-config"):
            (folder / name).write_text(script)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setattr(tempfile, "tempdir", str(scratch))
        return scratch

    return install


def test_build_reads_what_apt_brought_and_leaves_nothing_behind(fake_apt):
    scratch = fake_apt(FAKE)
    found = debian.build(min_packages=1)
    assert [(r["input"], r["output"], r["id"]) for r in found.records] == [
        ("Greets you in many a language.", "says hello", "one")
    ]
    assert found.meta["archive"] == {
        "origin": "Debian",
        "suite": "stable",
        "codename": "tiny",
        "date": "today",
        "architecture": "amd64",
        "components": "main",
    }
    assert not list(scratch.iterdir())


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "#!/bin/sh\necho 'E: cannot reach http://me:secret@host/x' >&2; exit 100\n",
            r"apt-get failed \(E: cannot reach http://host/x",
        ),
        ("#!/bin/sh\necho 'W: Failed to fetch it' >&2\n", "Failed to fetch it.*unreachable"),
        ("#!/bin/sh\nsleep 60 & wait\n", "more than 0.3 s"),
    ],
)
def test_a_failing_apt_is_told_in_one_line_with_the_remedy(fake_apt, script, words):
    scratch = fake_apt(script)
    start = time.monotonic()
    with pytest.raises(DataError, match=words) as caught:
        _apt.fetch(timeout=0.3 if "sleep" in script else 30)
    assert time.monotonic() - start < 20  # what apt started went with it
    message = str(caught.value)
    assert "persona-plug data synthetic" in message
    assert "\n" not in message
    assert "secret" not in message
    assert not list(scratch.iterdir())


def test_no_apt_client_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"no apt client.*persona-plug data synthetic"):
        debian.build()


@pytest.mark.network
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt client")
def test_a_real_archive_gives_real_records(tmp_path):
    lists = Path("/var/lib/apt/lists")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in lists.glob("*") if p.is_file())
    found = debian.build(max_users=20, max_per_user=15)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in lists.glob("*") if p.is_file()) == before
    assert found.meta["counts"]["users"] == 20
    assert found.meta["counts"]["items_per_user_min"] >= 12
    assert found.meta["archive"]["date"]
    assert all(r["output"].casefold() not in r["input"].casefold() for r in found.records)
    assert not any("@" in r["user_id"] or re.search(r"\w@\w+\.\w", r["input"]) for r in found.records)
    assert sum(len(r["input"].split()) for r in found.records) / len(found.records) > 20
    assert found.write(tmp_path / "events.jsonl").stat().st_size > 10_000
