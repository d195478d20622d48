"""Frozen states of prompts, cached by token ids within a memory budget, and the seconds they took."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


class StateCache:
    """Tensors by token ids, cached while they fit a budget in bytes; the others are computed again."""

    def __init__(self, budget: int) -> None:
        """Create an empty cache for `budget` bytes."""
        self.budget, self.used, self.hits, self.misses = budget, 0, 0, 0
        self._states: dict[tuple[int, ...], Tensor] = {}
        self.seconds: dict[tuple[int, ...], float] = {}  # that each state took, cached or not

    def get(self, key: tuple[int, ...]) -> Tensor | None:
        """Return the tensor or None, counting hits and misses."""
        state = self._states.get(key)
        self.hits += state is not None
        self.misses += state is None
        return state

    def put(self, key: tuple[int, ...], state: Tensor) -> None:
        """Cache the tensor if it fits."""
        size = state.numel() * state.element_size()
        if key not in self._states and self.used + size <= self.budget:
            self._states[key] = state
            self.used += size

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()
        self.used = 0


@dataclass(slots=True)
class StateBill:
    """What frozen states cost one training, as if it had computed all it used itself.

    Several trainings share states, and which of them computed one is chance.

    Attributes:
        spent: Seconds that went into computing states.
        owed: Seconds of every state that was used, each counted once.
        used: Token ids of the states that were used.
    """

    spent: float = 0.0
    owed: float = 0.0
    used: set[tuple[int, ...]] = field(default_factory=set)
