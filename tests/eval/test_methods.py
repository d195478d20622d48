"""Every method on generated users: what is reported re-scores from what is stored, and nothing is computed twice."""

import json

import numpy as np
import pytest

from eval import methods, run, tiny
from eval.methods import METHODS, PRIOR, Method, by_training, find_method
from eval.metrics.lamp import score
from eval.session import Session
from persona_plug.errors import ConfigError
from training.recipes import RECIPES
from training.tasks import TASKS

EVERY = [*(name for name in METHODS if name != PRIOR), "plug_shuffled", "plug_empty"]
FIT = "fit={steps: 2, batch_size: 4, eval_every: 1, eval_samples: 4}"


NO_WORDS = "plug={words: false}"  # fitting a memory takes seconds


def compare(folder, shape, names, *more, **data):
    if not (folder / "data").exists():
        tiny.write(folder / "data", shape, **data)
    run.main(
        [
            f"data={folder / 'data'}",
            f"task={tiny.SHAPES[shape][0]}",
            f"out={folder / 'out'}",
            "llm=tiny-llama",
            "encoder=tiny-encoder",
            f"methods={json.dumps(names)}",
            "generated=4",
            FIT,
            *more,
        ]
    )
    return json.loads((folder / "out" / "results.json").read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("label")
    return folder, compare(folder, "label", [*EVERY, "bm25-2", "turns-1", "user_prior"])


def test_every_method_has_a_row_with_costs(everything):
    _, results = everything
    assert {*EVERY, "bm25-2", "user_prior: majority"} <= set(results["methods"])
    for name, row in results["methods"].items():
        for found in row["metrics"].values():
            low, high = found["ci95"]
            assert np.isfinite([found["value"], low, high]).all()
        if name.startswith("user_prior"):
            assert row["fit_seconds"] == results["methods"]["user_prior: majority"]["fit_seconds"] > 0
            assert row["trainable_params"] is None
            continue
        assert row["prompt_tokens_mean"] > 0
        assert row["seconds_per_query"] > 0
        assert (row["trainable_params"] > 0) == (find_method(name).recipe is not None)
    assert 0 < results["methods"]["bm25"]["outside_llm"] < 1
    assert results["methods"]["lora_user"]["outside_llm"] is None  # it trains while it is asked
    running = {n: results["methods"][n]["flops_per_query"] for n in ("none", "prefix_tuning", "task_prompt")}
    assert running["prefix_tuning"] == running["none"] < running["task_prompt"]  # a prefix is kept, not run
    alone, whole = (results["methods"][n]["metrics"]["nll"]["value"] for n in ("plug_llm_alone", "plug"))
    assert alone != whole
    assert results["methods"]["bm25"]["prompt_tokens_mean"] > results["methods"]["bm25-2"]["prompt_tokens_mean"]
    assert results["methods"]["none"]["prompt_tokens_mean"] < results["methods"]["bm25-2"]["prompt_tokens_mean"]
    assert results["methods"]["none"]["prompt_tokens_mean"] < results["methods"]["turns-1"]["prompt_tokens_mean"]
    assert results["methods"]["turns-1"]["prompt_tokens_mean"] < results["methods"]["turns"]["prompt_tokens_mean"]


@pytest.mark.parametrize("name", ["none", "plug", "bm25", "lora_user", "user_prior: majority"])
def test_stored_predictions_score_what_is_reported(everything, name):
    folder, results = everything
    golds = json.loads((folder / "data" / "dev_outputs.json").read_text())
    predictions = json.loads((folder / "out" / "predictions" / f"{name.replace(': ', '=')}.json").read_text())
    for metric, value in score("LaMP_2", predictions, golds).items():
        assert results["methods"][name]["metrics"][metric]["value"] == pytest.approx(value, rel=1e-8)


def test_a_method_that_would_repeat_another_is_left_out_and_said(tmp_path):
    results = compare(tmp_path, "text", ["none", "plug_llm_alone", "summary_profile"])
    assert list(results["methods"]) == ["none"]
    for name in ("plug_llm_alone", "summary_profile"):
        assert any(note.startswith(f"{name} not run") for note in results["data_notes"])
    with pytest.raises(ConfigError, match=r"^plug_llm_alone not run"):
        compare(tmp_path, "text", ["plug_llm_alone"])
    with pytest.raises(ConfigError, match="names none"):
        compare(tmp_path, "text", [])


def test_ratings_score_from_their_two_files(tmp_path):
    results = compare(tmp_path, "rating", ["plug", "none"])
    golds = json.loads((tmp_path / "data" / "dev_outputs.json").read_text())
    for name in ("plug", "none"):
        for file, metric in ((f"{name}.json", "mae"), (f"{name}.mean.json", "rmse")):
            predictions = json.loads((tmp_path / "out" / "predictions" / file).read_text())
            expected = score("LaMP_3", predictions, golds)[metric]
            assert results["methods"][name]["metrics"][metric]["value"] == pytest.approx(expected, rel=1e-8)


def test_texts_are_scored_on_those_that_were_generated(tmp_path):
    results = compare(tmp_path, "text", ["none", "plug", "summary", "user_prior"], NO_WORDS)
    golds = {g["id"]: g["output"] for g in json.loads((tmp_path / "data" / "dev_outputs.json").read_text())["golds"]}
    found = json.loads((tmp_path / "out" / "predictions" / "plug.json").read_text())["golds"]
    assert len(found) == 4 < len(golds)
    chosen = {p["id"]: golds[p["id"]] for p in found}
    expected = score("LaMP_5", {p["id"]: p["output"] for p in found}, chosen)
    row = results["methods"]["plug"]
    assert row["metrics"]["rouge-1"]["value"] == pytest.approx(expected["rouge-1"], rel=1e-8)
    assert row["generated_tokens_mean"] > 0
    assert (tmp_path / "out" / "report.html").read_text().lower().startswith("<!doctype html>")


def test_a_profile_gives_way_to_the_question(tmp_path):
    results = compare(tmp_path, "label", ["none", "summary_profile"], "plug={max_input_tokens: 140}")
    rows = results["methods"]
    assert rows["none"]["prompts_cut"] == rows["summary_profile"]["prompts_cut"] == 0
    assert rows["summary_profile"]["prompt_tokens_mean"] > rows["none"]["prompt_tokens_mean"]
    assert results["notes"]["summary_profile"]["profiles that were cut to leave room for the question"] > 0


def test_an_adapter_for_each_user_writes_the_same_answers_as_the_others(tmp_path, monkeypatch):
    """Else its seconds would be those of more texts than another method's."""
    real, asked = Session._write, {}

    def write(self, plug, examples, personal):
        asked.setdefault(plug.llm is self.base.llm, []).extend(e.id for e in examples)
        return real(self, plug, examples, personal)

    monkeypatch.setattr(Session, "_write", write)
    compare(tmp_path, "text", ["none", "lora_user"])
    assert len(asked[True]) == 4
    assert sorted(asked[False]) == sorted(asked[True])
    found = json.loads((tmp_path / "out" / "predictions" / "lora_user.json").read_text())["golds"]
    assert sorted(p["id"] for p in found) == sorted(asked[True])


def test_a_stopped_run_computes_only_what_is_missing(everything, monkeypatch):
    folder, results = everything
    (folder / "out" / "seed-0" / "bm25.npz").unlink()
    real, asked = Session._run, []
    monkeypatch.setattr(Session, "_run", lambda self, chosen, seed: (asked.append(chosen), real(self, chosen, seed))[1])
    again = compare(folder, "label", [*EVERY, "bm25-2", "turns-1", "user_prior"])
    assert asked == [METHODS["bm25"]]
    for name, row in results["methods"].items():
        assert again["methods"][name]["metrics"] == row["metrics"]
    for trained, plain in (("plug_rag", "bm25"), ("lora_rag", "bm25")):  # the same prompts of the same questions
        asked = {k: v for k, v in results["notes"][trained].items() if not k.startswith("training: ")}
        assert asked == results["notes"].get(plain, {})
        assert len(results["notes"][trained]) > len(asked)
    assert again["notes"] == results["notes"] != {}  # what was cut is told again, not only by the run that cut it


def test_a_users_adapter_can_be_trained_on_another_users_history(everything):
    folder, _ = everything
    both = compare(folder, "label", ["lora", "lora_user", "lora_user_shuffled", "lora_user_empty"])["methods"]
    nll = {name: row["metrics"]["nll"]["value"] for name, row in both.items()}
    assert len({nll["lora_user"], nll["lora_user_shuffled"], nll["lora"]}) == 3
    assert nll["lora_user_empty"] == pytest.approx(nll["lora"], abs=1e-6)  # there is nothing to train on


def test_any_two_methods_can_be_contrasted(everything):
    folder, _ = everything
    names = ["none", "lora", "lora_user", "plug"]
    usual = compare(folder, "label", names)["contrasts"]
    found = compare(folder, "label", names, "pairs=[[lora, lora_user], [plug, none]]")["contrasts"]
    assert [(c["a"], c["b"], c["metric"]) for c in found[len(usual) :]] == [
        ("lora", "lora_user", metric) for metric in ("nll", "accuracy")
    ]
    for before, now in zip(usual, found, strict=False):
        assert before["delta"] == now["delta"]
        assert before["p_holm"] <= now["p_holm"]  # asking more costs certainty
    for pairs, message in (("[lora]", "lists of 2 texts"), ("[[lora, 3]]", "lists of 2 texts"), ("[[a, none]]", "'a'")):
        with pytest.raises(ConfigError, match=message):
            compare(folder, "label", names, f"pairs={pairs}")


def test_a_folder_made_with_other_settings_is_refused(everything):
    folder, _ = everything
    for more in (["valid=0.3"], ["fit={steps: 3}"], ["plug={user_tokens: 2}"], ["questions=3"]):
        with pytest.raises(ConfigError, match=f"made with another {more[0].partition('=')[0]}; choose another out="):
            compare(folder, "label", ["none"], *more)
    compare(folder, "label", ["none"], "seeds=[0, 1]")


def test_where_answers_do_not_depend_on_the_user_no_lift_is_found(tmp_path):
    """The negative control: labels are drawn alike for all, whatever the history says."""
    names = ["none", "task_prompt", "plug", "plug_shuffled", "plug_empty"]
    results = compare(tmp_path, "label", names, users=30, dev_users=30, personal=False)
    lift = [c for c in results["contrasts"] if (c["a"], c["b"]) == ("plug", "plug_shuffled")]
    assert {c["metric"] for c in lift} >= {"nll", "accuracy"}
    for c in lift:
        assert c["ci95"][0] <= 0 <= c["ci95"][1] or c["p_holm"] > 0.05


def test_a_new_method_is_a_line_and_a_new_task_a_file(tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "latest", Method(prompt="recency", items=1))
    task = tmp_path / "mood.yaml"
    task.write_text(
        "version: 1\nkind: label\nanswers: [comedy, action, classic]\nfields: [description, tag]\n"
        "query: 'description: (.*)'\nitem: '{input} is {output}'\nprompt: '{items}. {input}'\n"
    )
    results = compare(tmp_path, "label", ["latest", "none"], f"task={task}")
    assert results["task"] == "mood"
    assert results["methods"]["latest"]["prompt_tokens_mean"] > results["methods"]["none"]["prompt_tokens_mean"]


def test_names_are_checked_and_methods_that_share_a_training_stand_together():
    assert find_method("bm25-8").items == 8
    assert find_method("lora_user_shuffled") == Method("lora", user_adapter=True, history="other")
    assert find_method("plug_rag_empty") == Method("plug", prompt="bm25", history="none")
    assert find_method("turns-2") == Method(prompt="turns", items=2)
    assert find_method("turns_shuffled") == Method(prompt="turns", history="other")
    unknown = ("nonsense", "plug-4", "bm25-0", "bm25-x", "bm25_shuffled", "plug_shuffled_empty", "x_shuffled", "_empty")
    for name in unknown:
        with pytest.raises(ConfigError, match="no method"):
            find_method(name)
    with pytest.raises(ConfigError, match="prompt='nonsense' is not one of"):
        Method(prompt="nonsense")
    assert {m.recipe for m in METHODS.values() if m.recipe} <= set(RECIPES)
    names = ["plug_empty", "lora_rag", "none", "plug", "lora", "task_prompt", "lora_user", "plug_rag", "plug_shuffled"]
    assert sorted(by_training(names)) == sorted(names)
    kinds = [find_method(n).training for n in by_training(names)]
    assert [k for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k] == list(dict.fromkeys(kinds))


def test_a_generator_that_cannot_do_what_is_asked_is_refused(tmp_path):
    tiny.write(tmp_path / "data", "text")
    repeats = tmp_path / "titles.yaml"
    repeats.write_text((TASKS / "LaMP_5.yaml").read_text() + "no_repeat_ngram: 2\n")
    for more, words in (
        (["generator=pigeon"], "generator='pigeon' is not one of transformers, vllm"),
        (["generator=vllm", "beams=4"], "no beams"),
        (["generator=vllm", f"task={repeats}"], "no no_repeat_ngram"),
    ):
        with pytest.raises(ConfigError, match=words):
            compare(tmp_path, "text", ["none"], *more, f"out={tmp_path / words[:9]}")
    with pytest.raises(ConfigError, match="vLLM"):  # it is not installed where this test runs
        compare(tmp_path, "text", ["none"], "generator=vllm", f"out={tmp_path / 'vllm'}")


def test_vllm_writes_for_every_method_whose_llm_is_the_plain_one(tmp_path, monkeypatch):
    asked = []

    class Engine:
        def __init__(self, llm, **options):
            pass

        def answer(self, plug, examples, personal):
            asked.append((personal, len(examples)))
            return ["an answer"] * len(examples)

        def close(self):
            asked.append("closed")

    monkeypatch.setattr("persona_plug.serving.offline.VllmOffline", Engine)
    monkeypatch.setattr("persona_plug.heads.fitting.STEPS", 2)
    tiny.write(tmp_path / "data", "text")
    names = ["bm25", "plug", "words", "lora", "prefix_tuning"]
    compare(tmp_path, "text", names, "generator=vllm", "generated=3", NO_WORDS)
    assert sorted(asked[:-1]) == [(False, 3), (True, 3)]  # bm25 and the plug
    assert asked[-1] == "closed"
