"""What is cut is counted, whatever lies in a cache."""

from persona_plug.data.history import Example, HistoryItem
from persona_plug.data.splits import FitData
from persona_plug.measure.truncation import truncation_notes


def test_everything_that_is_cut_is_told(make_plug):
    plug = make_plug(max_input_tokens=20, max_answer_tokens=5, max_history=2)
    long = "many words " * 200  # the encoder reads fewer
    history = (HistoryItem("a", "b"), HistoryItem("c", "d"), HistoryItem("e", long))
    short, exact, cut = (Example("u", "ask", output) for output in ("abc", "abcd", "abcde"))
    data = FitData([short, exact], [cut], [Example("v", long, "abcdef", history), short], "{input}", None)
    expected = [
        "1 of 3 training answers were cut to 5 tokens",  # bytes, and one for the end
        "1 of 2 held-out requests were cut to 20 tokens",
        "1 of 2 held-out answers were cut to 5 tokens",
        f"1 of 7 held-out texts were cut to the encoder's {plug.encoder.max_length} tokens",
        "1 history items beyond max_history=2 were left out",
    ]
    assert truncation_notes(plug, data) == expected
    plug.encoder.encode([long])
    assert truncation_notes(plug, data) == expected


def test_nothing_is_told_where_nothing_is_cut(make_plug):
    plug = make_plug(answers=("a very long answer", "b"), max_answer_tokens=2)
    held = [Example("v", "ask", "a very long answer", (HistoryItem("x", "b"),))]
    assert truncation_notes(plug, FitData(held, held, held, "{input}", plug.config.answers)) == []


def test_items_that_are_cut_in_the_prompt_are_told(make_plug):
    plug = make_plug(max_input_tokens=20, max_answer_tokens=5, retrieve=3)
    items = (HistoryItem("a", "b"), HistoryItem("c" * 21, "d" * 4), HistoryItem("e" * 20, "f" * 5))
    data = FitData([], [], [Example("v", "ask", "x", items)], "{input}", None)
    assert truncation_notes(plug, data) == [
        "2 of 6 texts of items in the prompt were cut to 20 (inputs) or 4 (outputs) tokens"
    ]
