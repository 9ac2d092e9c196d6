"""Text and what becomes of it: documents, tokens, batches. Names load their module on first use (PEP 562)."""
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

_WHERE = {
    "Batches": "batches", "Tokens": "batches", "encode_corpus": "batches",
    "Corpus": "corpus", "CorpusError": "corpus", "load_corpus": "corpus",
    "without_overlap": "packages",
    "StreamError": "streaming", "documents": "streaming", "stream_dataset": "streaming",
    "PackedError": "packed", "open_packed": "packed", "pack": "packed", "pack_once": "packed",
    "Tokenizer": "tokenizer", "TokenizerError": "tokenizer",
}  # fmt: skip
__all__ = list(_WHERE)

if TYPE_CHECKING:
    from .batches import Batches, Tokens, encode_corpus
    from .corpus import Corpus, CorpusError, load_corpus
    from .packages import without_overlap
    from .packed import PackedError, open_packed, pack, pack_once
    from .streaming import StreamError, documents, stream_dataset
    from .tokenizer import Tokenizer, TokenizerError


def __getattr__(name: str) -> object:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
