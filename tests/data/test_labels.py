import re

import pytest

from persona_plug.data.labels import detect_answers, label_of, levels_of
from persona_plug.data.splits import prepare
from persona_plug.errors import DataError


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("5", "5"), ("5.0", "5"), ("5,0", "5"), ("5.00", "5"), (" 5 ", "5"), ("4,5", "4.5"), ("4.5", "4.5"),
        ("-1.0", "-1"), ("0", "0"), ("0.5", "0.5"), ("10.0", "10"),
        ("007", "007"), ("1,000", "1,000"), ("1.000", "1.000"), ("yes ", "yes"), ("Yes", "Yes"), ("5 stars", "5 stars"),
        ("", ""), ("5.", "5."), ("1.2.3", "1.2.3"),
    ],
)  # fmt: skip
def test_canonical_spelling(output, label):
    assert label_of(output) == label
    assert label_of(label) == label


@pytest.mark.parametrize(
    ("answers", "levels"),
    [
        (("1", "2", "5"), [1.0, 2.0, 5.0]),
        (("-0.5", "1e1"), [-0.5, 10.0]),
        (("5", "1"), [5.0, 1.0]),
        (("1", "two"), None),
        (("1", "nan"), None),
        (("1", "inf"), None),
        ((), None),
        (None, None),
    ],
)
def test_only_numbers_have_levels(answers, levels):
    assert levels_of(answers) == levels


def records(outputs, users=6, items=5):
    return [
        {"user_id": f"u{n % users}", "input": f"q {n}", "output": outputs[n % len(outputs)]}
        for n in range(users * items)
    ]


@pytest.mark.parametrize("outputs", [(5, 5.0, 1), ("5", "5.0", "1"), ("5", "5,0", 1.0), ("5", " 5 ", "1.0")])
def test_spellings_of_a_number_are_one_label(outputs):
    data = prepare(records(outputs))
    assert data.answers == ("1", "5")
    parts = (*data.train, *data.valid, *data.held_out)
    assert len(parts) == 30
    assert {e.output for e in parts} == {"1", "5"} == {i.output for e in parts for i in e.history}


def test_given_answers_keep_their_spelling():
    data = prepare(records(("5", "4,5", "1")), answers=["5.0", "4.5", "1.0"])
    assert {e.output for e in data.train} == {"5.0", "4.5", "1.0"} == {i.output for e in data.train for i in e.history}


ALIKE = [("Yes", "yes"), ("not bad", "not  bad"), ("No", "NO"), ("5", "05"), ("5", "+5"), ("4.5", "4.50"), ("5", "5.")]
ALIKE += [("caf\u00e9", "cafe\u0301"), ("good", "\uff47ood"), ("good", "go\u200bod"), ("5", "\u0665")]


@pytest.mark.parametrize("pair", ALIKE)
def test_labels_that_look_alike_are_refused_by_name(pair):
    outputs = (*pair, "other")
    with pytest.raises(
        DataError, match="differ in letter case, white space or spelling only; make them one, or name the answers"
    ):
        detect_answers(outputs * 10)
    with pytest.raises(DataError, match=re.escape(repr(pair[1]))):
        prepare(records(outputs))
    left = prepare(records(outputs, items=8), answers=[pair[0], "other"]).notes
    assert any("differ from one in letter case, white space or spelling only, first" in note for note in left)
    assert len(prepare(records(outputs), answers=[*pair, "other"]).answers) == 3


def test_answers_that_match_nothing_are_refused_before_work():
    with pytest.raises(
        DataError, match=r"training samples left out.*none is left, the first output is '(Yes|No)': name"
    ):
        prepare(records(("Yes", "No")), answers=["yes", "no"])
