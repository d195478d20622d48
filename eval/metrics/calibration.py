"""How far the confidence of probabilities is from their accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from persona_plug.errors import ConfigError, DataError


def expected_calibration_error(
    probabilities: np.ndarray | Sequence[Sequence[float]], gold: np.ndarray | Sequence[int], bins: int = 15
) -> float:
    """Return the mean distance of confidence and accuracy over bins of equal width, weighted by their size.

    The confidence of a row is its highest probability (Guo et al. 2017, arXiv 1706.04599, section 3).

    Args:
        probabilities: (N, C), rows summing to 1.
        gold: (N,) places of the true answers, 0 to C-1.
        bins: Number of bins between 0 and 1; a bin holds its upper edge.

    Raises:
        DataError: Shapes do not fit, a row is no distribution, or a place does not exist.
    """
    table, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(gold)
    if table.ndim != 2 or truth.shape != (len(table),) or not table.size:
        raise DataError(
            f"ece: probabilities {table.shape} and gold {truth.shape} must be (N, C) and (N,), N at least 1"
        )
    if (table < 0).any() or not np.allclose(table.sum(1), 1, atol=1e-4):  # float32 softmax sums to 1 within 1e-6
        raise DataError("ece: a row of probabilities does not sum to 1; give probabilities, not scores")
    if truth.min() < 0 or truth.max() >= table.shape[1]:
        raise DataError(f"ece: gold must be places from 0 to {table.shape[1] - 1}")
    if bins < 1:
        raise ConfigError(f"ece: bins={bins} must be at least 1")
    confidence, right = table.max(1), table.argmax(1) == truth
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # |sum of accuracy - sum of confidence| over N is the bin's distance times its share.
    return float(np.abs(np.bincount(place, right - confidence, bins)).sum() / len(table))
