"""What a report comes to: three findings and a recommendation."""

import pytest

from persona_plug.fit.verdict import judge
from persona_plug.measure.contrasts import Contrast
from persona_plug.measure.stats import Interval

COPY = "user_prior: nearest_own_output"


def contrast(b, metric, low, high):
    return Contrast("plug", b, metric, (low + high) / 2, low, high)


def metrics(**values):
    """Method -> metric -> value, from `name_metric=value`-like pairs."""
    return {name: {m: Interval(v, v - 0.1, v + 0.1) for m, v in row.items()} for name, row in values.items()}


LIFT = contrast("plug_shuffled", "nll", 0.1, 0.3)
TEXT = {
    "none": {"nll": 3.0, "rouge-1": 0.2},
    "task_prompt": {"nll": 2.0, "rouge-1": 0.3},
    "plug": {"nll": 1.0, "rouge-1": 0.4},
    COPY: {"rouge-1": 0.35},
    "user_prior: whole_request": {"rouge-1": 0.1},
}
TOKENS = {"none": 0.0, "task_prompt": 16.0, "plug": 66.4, "turns": 240.0}


def sentences(changes=None, rows=(), changed=0.5, tokens=None):
    return judge(metrics(**{**TEXT, **(changes or {})}), [LIFT, *rows], changed, TOKENS if tokens is None else tokens)


def test_all_is_well():
    rows = [contrast(COPY, "rouge-1", 0.01, 0.09), contrast("plug_shuffled", "rouge-1", 0.1, 0.2)]
    assert sentences(rows=rows) == [
        "Knows the user: yes, nll +0.200 [+0.100, +0.300] over another user's history.",
        "Better than without an LLM: yes, rouge-1 +0.050 [+0.010, +0.090] against copying the user's nearest output.",
        "Answers change with another user's history: 50% of them, rouge-1 +0.150 [+0.100, +0.200].",
        "Recommended: the plug, the lowest loss of 3; it adds 66 tokens to a request.",
    ]


@pytest.mark.parametrize(("low", "high", "found"), [(0.01, 0.2, "yes"), (-0.1, 0.1, "not shown"), (-0.3, -0.1, "no")])
def test_the_best_of_what_needs_no_llm_is_the_bar(low, high, found):
    rows = [contrast(COPY, "rouge-1", low, high), contrast("user_prior: whole_request", "rouge-1", 0.3, 0.4)]
    assert sentences(rows=rows)[1].startswith(f"Better than without an LLM: {found}, ")
    assert "against copying the user's nearest output" in sentences(rows=rows)[1]
    other = sentences({"user_prior: whole_request": {"rouge-1": 0.6}}, rows)
    assert "against copying the request" in other[1]


def test_texts_that_a_copy_beats_are_not_recommended():
    last = sentences(rows=[contrast(COPY, "rouge-1", -0.3, -0.2)])[-1]
    assert last.startswith("Recommended: nothing yet; copying the user's nearest output is nearer")


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ({"plug": 1.0}, "the plug, the lowest loss of 4; it adds 66 tokens to a request"),
        ({"turns": 0.5}, "chat turns alone, the lowest loss of 4; it adds 240 tokens to a request"),
        ({"task_prompt": 0.5}, "the task prompt, the lowest loss of 4; it adds 16 tokens to a request"),
        ({"none": 0.5}, "the plain LLM, the lowest loss of 4; it adds 0 tokens to a request"),
        ({"task_prompt": 1.0}, "the task prompt, "),  # as good, and cheaper
    ],
)
def test_the_lowest_loss_is_recommended_with_its_cost(losses, best):
    changes = {"turns": {"nll": 2.5}} | {name: {"nll": value} for name, value in losses.items()}
    assert sentences(changes)[-1].startswith(f"Recommended: {best}")


@pytest.mark.parametrize(("prior", "best"), [(0.4, "user_prior: majority"), (1.4, "the plug")])
def test_labels_may_need_no_llm(prior, best):
    changes = {"user_prior: majority": {"nll": prior}, "user_prior: classifier": {"nll": 9.0}}
    rows = [contrast(f"user_prior: {name}", "nll", -0.1, 0.1) for name in ("classifier", "majority")]
    found = sentences(changes, rows)
    assert "against user_prior: majority" in found[1]
    assert found[-1].startswith(f"Recommended: {best}, the lowest loss of 4")
    assert ("needs no LLM" in found[-1]) == (prior < 1)


def test_a_history_that_harms_leaves_what_knows_no_user():
    harm = contrast("plug_shuffled", "nll", -0.3, -0.1)
    found = judge(metrics(**TEXT), [harm], 0.5, TOKENS)
    assert found[0].startswith("Knows the user: harm")
    assert found[-1].startswith("Recommended: the task prompt, the lowest loss of 2")


def test_what_was_not_measured_is_not_said():
    assert judge(metrics(**TEXT), [], 0.5, TOKENS) == ["Knows the user: not measured."]
    found = judge(metrics(**TEXT), [LIFT], None, {})
    assert [line.partition(":")[0] for line in found] == ["Knows the user"]
