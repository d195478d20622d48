"""Official metrics against transcriptions of their rules, and against the libraries that define them."""

import json
import math
import socket
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.metrics.lamp import QUESTION_RULES, bleu, meteor, official_rouge, rating_errors, score
from persona_plug.errors import ConfigError, DataError
from training.tasks import Task, load_task

EXACT = 1e-12  # the same sums in another order
TAGS = load_task("LaMP_2").answers

# Transcriptions of LaMP's rules, written for this test alone


def official_labels(predictions, references, labels):
    """Accuracy and macro-F1 over places in the list of labels, -1 for anything else."""
    found = [labels.index(p.strip()) if p.strip() in labels else -1 for p in predictions]
    gold = [labels.index(r.strip()) for r in references]
    f1 = []
    for label in range(len(labels)):
        tp = sum(p == label and g == label for p, g in zip(found, gold, strict=True))
        fp = sum(p == label and g != label for p, g in zip(found, gold, strict=True))
        fn = sum(p != label and g == label for p, g in zip(found, gold, strict=True))
        precision = tp / (tp + fp) if tp + fp else 0
        recall = tp / (tp + fn) if tp + fn else 0
        f1.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    return {"accuracy": sum(map(int.__eq__, found, gold)) / len(gold), "f1": sum(f1) / len(labels)}


def official_ratings(predictions, references):
    """MAE and RMSE; what `float` refuses becomes 1 or 5, whichever is farther."""
    errors = []
    for prediction, reference in zip(predictions, references, strict=True):
        y = float(reference)
        try:
            x = float(prediction.strip())
        except ValueError:
            x = 1.0 if abs(1 - y) > abs(5 - y) else 5.0
        errors.append(x - y)
    return {
        "mae": math.fsum(map(abs, errors)) / len(errors),
        "rmse": math.sqrt(math.fsum(e * e for e in errors) / len(errors)),
    }


tags = st.sampled_from(TAGS)
tag_answers = st.one_of(
    tags, tags.map(" {}\n".format), tags.map(str.upper), tags.map('"{}"'.format), st.text(max_size=5), st.just("comed")
)
stars = st.sampled_from(["1", "2", "3", "4", "5", " 4 "])
star_answers = st.one_of(
    stars,
    st.floats(-100, 100).map(str),
    st.sampled_from(["4.5", "7", "", "five", "4 stars", "4,5", "-1", "1e1", "+3", ".5", "1_0", "score: 3", "None"]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(tag_answers, tags), min_size=1, max_size=30))
def test_labels_as_official(pairs):
    found, gold = map(list, zip(*pairs, strict=True))
    assert score("LaMP_2", found, gold) == pytest.approx(official_labels(found, gold, TAGS), abs=EXACT)


@settings(deadline=None)
@given(st.lists(st.tuples(tag_answers, tags), min_size=1, max_size=30))
def test_macro_f1_as_sklearn(pairs):
    from sklearn.metrics import accuracy_score, f1_score

    found, gold = map(list, zip(*pairs, strict=True))
    places = [[TAGS.index(t.strip()) if t.strip() in TAGS else -1 for t in texts] for texts in (found, gold)]
    got = score("LaMP_2", found, gold)
    labels = list(range(len(TAGS)))
    f1 = f1_score(places[1], places[0], labels=labels, average="macro", zero_division=0)
    assert got == pytest.approx({"accuracy": accuracy_score(places[1], places[0]), "f1": f1}, abs=EXACT)


@settings(deadline=None)
@given(st.lists(st.tuples(star_answers, stars), min_size=1, max_size=30))
def test_ratings_as_official(pairs):
    found, gold = map(list, zip(*pairs, strict=True))
    assert score("LaMP_3", found, gold) == pytest.approx(official_ratings(found, gold), abs=EXACT, rel=EXACT)


# The rules one by one


def test_macro_f1_counts_labels_that_never_occur():
    assert score("LaMP_2", ["comedy"], ["comedy"]) == pytest.approx({"accuracy": 1, "f1": 1 / 15})
    assert score("LaMP_1", ["[1]", "[1]"], ["[1]", "[2]"]) == pytest.approx({"accuracy": 0.5, "f1": 1 / 3})


@pytest.mark.parametrize("answer", ["Comedy", '"comedy"', "comedy.", "dark  comedy", ""])
def test_labels_are_compared_letter_by_letter(answer):
    assert score("LaMP_2", [answer], ["comedy"]) == {"accuracy": 0.0, "f1": 0.0}
    assert score("LaMP_2", [" comedy\n"], ["comedy "])["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("answer", "gold", "error"),
    [
        ("good", "1", 4),
        ("good", "2", 3),
        ("good", "3", 2),
        ("good", "4", 3),
        ("good", "5", 4),
        ("4.5", "4", 0.5),
        ("7", "5", 2),
        ("nan", "3", 2),
        ("inf", "1", 4),
        ("1e999", "5", 4),
    ],
)
def test_what_is_no_number_is_the_farthest_end(answer, gold, error):
    assert score("LaMP_3", [answer], [gold]) == {"mae": error, "rmse": error}


def test_an_unparsable_rating_of_the_middle_counts_as_five():
    assert rating_errors(["good"], ["3"], ("1", "2", "3", "4", "5")).tolist() == [2.0]


def test_a_huge_number_is_no_warning():
    assert score("LaMP_3", ["1e300"], ["3"])["rmse"] == math.inf


def test_the_scale_of_another_task_has_other_ends():
    task = Task("percent", 1, "rating", ("0", "50", "100"))
    assert score(task, ["?", "?", "?"], ["0", "50", "100"])["mae"] == pytest.approx((100 + 50 + 100) / 3)


# Free text

GOLD = ["The cats sat on a mat", "running shoes", "Über-große Fragen?", "the same words here", "x"]
FOUND = ["the cat sat on the mat", "runs in shoes", "große Fragen", " the same words here\n", ""]


def test_official_rouge_is_the_library_without_stemming():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"])
    rows = [scorer.score(g.strip(), f.strip()) for g, f in zip(GOLD, FOUND, strict=True)]
    for name, key in (("lamp-rouge-1", "rouge1"), ("lamp-rouge-L", "rougeL")):
        each = [row[key].fmeasure for row in rows]
        assert official_rouge(name, FOUND, GOLD).tolist() == each
        assert score("LaMP_4", FOUND, GOLD)[name] == pytest.approx(statistics.fmean(each), abs=EXACT)
    assert official_rouge("lamp-rouge-1", ["cats"], ["cat"]).tolist() == [0.0]
    assert official_rouge("lamp-rouge-1", ["b a"], ["a b"]) > official_rouge("lamp-rouge-L", ["b a"], ["a b"])


def test_what_reads_every_script_stands_beside_the_official_value():
    found, gold = ["Спасибо за письмо"], ["спасибо за письмо"]
    values = score("LaMP_7", found, gold)
    assert (values["rouge-1"], values["rouge-L"]) == (1, 1)
    assert (values["lamp-rouge-1"], values["lamp-rouge-L"]) == (0, 0)  # the official script keeps a to z
    assert 0 < values["chrf"] < 100  # letter case counts there


def test_official_rouge_is_the_middle_of_a_bootstrap():
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.scoring import BootstrapAggregator

    found, gold = FOUND * 8, GOLD * 8
    scorer, aggregator = RougeScorer(["rouge1", "rougeL"]), BootstrapAggregator()
    for f, g in zip(found, gold, strict=True):
        aggregator.add_scores(scorer.score(g, f))
    middle = aggregator.aggregate()
    ours = score("LaMP_5", found, gold, official_rouge=True, seed=1)
    # The median of 1,000 means of 40 values with a deviation of 0.4 is itself off by 0.0025.
    assert ours["lamp-rouge-1"] == pytest.approx(middle["rouge1"].mid.fmeasure, abs=0.015)
    assert ours["lamp-rouge-L"] == pytest.approx(middle["rougeL"].mid.fmeasure, abs=0.015)
    assert ours == score("LaMP_5", found, gold, official_rouge=True, seed=1)
    assert ours != score("LaMP_5", found, gold, official_rouge=True, seed=2)
    assert ours != score("LaMP_5", found, gold)
    assert ours == pytest.approx(score("LaMP_5", found, gold), abs=0.015)


def test_official_rouge_leaves_labels_alone():
    assert score("LaMP_2", ["comedy"], ["action"], official_rouge=True) == {"accuracy": 0.0, "f1": 0.0}


def no_network(*_args, **_kwargs):
    raise AssertionError("the network was asked")


def test_meteor_matches_words_and_stems_but_no_synonyms(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    # All m words match in one chunk: 1 - 0.5 * (1 / m)**3.
    assert meteor(["the cats sat down"], ["the cat sat down"])[0] == pytest.approx(1 - 0.5 / 4**3)
    # Three of four words match, in two chunks: precision and recall 3/4, penalty 0.5 * (2 / 3)**3.
    assert meteor(["my car is red"], ["my automobile is red"])[0] == pytest.approx(0.75 * (1 - 0.5 * (2 / 3) ** 3))
    # One of two found words matches, of four: precision 1/2, recall 1/4, the latter weighing 9 to 1.
    mean = (0.5 * 0.25) / (0.9 * 0.5 + 0.1 * 0.25)
    assert meteor(["red house"], ["my garage is red"])[0] == pytest.approx(mean * 0.5)
    assert meteor(["", "a"], ["a", ""]).tolist() == [0.0, 0.0]
    # The end of a sentence is no part of its last word, also in the middle of a text.
    assert meteor(["we left. it rained"], ["we left . it rained"])[0] == pytest.approx(1 - 0.5 / 5**3)


def test_meteor_takes_a_dictionary_of_synonyms():
    class Lemma:
        def name(self):
            return "auto"

    class Synset:
        def lemmas(self):
            return [Lemma()]

    class Reader:
        def synsets(self, word):
            return [Synset()] if word == "car" else []

    assert meteor(["my car is red"], ["my auto is red"], Reader())[0] == pytest.approx(1 - 0.5 / 4**3)


def test_bleu_is_the_library_from_0_to_100():
    import sacrebleu

    assert bleu(FOUND, GOLD) == sacrebleu.corpus_bleu([f.strip() for f in FOUND], [GOLD]).score
    assert bleu(["a b c d e"], [" a b c d e"]) == pytest.approx(100)


def test_a_score_is_what_the_task_reports():
    texts = ["rouge-1", "rouge-L", "chrf"]
    official = [*texts, "lamp-rouge-1", "lamp-rouge-L"]
    assert list(score("LongLaMP_3", FOUND, GOLD)) == [*official, "meteor", "bleu"]
    assert list(score("LaMP_7", FOUND, GOLD)) == official
    assert list(score("scholarly_title", FOUND, GOLD)) == texts
    for task, found in (("LaMP_1", ["[1]"]), ("LaMP_3", ["1"])):
        result = score(task, found, found)
        assert all(type(v) is float for v in result.values())
        json.dumps(result)
    assert score(load_task("LaMP_3"), ["1"], ["2"]) == score("LaMP_3", ["1"], ["2"])


@pytest.mark.parametrize(
    ("task", "found", "gold"),
    [("LaMP_2", ["comedy", "?"], ["comedy"] * 2), ("LaMP_3", ["1", "?"], ["2", "5"]), ("LongLaMP_4", FOUND, GOLD)],
)
def test_values_of_questions_lead_to_the_score(task, found, gold):
    result, answers = score(task, found, gold), load_task(task).answers or ()
    assert set(result) - set(QUESTION_RULES) <= {"f1", "bleu"}
    for name in set(result) & set(QUESTION_RULES):
        each = QUESTION_RULES[name](found, gold, answers)
        assert each.shape == (len(gold),)
        mean = math.sqrt(each.mean()) if name == "rmse" else each.mean()
        assert mean == pytest.approx(result[name], abs=EXACT)


# What may be given


def golds(texts, task="LaMP_3"):
    return {"task": task, "golds": [{"id": i, "output": t} for i, t in texts.items()]}


def test_lists_mappings_and_files_are_the_same():
    found, gold = {"a": "1", "b": "5", "c": "2"}, {"c": "2", "a": "3", "b": "4"}
    expected = score("LaMP_3", [found[i] for i in "abc"], [gold[i] for i in "abc"])
    assert expected == {"mae": 1.0, "rmse": pytest.approx(math.sqrt(5 / 3))}
    for f in (found, golds(found)):
        for g in (gold, golds(gold)):
            assert score("LaMP_3", f, g) == pytest.approx(expected, abs=EXACT)
    assert score("LaMP_3", ("1",), [1]) == {"mae": 0.0, "rmse": 0.0}
    assert score("LaMP_3", {7: "1"}, golds({"7": 2})) == {"mae": 1.0, "rmse": 1.0}


@pytest.mark.parametrize(
    ("found", "gold", "message"),
    [
        ({"a": "1", "c": "1"}, {"a": "1", "b": "1"}, "differ in 2 place.*first 'b', only in references"),
        ({"a": "1", "0": "1"}, {"a": "1"}, "differ in 1 place.*first '0', only in predictions"),
        (golds({}), {"a": "1"}, "predictions: there are none"),
        ([], [], "predictions: there are none"),
        (["1"], ["1", "2"], "1 predictions for 2 references"),
        (["1"], {"a": "1"}, "only one of predictions and references has ids"),
        ({"golds": [{"id": 1, "output": "1"}, {"id": "1", "output": "2"}]}, {"1": "1"}, "id '1' stands there twice"),
        ({"golds": [{"id": 1}]}, {"1": "1"}, "predictions: entry 0 of 'golds' lacks"),
        ({"a": "1"}, {"golds": ["a"]}, "references: entry 0 of 'golds' lacks"),
        ([None], ["1"], "predictions: place 0: NoneType is no text"),
        ({"a": ["1"]}, {"a": "1"}, "predictions: a: list is no text"),
        ("1", ["1"], "predictions: give a list of texts"),
        (None, ["1"], "predictions: give a list of texts"),
        (["1"], ["good"], "references: place 0: 'good' is no number"),
        (["1"], ["nan"], "references: place 0: 'nan' is no number"),
    ],
)
def test_what_does_not_fit_is_named(found, gold, message):
    with pytest.raises(DataError, match=message) as refusal:
        score("LaMP_3", found, gold)
    assert "\n" not in str(refusal.value)


def test_a_reference_outside_the_answers_is_named():
    with pytest.raises(DataError, match="references: q2: 'Comedy' is no answer of LaMP_2; its answers are sci-fi"):
        score("LaMP_2", {"q1": "comedy", "q2": "comedy"}, {"q1": "comedy", "q2": "Comedy"})
    with pytest.raises(ConfigError, match="no task 'LaMP_9'"):
        score("LaMP_9", ["1"], ["1"])
