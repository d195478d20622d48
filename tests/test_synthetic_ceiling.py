"""On generated users the best possible score is known: a plug must come close, and by nothing but the history.

Two topics, three answers, three types of users. What a user answers depends on type and topic, so neither the request
nor the user's answer frequencies suffice: soft tokens have to carry what this user does with this topic. The answer
head, which needs no LLM, is off.
"""

import pytest

from persona_plug.data import synthetic
from persona_plug.fit import train
from persona_plug.report import contrasts, run_methods
from persona_plug.trainer import FitConfig
from persona_plug.training_data import prepare

# Few topics, since a tiny encoder with random weights tells these two apart in 9 of 10 sentences, and four in 7 of 10.
WORLD = {"items_per_user": 8, "topics": 2, "answers": 3, "types": 3, "seed": 2}
SETTINGS = {
    "batch_size": 64,
    "lr": 0.015,
    "dropout": 0.0,
    "history_dropout": 0.2,
    "empty_history": 0.05,
    "weight_decay": 0.05,
    "eval_every": 50,
    "eval_samples": 256,
}


def compare(make_plug, folder, users, steps, personal):
    """Train on generated users; return held-out NLLs by method, the paired differences, floor and ceiling."""
    made = synthetic.build("label", users=users, personal=personal, **WORLD)
    data = prepare(made.records, samples="leave_one_out", held_out=0.25, template="{input}", answers=list(made.answers))
    config = FitConfig.of(SETTINGS | {"steps": steps})
    plug = make_plug(answers=data.answers, template="{input}", answer_head=False, projector_hidden=64)
    train(plug, data, config, folder)
    methods = ("none", "plug_empty", "plug_shuffled")
    found = run_methods(plug, data, config, folder, False, methods, 0)
    owners = [e.user_id for e in data.held_out]
    rows = {(r["b"], r["metric"]): r for r in contrasts(found, owners)}
    bounds = made.bounds([(e.history, e) for e in data.held_out])
    return {name: a.values["nll"].mean() for name, a in found.items()}, rows, bounds


@pytest.fixture(scope="module")
def personal(make_plug, tmp_path_factory):
    return compare(make_plug, tmp_path_factory.mktemp("run"), users=900, steps=450, personal=True)


def closed(nll, bounds):
    """Share of the way from the best score without a history to the best with one."""
    return (bounds.prior.nll - nll) / (bounds.prior.nll - bounds.bayes.nll)


def test_there_is_a_gap_to_close(personal):
    _, _, bounds = personal
    assert bounds.prior.nll - bounds.bayes.nll > 0.5


def test_the_plug_closes_most_of_the_gap_on_held_out_users(personal):
    nll, _, bounds = personal
    assert 0.8 <= closed(nll["plug"], bounds) <= 1.05


def test_another_users_history_closes_none_of_it(personal):
    nll, _, bounds = personal
    assert closed(nll["plug_shuffled"], bounds) < 0.02


def test_no_history_is_about_as_good_as_the_best_without_one(personal):
    nll, _, bounds = personal
    assert -0.15 < closed(nll["plug_empty"], bounds) < 0.02


def test_neither_request_nor_frequencies_alone_close_it(personal):
    nll, rows, bounds = personal
    for name in ("user_prior: majority", "user_prior: classifier", "user_prior: user_frequency"):
        assert closed(nll[name], bounds) < 0.6
        assert rows[name, "nll"]["low"] > 0


def test_the_lift_is_beyond_doubt(personal):
    _, rows, _ = personal
    assert rows["plug_shuffled", "nll"]["low"] > 0.3


def test_users_who_do_not_matter_give_no_lift(make_plug, tmp_path):
    nll, rows, bounds = compare(make_plug, tmp_path, users=200, steps=100, personal=False)
    assert bounds.prior.nll == pytest.approx(bounds.bayes.nll)
    lift = rows["plug_shuffled", "nll"]
    assert lift["low"] <= 0 <= lift["high"]
    assert nll["plug"] > bounds.bayes.nll - 0.02
