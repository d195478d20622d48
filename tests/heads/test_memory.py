"""What is kept of a user's words, and how a new request reads it."""

import math

import pytest
import torch

from persona_plug.heads.memory import (
    CHAIN,
    NONE,
    ItemWords,
    RequestWords,
    SlotTokens,
    WordMemory,
    facts_of,
    recall,
    token_slots,
)
from persona_plug.heads.slots import find_slots

END = 0


def tokenise(text):
    """One token per character: its code."""
    return [ord(c) for c in text]


def item(answer, request="", states=None, common=frozenset(), topic=None):
    """An item whose tokens are characters; its request's words have the unit vectors of `states`."""
    offsets = [(i, i + 1) for i in range(len(answer))]
    slots = ()
    if states is not None:
        slots = token_slots(find_slots(request, answer, common), answer, offsets, states, states)
    tokens = (*tokenise(answer), END)
    kept = torch.nn.functional.one_hot(torch.arange(len(tokens)) % 16, 16).float()
    return ItemWords(
        tokens, kept, torch.eye(16)[0] if topic is None else topic, slots, facts_of(answer, offsets, slots)
    )


BLANK = RequestWords("", [], torch.zeros(0, 16), torch.zeros(16), [])


def request_words(text, states):
    spans, at = [], 0
    for word in text.split():
        begin = text.index(word, at)
        spans.append((begin, begin + len(word)))
        at = begin + len(word)
    return RequestWords(text, spans, states, torch.eye(16)[1], [True] * len(spans))


def as_text(memory):
    return "".join(chr(t) if t else "." for t in memory.tokens.tolist())


def test_without_slots_every_token_is_a_place_with_its_state():
    memory = recall([item("hi!"), item("yo")], BLANK, tokenise)
    assert as_text(memory) == "hi!.yo."
    assert memory.items.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert torch.equal(memory.states[2], torch.nn.functional.one_hot(torch.tensor(2), 16).float())
    assert memory.before[2].tolist() == [NONE] * (CHAIN - 2) + tokenise("hi")
    assert memory.length == pytest.approx((math.log1p(4) + math.log1p(3)) / 2)
    assert not memory.inside.any()


def test_a_slot_is_filled_from_the_request_that_asks():
    names = torch.eye(16)
    kept = item("hi Ben,", "Ben lamp", names[:2])
    memory = recall([kept], request_words("lamp Joanna", names[[1, 0]]), tokenise)
    assert as_text(memory) == "hi Joanna,."
    assert memory.slots.tolist() == [False] * 3 + [True] * 6 + [False] * 2
    assert memory.inside.tolist() == [False] * 4 + [True] * 5 + [False] * 2
    # The place in front of the slot has the state that was there, the comma the state behind the old name.
    assert int(memory.states[3].argmax()) == 3
    assert int(memory.states[9].argmax()) == 6
    # Inside, a place counts behind exactly the slot's beginning, whatever stood in front of it.
    assert memory.before[5].tolist() == [NONE] * (CHAIN - 2) + tokenise("Jo")


@pytest.mark.parametrize("words", ["", "nothing near"])
def test_a_slot_without_a_place_is_left_out(words):
    names = torch.eye(16)
    request = request_words(words, names[[7, 8]]) if words else BLANK
    memory = recall([item("hi Ben,", "Ben lamp", names[:2])], request, tokenise)
    assert as_text(memory) == "hi ,."


def test_a_number_of_one_item_is_left_out_and_a_habit_stays():
    memory = recall([item("a 77 x24 so it goes"), item("b x24 and so on and on")], BLANK, tokenise)
    assert as_text(memory) == "a  x24 so it goes.b x24 and so on and on."


def test_a_number_that_closes_an_answer_is_the_writers():
    assert as_text(recall([item("order 12345678 left. Ann, desk 9")], BLANK, tokenise)) == "order  left. Ann, desk 9."


def test_a_slot_keeps_what_its_tokens_hold_besides():
    """Tokens may reach over a word's ends: a space in front belongs to most."""
    answer = "hi Ben."
    states, offsets = torch.eye(2), [(0, 2), (2, 6), (6, 7)]
    (slot,) = token_slots(find_slots("Ben", answer, frozenset()), answer, offsets, states, states)
    assert isinstance(slot, SlotTokens)
    assert (slot.begin, slot.end, slot.before, slot.after) == (1, 2, " ", "")


def test_a_place_knows_where_it_stands_and_an_item_how_near_its_request_is():
    names = torch.eye(16)
    kept = [item("abc", topic=names[3]), item("hi Ben,", "Ben lamp", names[:2], topic=names[1])]
    memory = recall(kept, request_words("lamp Jo", names[[1, 0]]), tokenise)
    starts, finishes = (t.expm1().round().int().tolist() for t in (memory.starts, memory.finishes))
    assert starts == [0, 1, 2, 3, *range(7)]
    assert finishes == [3, 2, 1, 0, *reversed(range(7))]
    assert memory.nearness.tolist() == [0.0, 1.0]


def test_nobodys_memory_is_empty():
    memory = recall([], BLANK, tokenise)
    assert memory.count == 0
    assert len(memory.tokens) == 0
    assert WordMemory.empty(16).states.shape == (0, 16)
