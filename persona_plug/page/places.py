"""Where users stand: points on a map, and who is nearest to whom, from the mean vectors of their items."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from persona_plug.store.history_store import HistoryStore, UserRow

UMAP_LEAST = 16  # users: below its own 15 neighbours UMAP says nothing that PCA does not


@dataclass(frozen=True, slots=True)
class UserMap:
    """Users as points.

    Attributes:
        users: User ids.
        items: Items of each.
        points: (n, 2) float, in the order of `users`.
        method: `UMAP`, or `PCA` with the share of variance that the two axes hold.
    """

    users: list[str]
    items: list[int]
    points: np.ndarray
    method: str


class Places:
    """Mean vectors [input; output] of a store's users, read again only where a user has changed."""

    def __init__(self, store: HistoryStore) -> None:
        """Take the store; nothing is read before it is asked for."""
        self.store = store
        self._means: dict[str, tuple[UserRow, np.ndarray]] = {}
        self._map: tuple[list[UserRow], UserMap] | None = None

    def map(self) -> UserMap:
        """Return all users that have items as points: by UMAP where it is installed and users are enough, else PCA."""
        rows, vectors = self._vectors()
        if self._map is None or self._map[0] != rows:
            umap = len(rows) >= UMAP_LEAST and importlib.util.find_spec("umap") is not None
            points, method = by_umap(vectors) if umap else by_pca(vectors)
            self._map = rows, UserMap([r.user_id for r in rows], [r.items for r in rows], points, method)
        return self._map[1]

    def nearest(self, user: str, count: int = 5) -> list[tuple[str, float, int]]:
        """Return (user, cosine, items) of the users nearest to one; empty for a user without items.

        Cosines are of mean vectors from the mean of all users: what all have in common says nothing.
        """
        rows, vectors = self._vectors()
        names = [row.user_id for row in rows]
        if user not in names:
            return []
        centred = vectors - vectors.mean(0)
        units = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)
        near = units @ units[names.index(user)]
        order = [i for i in np.argsort(-near, kind="stable") if names[i] != user][:count]
        return [(names[i], float(near[i]), rows[i].items) for i in order]

    def forget(self, user: str) -> None:
        """Drop what is kept in memory of a user."""
        self._means.pop(user, None)
        self._map = None

    def _vectors(self) -> tuple[list[UserRow], np.ndarray]:
        """Return users with items, by id, and their mean vectors (n, 2d)."""
        rows = sorted((row for row in self.store.users() if row.items), key=lambda row: row.user_id)
        for row in rows:
            if row.user_id not in self._means or self._means[row.user_id][0] != row:
                held = self.store.read(row.user_id)
                self._means[row.user_id] = row, np.concatenate([held.inputs.mean(0), held.outputs.mean(0)])
        return rows, np.stack([self._means[r.user_id][1] for r in rows]) if rows else np.zeros((0, 0))


def by_pca(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the first two principal components of n vectors, (n, 2), and a line on them.

    The largest entry of each axis is positive, so that the same users give the same map.
    """
    points = np.zeros((len(vectors), 2))
    if len(vectors) < 2:
        return points, "PCA"
    left, sizes, axes = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    kept = min(2, len(sizes))
    signs = np.sign(axes[np.arange(kept), np.abs(axes[:kept]).argmax(1)])
    points[:, :kept] = left[:, :kept] * sizes[:kept] * signs
    share = float((sizes[:2] ** 2).sum() / max(float((sizes**2).sum()), 1e-12))
    return points, f"PCA, {share:.0%} of the variance"


def by_umap(vectors: np.ndarray) -> tuple[np.ndarray, str]:
    """Return UMAP's points of n vectors, (n, 2), with a fixed seed."""
    umap = importlib.import_module("umap")
    return np.asarray(umap.UMAP(random_state=0, n_jobs=1).fit_transform(vectors), dtype=float), "UMAP"
