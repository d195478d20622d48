"""A user's words as bytes and back."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_plug.errors import CorruptFileError
from persona_plug.heads.memory import ItemWords, SlotTokens, WordMemory, recall
from persona_plug.heads.packing import pack_item, pack_memory, unpack_item, unpack_memory
from tests.heads.test_memory import BLANK, item, request_words, tokenise

D = 48


def unit(*shape, seed=0):
    noise = torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(noise, dim=-1).half()


def words(tokens, slots=3):
    states = unit(len(tokens) + 1 + 2 * slots)
    placed = tuple(SlotTokens(i, i + 1, " ", "", "title", states[-1 - i], states[-2 - i]) for i in range(slots))
    return ItemWords(tuple(tokens), states[: len(tokens)], states[len(tokens)], placed, ((1, "x24"), (2, "ﬁ7")))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=60), st.integers(0, 4))
def test_an_item_comes_back(tokens, slots):
    before = words(tokens, slots)
    after = unpack_item(pack_item(before))
    assert (after.tokens, after.facts) == (before.tokens, before.facts)
    torch.testing.assert_close(after.states, before.states, atol=4e-3, rtol=0)
    torch.testing.assert_close(after.topic, before.topic, atol=4e-3, rtol=0)
    for one, other in zip(after.slots, before.slots, strict=True):
        assert dataclasses.astuple(one)[:5] == dataclasses.astuple(other)[:5]
        torch.testing.assert_close(one.first, other.first, atol=4e-3, rtol=0)
        torch.testing.assert_close(one.last, other.last, atol=4e-3, rtol=0)


def test_forty_items_of_twenty_tokens_fit_into_64_kb():
    assert 40 * len(pack_item(words(range(20)))) <= 64_000


def test_a_memory_comes_back():
    names = torch.eye(16)
    kept = [item("hi Ben,", "Ben lamp", names[:2]), item("bye x24")]
    before = recall(kept, request_words("lamp Jo", names[[1, 0]]), tokenise)
    after, request, end, strength = unpack_memory(pack_memory(before, torch.tensor([5, 6]), 2, 0.5))
    assert (request.tolist(), end, strength) == ([5, 6], 2, 0.5)
    for field in dataclasses.fields(WordMemory):
        one, other = getattr(after, field.name), getattr(before, field.name)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, atol=4e-3, rtol=0)
        else:
            assert one == other


def test_nobodys_memory_comes_back():
    empty = recall([], BLANK, tokenise)
    assert unpack_memory(pack_memory(empty, torch.zeros(0, dtype=torch.long), 0))[0].count == 0


@pytest.mark.parametrize("change", [lambda b: b[:-5], lambda b: b"\x09" + b[1:], lambda b: b[:3], lambda _: b""])
def test_other_bytes_are_refused(change):
    with pytest.raises(CorruptFileError, match="remember them anew"):
        unpack_item(change(pack_item(words([1, 2, 3]))))
    with pytest.raises(CorruptFileError, match="one version"):
        unpack_memory(change(pack_memory(recall([item("hi")], BLANK, tokenise), torch.zeros(0), 0)))
