"""Ranking one user's history for a query, and finding users with similar histories.

Nothing here is trained. `bm25`, `random` and `recency` need no model; `dense` and `rrf` need a `HistoryEncoder`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from persona_plug.data.history import HistoryItem
from persona_plug.errors import ConfigError, DataError

if TYPE_CHECKING:
    from persona_plug.models.encoder import HistoryEncoder

METHODS = ("random", "recency", "bm25", "dense", "rrf")
BM25_K1, BM25_B = 1.5, 0.75  # rank_bm25's defaults, with which LaMP's baselines ran
RRF_K = 60  # of Cormack et al., "Reciprocal Rank Fusion", SIGIR 2009

_KEPT = 256  # users whose index and vectors stay in memory: some 60 MB with 150 items of width 384
_CHUNK = 128  # requests encoded together; at most _KEPT, else users would be dropped before they are ranked


class _User:
    """What is kept of one history; index and vectors are made when a method first needs them."""

    __slots__ = ("index", "items", "texts", "vectors")

    def __init__(self, items: tuple[HistoryItem, ...], texts: list[str]) -> None:
        self.items, self.texts = items, texts
        self.index: Any = None
        self.vectors: np.ndarray | None = None


class Retriever:
    """Ranks the items of a user's history for a query; ties go to the later item, in every method.

    An item is matched by its output and input, joined by a space (LaMP: title and abstract, title and text), or by the
    one it has. LaMP leaves labels and scores out: pass `outputs=False` where the outputs are an answer space.

    Methods:
        random: Without replacement, drawn from (seed, query) alone, so that neither the order of calls nor other users
            matter. LaMP's script draws with replacement and may show an item twice.
        recency: Latest timestamp first; behind them the items without one, last in the list first.
        bm25: Words as they stand between white space, case kept, as in LaMP's `BM25Okapi` with the same k1 and b. Only
            the weight of a word differs, by bm25s's `lucene` idf, log(1 + (N - df + 0.5) / (df + 0.5)): it is always
            positive, where BM25Okapi gives every word of more than half of the items a quarter of the mean idf, which
            lifts the commonest words above less common ones and turns negative in short histories.
        dense: Dot product of the encoder's unit vectors of query and item.
        rrf: Reciprocal rank fusion of bm25 and dense.
    """

    def __init__(self, encoder: HistoryEncoder | None = None, seed: int = 0, *, outputs: bool = True) -> None:
        """Make a retriever.

        Args:
            encoder: Needed for `dense`, `rrf`, `graph` and `user_vectors`; it keeps vectors on disk.
            seed: Seed of `random`.
            outputs: Whether an item's output is matched too.
        """
        self.encoder, self.seed, self.outputs = encoder, seed, outputs
        self._users: OrderedDict[tuple[HistoryItem, ...], _User] = OrderedDict()

    def rank(self, method: str, query: str, items: Sequence[HistoryItem], k: int) -> list[int]:
        """Return indices of at most k items, best first, none twice; see `rank_many`."""
        return self.rank_many(method, [query], [items], k)[0]

    def rank_many(
        self, method: str, queries: Sequence[str], histories: Sequence[Sequence[HistoryItem]], k: int
    ) -> list[list[int]]:
        """Rank each history for its query; texts are encoded in large batches, each once.

        A history is known by its content, so index and vectors are made once for a user's requests.

        Args:
            method: One of `METHODS`.
            queries: B queries; an empty one matches nothing, and all items tie.
            histories: B histories, each in its own order.
            k: Most indices a row may have; all items are ranked, also those that share no word with the query.

        Returns:
            B lists of indices into their history.

        Raises:
            ConfigError: The method is unknown, k is negative, or an encoder or bm25s is missing.
            DataError: Queries and histories differ in number.
        """
        if method not in METHODS:
            raise ConfigError(f"retrieval method {method!r} is not one of {', '.join(METHODS)}")
        if k < 0:
            raise ConfigError(f"k={k} must not be negative")
        if len(queries) != len(histories):
            raise DataError(f"{len(queries)} queries but {len(histories)} histories; give one history for each query")
        ranked: list[list[int]] = []
        for start in range(0, len(queries), _CHUNK):
            part = list(queries[start : start + _CHUNK])
            users = [self._user(items) for items in histories[start : start + _CHUNK]]
            vectors = self._encode(part, users, method) if method in ("dense", "rrf") else np.zeros((len(part), 0))
            for query, vector, user in zip(part, vectors, users, strict=True):
                ranked.append(self._order(method, query, vector, user)[:k] if user.items else [])
        return ranked

    def graph(
        self, query: str, items: Sequence[HistoryItem], others: Sequence[Sequence[HistoryItem]], k: int
    ) -> list[HistoryItem]:
        """Return the user's own items and, where these are fewer than k, the best of similar users' items.

        For users with a short history, after PGraphRAG (arXiv 2501.02157). Own items always come first; both groups are
        ranked by dense similarity to the query.

        Args:
            query: What is looked for.
            items: The user's own history.
            others: Histories of the nearest other users (`user_vectors` and `neighbours`). Whether these may hold the
                request itself, answered by someone else, is the caller's choice.
            k: Most items to return.

        Raises:
            ConfigError: There is no encoder, or k is negative.
        """
        own = [items[i] for i in self.rank("dense", query, items, k)]
        pool = [item for other in others for item in other] if len(own) < k else []
        return own + [pool[i] for i in self.rank("dense", query, pool, k - len(own))]

    def user_vectors(self, histories: Sequence[Sequence[HistoryItem]]) -> np.ndarray:
        """Return the mean of each history's item vectors, float32 (n, d); zero for an empty history.

        Raises:
            ConfigError: There is no encoder.
        """
        rows: list[np.ndarray] = []
        for start in range(0, len(histories), _CHUNK):
            users = [self._user(items) for items in histories[start : start + _CHUNK]]
            zero = self._encode([""], users, "user_vectors")[0]
            rows += [u.vectors.mean(0) if u.vectors is not None and u.items else zero for u in users]
        return np.stack(rows) if rows else np.zeros((0, 0), dtype=np.float32)

    def _user(self, items: Sequence[HistoryItem]) -> _User:
        """Find or add a history; hashing 150 items is cheap, since Python keeps the hash of a text."""
        key = tuple(items)
        if key in self._users:
            self._users.move_to_end(key)
        else:
            self._users[key] = _User(key, [_matched(item, self.outputs) for item in key])
            if len(self._users) > _KEPT:
                self._users.popitem(last=False)
        return self._users[key]

    def _encode(self, queries: Sequence[str], users: Sequence[_User], method: str) -> np.ndarray:
        """Return the queries' vectors, float32 (B, d), and fill in those of the users' items; one encoder call."""
        if self.encoder is None:
            raise ConfigError(f"retrieval by {method} needs a sentence encoder: pass Retriever(encoder=...)")
        new = [user for user in dict.fromkeys(users) if user.vectors is None]
        rows = {text: i for i, text in enumerate(dict.fromkeys([*queries, *(t for u in new for t in u.texts)]))}
        vectors = self.encoder.encode(list(rows)).numpy()
        for user in new:
            user.vectors = vectors[[rows[text] for text in user.texts]] if user.texts else vectors[:0]
        return vectors[[rows[query] for query in queries]]

    def _order(self, method: str, query: str, vector: np.ndarray, user: _User) -> list[int]:
        """Return all indices of a history that is not empty, best first."""
        count = len(user.items)
        if method == "random":
            drawn = hashlib.sha256(f"{self.seed}\n{query}".encode("utf-8", "surrogatepass")).digest()
            return list(map(int, np.random.default_rng(int.from_bytes(drawn, "big")).permutation(count)))
        if method == "recency":
            return _best_first(np.array([-np.inf if i.timestamp is None else i.timestamp for i in user.items]))
        if method == "bm25":
            return _best_first(_bm25(query, user))
        assert user.vectors is not None  # noqa: S101  (rank_many has encoded)
        # Not `vectors @ vector`: the last bit of a BLAS product may depend on the row, and equal items must tie.
        dense = (user.vectors * vector).sum(1)
        if method == "dense":
            return _best_first(dense)
        fused = np.zeros(count)
        for scores in (_bm25(query, user), dense):
            fused[_best_first(scores)] += 1.0 / (RRF_K + 1 + np.arange(count))
        return _best_first(fused)


def neighbours(users: np.ndarray, pool: np.ndarray, k: int) -> list[list[int]]:
    """Return, for each user, the rows of at most k most similar users of a pool, nearest first; ties by order.

    Similarity is the cosine. A user without history (a zero row) is similar to nobody: it has no neighbours and is
    nobody's. To place such a user by a request, put the request's vector into the row.

    Args:
        users: (n, d) of any scale; see `Retriever.user_vectors`.
        pool: (m, d), the same of those who may be neighbours.
        k: Most neighbours of one user.
    """
    norms = np.linalg.norm(pool, axis=1, keepdims=True)
    units = pool / np.where(norms > 0, norms, 1.0)
    rows = []
    for user in users:  # one at a time: all pairs of 20,000 users would take gigabytes
        similarity = np.where(norms[:, 0] > 0, units @ user, -np.inf)
        order = np.argsort(-similarity, kind="stable")[: max(0, k)]
        rows.append([int(i) for i in order if similarity[i] > -np.inf] if user.any() else [])
    return rows


def _matched(item: HistoryItem, outputs: bool) -> str:
    """Return the text an item is matched by: the output first, so that a long input cannot push it out of reach."""
    parts = [item.output, item.input] if outputs or not item.input.strip() else [item.input]
    return " ".join(part for part in parts if part.strip())


def _best_first(scores: np.ndarray) -> list[int]:
    """Return indices by falling score; among equals the later comes first."""
    return list(map(int, np.lexsort((-np.arange(len(scores)), -scores))))


def _bm25(query: str, user: _User) -> np.ndarray:
    """Return the BM25 score of each item, float (n,); the index is built at the first query."""
    if user.index is None:
        words = [text.split() for text in user.texts]
        if not any(words):  # bm25s would divide by the mean length
            return np.zeros(len(words))
        user.index = _index(words)
    # A word that occurs twice in the query counts twice, as in BM25Okapi; an unknown one not at all.
    scores: np.ndarray = user.index.get_scores_from_ids(user.index.get_tokens_ids(query.split()))
    return scores


def _index(words: list[list[str]]) -> Any:  # noqa: ANN401
    try:
        import bm25s
    except ImportError as exc:
        raise ConfigError("retrieval by bm25 needs bm25s: pip install 'persona-plug[rag]'") from exc
    # bm25s sets its own logger to DEBUG and tells of every index.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    # A vocabulary in order of appearance, where bm25s would take that of a set, which differs from run to run.
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(w for row in words for w in row))}
    index.index(([[vocabulary[w] for w in row] for row in words], vocabulary), False, show_progress=False)
    return index
