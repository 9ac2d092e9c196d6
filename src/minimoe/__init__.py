"""minimoe: Nemotron 3's arithmetic at any size, in readable PyTorch.

``import minimoe`` imports no torch; the names below load their module on first use (PEP 562), so that sizes,
catalogue and command line answer at once.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_WHERE = {
    "HybridConfig": "config", "ConfigError": "config", "HybridLM": "model", "lm_loss": "model",
    "HybridState": "state", "generate": "generation", "profile": "profiles",
}  # fmt: skip
__all__ = ["__version__", "catalog", *_WHERE]

if TYPE_CHECKING:
    from . import catalog
    from .config import ConfigError, HybridConfig
    from .generation import generate
    from .model import HybridLM, lm_loss
    from .profiles import profile
    from .state import HybridState


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    if name == "catalog":
        return importlib.import_module(f"{__name__}.catalog")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
