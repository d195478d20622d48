import numpy as np
import pytest

from persona_plug.page.places import UMAP_LEAST, Places, by_pca, by_umap


def test_pca_keeps_distances_of_points_in_a_plane():
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(30, 2)) * [3, 1]
    axes = np.linalg.qr(rng.normal(size=(10, 2)))[0].T
    points, method = by_pca(plane @ axes + 5)
    assert method == "PCA, 100% of the variance"
    expected = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    assert np.allclose(np.linalg.norm(points[:, None] - points[None], axis=-1), expected)
    assert points[:, 0].std() > points[:, 1].std()


def test_pca_names_the_share_of_variance():
    vectors = np.diag([2.0, 1.0, 1.0, 0.0])
    sizes = np.linalg.svd(vectors - vectors.mean(0))[1] ** 2
    assert by_pca(vectors)[1] == f"PCA, {sizes[:2].sum() / sizes.sum():.0%} of the variance"


def test_pca_does_not_flip():
    vectors = np.random.default_rng(1).normal(size=(12, 6))
    points, _ = by_pca(vectors)
    shuffled = np.random.default_rng(2).permutation(12)
    assert np.allclose(by_pca(vectors[shuffled])[0], points[shuffled])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_pca_of_few(n):
    points, method = by_pca(np.eye(4)[:n])
    assert points.shape == (n, 2)
    assert np.isfinite(points).all()
    assert method.startswith("PCA")


def test_pca_of_equal_users():
    assert np.allclose(by_pca(np.ones((5, 3)))[0], 0)


def test_map_is_of_mean_vectors_of_users_with_items(open_session, encoder, people):
    session = open_session()
    made = session.places.map()
    assert made.users == ["ann", "bob", "eve"]
    assert made.items == [5, 3, 1]
    vectors = [
        np.concatenate(
            [encoder.encode([getattr(i, part) for i in items]).numpy().mean(0) for part in ("input", "output")]
        )
        for items in (people.ann, people.bob, people.eve)
    ]
    assert np.allclose(made.points, by_pca(np.stack(vectors))[0], atol=1e-3)


def test_map_follows_changes_and_reads_only_them(open_session, monkeypatch):
    session = open_session()
    first = session.places.map()
    assert session.places.map() is first
    read = []
    original = session.store.read
    monkeypatch.setattr(session.store, "read", lambda user, **k: read.append(user) or original(user, **k))
    session.add("bob", "something else")
    second = session.places.map()
    assert read == ["bob"]
    assert second.items == [5, 4, 1]
    assert not np.allclose(second.points, first.points)


def test_nearest_are_by_cosine_about_the_mean(open_session):
    session = open_session(filled=False)
    for name, text in (("a", "sun and rain"), ("b", "sun and rain"), ("c", "a violin, a drum"), ("d", "7 8 9 10 11")):
        session.add(name, text)
    near = session.places.nearest("a", 2)
    assert near[0] == ("b", pytest.approx(1, abs=1e-3), 1)
    assert len(near) == 2
    assert "a" not in [name for name, _, _ in near]
    assert session.places.nearest("nobody") == []


def test_empty_store(open_store):
    places = Places(open_store(filled=False))
    assert places.map().users == []
    assert places.nearest("ann") == []


@pytest.mark.services
def test_umap_is_used_where_it_is_installed(open_session):
    session = open_session(filled=False)
    for i in range(UMAP_LEAST - 1):
        session.add(f"user-{i:02}", f"text {i * 37}")
    assert session.places.map().method.startswith("PCA")
    session.add("one-more", "text")
    made = session.places.map()
    assert made.method == "UMAP"
    assert made.points.shape == (UMAP_LEAST, 2)
    assert np.isfinite(made.points).all()


@pytest.mark.services
def test_umap_keeps_groups_together_and_repeats():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(20, 8)) * 0.1, rng.normal(size=(20, 8)) * 0.1 + 5])
    points, _ = by_umap(vectors)
    centres = points[:20].mean(0), points[20:].mean(0)
    spread = max(
        np.linalg.norm(points[:20] - centres[0], axis=1).max(), np.linalg.norm(points[20:] - centres[1], axis=1).max()
    )
    assert np.linalg.norm(centres[0] - centres[1]) > spread
    assert np.array_equal(points, by_umap(vectors)[0])
