"""One page over many sets."""

import copy
import json

import pytest

from eval.report.__main__ import main
from eval.report.decisions import decision_table, picture, record_decisions, sentence
from persona_plug.errors import DataError


def interval(value, half=0.1):
    return {"value": value, "ci95": [value - half, value + half]}


def contrast(a, b, delta, half, p):
    return {"a": a, "b": b, "metric": "nll", "delta": delta, "ci95": [delta - half, delta + half], "p": p, "p_holm": p}


def method(loss, tokens, **more):
    metrics = {"nll": interval(loss), **{name: interval(value) for name, value in more.items()}}
    row = {"metrics": metrics, "prompt_tokens_mean": tokens, "generated_tokens_mean": 3.0, "trainable_params": 0.0}
    return {**row, "fit_seconds": 60.0, "seconds_per_query": 0.5, "curve": None, "per_seed": [], "lr": None}


RESULTS = {
    "task": "LaMP_5", "split": "dev", "n": 40, "n_users": 20, "llm": "tiny", "encoder": "tiny", "seeds": [0],
    "settings": {"fit": {"flops": 4.3e13, "steps": 400}},
    "methods": {
        "none": method(3.0, 100.0, foreign=0.5), "words": method(2.0, 116.0, foreign=0.1),
        "words_shuffled": method(2.4, 116.0, foreign=0.2), "turns": method(1.9, 480.0, foreign=0.3),
        "user_prior: a": {**method(2.6, 0.0), "prompt_tokens_mean": 0.0},
        "user_prior: b": {**method(2.5, 0.0), "prompt_tokens_mean": 0.0},
    },
    "contrasts": [],
    "decision": {
        "subject": "words", "validation": {"user_prior: a": 1.0}, "best": "turns", "advice": "words",
        "lift": contrast("words", "words_shuffled", 0.4, 0.14, 0.01),
        "gain": contrast("words", "user_prior: a", 0.6, 0.2, 0.04),
    },
}  # fmt: skip


@pytest.fixture
def files(tmp_path):
    other = copy.deepcopy(RESULTS)
    del other["decision"]["gain"]
    other["decision"]["lift"] = contrast("words", "words_shuffled", 0.05, 0.14, 0.5)
    other["decision"] |= {"best": "user_prior: b", "advice": "user_prior: b"}
    for name, results in (("2026-11-27-decide_mails", RESULTS), ("titles", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    return [tmp_path / "2026-11-27-decide_mails.json", tmp_path / "titles.json"]


def test_a_sentence_says_what_to_use_and_what_the_history_is_worth(files):
    assert sentence("mails", RESULTS) == (
        "**mails**: use words (nll ↓ 2.000, +16 tokens). turns (1.900) is not better beyond chance. "
        "Another user's history costs words 0.400 nats."
    )
    other = json.loads(files[1].read_text())
    assert sentence("titles", other) == (
        "**titles**: use user_prior: b (nll ↓ 2.500, no LLM). "
        "No lift of words is shown; one of 0.200 nats would have been."
    )


def test_p_is_corrected_over_all_sets_together(files):
    sets = {path.stem.rpartition("_")[2]: json.loads(path.read_text()) for path in files}
    first, second = decision_table(sets).rows
    assert first[:5] == ["mails", "40, 20", "1", "43 TFLOP, 400 steps", "words"]
    assert first[5:7] == ["+0.400 [+0.260, +0.540]", "0.03"]  # 3 x .01
    assert first[7:9] == ["+0.600 [+0.400, +0.800] over user_prior: a", "0.08"]  # 2 x .04
    assert second[6:9] == ["0.5", "–", "–"]
    assert second[-1] == "0.200"  # 2.8 standard errors


def test_page_and_plot_are_rendered_and_keep_what_was_written_by_hand(files, tmp_path, capsys):
    page = tmp_path / "decide.md"
    main([*map(str, files), "--decisions", str(page)])
    assert capsys.readouterr().out == f"{page}\n{tmp_path / 'decide.svg'}\n"
    text = page.read_text()
    assert "| words | **2.000 [1.900, 2.100]** |" not in text
    assert "| turns | **1.900 [1.800, 2.000]** | **1.900 [1.800, 2.000]** |" in text
    assert "| user_prior | 2.500 [2.400, 2.600] | 2.500 [2.400, 2.600] |" in text  # the best of the family
    assert "words_shuffled |" not in text
    assert "| mails | turns | – | – | 0.300 [0.200, 0.400] | – |" in text
    assert "| mails | turns | +380 | 0.50 | 60 |" in text
    page.write_text(text + "\nby hand\n")
    record_decisions(files, page)
    assert page.read_text() == text + "\nby hand\n"


def test_the_picture_has_a_point_per_method_and_set(files):
    sets = {path.stem.rpartition("_")[2]: json.loads(path.read_text()) for path in files}
    drawing = picture(sets)
    assert drawing.count("<title>") == 4
    assert "mails, turns: +1.100" in drawing


def test_what_decides_nothing_is_refused(files, tmp_path):
    plain = {**RESULTS, "decision": None}
    (tmp_path / "plain.json").write_text(json.dumps(plain))
    with pytest.raises(DataError, match=r"plain.json: decides nothing; run eval.run with subject="):
        record_decisions([tmp_path / "plain.json"], tmp_path / "page.md")
    with pytest.raises(DataError, match="a second result named mails"):
        record_decisions([files[0], files[0]], tmp_path / "page.md")
