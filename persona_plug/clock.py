"""Seconds as work is charged for."""

from __future__ import annotations

import time
from typing import Any


def clock(llm: Any) -> float:  # noqa: ANN401
    """Return seconds: of the process's threads on a CPU, which other work on the machine hardly moves; else of time."""
    return time.process_time() if llm.device.type == "cpu" else time.perf_counter()
