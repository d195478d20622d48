"""Whether the Hugging Face Hub answers: asked once a minute, so that nothing retries for half a minute offline."""

from __future__ import annotations

import functools
import time
from pathlib import Path

SECONDS = 5.0  # for an answer of any kind


def cache_only(name: str) -> bool:
    """Whether a folder or Hub id can be had from this machine alone."""
    return not Path(name).is_dir() and not hub_answers()


def hub_answers() -> bool:
    """Return whether the Hub can be reached, and may be by the environment (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return not constants.HF_HUB_OFFLINE and _asked(int(time.monotonic() // 60))


@functools.lru_cache(maxsize=1)
def _asked(_minute: int) -> bool:
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # each version's http library raises its own
        return False
    return True
