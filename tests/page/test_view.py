import dataclasses
import re
from html.parser import HTMLParser

import pytest

from persona_plug.data.history import HistoryItem
from persona_plug.data.style import Habit, style_of
from persona_plug.fit.report import FitReport
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval
from persona_plug.page import view
from persona_plug.page.answers import Answer

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
    card = dataclasses.replace(style_of([EVIL], []), openings=[Habit(EVIL, 1, 0, 3)])
    evil = answer(
        user=EVIL,
        text=EVIL,
        marks=[(0, 4), (10, len(EVIL))],
        notes=[EVIL],
        probabilities={EVIL: 1.0},
        weights=[(item, 0.5)],
    )
    return {
        "header": view.header(EVIL, EVIL, EVIL),
        "good": view.good(EVIL),
        "bad": view.bad(EVIL),
        "note": view.note(EVIL),
        "cards": view.cards({"own": evil, "other": evil}),
        "weights": view.weights(evil),
        "items": view.items(EVIL, [item]),
        "style": view.style(EVIL, card),
        "no style": view.style(EVIL, None),
        "report": view.report(report, []),
    }


@pytest.mark.parametrize("name", everything_users_write())
def test_what_users_write_stays_text(name):
    page = Page(everything_users_write()[name])
    assert not {"img", "script", "style"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert "alert(1)" in page.text


def test_cards_before_while_and_after_answering():
    empty, half = Page(view.cards({})), Page(view.cards({"own": answer()}, running=True))
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
    assert "50% is what the plug does for any user" in text


def test_many_weights_are_summed_up():
    page = Page(view.weights(weighed(*[0.05] * 12)))
    assert page.tags.count("tr") == 1 + view.ROWS + 1
    assert "4 others 20.0%" in page.text


def test_weights_of_nobody_and_of_a_plug_without():
    assert "No items yet" in Page(view.weights(weighed())).text
    assert view.weights(answer()) == ""


def test_zero_weights_draw():
    assert "0.0%" in view.weights(weighed(0.0))


def test_items_beyond_the_table_are_counted():
    held = [HistoryItem("", f"text {i}") for i in range(view.SHOWN_ITEMS + 5)]
    page = Page(view.items("ann", held))
    assert page.tags.count("tr") == 1 + view.SHOWN_ITEMS
    assert f"{view.SHOWN_ITEMS + 5} items of ann, newest first, the newest {view.SHOWN_ITEMS} shown" in page.text
    assert "No items of bob yet" in Page(view.items("bob", [])).text


def test_long_texts_are_shortened_in_tables():
    text = Page(view.items("ann", [HistoryItem("", "word " * 200)])).text
    assert "…" in text
    assert len(text) < 2 * view.LONG


def test_this_user_comes_first():
    """On a phone the cards stand below each other in this order."""
    titles = re.findall(r"<h3>([^<]*)</h3>", view.cards({"own": answer(), "other": answer("other", user="bob")}))
    assert titles == ["This user: ann", "Another user: bob", "Few-shot", "LLM alone"]


@pytest.mark.parametrize(
    ("text", "marks", "html"),
    [
        ("Servus, the lamp", [(0, 7)], "<mark>Servus,</mark> the lamp"),
        ("a <b> & c", [(2, 5), (8, 9)], "a <mark>&lt;b&gt;</mark> &amp; <mark>c</mark>"),
        ("none", [], "none"),
    ],
)
def test_what_came_from_the_users_words_is_marked(text, marks, html):
    assert f'<p class="text" dir="auto">{html}</p>' in view.cards({"own": answer(text=text, marks=marks)})


def test_style_is_a_table():
    card = style_of(["Servus, so 🌳"] * 3 + ["Servus, well 🌳"], ["Hello there, my friend"] * 9)
    text = Page(view.style("ann", card)).text
    for part in ("Style of ann: 4 texts beside 9", "length 3 words", "openings Servus,", "emoji 🌳"):
        assert part in text
    assert "100% of texts, others 0%" in text
    assert "No items of ann yet" in view.style("ann", None)
    assert "Choose a user" in view.style("", None)


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
