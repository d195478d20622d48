"""Words that an answer shares with its request, and where they go in another request."""

import pytest
import torch

from persona_plug.heads.slots import (
    SHAPE_WEIGHTS,
    SHAPES,
    SPAN_WORDS,
    common_words,
    find_slots,
    place,
    shape,
    split_words,
    word_shapes,
)

COMMON = frozenset({"the", "my", "is"})


def texts(request, answer, common=COMMON):
    return [(answer[s.start : s.end], s.form) for s in find_slots(request, answer, common)]


@pytest.mark.parametrize(
    ("request_", "answer", "expected"),
    [
        ("I am Ben. My lamp is late.", "Hi Ben, sorry about the lamp!", [("Ben", "same"), ("lamp", "same")]),
        ("I am Ben.", "hey ben", [("ben", "lower")]),
        ("i am ben", "Hey Ben", [("Ben", "title")]),
        ("the blue yoga mat", "Your blue yoga mat is here", [("blue yoga mat", "same")]),
        ("the mat", "the mat", [("mat", "same")]),
        ("the mat is", "THE MAT IS", [("MAT", "upper")]),
        ("order 12-34", "Order 12-34 left", [("Order 12-34", "title")]),
        ("the yoga mat", "Yoga mat!", [("Yoga mat", "capital")]),
        ("Grüße aus Köln", "KÖLN!", [("KÖLN", "upper")]),
        ("nothing", "in common", []),
        ("", "words", []),
    ],
)
def test_slots_are_the_longest_runs_that_the_request_holds(request_, answer, expected):
    assert texts(request_, answer) == expected


def test_a_run_is_no_longer_than_its_limit():
    text = " ".join(f"w{i}" for i in range(SPAN_WORDS + 2))
    assert [len(slot.split()) for slot, _ in texts(text, text)] == [SPAN_WORDS, 2]


def test_a_slot_names_its_words_in_the_request():
    (slot,) = find_slots("say the yoga mat please", "yoga mat", COMMON)
    assert (slot.first, slot.last) == (2, 3)


def test_common_words_are_those_of_many_texts():
    assert common_words(["the cat", "the dog", "The bird", "a fish"], 0.5) == frozenset({"the"})


@pytest.mark.parametrize(
    ("form", "text"),
    [("lower", "ann lee"), ("upper", "ANN LEE"), ("title", "Ann Lee"), ("capital", "Ann LEE"), ("same", "ann LEE")],
)
def test_a_text_takes_the_slots_form(form, text):
    assert shape("ann LEE", form) == text


def test_a_slot_goes_to_the_nearest_words_in_order():
    states = torch.eye(4)
    assert place(states[1], states[2], states, [True] * 4) == (1, 2, 1.0)
    assert place(states[2], states[1], states, [True] * 4)[:2] != (2, 1)
    assert place(states[1], states[1], states, [True, False, True, True]) is None
    assert place(states[1] + states[2], states[1], states, [True] * 4)[2] == 1.0
    assert place(states[1], states[1], states, [False] * 4) is None


def test_words_are_found_in_any_script():
    assert [w.folded for w in split_words("Don't stop, Привет мир 12")] == ["don't", "stop", "привет", "мир", "12"]


@pytest.mark.parametrize(
    ("word", "digits", "capital", "left", "right"),
    [
        ("Is", 0, 1, 1, 1),  # at the beginning, in front of a common word
        ("desk", 0, 0, 1, 0),  # behind a common word
        ("lamp", 0, 0, 0, 1),  # in front of a mark
        ("R2", 1, 0, 1, 1),
        ("Goran", 0, 1, 1, 0),
        ("Gray", 0, 1, 0, 1),
    ],
)
def test_shapes_say_what_a_word_looks_like_and_where_its_name_ends(word, digits, capital, left, right):
    text = "Is the desk lamp, R2, in here? Goran Gray"
    spans = [(w.start, w.end) for w in split_words(text)]
    shapes = word_shapes(text, spans, {"the", "in"}) / torch.tensor(SHAPE_WEIGHTS)
    rows = dict(zip((text[slice(*span)] for span in spans), shapes.tolist(), strict=True))
    assert rows[word] == [digits, capital, left, right]


def test_shapes_of_nothing_are_nothing():
    assert word_shapes("", [], ()).shape == (0, len(SHAPES))


def test_a_slot_takes_a_name_of_two_words_whole():
    """By meaning alone it takes the one that is nearer."""
    text, common = "Where is the travel backpack now?", {"the", "is", "now"}
    spans = [(w.start, w.end) for w in split_words(text)]
    meaning = torch.zeros(len(spans), 2)
    meaning[3:5] = torch.tensor([[0.6, 0.8], [1.0, 0.0]])  # travel, backpack
    meaning[[0, 1, 2, 5], 1] = -1.0
    allowed = [text[slice(*span)] not in common for span in spans]
    lamp = torch.tensor([1.0, 0.0])
    assert place(lamp, lamp, meaning, allowed)[:2] == (4, 4)
    states = torch.nn.functional.normalize(torch.cat([meaning, word_shapes(text, spans, common)], -1), dim=-1)
    edges = SHAPE_WEIGHTS[-1]
    begin, end = (torch.tensor([1.0, 0.0, 0.0, 0.0, *edge]) for edge in ((edges, 0.0), (0.0, edges)))
    begin, end = (torch.nn.functional.normalize(state, dim=0) for state in (begin, end))
    assert place(begin, end, states, allowed)[:2] == (3, 4)
