"""The two contrasts that are fixed beforehand, and the advice."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import run, tiny
from eval.decision import decide

USERS = [f"u{i // 2}" for i in range(40)]


def values(**means):
    """Losses of each method: its mean, and an error that is the question's own."""
    draw = np.random.default_rng(0)
    shared = draw.normal(size=40)
    return {n.replace("__", ": "): {"nll": m + shared + draw.normal(scale=0.05, size=40)} for n, m in means.items()}


def test_lift_and_gain_are_of_the_subject_and_the_rival_is_chosen_elsewhere():
    rows = values(plug=1.0, plug_shuffled=1.3, task_prompt=1.1, user_prior__a=0.5, user_prior__b=1.2)
    losses = {"task_prompt": 1.2, "user_prior: a": 1.5, "user_prior: b": 1.1, "gone": 0.1}  # validation prefers b
    made = decide("plug", rows, USERS, losses, {"plug": 9})
    assert (made["lift"]["a"], made["lift"]["b"]) == ("plug", "plug_shuffled")
    assert made["lift"]["delta"] == pytest.approx(0.3, abs=0.05)
    assert made["gain"]["b"] == "user_prior: b"  # though the questions prefer a
    assert made["gain"]["delta"] == pytest.approx(0.2, abs=0.05)
    assert made["lift"]["p"] < 0.01
    assert made["validation"] == losses


@pytest.mark.parametrize(
    ("means", "tokens", "best", "advice"),
    [
        ({"none": 2.0, "plug": 1.0, "turns": 0.5}, {"none": 5, "plug": 9, "turns": 99}, "turns", "turns"),
        ({"none": 2.0, "plug": 1.0, "turns": 1.0}, {"none": 5, "plug": 9, "turns": 99}, None, "plug"),
        ({"none": 1.0, "plug": 1.0, "user_prior__a": 1.0}, {"none": 5, "plug": 9}, None, "user_prior: a"),
        ({"none": 1.0, "plug": 1.2, "plug_shuffled": 0.1}, {"none": 5, "plug": 9}, "none", "none"),  # no control
    ],
)
def test_the_advice_is_the_fewest_tokens_that_are_no_worse_than_chance(means, tokens, best, advice):
    made = decide("plug", values(**means), USERS, {}, tokens)
    assert made["advice"] == advice
    assert best in (None, made["best"])
    assert "gain" not in made


@pytest.mark.parametrize("shape", ["label", "text"])
def test_a_comparison_decides(tmp_path, shape):
    tiny.write(tmp_path / "data", shape)
    out = tmp_path / "out"
    arguments = [
        f"data={tmp_path / 'data'}",
        f"task={tiny.SHAPES[shape][0]}",
        f"out={out}",
        "llm=tiny-llama",
        "encoder=tiny-encoder",
        "methods=[none, task_prompt, plug, plug_shuffled, user_prior]",
        "generated=2",
        "fit={steps: 2, batch_size: 4, eval_every: 1, eval_samples: 4}",
    ]
    run.main(arguments)
    decision = json.loads((out / "results.json").read_text())["decision"]
    rivals = json.loads(Path(out / "seed-0" / "validation.json").read_text())
    assert decision["gain"]["b"] == min(rivals, key=rivals.get)
    assert ("user_prior: classifier" in rivals) == (shape == "label")
    assert decision["lift"]["metric"] == "nll"
    assert decision["best"] in json.loads((out / "results.json").read_text())["methods"]
    run.main([*arguments, "methods=[none, user_prior]"])
    assert json.loads((out / "results.json").read_text())["decision"] is None
