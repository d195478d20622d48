"""persona_plug makes a frozen language model personal with a few soft tokens learned from a user's history.

The public names are imported on first use, so `import persona_plug` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_plug.config import PlugConfig
    from persona_plug.embedder import UserEmbedder
    from persona_plug.encoder import HistoryEncoder
    from persona_plug.errors import PersonaPlugError
    from persona_plug.history import Event, Example, HistoryItem
    from persona_plug.model import PersonaPlug
    from persona_plug.report import FitReport
    from persona_plug.store import HistoryStore
    from persona_plug.trainer import FitConfig, PlugTrainer

__version__ = "0.1.0"

__all__ = [
    "Event",
    "Example",
    "FitConfig",
    "FitReport",
    "HistoryEncoder",
    "HistoryItem",
    "HistoryStore",
    "PersonaPlug",
    "PersonaPlugError",
    "PlugConfig",
    "PlugTrainer",
    "UserEmbedder",
    "__version__",
]

_MODULES = {
    "Event": "history",
    "Example": "history",
    "FitConfig": "trainer",
    "FitReport": "report",
    "HistoryEncoder": "encoder",
    "HistoryItem": "history",
    "HistoryStore": "store",
    "PersonaPlug": "model",
    "PersonaPlugError": "errors",
    "PlugConfig": "config",
    "PlugTrainer": "trainer",
    "UserEmbedder": "embedder",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Imports a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Lists the public names, loaded or not."""
    return sorted({*globals(), *__all__})
