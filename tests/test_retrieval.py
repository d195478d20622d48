"""Ranking one user's history, and users with similar histories."""

import itertools
import logging
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from persona_plug import retrieval
from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, DataError
from persona_plug.retrieval import METHODS, Retriever, neighbours

pytest.importorskip("bm25s")


class Words:
    """Stands in for the encoder: a text's vector counts the words it knows, normalised; remembers what it was asked."""

    known = ("sport", "food", "music", "rain")
    dim = len(known)

    def __init__(self):
        self.asked = []

    def encode(self, texts, progress=None):
        self.asked.append(list(texts))
        rows = torch.tensor([[float(t.split().count(w)) for w in self.known] for t in texts]).reshape(-1, self.dim)
        return torch.nn.functional.normalize(rows, dim=-1)


VOCABULARY = ["sport", "food", "music", "rain", "Sport", "a", "the"]
SENTENCES = st.lists(st.sampled_from(VOCABULARY), max_size=6).map(" ".join)
ITEMS = st.builds(HistoryItem, SENTENCES, SENTENCES, st.none() | st.integers(0, 5).map(float))
HISTORIES = st.lists(ITEMS, max_size=8)


def made(*texts):
    return [HistoryItem("", text) for text in texts]


def okapi(query, texts, k1=1.5, b=0.75):
    """BM25 by its formula, with the idf that is always positive."""
    documents = [text.split() for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    found = Counter(word for document in documents for word in set(document))
    scores = []
    for document in documents:
        score = 0.0
        for word in query.split():
            idf = math.log(1 + (len(documents) - found[word] + 0.5) / (found[word] + 0.5))
            count = document.count(word)
            score += idf * count / (count + k1 * (1 - b + b * len(document) / mean)) if count else 0.0
        scores.append(score)
    return scores


# What holds for every method


@pytest.mark.parametrize("method", METHODS)
@given(query=SENTENCES, items=HISTORIES, k=st.integers(0, 10), outputs=st.booleans())
def test_a_ranking_holds_k_different_items(method, query, items, k, outputs):
    retriever = Retriever(Words(), outputs=outputs)
    ranking = retriever.rank(method, query, items, k)
    assert len(ranking) == len(set(ranking)) == min(k, len(items))
    assert set(ranking) <= set(range(len(items)))
    assert all(type(i) is int for i in ranking)
    assert ranking == retriever.rank(method, query, items, len(items))[:k]


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_history_has_no_ranking(method):
    assert Retriever(Words()).rank(method, "sport", [], 4) == []
    assert Retriever(Words()).rank_many(method, [], [], 4) == []


@pytest.mark.parametrize("method", ["bm25", "dense", "rrf"])
@pytest.mark.parametrize("query", ["", " \n", "unheard words"])
def test_a_query_that_matches_nothing_ranks_later_items_first(method, query):
    assert Retriever(Words()).rank(method, query, made("sport", "food", "rain"), 3) == [2, 1, 0]


@pytest.mark.parametrize("method", ["recency", "bm25", "dense", "rrf"])
def test_of_equal_items_the_later_comes_first(method):
    items = made("rain", "sport", "rain", "sport", "rain", "sport", "music food")
    assert [i for i in Retriever(Words()).rank(method, "sport", items, 7) if i in (1, 3, 5)] == [5, 3, 1]


@pytest.mark.parametrize("method", METHODS)
def test_items_without_a_word_are_ranked(method):
    assert sorted(Retriever(Words()).rank(method, "sport", made("", " ", ""), 3)) == [0, 1, 2]
    assert sorted(Retriever(Words()).rank(method, "sport", made("sport", " "), 3)) == [0, 1]


@pytest.mark.parametrize("method", METHODS)
def test_many_are_ranked_as_each_alone(method, monkeypatch):
    monkeypatch.setattr(retrieval, "_CHUNK", 4)
    rng = np.random.default_rng(0)
    histories = [made(*(" ".join(rng.choice(VOCABULARY, 4)) for _ in range(n))) for n in (5, 0, 3, 7, 1, 6, 5, 4, 2)]
    queries = [" ".join(rng.choice(VOCABULARY, 3)) for _ in histories]
    alone = [Retriever(Words()).rank(method, q, h, 4) for q, h in zip(queries, histories, strict=True)]
    assert Retriever(Words()).rank_many(method, queries, histories, 4) == alone
    backwards = Retriever(Words()).rank_many(method, queries[::-1], histories[::-1], 4)
    assert backwards == alone[::-1]


# BM25


@given(query=SENTENCES, items=HISTORIES)
def test_bm25_is_its_formula(query, items):
    texts = [f"{item.output} {item.input}".strip() for item in items]
    if not any(texts):
        return
    scores = okapi(query, texts)
    ranking = Retriever().rank("bm25", query, items, len(items))
    found = [scores[i] for i in ranking]
    assert found == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


@given(query=SENTENCES, items=HISTORIES, order=st.randoms(use_true_random=False), k=st.integers(1, 6))
def test_the_order_of_items_does_not_change_what_bm25_finds(query, items, order, k):
    scores = sorted(okapi(query, [f"{i.output} {i.input}" for i in items]), reverse=True) if items else []
    assume(all(a - b > 1e-4 for a, b in itertools.pairwise(scores[: k + 1])))
    moved = list(items)
    order.shuffle(moved)
    retriever = Retriever()
    before = [items[i] for i in retriever.rank("bm25", query, items, k)]
    after = [moved[i] for i in retriever.rank("bm25", query, moved, k)]
    assert before == after


def test_words_stand_between_white_space_as_they_are():
    items = made("Sport,", "sport", "Sport", "SPORT")
    assert Retriever().rank("bm25", "Sport", items, 1) == [2]
    assert Retriever().rank("bm25", "sport\tnothing", items, 1) == [1]


def test_a_word_that_is_asked_twice_counts_twice():
    items = made("sport x", "rain y", "z z")
    assert Retriever().rank("bm25", "sport rain", items, 2) == [1, 0]
    assert Retriever().rank("bm25", "sport sport rain", items, 2) == [0, 1]


def test_a_word_of_most_items_still_counts_a_little():
    assert Retriever().rank("bm25", "the", made("the", "the", "a"), 3) == [1, 0, 2]


def test_bm25_is_quiet(capfd, caplog):
    caplog.set_level(logging.DEBUG)
    Retriever().rank("bm25", "sport", made("sport", "rain"), 2)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name == "bm25s"]


def test_an_index_is_built_once_for_equal_histories(monkeypatch):
    built = []
    real = retrieval._index
    monkeypatch.setattr(retrieval, "_index", lambda words: built.append(words) or real(words))
    retriever = Retriever()
    for query in ("sport", "rain", "food"):
        retriever.rank("bm25", query, made("sport", "rain"), 2)
    assert len(built) == 1
    retriever.rank("bm25", "sport", made("rain", "sport"), 2)
    retriever.rank("bm25", "sport", [HistoryItem("", "sport", 1.0), HistoryItem("", "rain")], 2)
    assert len(built) == 3


def test_only_the_latest_users_are_kept(monkeypatch):
    monkeypatch.setattr(retrieval, "_KEPT", 3)
    retriever = Retriever(Words())
    users = [made(f"sport {i}") for i in range(5)]
    for i in (0, 1, 2, 0, 3, 4):
        retriever.rank("dense", "sport", users[i], 1)
    assert list(retriever._users) == [tuple(users[i]) for i in (0, 3, 4)]


# What is matched


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_input_and_output_are_matched_unless_outputs_are_labels(method):
    items = [HistoryItem("sport", "rain"), HistoryItem("rain", "sport"), HistoryItem("music", "food")]
    assert Retriever(Words()).rank(method, "sport", items, 3) == [1, 0, 2]
    assert Retriever(Words(), outputs=False).rank(method, "sport", items, 3) == [0, 2, 1]


@pytest.mark.parametrize("outputs", [True, False])
def test_an_item_is_matched_by_whatever_it_has(outputs):
    items = [HistoryItem(" ", "sport"), HistoryItem("rain", ""), HistoryItem("music", " ")]
    encoder = Words()
    assert Retriever(encoder, outputs=outputs).rank("dense", "sport", items, 1) == [0]
    assert encoder.asked == [["sport", "rain", "music"]]


def test_the_output_stands_before_the_input():
    encoder = Words()
    Retriever(encoder).rank("dense", "q", [HistoryItem("a long abstract", "Title")], 1)
    assert encoder.asked == [["q", "Title a long abstract"]]


# Dense and fused


def test_dense_is_the_dot_product_of_the_encoders_vectors(encoder, people):
    retriever = Retriever(encoder)
    texts = [f"{i.output} {i.input}" for i in people.ann]
    for query in people.requests:
        scores = encoder.encode(texts) @ encoder.encode([query])[0]
        assert retriever.rank("dense", query, people.ann, 5) == scores.argsort(descending=True).tolist()


def test_texts_are_encoded_in_one_call_and_those_of_a_known_user_never_again():
    encoder = Words()
    retriever = Retriever(encoder)
    retriever.rank_many("dense", ["sport", "rain", "sport"], [made("x", "y"), made("y"), made("x", "y")], 2)
    assert encoder.asked == [["sport", "rain", "x", "y"]]
    retriever.rank("rrf", "food", made("x", "y"), 2)
    assert encoder.asked[1:] == [["food"]]


def test_rrf_sums_reciprocal_ranks(monkeypatch):
    """With 60 the item that is third twice wins over the one that is first and last; with 0 it would not."""
    orders = {"bm25": [0, 2, 1, 3, 4, 5], "dense": [2, 3, 1, 4, 5, 0]}
    scores = {name: 1.0 - np.argsort(order) / 10 for name, order in orders.items()}

    class Given:
        def encode(self, texts):
            return torch.tensor([[1.0 if t == "q" else scores["dense"][int(t)]] for t in texts])

    monkeypatch.setattr(retrieval, "_bm25", lambda query, user: scores["bm25"])
    retriever = Retriever(Given())
    items = made(*"012345")
    for name, order in orders.items():
        assert retriever.rank(name, "q", items, 6) == order
    fused = [sum(1 / (61 + order.index(i)) for order in orders.values()) for i in range(6)]
    assert retriever.rank("rrf", "q", items, 6) == sorted(range(6), key=lambda i: -fused[i]) == [2, 3, 1, 0, 4, 5]


# Random and recency


def test_random_depends_on_seed_and_query_alone():
    items = made(*map(str, range(20)))
    first = Retriever(seed=1)
    drawn = first.rank("random", "a", items, 20)
    for query in ("b", "c"):
        assert first.rank("random", query, items, 20) != drawn
    assert first.rank("random", "a", items, 20) == Retriever(seed=1).rank("random", "a", items, 20) == drawn
    assert Retriever(seed=2).rank("random", "a", items, 20) != drawn
    assert Retriever(seed=-1).rank("random", "\ud800", items, 20) != drawn


def test_random_prefers_no_place():
    retriever, items = Retriever(), made(*"abcde")
    firsts = Counter(retriever.rank("random", str(i), items, 2)[0] for i in range(1000))
    assert all(abs(firsts[i] - 200) < 60 for i in range(5))  # 4.7 standard deviations


def test_recency_goes_by_time_and_then_by_place():
    times = [2.0, None, 5.0, 1.0, None, 5.0, 0.0, -3.0]
    items = [HistoryItem("", str(i), t) for i, t in enumerate(times)]
    assert Retriever().rank("recency", "x", items, 9) == [5, 2, 0, 3, 6, 7, 4, 1]
    assert Retriever().rank("recency", "x", made("a", "b", "c"), 2) == [2, 1]


# Users with similar histories


def test_a_users_vector_is_the_mean_of_the_items(monkeypatch):
    monkeypatch.setattr(retrieval, "_CHUNK", 2)
    vectors = Retriever(Words()).user_vectors([made("sport", "rain"), [], made("food")])
    np.testing.assert_allclose(vectors, [[0.5, 0, 0, 0.5], [0, 0, 0, 0], [0, 1, 0, 0]])
    assert vectors.dtype == np.float32
    assert Retriever(Words()).user_vectors([]).shape[0] == 0


def test_neighbours_are_the_most_similar_of_the_pool():
    pool = np.array([[5.0, 1], [0, 1.0], [0, 0], [1.0, 1], [-1.0, 0]])
    assert neighbours(np.array([[2.0, 0], [0, 3]]), pool, 2) == [[0, 3], [1, 3]]
    assert neighbours(np.array([[1.0, 0]]), pool, 9) == [[0, 3, 1, 4]]
    assert neighbours(np.array([[0.0, 0]]), pool, 2) == [[]]
    assert neighbours(np.array([[1.0, 0], [0, 1]]), pool, 0) == [[], []]
    assert neighbours(np.ones((1, 2)), np.ones((3, 2)), 2) == [[0, 1]]


def test_a_short_history_is_filled_with_items_of_similar_users():
    own = made("rain", "sport food")
    others = [made("music", "sport"), made("sport sport rain")]
    retriever = Retriever(Words())
    assert retriever.graph("sport", own, others, 1) == [own[1]]
    assert retriever.graph("sport", own, others, 2) == [own[1], own[0]]
    assert retriever.graph("sport", own, others, 4) == [own[1], own[0], others[0][1], others[1][0]]
    assert retriever.graph("sport", [], others, 9) == [others[0][1], others[1][0], others[0][0]]
    assert retriever.graph("sport", own, [], 4) == [own[1], own[0]]


# Errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda r: r.rank("tfidf", "q", [], 1), ConfigError, "'tfidf'.*random, recency, bm25"),
        (lambda r: r.rank("bm25", "q", [], -1), ConfigError, "k=-1"),
        (lambda r: r.rank_many("bm25", ["q"], [], 1), DataError, "1 queries but 0 histories"),
        (lambda r: r.rank("dense", "q", made("a"), 1), ConfigError, "dense needs a sentence encoder.*encoder="),
        (lambda r: r.rank("rrf", "q", made("a"), 1), ConfigError, "rrf needs a sentence encoder"),
        (lambda r: r.user_vectors([made("a")]), ConfigError, "user_vectors needs a sentence encoder"),
    ],
)
def test_errors_name_the_thing_and_the_remedy(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call(Retriever())
    assert "\n" not in str(caught.value)


def test_without_bm25s_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    assert Retriever().rank("recency", "q", made("a"), 1) == [0]
    with pytest.raises(ConfigError, match=r"pip install 'persona-plug\[rag\]'"):
        Retriever().rank("bm25", "q", made("a"), 1)


def test_importing_it_loads_neither_torch_nor_bm25s():
    code = "import sys, persona_plug.retrieval; sys.exit(bool({'torch', 'bm25s'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
