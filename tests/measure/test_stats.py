import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.measure.stats import Interval, derangement, identity, set_bootstrap, user_bootstrap

# Nominal coverage is 95%; 300 simulations have a standard error of 1.3 points, and a percentile bootstrap of
# 40 users is known to cover slightly less than it says.
SIMULATIONS, LOW, HIGH = 300, 0.90, 0.985


def clustered(rng, users=40, between=1.0, within=1.0):
    """Return values and owners: users differ in mean and in number of questions."""
    counts = rng.integers(1, 12, users)
    owner = np.repeat(np.arange(users), counts)
    return rng.normal(0, between, users)[owner] + rng.normal(0, within, len(owner)), [f"u{o}" for o in owner]


def coverage(truth, make, simulations=SIMULATIONS, **options):
    rng = np.random.default_rng(11)
    hits = 0
    for seed in range(simulations):
        found = user_bootstrap(*make(rng), seed=seed, **options)
        hits += found.low <= truth <= found.high
    return hits / simulations


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    assert LOW <= coverage(0.0, clustered) <= HIGH


def test_drawing_questions_instead_of_users_would_not_cover():
    # The control: were each question its own user, the interval would be far too narrow, and this test would notice.
    def alone(rng):
        values, _ = clustered(rng)
        return values, [str(i) for i in range(len(values))]

    assert coverage(0.0, alone, simulations=60) < 0.8


def test_the_interval_of_a_root_mean_square_covers_it():
    def squares(rng):
        values, users = clustered(rng)
        return values**2, users

    assert 0.87 <= coverage(np.sqrt(2.0), squares, transform=np.sqrt) <= HIGH


def test_the_interval_of_a_paired_difference_covers_it():
    rng = np.random.default_rng(5)
    hits = 0
    for seed in range(SIMULATIONS):
        values, users = clustered(rng)
        other = values - 0.3 + rng.normal(0, 0.5, len(values))
        found = user_bootstrap(values, users, other, seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert LOW <= hits / SIMULATIONS <= HIGH


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(1)
    values, users = clustered(rng)
    other = values - 0.3 + rng.normal(0, 0.3, len(values))
    paired = user_bootstrap(values, users, other)
    a, b = user_bootstrap(values, users), user_bootstrap(other, users, seed=1)
    unpaired = np.hypot(a.high - a.low, b.high - b.low)
    assert paired.high - paired.low < 0.5 * unpaired
    assert paired.low > 0


def test_values_are_those_of_the_plain_formula():
    rng = np.random.default_rng(2)
    values, users = clustered(rng)
    other = rng.random(len(values))
    assert user_bootstrap(values, users).value == pytest.approx(values.mean())
    assert user_bootstrap(values, users, other).value == pytest.approx(values.mean() - other.mean())
    root = user_bootstrap(values**2, users, other, np.sqrt)
    assert root.value == pytest.approx(np.sqrt((values**2).mean()) - np.sqrt(other.mean()))


def test_bounds_are_those_of_drawing_whole_users():
    values, users = [0.0, 0.0, 0.0, 3.0], ["a", "a", "a", "b"]
    # Draws of two users give aa, ab (twice as often), bb: means 0, 0.75, 3.
    found = user_bootstrap(values, users)
    assert (found.value, found.low, found.high) == (0.75, 0.0, 3.0)


def test_same_seed_same_interval_and_order_does_not_matter():
    values, users = clustered(np.random.default_rng(3))
    found = user_bootstrap(values, users, seed=4)
    assert found == user_bootstrap(values, users, seed=4)
    assert found != user_bootstrap(values, users, seed=5)
    turned = user_bootstrap(values[::-1], users[::-1], seed=4)
    assert (turned.low, turned.high) == pytest.approx((found.low, found.high))


def test_one_user_has_no_spread():
    assert user_bootstrap([1.0, 3.0], ["a", "a"]) == Interval(2.0, 2.0, 2.0)


def test_a_value_of_a_whole_set_is_drawn_over_users_too():
    values, users = np.array([0.0, 0.0, 0.0, 3.0]), ["a", "a", "a", "b"]
    highest = set_bootstrap(lambda rows: values[rows].max(), users)
    assert highest == Interval(3.0, 0.0, 3.0)  # the fourth question is missing from a quarter of the draws
    means, plain = set_bootstrap(lambda rows: values[rows].mean(), users), user_bootstrap(values, users)
    assert (means.value, means.low, means.high) == (plain.value, plain.low, plain.high)
    assert means == set_bootstrap(lambda rows: values[rows].mean(), users)


def test_identity():
    values = np.array([1.0, 2.0])
    assert identity(values) is values


@given(st.lists(st.text(max_size=3), min_size=1, max_size=30), st.integers(0, 1000))
def test_a_derangement_moves_everybody_and_hits_everybody(users, seed):
    mapped = derangement(users, seed)
    assert set(mapped) == set(mapped.values()) == set(users)
    if len(set(users)) > 1:
        assert all(a != b for a, b in mapped.items())


def test_a_derangement_depends_on_the_seed_alone():
    users = [f"u{i}" for i in range(20)]
    assert derangement(users, 1) == derangement(users[::-1] * 2, 1)
    assert derangement(users, 1) != derangement(users, 2)
