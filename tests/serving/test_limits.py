"""Limits in themselves: buckets, places, and completions that are remembered for a while."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.errors import ConfigError
from persona_plug.serving.limits import Limits, Memory, Overloaded, Rates, Slots


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def test_a_bucket_fills_with_time():
    clock = Clock()
    rates = Rates(60, clock)  # six at once, then one a second
    assert [rates.wait("a") for _ in range(7)] == [0] * 6 + [1]
    clock.now += 0.5
    assert rates.wait("a") == 1
    clock.now += 0.5
    assert [rates.wait("a"), rates.wait("a")] == [0, 1]
    clock.now += 3600
    assert [rates.wait("a") for _ in range(7)] == [0] * 6 + [1], "time saves no more than a bucket"


def test_each_key_has_its_own_bucket():
    rates = Rates(1, Clock())
    assert [rates.wait("a"), rates.wait("b")] == [0, 0]
    assert [rates.wait("a"), rates.wait("b")] == [60, 60]


def test_zero_is_no_limit():
    rates = Rates(0, Clock())
    assert not any(rates.wait("a") for _ in range(1000))


@given(st.floats(0.5, 600), st.lists(st.floats(0, 30), min_size=1, max_size=60))
def test_no_more_than_the_rate_and_a_burst(per_minute, gaps):
    clock = Clock()
    rates, allowed = Rates(per_minute, clock), 0
    for gap in gaps:
        clock.now += gap
        allowed += rates.wait("a") == 0
    assert allowed <= rates.burst + sum(gaps) * per_minute / 60 + 1e-6


def test_places():
    slots = Slots(2)
    with slots.take(), slots.take():
        assert slots.used == 2
        with pytest.raises(Overloaded), slots.take():
            pass
        assert slots.used == 2
    with pytest.raises(KeyError), slots.take():
        raise KeyError
    assert slots.used == 0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def memory(clock):
    return Memory(60, 3, clock)


def test_only_its_user_finds_a_completion(memory, clock):
    memory.keep("c1", "acme/ann", "q", "a", clock())
    assert memory.find("c1", "acme/ann").answer == "a"
    assert memory.find("c1", "acme/bob") is None
    assert memory.find("c1", "bolt/ann") is None
    assert memory.find("c2", "acme/ann") is None


def test_completions_end_with_time_and_number(memory, clock):
    for i in range(5):
        memory.keep(f"c{i}", "u", "q", "a", clock())
    assert len(memory) == 3
    assert memory.find("c1", "u") is None
    assert memory.find("c2", "u")
    clock.now += 61
    memory.prune()
    assert len(memory) == 0


def test_nothing_of_a_forgotten_user_is_remembered(memory, clock):
    begun = clock()
    memory.keep("old", "u", "q", "a", begun)
    memory.keep("other", "v", "q", "a", begun)
    clock.now += 1
    memory.forget("u")
    memory.keep("under way", "u", "q", "a", begun)
    assert memory.find("old", "u") is None
    assert memory.find("under way", "u") is None
    assert memory.find("other", "v")
    clock.now += 1
    memory.keep("new", "u", "q", "a", clock())
    assert memory.find("new", "u")
    clock.now += 61
    memory.prune()
    assert not memory._forgotten


@pytest.mark.parametrize(
    ("name", "value"),
    [("pending", 0), ("seconds", 0), ("body_bytes", -1), ("per_minute", -1), ("seconds", float("nan"))],
)
def test_limits_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})
