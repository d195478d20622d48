"""Limits in themselves: buckets, and places that tenants share."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.errors import ConfigError
from persona_plug.serving.limits import Limits, Overloaded, Rates, Slots


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


@pytest.mark.parametrize(("limit", "tenants"), [(64, 2), (8, 3), (10, 7)])
def test_nobody_takes_all_places_and_everybody_gets_some(limit, tenants):
    slots = Slots(limit, lambda: tenants)
    with ExitStack() as held:
        share = limit // (2 * tenants)
        for _ in range(limit - share * (tenants - 1)):
            held.enter_context(slots.take("greedy"))
        with pytest.raises(Overloaded):
            held.enter_context(slots.take("greedy"))
        for other in range(tenants - 1):
            for _ in range(share):
                held.enter_context(slots.take(f"other {other}"))
        with pytest.raises(Overloaded):
            held.enter_context(slots.take("greedy"))
    assert slots.used == 0


def test_who_is_alone_gets_everything():
    slots = Slots(5)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(slots.take("local"))
    with slots.take("local", 5), pytest.raises(Overloaded), slots.take("local", 1):
        pass


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=40))
def test_no_more_is_held_than_there_is(asked):
    slots = Slots(20, lambda: 3)
    held, amounts = [], 0
    for tenant, amount in asked:
        place = slots.take(tenant, amount)
        try:
            place.__enter__()
        except Overloaded:
            if held:
                done, size = held.pop(0)
                done.__exit__(None, None, None)
                amounts -= size
            continue
        held.append((place, amount))
        amounts += amount
        assert slots.used == amounts <= 20


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pending", 0),
        ("seconds", 0),
        ("body_bytes", -1),
        ("per_minute", -1),
        ("seconds", float("nan")),
        ("remember_seconds", 86400),
    ],
)
def test_limits_that_cannot_work(name, value):
    with pytest.raises(ConfigError, match=name):
        Limits(**{name: value})
