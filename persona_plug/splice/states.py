"""Frozen states that are computed once and kept: by token ids, within a budget of memory, and with what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


class StateCache:
    """Tensors by token ids, kept while they fit a budget in bytes; what does not fit is computed again."""

    def __init__(self, budget: int) -> None:
        """Create an empty cache for `budget` bytes."""
        self.budget, self.used, self.hits, self.misses = budget, 0, 0, 0
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.seconds: dict[tuple[int, ...], float] = {}  # that each state took, kept or not

    def get(self, key: tuple[int, ...]) -> Tensor | None:
        """Return the tensor or None, counting hits and misses."""
        found = self._kept.get(key)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: tuple[int, ...], state: Tensor) -> None:
        """Keep the tensor if it fits."""
        size = state.numel() * state.element_size()
        if key not in self._kept and self.used + size <= self.budget:
            self._kept[key] = state
            self.used += size

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.used = 0


@dataclass(slots=True)
class StateBill:
    """What frozen states cost one training, as if it had computed all it used itself.

    Several trainings share states, and which of them computed one is chance: `spent` seconds went into computing,
    `owed` are those of every state that was used, each once.
    """

    spent: float = 0.0
    owed: float = 0.0
    used: set[tuple[int, ...]] = field(default_factory=set)
