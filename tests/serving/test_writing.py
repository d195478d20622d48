"""Answers while they are written: what is sent early never has to be taken back."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from persona_plug.serving.writing import BROKEN, Sampler, Writer


def decode(ids):
    """A tokenizer of single bytes; 0 is its end token, which is special and so left out."""
    return bytes(i for i in ids if i).decode(errors="replace")


def write(data, stop=(), limit=10_000, streams=True, end=True):
    """Feed bytes one by one until the writer is done; return it and what it gave."""
    writer, given_ = Writer(limit, tuple(stop), streams, decode), []
    for at, token in enumerate(data):
        text, tokens = writer.add(token, last=False)
        given_.append((text, tokens))
        if writer.finish:
            return writer, given_, at + 1
    if end:
        given_.append(writer.add(0, last=True))
    return writer, given_, len(data) + end


TEXTS = st.text(st.sampled_from("ab \n🙂é漢"), max_size=30)


@given(TEXTS, st.lists(st.text(st.sampled_from("ab \n🙂"), min_size=1, max_size=3), max_size=3))
@example("  a🙂 b  ", [])
@example("aab", ["ab"])
def test_pieces_add_up_to_the_whole(text, stop):
    expected = text
    # The first stop text to be complete ends the answer; of those that end together the one that begins first counts.
    for end in range(len(text) + 1):
        found = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if found:
            expected = text[: min(found)]
            break
    writer, pieces, used = write(text.encode(), stop)
    assert "".join(t for t, _ in pieces) == expected.strip()
    assert sum(n for _, n in pieces) == used
    assert writer.finish == "stop"
    assert not any(BROKEN in t for t, _ in pieces)


def test_a_character_is_sent_whole_or_not_at_all():
    _, pieces, _ = write("a🙂b".encode())
    assert [t for t, _ in pieces if t] == ["a", "🙂", "b"]


def test_the_beginning_of_a_stop_text_waits_until_it_is_one_or_not():
    _, pieces, _ = write(b"one ##two ### three", ["###"])
    assert "".join(t for t, _ in pieces) == "one ##two"
    _, pieces, _ = write(b"abcabx", ["abc"], end=False)
    assert "".join(t for t, _ in pieces) == ""


def test_tokens_beyond_the_limit_are_not_taken():
    writer, pieces, used = write(b"abcdef", limit=3)
    assert ("".join(t for t, _ in pieces), writer.finish, used) == ("abc", "length", 3)


def test_nothing_is_sent_early_unless_asked():
    _, pieces, _ = write(b"abc", streams=False, limit=3)
    assert pieces == [("", 0), ("", 0), ("abc", 3)]


def test_what_is_no_character_at_the_end_is_shown_as_such():
    _, pieces, _ = write(b"a\xf0\x9f", limit=3)
    assert "".join(t for t, _ in pieces) == "a" + BROKEN


# Sampling


def draws(sampler, scores, count=200):
    return [sampler.draw(scores) for _ in range(count)]


def test_temperature_zero_needs_no_sampler():
    assert Sampler.of(0.0, 1.0, 1) is None


def test_a_seed_gives_the_same_tokens():
    scores = torch.randn(50)
    assert draws(Sampler.of(1.0, 0.9, 7), scores) == draws(Sampler.of(1.0, 0.9, 7), scores)
    assert draws(Sampler.of(1.0, 0.9, 7), scores) != draws(Sampler.of(1.0, 0.9, 8), scores)
    assert draws(Sampler.of(1.0, 0.9, None), scores) != draws(Sampler.of(1.0, 0.9, None), scores)


def test_the_nucleus_is_the_smallest_set_with_the_mass():
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(draws(Sampler.of(1.0, 0.5, 0), scores)) == {0}
    assert set(draws(Sampler.of(1.0, 0.6, 0), scores)) == {0, 1}
    assert set(draws(Sampler.of(1.0, 1.0, 0), scores)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("temperature", "share"), [(1.0, 0.8), (2.0, 2 / 3)])
def test_temperature_flattens(temperature, share):
    scores = torch.tensor([0.8, 0.2]).log()
    drawn = draws(Sampler.of(temperature, 1.0, 0), scores, 4000)
    assert drawn.count(0) / 4000 == pytest.approx(share, abs=0.03)  # four standard errors


def test_masked_tokens_are_never_drawn():
    scores = torch.tensor([0.0, float("-inf"), 0.0])
    assert 1 not in draws(Sampler.of(2.0, 1.0, 0), scores)
