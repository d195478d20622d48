"""The type of soft tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Soft = Tensor | Sequence[Tensor]  # (B, S, H), or one (S_b, H) a row
