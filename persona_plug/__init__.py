"""persona_plug makes a frozen language model personal with a few soft tokens learned from a user's history.

The public names are imported on first use, so `import persona_plug` alone loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persona_plug.config import PlugConfig
    from persona_plug.data.history import Event, Example, HistoryItem
    from persona_plug.embedder.user_embedder import UserEmbedder
    from persona_plug.errors import PersonaPlugError
    from persona_plug.fit.config import FitConfig
    from persona_plug.fit.report import FitReport
    from persona_plug.fit.trainer import PlugTrainer
    from persona_plug.models.encoder import HistoryEncoder
    from persona_plug.plug import PersonaPlug
    from persona_plug.store.history_store import HistoryStore

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
    "Event": "data.history",
    "Example": "data.history",
    "FitConfig": "fit.config",
    "FitReport": "fit.report",
    "HistoryEncoder": "models.encoder",
    "HistoryItem": "data.history",
    "HistoryStore": "store.history_store",
    "PersonaPlug": "plug",
    "PersonaPlugError": "errors",
    "PlugConfig": "config",
    "PlugTrainer": "fit.trainer",
    "UserEmbedder": "embedder.user_embedder",
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
