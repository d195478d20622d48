"""Tables as Markdown and HTML from the same rows."""

import math

import pytest

from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval
from persona_plug.measure.tables import Table, contrast_table, interval_text, metric_table, number_text, one_line

EVIL = "<b>|`x`\n"


def test_cells_are_no_markup_in_either_form():
    table = Table(("name", EVIL), [[EVIL, "a_b"]])
    lines = table.markdown()
    assert len(lines) == 3
    assert all("\n" not in line and "<b>" not in line for line in lines)
    assert lines[2] == "| &lt;b&gt;\\|\\`x\\` | a_b |"
    html = table.html(EVIL)
    assert "<b>" not in html
    assert html.count('scope="col"') == 2
    assert html.count('scope="row"') == 1
    assert 'role="region" aria-label="&lt;b&gt;' in html
    assert "role=" not in table.html()


def test_metrics_stand_in_one_order_with_their_directions():
    methods = {"none": {"accuracy": Interval(0.5, 0.4, 0.6)}, "plug": {"nll": Interval(1.0, 0.9, 1.1)}}
    table = metric_table(methods)
    assert table.head == ("method", "nll ↓", "accuracy ↑")
    assert table.rows == [["none", "–", "0.500 [0.400, 0.600]"], ["plug", "1.000 [0.900, 1.100]", "–"]]
    assert metric_table(methods, ["accuracy", "new"]).head == ("method", "accuracy ↑", "new")


def test_contrasts_show_p_only_where_it_was_tested():
    plain = Contrast("plug", "none", "nll", 0.25, -0.1, 0.5)
    assert contrast_table([plain]).rows == [["plug − none", "nll", "+0.250 [-0.100, +0.500] (includes 0)"]]
    tested = Contrast("plug", "none", "nll", -0.25, -0.5, -0.1, 0.01, 0.02)
    table = contrast_table([plain, tested])
    assert table.head[-2:] == ("p", "p, Holm")
    assert [row[2:] for row in table.rows] == [
        ["+0.250 [-0.100, +0.500] (includes 0)", "–", "–"],
        ["-0.250 [-0.500, -0.100]", "0.0100", "0.0200"],
    ]


def test_what_is_not_known_is_a_dash():
    assert interval_text(None) == interval_text(Interval(math.nan, 0, 1)) == number_text(None) == "–"
    assert interval_text(Interval(1, math.nan, 2)) == "1.000 [–, 2.000]"
    assert number_text(math.inf) == "–"


def test_a_long_text_is_cut_to_one_line():
    assert one_line(" a\n b ", 9) == "a b"
    assert one_line("abcdef", 4) == "abc…"


@pytest.mark.parametrize(
    ("metric", "values", "bold"),
    [
        ("nll", [2.0, 1.0, 3.0], [1]),
        ("rouge-1", [0.2, 0.5, 0.5], [1, 2]),
        ("accuracy", [0.2, None, 0.1], [0]),
        ("nll", [1.0, None, None], []),
        ("nll", [math.nan, 1.0, 2.0], [1]),
    ],
)
def test_best_values_are_bold(metric, values, bold):
    rows = {f"m{i}": {} if v is None else {metric: Interval(v, v, v)} for i, v in enumerate(values)}
    table = metric_table(rows)
    lines = table.markdown()[2:]
    assert [i for i, line in enumerate(lines) if "**" in line] == bold
    assert table.html().count("<strong>") == len(bold)
