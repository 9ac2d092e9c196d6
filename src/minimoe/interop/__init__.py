"""Weights in and out: other programs' files, read and written as they spell them.

Names load their module on first use (PEP 562): a Hugging Face directory needs no GGUF library.
"""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_WHERE = {
    "load_model": "anything",
    "GGUFError": "gguf", "load_gguf": "gguf", "save_gguf": "gguf",
    "CheckpointError": "huggingface", "load_hf": "huggingface", "save_hf": "huggingface",
}  # fmt: skip
__all__ = list(_WHERE)

if TYPE_CHECKING:
    from .anything import load_model
    from .gguf import GGUFError, load_gguf, save_gguf
    from .huggingface import CheckpointError, load_hf, save_hf


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
