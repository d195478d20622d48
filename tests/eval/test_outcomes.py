"""An outcome's two files."""

import json

import numpy as np

from eval.outcomes import Costs, Outcome, read_outcome, write_outcome
from persona_plug.measure.answers import Answers


def test_an_outcome_comes_back_as_it_was_written(tmp_path):
    values = {"nll": np.array([1.0, np.nan]), "rouge-1": np.array([0.5, 0.25])}
    costs = Costs(prompt_tokens=12.5, curve=[[1, 0.5, 2.0]], lr=0.001)
    stem = tmp_path / "seed-0" / "user_prior=a.b"  # a dot in the name is no ending
    assert read_outcome(stem) is None
    write_outcome(stem, Outcome(Answers(values, ["a", "ü"], np.eye(2)), costs, {"cut": 3}))
    outcome = read_outcome(stem)
    assert (outcome.costs, outcome.notes, outcome.answers.texts) == (costs, {"cut": 3}, ["a", "ü"])
    np.testing.assert_array_equal(outcome.answers.probabilities, np.eye(2))
    assert set(outcome.answers.values) == set(values)
    np.testing.assert_array_equal(outcome.answers.values["nll"], values["nll"])
    assert set(json.loads((tmp_path / "seed-0" / "user_prior=a.b.json").read_text())) == {"texts", "costs", "notes"}


def test_costs_of_an_earlier_run_may_lack_fields(tmp_path):
    write_outcome(tmp_path / "none", Outcome(Answers({"nll": np.zeros(1)})))
    file = tmp_path / "none.json"
    file.write_text(json.dumps({"texts": None, "costs": {"seconds": 2.0}}))
    assert read_outcome(tmp_path / "none").costs == Costs(seconds=2.0)
