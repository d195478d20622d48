"""Whether two methods differ: a permutation test over users, and Holm's correction for many tests.

If two methods were equally good, swapping them for any user would give an equally likely outcome. The test compares the
observed difference with those of swapped users (Fisher 1935; drawn swaps are counted as in Phipson and Smyth 2010).
Users are swapped as a whole, because one user's questions are not independent. Holm (1979) then bounds the chance of
any false discovery among all contrasts of a report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona_plug.measure.metrics import Transform
from persona_plug.measure.stats import identity

FLIPS = 10_000
EXACT_USERS = 12  # up to here all 2**n swaps are tried
CHUNK = 1_000  # swaps at a time: 1,000 rows of 10,000 users are 80 MB


def smallest_p(n_users: int) -> float:
    """Return the least p that so many users can give: of 2**n equally likely swaps two are as far out as possible."""
    exact = 2.0 ** (1 - n_users)
    return exact if n_users <= EXACT_USERS else max(exact, 1 / (FLIPS + 1))


def sign_flip(
    a: np.ndarray, b: np.ndarray, users: Sequence[str], transform: Transform = identity, seed: int = 0
) -> float:
    """Return the two-sided p of transform(mean a) - transform(mean b) under swaps of a and b for whole users.

    Args:
        a: (N,) float64 without NaN.
        b: (N,) float64 without NaN.
        users: (N,) the owner of each question.
        transform: From a mean to the metric; with a transform sums are swapped, not differences.
        seed: Seed of the draws; all swaps are tried for `EXACT_USERS` users or fewer, and none is drawn.
    """
    names, owner = np.unique(np.asarray(users), return_inverse=True)
    sums_a, sums_b = (np.bincount(owner, weights=x, minlength=len(names)) for x in (a, b))
    exact = len(names) <= EXACT_USERS
    total = 2 ** len(names) if exact else FLIPS
    rng = np.random.default_rng(seed)
    observed = abs(float(transform(a.mean()) - transform(b.mean())))
    # Sums in another order differ in their last bits; what is equal but for them counts as equal.
    bound = observed - 1e-10 * max(1.0, abs(float(transform(a.mean()))), abs(float(transform(b.mean()))))
    extreme = 0
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        if exact:
            swaps = (np.arange(start, start + count)[:, None] >> np.arange(len(names))) & 1
        else:
            swaps = rng.integers(0, 2, (count, len(names)), dtype=np.int8)
        moved = swaps.astype(np.float64) @ (sums_b - sums_a)
        mean_a, mean_b = (sums_a.sum() + moved) / len(a), (sums_b.sum() - moved) / len(a)
        # A mean of squares may come out as -1e-17.
        low = min(0.0, float(np.min(a)), float(np.min(b)))
        statistic = transform(np.maximum(mean_a, low)) - transform(np.maximum(mean_b, low))
        extreme += int(np.count_nonzero(np.abs(statistic) >= bound))
    # The outcome as it was is one of the exact swaps; among drawn ones it is counted once more, so that p is never 0.
    return extreme / total if exact else (extreme + 1) / (total + 1)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's corrected p values, in the order given (Holm 1979, step-down; never below the p before them)."""
    corrected = [0.0] * len(p)
    reached = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        reached = max(reached, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = reached
    return corrected
