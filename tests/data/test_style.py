"""The style card: what a user does, and others do not."""

import random

import pytest

from persona_plug.data.style import style_of

BODIES = [
    "the parcel left our house today",
    "please send one photo of the damage",
    "your money is on its way to you",
    "we looked into it at once",
    "the desk has opened a ticket",
    "nothing else is needed from your side",
]


def replies(opening, closing, count=12, seed=0, change=str):
    draw = random.Random(seed)  # noqa: S311
    names = ["Ben", "Wei", "Ada", "Max", "Ida"]
    return [change(f"{opening} {draw.choice(names)}, {draw.choice(BODIES)}. {closing}") for _ in range(count)]


OTHERS = [text for i, pair in enumerate([("Hello", "Regards, Ann"), ("Hi", "Cheers Bo"), ("Dear", "Best wishes, Cy")])
          for text in replies(*pair, seed=i + 1)]  # fmt: skip


@pytest.mark.parametrize(
    ("opening", "closing", "emoji"),
    [
        ("Servus", "Sunny greetings! Ramona 🌳", ["🌳"]),
        ("Oh wonderful", "Much obliged, Valerie", []),
        ("Moin moin", "ciao 👩‍🔬 :)", [":)", "👩‍🔬"]),
        ("¡Hola!", "abrazos 🇪🇸", ["🇪🇸"]),
    ],
)
def test_openings_closings_and_emoji_are_the_users_own(opening, closing, emoji):
    style = style_of(replies(opening, closing), OTHERS)
    assert style.openings[0].text == opening
    assert style.openings[0].share == 1
    assert style.openings[0].others == 0
    assert style.closings[0].text.endswith(closing)
    assert sorted(h.text for h in style.emoji) == sorted(emoji)
    assert (style.texts, style.others) == (12, 36)
    assert style.labels == []


@pytest.mark.parametrize(("count", "others"), [(10, 40), (100, 4), (40, 40)])
def test_what_all_do_is_nobodys_habit(count, others):
    shared = ["Hello Ben, see you. Regards"]
    style = style_of(shared * count, shared * others)
    assert style.openings == style.closings == style.phrases == []


def test_phrases_are_no_parts_of_openings_closings_or_each_other():
    own = [f"Ahoy, {b}, as the old captain said, and {c}. Yours" for b in BODIES for c in BODIES[:2]]
    style = style_of(own, OTHERS)
    phrases = [h.text for h in style.phrases]
    assert phrases[0] == "as the old captain said, and"
    seen = [h.text for h in (*style.openings, *style.closings, *style.phrases)]
    assert not [(a, b) for a in seen for b in seen if a is not b and f" {a} " in f" {b} "]


@pytest.mark.parametrize(
    ("change", "case"), [(str.lower, "all lower case"), (str.upper, "ALL CAPITALS"), (str, "usual case")]
)
def test_letter_case(change, case):
    style = style_of(replies("Servus", "Ramona", change=change), OTHERS)
    assert (style.case.text, style.case.share) == (case, 1)


def test_length_is_the_usual_one_and_its_range():
    style = style_of([" ".join(["word"] * n) for n in range(1, 12)], ["a b c"] * 3)
    assert style.words == (2, 6, 10)
    assert style.others_words == 3


@pytest.mark.parametrize(("own", "theirs", "habit"), [("5", "1", "5"), ("great film", "dull film", "great film")])
def test_labels_have_label_habits(own, theirs, habit):
    style = style_of([own] * 9 + [theirs], [theirs] * 30 + [own] * 10)
    assert [h.text for h in style.labels] == [habit]
    assert (style.labels[0].share, style.labels[0].others) == (0.9, 0.25)
    assert style.openings == style.phrases == []


@pytest.mark.parametrize("texts", [["hello"], ["one text alone"], [""], ["🌳"], ["Hi", "Hi"], ["Hi", "HO"]])
def test_few_texts_and_no_others_are_no_error(texts):
    for others in ([], ["Dear Sir"], OTHERS):
        assert style_of(texts, others).texts == len(texts)


def test_the_card_reads_as_lines():
    lines = str(style_of(replies("Servus", "Sunny greetings! Ramona 🌳"), OTHERS)).splitlines()
    assert lines[0] == "12 texts, compared with 36 of other users"
    assert any(line.startswith("openings  Servus  (100% of texts; others 0%)") for line in lines)
    assert any(line.startswith("emoji     🌳") for line in lines)


def test_the_card_changes_with_the_texts_and_with_nothing_else():
    texts = replies("Servus", "Ramona")
    assert style_of(texts, OTHERS) == style_of(list(reversed(texts)), list(reversed(OTHERS)))
    assert style_of(texts[:6], OTHERS) != style_of(texts, OTHERS)
