"""A LaMP-shaped folder as samples: copies of histories, and a sample of the questions."""

from hypothesis import given
from hypothesis import strategies as st

from persona_plug.data.history import Example, HistoryItem
from training.data import augment, sample_questions


@given(st.integers(0, 30), st.integers(0, 4), st.integers(0, 3))
def test_copies_hold_random_parts_of_the_history_in_its_order(size, times, seed):
    items = tuple(HistoryItem(f"i{i}", "o") for i in range(size))
    first, other = Example("u", "q", "a", items, "1"), Example("v", "r", "b", items[:2], "2")
    made = augment([first, other], times, seed)
    assert made[0] == first
    assert made[-1] == other
    assert len(made) == 2 + (times if size > 2 else 0)
    for copy in made[1:-1]:
        assert (copy.user_id, copy.input, copy.output, copy.id) == ("u", "q", "a", "1")
        assert [i for i in items if i in copy.history] == list(copy.history)
        # Between one item and half of them and one more are left out.
        assert size - 1 >= len(copy.history) >= size - (size // 2 + 1)
        assert copy.history
    assert made == augment([first, other], times, seed)


def test_copies_differ():
    items = tuple(HistoryItem(f"i{i}", "o") for i in range(40))
    made = augment([Example("u", "q", "a", items)], 10)
    assert len({e.history for e in made}) == 11
    lengths = [len(e.history) for e in made[1:]]
    assert max(lengths) - min(lengths) >= 8  # the share itself is drawn
    assert {len(e.history) for e in augment([Example("u", "q", "a", items[:3])], 200)[1:]} == {1, 2}


def test_a_sample_of_questions_keeps_every_user_and_their_order():
    examples = [Example(f"u{i % 7}", f"q{i}", "a") for i in range(50)]
    some = sample_questions(examples, 12)
    assert len(some) == 12
    assert {e.user_id for e in some} == {f"u{i}" for i in range(7)}
    assert some == sample_questions(examples, 12)
    assert [examples.index(e) for e in some] == sorted(examples.index(e) for e in some)
    assert len(sample_questions(examples, 3)) == 7  # every user, even beyond the limit
    assert sample_questions(examples, None) == examples
