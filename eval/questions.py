"""What every method of a comparison is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from persona_plug.data.splits import FitData
from persona_plug.measure.stats import spread
from training.tasks import Task


@dataclass(frozen=True, slots=True)
class Questions:
    """What every method is asked.

    Attributes:
        task: The task.
        data: Its data; `held_out` are the N questions.
        generated: Free-text questions that are answered in words, at most.
    """

    task: Task
    data: FitData
    generated: int

    @property
    def texts(self) -> Sequence[int]:
        """Indices of the M questions whose answers are texts: all with labels, else those that are spread evenly."""
        count = len(self.data.held_out)
        return range(count) if self.data.answers else spread(count, self.generated)

    @property
    def users(self) -> list[str]:
        """The owner of each question, (N,)."""
        return [e.user_id for e in self.data.held_out]

    @property
    def references(self) -> list[str]:
        """What the users wrote, (M,)."""
        return [self.data.held_out[i].output.strip() for i in self.texts]
