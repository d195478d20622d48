import re
from html.parser import HTMLParser

import numpy as np
import pytest

from persona_plug.data.history import HistoryItem
from persona_plug.fit.report import FitReport
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval
from persona_plug.page import view
from persona_plug.page.answers import Answer
from persona_plug.page.places import UserMap

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>"&\'</style>'


class Page(HTMLParser):
    """Tags, texts and widths of a piece of HTML; tags that are left open or closed wrongly fail."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def answer(column="own", **fields):
    return Answer(**{"column": column, "user": "ann", "text": "hello", **fields})


def weighed(*weights):
    return answer(weights=[(HistoryItem(f"in {i}", f"out {i}"), w) for i, w in enumerate(weights)])


def everything_users_write():
    item, report = HistoryItem(EVIL, EVIL), FitReport({EVIL: {"nll": Interval(1, 0, 2)}}, [], 1, 1, [EVIL])
    where = UserMap([EVIL, "b"], [1, 2], np.eye(2), "PCA")
    evil = answer(user=EVIL, text=EVIL, notes=[EVIL], probabilities={EVIL: 1.0}, weights=[(item, 0.5)])
    return {
        "header": view.header(EVIL, EVIL, EVIL),
        "good": view.good(EVIL),
        "bad": view.bad(EVIL),
        "note": view.note(EVIL),
        "cards": view.cards({"own": evil, "other": evil}),
        "weights": view.weights(evil),
        "items": view.items(EVIL, [item]),
        "map": view.user_map(where, EVIL, {EVIL}, {EVIL}),
        "nearest": view.nearest(EVIL, [(EVIL, 0.5, 2)]),
        "found": view.found(EVIL, [EVIL]),
        "report": view.report(report, []),
    }


@pytest.mark.parametrize("name", everything_users_write())
def test_what_users_write_stays_text(name):
    page = Page(everything_users_write()[name])
    assert not {"img", "script", "style"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "alert(1)" in page.text or name == "map"


def test_cards_before_while_and_after_answering():
    empty, half = Page(view.cards({})), Page(view.cards({"base": answer("base", user=None)}, running=True))
    assert empty.text.count("No answer yet") == 4
    assert ("aria-busy", "false") in empty.attributes
    assert (half.text.count("Answering"), half.text.count("Waiting.")) == (1, 2)
    assert ("aria-busy", "true") in half.attributes
    assert half.text.index("hello") < half.text.index("Answering") < half.text.index("Waiting.")


def test_card_says_whose_tokens_and_seconds():
    own = answer(prompt_tokens=40, answer_tokens=7, seconds=1.234, notes=["3 tokens of the request cut."])
    text = Page(view.cards({"own": own, "other": answer("other", user="bob")})).text
    for part in ("This user: ann", "Another user: bob", "40 tokens read, 7 written, 1.23 s", "3 tokens of the request"):
        assert part in text


def test_empty_answer_and_no_answer_are_told_apart():
    text = Page(view.cards({"own": answer(text=""), "other": answer("other", text=None, notes=["Nobody else."])})).text
    assert "the LLM ended at once" in text
    assert "No answer. Nobody else." in text


def test_labels_are_bars_with_the_likeliest_first():
    html = view.cards({"own": answer(text="b", probabilities={"a": 0.2, "b": 0.5, "c": 0.3}, prompt_tokens=9)})
    assert re.findall(r">([abc])</td><td class=\"bar\">([\d.]+)%<span style=\"width:([\d.]+)%", html) == [
        ("b", "50.0", "100.0"),
        ("c", "30.0", "60.0"),
        ("a", "20.0", "40.0"),
    ]
    assert "9 tokens read, 0.00 s" in Page(html).text  # a label is scored, not written


def test_weights_are_bars_and_the_same_as_text():
    html = view.weights(weighed(0.4, 0.1))
    assert re.findall(r"([\d.]+)%<span style=\"width:([\d.]+)%", html) == [("40.0", "100.0"), ("10.0", "25.0")]
    text = Page(html).text
    assert "in 0 out 0 40.0%" in text
    assert "50% went to none" in text


def test_many_weights_are_summed_up():
    page = Page(view.weights(weighed(*[0.05] * 12)))
    assert page.tags.count("tr") == 1 + view.ROWS + 1
    assert "4 others 20.0%" in page.text


def test_weights_of_nobody_and_of_a_plug_without():
    assert "No items yet" in Page(view.weights(weighed())).text
    assert "no weights" in Page(view.weights(answer())).text


def test_zero_weights_draw():
    assert "0.0%" in view.weights(weighed(0.0))


def test_items_beyond_the_table_are_counted():
    held = [HistoryItem("", f"text {i}") for i in range(view.SHOWN_ITEMS + 5)]
    page = Page(view.items("ann", held))
    assert page.tags.count("tr") == 1 + view.SHOWN_ITEMS
    assert f"{view.SHOWN_ITEMS + 5} items of ann, newest first, the newest {view.SHOWN_ITEMS} shown" in page.text
    assert "Nothing is held about bob yet" in Page(view.items("bob", [])).text


def test_long_texts_are_shortened_in_tables():
    text = Page(view.items("ann", [HistoryItem("", "word " * 200)])).text
    assert "…" in text
    assert len(text) < 2 * view.LONG


def circles(html):
    return re.findall(
        r'<circle class="dot (\w*)" cx="([\d.]+)" cy="([\d.]+)" r="\d+"><title>(\w+), (\d+) items?<', html
    )


def test_map_has_a_dot_a_user_within_the_frame():
    points = np.array([[0.0, 0], [10, 5], [5, 1], [2, 2]])
    where = UserMap(["a", "b", "c", "d"], [1, 2, 3, 4], points, "PCA, 90% of the variance")
    html = view.user_map(where, "b", {"c"}, {"d"})
    dots = circles(html)
    assert [(kind, name, items) for kind, _, _, name, items in dots] == [
        ("", "a", "1"),
        ("near", "c", "3"),
        ("hit", "d", "4"),
        ("own", "b", "2"),
    ]
    m = view.MARGIN
    place = {name: (float(x), float(y)) for _, x, y, name, _ in dots}
    assert place["a"] == (m, view.HEIGHT - m)
    assert place["b"] == (view.WIDTH - m, m)
    assert re.findall(r"<text[^>]*>(\w+)<", html) == ["d", "b"]
    assert "4 users by the mean vectors of their items, PCA, 90% of the variance." in Page(html).text


def test_map_of_one_user_and_of_none():
    assert len(circles(view.user_map(UserMap(["a"], [1], np.zeros((1, 2)), "PCA"), "a", set(), set()))) == 1
    assert "the map is empty" in view.user_map(UserMap([], [], np.zeros((0, 2)), "PCA"), "a", set(), set())


def test_map_of_very_many_keeps_who_is_marked_and_says_so():
    n = view.DOTS + 50
    where = UserMap([f"u{i}" for i in range(n)], [1] * n, np.random.default_rng(0).normal(size=(n, 2)), "PCA")
    html = view.user_map(where, f"u{n - 1}", set(), {f"u{n - 2}"})
    names = [name for *_, name, _ in circles(html)]
    assert len(names) == view.DOTS
    assert names[-2:] == [f"u{n - 2}", f"u{n - 1}"]
    assert f"{view.DOTS} of {n} users" in Page(html).text


def test_nearest_and_found_in_words():
    assert "bob +0.50 3" in Page(view.nearest("ann", [("bob", 0.5, 3)])).text
    assert "ann has no items" in Page(view.nearest("ann", [])).text
    assert "Choose a user" in Page(view.nearest("", [])).text
    assert view.found(" ", []) == ""
    assert "No user id contains 'x'" in Page(view.found("x", [])).text
    many = Page(view.found("u", [f"u{i}" for i in range(view.ROWS + 3)])).text
    assert f"{view.ROWS + 3} found: u0, " in many
    assert "and 3 more." in many


def test_report_shows_verdict_table_and_plots(tmp_path):
    plot = tmp_path / "lift.png"
    plot.write_bytes(b"png")
    lift = Contrast("plug", "plug_shuffled", "nll", 0.2, 0.1, 0.3)
    metrics = {
        "none": {"nll": Interval(2.0, 1.9, 2.1)},
        "plug": {"nll": Interval(1.0, 0.9, 1.1), "rouge-1": Interval(0.5, 0.4, 0.6)},
    }
    page = Page(view.report(FitReport(metrics, [lift], 5, 2, ["a note"]), [plot]))
    for part in ("Knows the user: yes", "5 questions of 2 held-out users", "nll ↓ rouge-1 ↑", "2.000 [1.900, 2.100] –"):
        assert part in page.text
    assert ("alt", "lift of the training") in page.attributes
    assert ("src", "data:image/png;base64,cG5n") in page.attributes


def test_report_without_held_out_users():
    assert "No users were held out" in Page(view.report(FitReport({}, [], 0, 0), [])).text


def test_style_takes_nothing_from_outside():
    assert not re.search(r"url\(|@import|https?:", view.CSS)
