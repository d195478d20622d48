"""Histories as people have them: lists, tuples, tables; one for all requests, or one for each."""

import datasets
import numpy as np
import pandas as pd
import pytest

from persona_plug.config import PlugConfig
from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, DataError
from persona_plug.pairing import candidates_of, pair

CONFIG = PlugConfig("llm", "encoder")
ROWS = [{"input": "tea or coffee", "output": "tea"}, {"input": "rate it", "output": "5"}]
ITEMS = tuple(HistoryItem(row["input"], row["output"]) for row in ROWS)
FORMS = {
    "mappings": ROWS,
    "a tuple of mappings": tuple(ROWS),
    "items": list(ITEMS),
    "a tuple of items": ITEMS,
    "pairs": [("tea or coffee", "tea"), ("rate it", "5")],
    "a tuple of pairs": (("tea or coffee", "tea"), ("rate it", "5")),
    "pairs with numbers": [("tea or coffee", "tea"), ("rate it", 5)],
    "chats": [{"messages": [{"role": "user", "content": row["input"]}, {"role": "assistant", "content": row["output"]}]}
              for row in ROWS],
    "an iterator": iter(ROWS),
    "a DataFrame": pd.DataFrame(ROWS),
    "a DataFrame with a name": pd.DataFrame(ROWS).assign(user_id="ann"),
    "a Dataset": datasets.Dataset.from_list(ROWS),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_history_has_any_form(form):
    if form == "an iterator":
        (example,) = pair(CONFIG, "x", iter(ROWS))
    else:
        (example,) = pair(CONFIG, "x", FORMS[form])
    assert example.history == ITEMS


@pytest.mark.parametrize("form", [form for form in FORMS if form != "an iterator"])
def test_a_history_for_each_request_has_any_form(form):
    one, two = pair(CONFIG, ["x", "y"], [FORMS[form], []] if "pairs" not in form else [list(FORMS[form]), []])
    assert (one.history, two.history) == (ITEMS, ())


@pytest.mark.parametrize("form", [form for form in FORMS if form != "an iterator"])
def test_one_history_serves_all_requests(form):
    examples = pair(CONFIG, ["x", "y", "z"], FORMS[form])
    assert [example.history for example in examples] == [ITEMS] * 3


def test_texts_are_outputs():
    (example,) = pair(CONFIG, "x", ["tea", "5"])
    assert example.history == (HistoryItem("", "tea"), HistoryItem("", "5"))


def test_tuples_that_may_be_items_or_histories_are_refused():
    with pytest.raises(DataError, match="as many tuples as inputs: items or histories\\? Use lists"):
        pair(CONFIG, ["x", "y"], [("a", "b"), ("c", "d")])


@pytest.mark.parametrize("item", [5, ("a",), ("a", "b", "c"), ("a", []), None, ["a", "b"]], ids=repr)
def test_what_is_no_item_is_shown(item):
    with pytest.raises(DataError, match="history item 2: must be") as refusal:
        pair(CONFIG, "x", [{"input": "a", "output": "b"}, item])
    assert repr(item) in str(refusal.value)


def test_what_an_item_lacks_is_told_without_what_was_not_given():
    with pytest.raises(DataError) as refusal:
        pair(CONFIG, "x", [{"inp": "a", "answer": "b"}])
    assert str(refusal.value).endswith("got nothing (field missing; the item has inp, answer)")


@pytest.mark.parametrize("inputs", [5, None, 1.5, [5], [None], ["a", 5]], ids=repr)
def test_inputs_are_texts(inputs):
    with pytest.raises(DataError, match="inputs must be texts"):
        pair(CONFIG, inputs, [])


def test_times_of_one_history_are_dates_or_counts():
    rows = [{"output": "a", "timestamp": 1}, {"output": "b", "timestamp": "2024-05-02"}]
    with pytest.raises(DataError, match="history item 2: field 'timestamp' '2024-05-02' is a date, but a count stands"):
        pair(CONFIG, "x", rows)


@pytest.mark.parametrize("item", ["", " \n", ("a", ""), {"input": "a", "output": " "}], ids=repr)
def test_an_item_without_an_output_is_refused_in_every_form(item):
    with pytest.raises(DataError, match="history item 2: field 'output' is empty; remove the record or fill it"):
        pair(CONFIG, "x", ["tea", item])


@pytest.mark.parametrize("candidates", [iter(["a", "b"]), np.array(["a", "b"]), ("a", "b"), pd.Series(["a", "b"])])
def test_candidates_have_any_form(candidates):
    assert candidates_of(CONFIG, candidates) == ["a", "b"]


@pytest.mark.parametrize(
    ("candidates", "reason"),
    [("ab", "a list of texts, not 'ab'"), (5, "a list of texts, not 5"), (["a", None], "must be texts, not None"),
     (["a", "\ud800"], "holds half a character"), ([], "no candidates"), (iter([]), "no candidates")],
)  # fmt: skip
def test_what_is_no_candidate_is_named(candidates, reason):
    with pytest.raises(ConfigError, match=reason):
        candidates_of(CONFIG, candidates)
