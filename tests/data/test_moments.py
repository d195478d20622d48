import datetime as dt
import itertools
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_plug.data.history import HistoryItem
from persona_plug.data.moments import in_time, is_count, seconds
from persona_plug.errors import DataError

DAY = 1714608000.0  # 2 May 2024, 0:00 UTC
TEN = DAY + 36000

MOMENTS = {
    DAY: [
        "2024-05-02", "2024/05/02", "2024.05.02", "2024-5-2", "20240502", 20240502, " 2024-05-02 ", "2.5.2024",
        "02.05.2024", "2 May 2024", "May 2, 2024", "2-May-2024", "2nd May 2024", dt.date(2024, 5, 2), "2024-W18-4",
        "2024-05-02 UTC", np.datetime64("2024-05-02").item(), "1714608000", 1714608000, 1714608000000, 1714608000.0,
        "1714608000000", 1714608000 * 10**6, 1714608000 * 10**9, int(np.datetime64("2024-05-02", "ns").astype(int)),
    ],
    TEN: [
        "2024-05-02T10:00:00", "2024-05-02 10:00", "2024-05-02T10:00:00Z", "2024-05-02 10:00:00 UTC",
        "2024/05/02 10:00",
        "2024-05-02T12:00:00+02:00", "2024-05-02 12:00:00 +0200", "2024-05-02T06:00-04:00",
        "2024-05-02T10:00:00.000000",
        "2024-05-02T10:00:00.000000000Z", "2024-05-02 10:00:00,000", "2.5.2024 10:00", "2024-05-02 10:00 AM",
        "20240502100000", 20240502100000, 202405021000, "202405021000", 20240502100000.0,
        "2024/5/2 10:00:00 GMT", "May 2, 2024 10:00 AM", "2 May 2024, 10:00", "Thu, 02 May 2024 12:00:00 +0200",
        "Thu May 02 10:00:00 +0000 2024", "Thu May 2 10:00:00 2024", dt.datetime(2024, 5, 2, 10),
        dt.datetime(2024, 5, 2, 12, tzinfo=dt.timezone(dt.timedelta(hours=2))), pd.Timestamp("2024-05-02 10:00"),
    ],
    1710288000.0: ["13/03/2024", "03/13/2024", "13-03-2024", "2024-03-13"],
    1714521600.0: ["2024-05", "2024-05-01", "2024/5"],
    0.0: [0, "0", "1970-01-01"],
    -86400.0: ["1969-12-31", -86400],
    7.0: [7, "7", 7.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "expected"), [(value, at) for at, values in MOMENTS.items() for value in values], ids=repr
)
def test_one_time_in_its_forms(value, expected):
    assert seconds(value, "here") == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("01-03-2020", "two days are possible"), ("3/4/2020", "two days are possible"), ("yesterday", "no time"),
        ("", "no time"), ("2024-13-01", "no time"), ("31/02/2020", "no time"), ("2024-05-02 25:00", "no time"),
        ("2024-05-02 10:00 CEST", "no time"), ("10:00", "no time"), (True, "no time"), ([1], "no time"),
        (float("nan"), "no time"), (float("inf"), "no time"), (10**400, "no time"), (1e21, "no time"),
        (None, "no time"),
        ("24-05-02", "no time"), ("May", "no time"), ({"a": 1}, "no time"), ("1e9", "no time"),
    ],
)  # fmt: skip
def test_what_is_no_time_is_refused_with_its_remedy(value, reason):
    with pytest.raises(DataError, match=f"here: field 'timestamp' .*{reason}.*write it as 2024") as caught:
        seconds(value, "here")
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("value", "count"),
    [(0, True), ("3", True), (-1.5, True), (2019, True), (20240502, False), ("20240502", False), (1714608000, False),
     ("2024-05-02", False), (dt.date(2024, 5, 2), False), (True, False)],
)  # fmt: skip
def test_counts_are_told_from_dates(value, count):
    assert is_count(value) == count


def items(*times):
    return [HistoryItem(str(n), "x", t) for n, t in enumerate(times)]


@pytest.mark.parametrize(
    ("times", "order"),
    [
        ((), ""),
        ((None, None, None), "012"),
        ((1, 2, 3), "012"),
        ((3, 2, 1), "210"),
        ((3, 3, 1, 1), "3210"),  # from new to old, within a time, too
        ((2, 2, 2), "012"),
        ((2, 1, 3), "102"),
        ((2, 2, 1, 3), "2013"),  # neither: the list's order within a time
        ((1, 2, None), "012"),
        ((2, None, 1, 3), "2013"),
        ((None, 2, 1, 3), "0213"),
        ((3, None, 1), "210"),
    ],
)
def test_items_are_oldest_first(times, order):
    assert "".join(i.input for i in in_time(items(*times))) == order


@given(st.lists(st.one_of(st.none(), st.integers(0, 4)), max_size=8))
def test_the_order_is_by_time_loses_nothing_and_is_the_same_again(times):
    ordered = in_time(items(*times))
    assert sorted(i.input for i in ordered) == sorted(str(n) for n in range(len(times)))
    found = [i.timestamp for i in ordered if i.timestamp is not None]
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert in_time(ordered) == ordered


@pytest.mark.parametrize("value", ["9999-12-31", dt.date(9999, 12, 31), dt.datetime.max, "9999-12-31T23:59:59Z"])
def test_a_date_that_means_never_is_no_other_date(value):
    with pytest.raises(DataError, match="field 'timestamp' is no time"):
        seconds(value, "record 1")
    with pytest.raises(DataError, match="field 'timestamp' is no time"):
        HistoryItem("a", "b", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.datetime64("2024-05-02"), DAY),
        (np.int64(DAY), DAY),
        (pd.Timestamp("2024-05-02"), DAY),
        (Decimal(int(DAY)), DAY),
        (pd.NaT, None),
        ("", None),
    ],
    ids=repr,
)
def test_an_item_takes_the_times_that_a_record_takes(value, expected):
    assert HistoryItem("a", "b", value).timestamp == expected
    assert HistoryItem.of({"input": "a", "output": "b", "timestamp": value}).timestamp == expected
