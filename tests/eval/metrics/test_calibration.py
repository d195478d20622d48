"""The calibration error, by hand and by its definition."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.calibration import expected_calibration_error
from persona_plug.errors import DataError


def test_calibration_error_by_hand():
    rows = [[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]]
    # Each row has a bin of its own: 0.9 right, 0.8 wrong, 0.7 right, 0.55 wrong.
    expected = (0.1 + 0.8 + 0.3 + 0.55) / 4
    assert expected_calibration_error(rows, [0, 1, 1, 0], bins=10) == pytest.approx(expected)
    # In a single bin: confidence 0.7375, accuracy a half.
    assert expected_calibration_error(rows, [0, 1, 1, 0], bins=1) == pytest.approx(0.2375)
    assert expected_calibration_error([[1.0, 0.0]], [0]) == 0
    # A half lies in the lower of two bins, apart from 0.7.
    assert expected_calibration_error([[0.5, 0.5], [0.7, 0.3]], [1, 0], bins=2) == pytest.approx(0.4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 99), st.integers(1, 20))
def test_calibration_error_as_defined(n, classes, seed, bins):
    rng = np.random.default_rng(seed)
    rows, gold = rng.dirichlet(np.ones(classes), n), rng.integers(classes, size=n)
    total = 0.0
    for b in range(bins):
        inside = [i for i in range(n) if b / bins < rows[i].max() <= (b + 1) / bins]
        if inside:
            confidence = statistics.fmean(float(rows[i].max()) for i in inside)
            accuracy = statistics.fmean(float(rows[i].argmax() == gold[i]) for i in inside)
            total += len(inside) / n * abs(accuracy - confidence)
    assert expected_calibration_error(rows, gold, bins) == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "gold", "message"),
    [
        ([[0.5, 0.6]], [0], "does not sum to 1"),
        ([[1.5, -0.5]], [0], "does not sum to 1"),
        ([[float("nan"), 1.0]], [0], "does not sum to 1"),
        ([[0.5, 0.5]], [2], "places from 0 to 1"),
        ([[0.5, 0.5]], [-1], "places from 0 to 1"),
        ([[0.5, 0.5]], [0, 1], "must be"),
        ([], [], "must be"),
    ],
)
def test_what_is_no_probability_is_refused(rows, gold, message):
    with pytest.raises(DataError, match=message):
        expected_calibration_error(rows, gold)
