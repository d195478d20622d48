"""Titles and abstracts of RFCs as records."""

import gzip
import json
import shutil
import subprocess

import pytest

from persona_plug.data import rfc
from persona_plug.data._apt import source_line, unpack
from persona_plug.errors import ConfigError, DataError


def document(number, author="P. Resnick, Ed.", date="October 2008", **more):
    abstract = f"This document specifies\r\nthe part number {number} of a syntax. \r\n[STANDARDS-TRACK]"
    row = {"doc_id": f"RFC{number}", "title": f"Part {number}", "authors": [author], "abstract": abstract}
    return {**row, "pub_date": date, **more}


def documents(count=4, author="A. One", start=0, year=2000):
    return [document(start + i, author, f"May {year + i}") for i in range(count)]


def test_a_record_is_abstract_title_author_and_month():
    (record, *_) = rfc.assemble([document(1), document(2, "p. resnick")], {}, least=2).records
    assert record == {
        "user_id": rfc.hash_author("P. Resnick"),
        "input": "This document specifies the part number 1 of a syntax.",
        "output": "Part 1",
        "timestamp": "2008-10-01",
        "id": "RFC1",
    }
    assert "resnick" not in json.dumps(record).casefold()


@pytest.mark.parametrize(
    ("name", "alike"),
    [
        ("P. Resnick (Ed.)", True),
        ("P.  RESNICK", True),
        ("P. Resnick, Eds", True),
        ("Q. Resnick", False),
        ("Ed", False),
    ],
)
def test_one_author_is_one_user(name, alike):
    assert (rfc.hash_author(name) == rfc.hash_author("P. Resnick, Ed.")) == alike


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"authors": []}, "no_author"),
        ({"title": ""}, "too_short"),
        ({"abstract": "Too short."}, "too_short"),
        ({"abstract": None}, "too_short"),
        ({"title": "Syntax", "abstract": "About metasyntaxes that some people have in mind."}, "title_inside_a_word"),
        ({"pub_date": "sometime"}, "no_date"),
    ],
)
def test_what_gives_no_record_is_counted(change, reason):
    made = rfc.assemble([*documents(2), document(9, **change)], {}, least=2)
    assert made.meta["dropped"] == {reason: 1}
    assert made.meta["counts"]["records"] == 2


def test_the_title_is_cut_out_of_the_abstract():
    row = document(7, title="Message Format", abstract="Message format: this memo is about messages and their form.")
    records = rfc.assemble([row, document(8, "p. resnick")], {}, least=2).records
    assert records[0]["input"] == "this memo is about messages and their form."


def test_limits_keep_the_largest_authors_and_their_latest_documents():
    rows = documents(5) + documents(3, "B. Two", 10) + documents(1, "C. Three", 20)
    made = rfc.assemble(rows, {"origin": "x"}, least=2, max_users=1, max_per_user=3)
    assert [r["timestamp"][:4] for r in made.records] == ["2002", "2003", "2004"]
    assert made.meta["dropped"] == {"user_with_few_documents": 1, "over_max_users": 3, "over_max_per_user": 2}
    assert made.meta["archive"] == {"origin": "x"}
    assert made.records == rfc.assemble(rows[::-1], {}, least=2, max_users=1, max_per_user=3).records


def test_a_document_that_two_packages_hold_and_a_title_that_comes_again_count_once():
    again = document(9, "A. One", "May 2009", title="Part 1")
    made = rfc.assemble([*documents(2), *documents(2), again], {}, least=2)
    assert [(r["id"], r["output"]) for r in made.records] == [("RFC0", "Part 0"), ("RFC9", "Part 1")]
    assert made.meta["dropped"] == {"duplicate_title": 1}


def test_what_cannot_work_is_refused():
    with pytest.raises(DataError, match="no author has 5 usable documents in these packages; lower least"):
        rfc.assemble(documents(4), {})
    for arguments in ({"least": 1}, {"max_users": -1}, {"max_per_user": -1}):
        with pytest.raises(ConfigError, match="at least"):
            rfc.assemble(documents(9), {}, **arguments)


TARGET = {"origin": "Debian", "component": "main", "created-by": "Packages", "release": "bookworm", "repo-uri": "URI/"}


def test_the_private_source_is_the_release_that_apt_knows():
    others = [{**TARGET, "origin": "Other"}, {**TARGET, "release": "bookworm-updates"}, {**TARGET, "component": "x"}]
    line = source_line([*others, TARGET], "non-free")
    assert line.startswith("deb ")
    assert line.endswith(" URI/ bookworm non-free") or line == "deb URI/ bookworm non-free"
    with pytest.raises(DataError, match="apt's sources name no whole Debian release"):
        source_line(others, "non-free")


def test_files_of_a_package_are_read(tmp_path):
    root = tmp_path / "package"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    )
    (root / "usr").mkdir()
    (root / "usr" / "one.json").write_bytes(b"1")
    (root / "usr" / "two.json.gz").write_bytes(gzip.compress(b"2"))
    (root / "usr" / "three.txt").write_bytes(b"3")
    file = tmp_path / "a.deb"
    subprocess.run([shutil.which("dpkg-deb"), "-b", str(root), str(file)], check=True, capture_output=True)
    assert sorted(unpack(file, ".json")) == [b"1", b"2"]
    assert next(unpack(file, ".json"))  # one may stop early
    file.write_bytes(b"no package")
    with pytest.raises(DataError, match=r"a.deb: no Debian package"):
        list(unpack(file, ".json"))
