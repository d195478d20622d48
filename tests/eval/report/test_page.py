"""The comparison's report: what it says, that it is safe and self-contained, and what its plots show."""

import copy
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from eval.report import drawings, figures
from eval.report import page as report
from eval.report.figures import Bar, Point, Scale
from eval.report.results import contrast_row
from persona_plug.measure.contrasts import contrasts, difference

METHODS = ("none", "task_prompt", "plug_empty", "plug_shuffled", "plug", "user_prior: label frequencies")
COMMAND = "python -m eval.run configs/compare.yaml split=dev"
VOID = {"meta", "circle", "line", "path", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(self.words)


def values(seed=0, users=9, per_user=4):
    """Accuracy rises with the method, RMSE's squared errors fall; the lift grows with the history."""
    rng = np.random.default_rng(seed)
    owners = [f"user{u}" for u in range(users) for _ in range(per_user)]
    lengths = [4 * (u + 1) for u in range(users) for _ in range(per_user)]
    found = {}
    for i, name in enumerate(METHODS):
        right = rng.random(len(owners)) < 0.3 + 0.1 * i
        found[name] = {"accuracy": right.astype(float).tolist(), "rmse": (rng.random(len(owners)) + 5 - i).tolist()}
    found["plug_shuffled"]["accuracy"] = [0.0] * len(owners)
    found["plug"]["accuracy"] = [float(length > 20) for length in lengths]
    return found, owners, lengths


@pytest.fixture
def run():
    found, owners, lengths = values()
    methods = {}
    for i, name in enumerate(METHODS):
        metrics = {m: {"value": float(np.mean(v)), "ci95": [0.1, 0.9]} for m, v in found[name].items()}
        methods[name] = {
            "metrics": metrics,
            "per_seed": [{"accuracy": 0.25 + i / 100}, {"accuracy": 0.5}],
            "prompt_tokens_mean": 40.0 + 10 * i,
            "generated_tokens_mean": 1.0,
            "trainable_params": 1_234_567,
            "fit_seconds": 12.5,
            "seconds_per_query": 0.001 * 3**i,
            "flops_per_query": None,
        }
    results = {
        "task": "LaMP_2", "split": "dev", "n": len(owners), "n_users": 9, "llm": "tiny 12ab", "encoder": "enc 34cd",
        "seeds": [0, 1], "git": "abc123", "versions": {"torch": "2.13.0"}, "settings": {"lr": 0.001},
        "date": "2026-11-24", "machine": "x86_64, 2 cores", "methods": methods,
        "contrasts": [
            contrast_row(row)
            for row in contrasts(found, owners, [("plug", "plug_shuffled"), ("task_prompt", "none"), ("none", "plug")])
        ],
        "command": COMMAND,
    }  # fmt: skip
    examples = [
        {"input": f"request {i}", "reference": "right", "answers": {"plug": f"own {i}", "plug_shuffled": f"other {i}"}}
        for i in range(len(owners))
    ]
    details = {"users": owners, "history_lengths": lengths, "values": found, "examples": examples}
    return results, details


def section(page, title):
    """The text of one section of the page."""
    found = re.search(rf"<section><h2>{title}</h2>(.*?)</section>", page, re.DOTALL)
    return found[1]


def row(markdown, start):
    return next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))


def test_the_two_controls_come_first_and_are_explained(run):
    results, details = run
    lift = results["contrasts"][0]
    interval = f"{lift['delta']:+.3f} [{lift['ci95'][0]:+.3f}, {lift['ci95'][1]:+.3f}]"
    for text in (report.markdown(results), Page(report.html(results, details)).text):
        flat = " ".join(text.split())
        explained, control = flat.index("Personal lift is plug"), flat.index("personal lift (plug")
        assert flat.index("Lift and gain") < explained < control < flat.index("task gain (task_prompt")
        assert flat.index("task gain (task_prompt") < flat.index("user_prior")
        assert "plug − none mixes the two." in flat
        assert interval in flat


def test_markdown_holds_values_costs_contrasts_and_how_to_repeat_them(run):
    results, _ = run
    text = report.markdown(results)
    rmse = results["methods"]["plug"]["metrics"]["rmse"]["value"]
    assert row(text, "plug |") == f"| plug | 0.444 [0.100, 0.900] | {rmse:.3f} [0.100, 0.900] | 0.290; 0.500 |"
    assert "| method | accuracy ↑ | rmse ↓ | accuracy by seed |" in text
    assert "| plug | 80 | 1 | 1,234,567 | 12.5 | 0.081 | – |" in text
    assert row(text, "plug − plug_shuffled | accuracy").endswith(
        f"| {results['contrasts'][0]['p']:.4f} | {results['contrasts'][0]['p_holm']:.4f} |"
    )
    assert f"` {COMMAND} `" in text
    for fact in (
        "| git | abc123 |",
        "| versions | torch 2.13.0 |",
        "| date | 2026-11-24 |",
        '{"lr": 0.001}',
        "2 cores",
    ):
        assert fact in text
    assert results["contrasts"][4]["ci95"][0] < 0 < results["contrasts"][4]["ci95"][1]
    assert "includes 0" in row(text, "none − plug | accuracy")
    assert "includes 0" not in row(text, "plug − plug_shuffled | rmse")


def test_what_was_cut_is_told(run):
    results, details = run
    assert row(report.markdown(results).partition("## What was cut")[2], "nothing")
    results["data_notes"] = ["7 training samples left out"]
    results["notes"] = {"plug": {"items that found no room in a prompt": 12}}
    results["methods"]["none"]["prompts_cut"] = 3.5
    text = report.markdown(results)
    assert "| samples | 7 training samples left out | – |" in text
    assert "| plug | items that found no room in a prompt | 12 |" in text
    assert "| none | questions that were cut to fit the prompt (mean over seeds) | 3.5 |" in text
    page = section(report.html(results, details), "What was cut or left out")
    assert "7 training samples left out" in page
    assert "items that found no room in a prompt" in page


def test_what_so_few_users_can_show_is_said(run):
    results, _ = run
    assert "The smallest p that 9 users can give is 0.0039, 0.0234 after the correction." in report.markdown(results)
    few = {**results, "n_users": 4}
    assert "4 users can give is 0.1250, 0.7500 after the correction: too few users" in report.markdown(few)


def test_the_page_needs_nothing_from_outside_and_fits_a_phone(run):
    page = report.html(run[0], run[1])
    parsed = Page(page)
    assert not {"script", "link", "iframe", "img", "object"} & set(parsed.tags)
    assert not {"src", "href", "onload", "onerror", "style"} & {name for name, _ in parsed.attributes}
    assert not re.search(r"url\(|@import|https?:", page)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in parsed.attributes
    assert '<meta name="viewport" content="width=device-width' in page
    assert "@media (prefers-color-scheme: dark)" in page
    # A table scrolls inside its own box; a drawing shrinks to the screen.
    assert parsed.tags.count("table") == page.count('<div class="wide"')
    assert re.search(r"\.wide \{ overflow-x: auto", page)
    assert re.search(r"svg \{ width: 100%", page)
    drawings = [value for name, value in parsed.attributes if name == "aria-label"]
    assert len(drawings) == parsed.tags.count("svg") >= 10
    assert all(len(told) > 40 for told in drawings)
    colours = re.findall(r"var\((--\w+)\)", page)
    assert all(page.count(f"{name}:") == 2 for name in set(colours))  # light and dark


HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(1)> | `a` [l](javascript:x)\n# **b** _c_ \\'


def test_what_others_wrote_is_never_markup(run):
    results, details = copy.deepcopy(run)
    for key in ("task", "split", "llm", "encoder", "git", "date", "machine", "command"):
        results[key] = HOSTILE
    results["versions"][HOSTILE] = HOSTILE
    results["settings"][HOSTILE] = HOSTILE
    results["methods"][f"user_prior: {HOSTILE}"] = results["methods"].pop("user_prior: label frequencies")
    details["values"][f"user_prior: {HOSTILE}"] = details["values"].pop("user_prior: label frequencies")
    results["contrasts"].append({**results["contrasts"][0], "b": HOSTILE})
    for r in results["methods"].values():
        r["metrics"][HOSTILE] = {"value": 1.0, "ci95": [0.0, 2.0]}
    for e in details["examples"]:
        e.update(
            input=HOSTILE, reference=HOSTILE, answers={"plug": HOSTILE, "plug_shuffled": HOSTILE, HOSTILE: HOSTILE}
        )
    details["users"] = [f"{HOSTILE}{u}" for u in details["users"]]
    page = Page(report.html(results, details))
    assert not {"script", "img", "a"} & set(page.tags)
    assert not {"src", "onerror", "href"} & {name for name, _ in page.attributes}
    assert page.text.count("<script>alert(1)</script>") > 20

    text = report.markdown(results)
    code = f"`` {' '.join(HOSTILE.split())} ``"  # a span of code shows everything as it is
    assert code in text
    rest = text.replace(code, "")
    assert "<" not in rest
    assert len([line for line in rest.splitlines() if line.startswith("# ")]) == 1
    assert not re.search(r"(?<!\\)\*\*b|(?<!\\)`a|(?<!\\)\]\(", rest)
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in rest.splitlines() if line.startswith("| plug |")}
    assert widths == {6, 9}  # values: four columns and the hostile metric's; costs: eight


@pytest.mark.parametrize("missing", ["users", "history_lengths", "values", "examples", None])
def test_what_was_not_recorded_is_said(run, missing):
    results, details = run
    for m in results["methods"].values():
        m.pop("seconds_per_query")
    given = {k: v for k, v in details.items() if k != missing} if missing else None
    page = report.html(results, given)
    Page(page)
    absent = missing is None
    needs_values = absent or missing in ("users", "values")
    length = section(page, "Lift by history length")
    assert ("Not recorded" in length) == (needs_values or missing == "history_lengths")
    assert ("Not recorded: answers of plug" in section(page, "Examples")) == (absent or missing == "examples")
    # The contrasts that the run recorded itself are drawn in any case.
    lifts = section(page, "Lifts")
    assert "plug − none" in lifts
    assert ("differences were not recorded" in lifts) == needs_values
    assert "Not recorded: seconds per query together with accuracy" in section(page, "Quality against cost")


def test_results_of_an_older_run_still_make_a_report():
    bare = {"methods": {"none": {"metrics": {"nll": {"value": None, "ci95": [None, None]}}}}}
    assert "| none | – | – |" in report.markdown(bare)
    page = Page(report.html(bare))
    assert page.text.count("not recorded") + page.text.count("Not recorded") > 8


def test_lifts_are_the_recorded_ones_turned_around_or_computed(run):
    results, details = run
    lifts = section(report.html(results, details), "Lifts")
    recorded = next(c for c in results["contrasts"] if (c["a"], c["metric"]) == ("none", "accuracy"))
    assert f">plug − none</th><td>{-recorded['delta']:+.3f} [{-recorded['ci95'][1]:+.3f}" in lifts
    v, users = details["values"], details["users"]
    computed = difference(v["plug_empty"]["rmse"], v["none"]["rmse"], users, "rmse")
    assert f">plug_empty − none</th><td>{computed.value:+.3f} [{computed.low:+.3f}" in lifts
    for a in METHODS[1:]:
        assert f">{a} − none</th>" in lifts
    for b in METHODS:
        assert (f">plug − {b}</th>" in lifts) == (b != "plug")


def test_lift_by_terciles_of_history_and_by_user(run):
    results, details = run
    text = section(report.html(results, details), "Lift by history length")
    cells = re.findall(r'<tr><th scope="row">(.*?)</th><td>(\d+)</td><td>(\d+)</td><td>(.*?)</td>', text)[:3]
    assert [c[:3] for c in cells] == [("4–12 items", "12", "3"), ("16–24 items", "12", "3"), ("28–36 items", "12", "3")]
    assert cells[0][3] == "+0.000 [+0.000, +0.000]"
    assert cells[1][3].startswith("+0.333 [")
    assert cells[2][3] == "+1.000 [+1.000, +1.000]"
    assert "Of 9 users the lift is above 0 for 4, below for 0, 0 for 5." in text
    assert text.count('class="point"') == 2 * 9  # for either metric
    assert "Of 9 users the lift is above 0 for 9, below for 0, 0 for 0." in text  # RMSE fell for everyone
    alike = {**details, "history_lengths": [7] * len(details["users"])}
    text = section(report.html(results, alike), "Lift by history length")
    assert re.findall(r'<tr><th scope="row">(.*?)</th><td>(\d+)</td>', text)[0] == ("7 items", "36")


def test_the_frontier_is_marked_in_plot_and_table(run):
    results, details = run
    text = section(report.html(results, details), "Quality against cost")
    tokens = text[: text.index("against seconds")]
    marked = re.findall(r"<td>([^<]*)</td><td>\d+</td><td>[\d.]+</td><td>yes</td>", tokens)
    quality = {m: r["metrics"]["accuracy"]["value"] for m, r in results["methods"].items()}
    best, expected = -1.0, []
    for name in METHODS:  # in order of cost
        if quality[name] > best:
            expected.append(name)
            best = quality[name]
    assert marked == expected
    assert tokens.count('class="good"') == len(expected)
    assert 'class="edge"' in tokens


@pytest.mark.parametrize(
    ("lower", "expected"), [(False, [True, True, False, True, True]), (True, [True, False, False, False, True])]
)
def test_pareto(lower, expected):
    assert figures.pareto([1, 2, 2, 3, 1], [5, 6, 5.5, 7, 5], lower) == expected


def test_examples_won_and_lost_by_the_run_s_own_metric(run):
    results, details = run
    text = section(report.html(results, details), "Examples")
    assert "judged by accuracy of each question: 16 won, 0 lost, 20 even" in text
    assert text.count("<blockquote>") == drawings.EXAMPLES
    assert "<blockquote>request 20</blockquote>" in text  # the sixth user's first question
    assert "Lost: none." in text
    chosen = [{**details["examples"][i], "index": i} for i in (30, 2)]
    text = section(report.html(results, {**details, "examples": chosen}), "Examples")
    assert "1 won, 0 lost, 1 even" in text


def test_examples_without_a_place_are_judged_by_words(run):
    results, details = run
    answers = [("The right one", "wrong"), ("wrong", "right"), ("a", "b")]
    details["examples"] = [
        {"input": f"q{i}", "reference": "right", "answers": {"plug": a, "plug_shuffled": b}}
        for i, (a, b) in enumerate(answers)
    ]
    text = section(report.html(results, details), "Examples")
    assert "judged by the words shared with the reference (F1): 1 won, 1 lost, 1 even" in text
    assert text.index("q0") < text.index("<h3>Lost</h3>") < text.index("q1")


def test_a_forest_shows_side_and_place_of_every_interval():
    svg = figures.forest(
        [Bar("up", 2.0, 1.0, 3.0), Bar("down", -2.0, -3.0, -1.0), Bar("so so", 0.5, -1, 2)], "t", "axis"
    )
    Page(svg)
    kinds = re.findall(r'<line class="bar (\w*)" x1="([\d.]+)" x2="([\d.]+)"', svg)
    assert [k[0] for k in kinds] == ["good", "bad", ""]
    zero = float(re.search(r'class="zero" x1="([\d.]+)"', svg)[1])
    assert float(kinds[0][1]) > zero > float(kinds[1][2])
    assert float(kinds[2][1]) < zero < float(kinds[2][2])
    assert "up: +2 (95% +1 to +3)" in svg
    assert figures.forest([], "t", "axis") == ""


def test_scales_are_round_and_inside():
    scale = Scale(-0.013, 0.047, 0, 100)
    assert scale.ticks() == pytest.approx([0, 0.02, 0.04])
    assert 0 < scale.at(-0.013) < scale.at(0.047) < 100
    assert Scale(3, 3, 0, 100).at(3) == pytest.approx(50)
    log = Scale(0.001, 10, 0, 100, log=True)
    assert log.ticks() == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log.at(0.1) == pytest.approx(50)
    assert len(Scale(1, 30, 0, 100, log=True).ticks()) >= 4


def test_costs_over_many_sizes_are_drawn_on_a_logarithmic_scale():
    points = [Point("a", 0.001, 1), Point("b", 0.1, 2), Point("c", 10.0, 3)]
    xs = [float(x) for x in re.findall(r'<circle[^>]*cx="([\d.]+)"', figures.scatter(points, "t", "x", "y"))]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    near = [Point("a", 1, 1), Point("b", 2, 2), Point("c", 10, 3)]
    xs = [float(x) for x in re.findall(r'<circle[^>]*cx="([\d.]+)"', figures.scatter(near, "t", "x", "y"))]
    assert xs[2] - xs[1] > 5 * (xs[1] - xs[0])


def test_the_report_begins_with_what_was_found(run):
    results, details = run
    first = re.search(r"<h1>.*?</h1><p><strong>(.*?)</strong></p>", report.html(results, details))[1]
    assert first.startswith("Knows the user: ")
    assert f"**{first.split('.')[0]}" in report.markdown(results).replace("&#x27;", "'")


def test_the_line_at_zero_leaves_labels_free():
    svg = figures.forest([Bar("a − b", 0.1, -0.1, 0.3), Bar("c − d", 0.2, 0.1, 0.3)], "title", "axis")
    labels = [float(y) for y in re.findall(r'<text x="14" y="([\d.]+)"', svg)]
    lines = re.findall(r'class="zero" [^>]*y1="([\d.]+)" y2="([\d.]+)"', svg)
    assert len(labels) == len(lines) == 2
    assert all(float(top) > label + 2 for label, (top, _) in zip(labels, lines, strict=True))
    assert float(lines[0][1]) < labels[1] - 9
