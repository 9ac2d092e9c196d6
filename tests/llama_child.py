"""What tests run in a child process, because llama.cpp may abort it. Imports no torch, for speed."""

from __future__ import annotations

from minimoe.runtime import llamacpp


def decode_exactly(path: str) -> None:
    """Load a file and compute two tokens as the parity tests do."""
    llamacpp.logits(llamacpp.load(path, exact=True, check=False), [0, 1])
