"""Tokens into a llama.cpp context, logits and hidden states out of it."""
from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .library import LlamaError, library, log, reason


def decode(
    context: Any, ids: Sequence[int], at: int = 0, outputs: str = "all", hidden_LD: np.ndarray | None = None
) -> None:
    """One ``llama_decode`` of tokens ``ids`` at positions ``at``, ``at + 1``, ... of sequence 0.

    outputs     "all" or "last": which tokens get logits
    hidden_LD   a float32 row beside each token, which an MTP context reads

    At most ``llama_n_batch(context)`` tokens: llama.cpp aborts on more. Raises LlamaError, with llama.cpp's reason.
    """
    api = library()
    most = api.llama_n_batch(context)
    if len(ids) > most:
        raise LlamaError(f"{len(ids)} tokens in one batch: the context was made for {most}; feed them in parts")
    with _batch(len(ids), 0 if hidden_LD is None else hidden_LD.shape[1]) as batch, log.listen() as lines:
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i] = int(token), at + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = outputs == "all" or i == len(ids) - 1
        if hidden_LD is not None:
            np.ctypeslib.as_array(batch.embd, hidden_LD.shape)[:] = hidden_LD
        batch.n_tokens = len(ids)
        code = api.llama_decode(context, batch)
    if code == 1:
        raise LlamaError(f"the context of {api.llama_n_ctx(context)} tokens is full: load the file with a larger one")
    if code:
        raise LlamaError(f"llama.cpp could not compute {len(ids)} tokens at position {at}: {reason(lines) or f'code {code}'}")


@contextlib.contextmanager
def _batch(n: int, width: int) -> Iterator[Any]:
    api = library()
    batch = api.llama_batch_init(n, width, 1)
    # with embeddings llama.cpp allocates no tokens; an MTP context wants both, so these are ours
    ours = (api.llama_token * n)() if width else None
    if ours is not None:
        batch.token = ours
    try:
        yield batch
    finally:
        if ours is not None:
            batch.token = ctypes.POINTER(api.llama_token)()  # not llama.cpp's to free
        api.llama_batch_free(batch)


def logits(context: Any, rows: int) -> np.ndarray:
    """A copy [rows, V] of the logits of the last :func:`decode`; waits for the device."""
    api = library()
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    pointer = api.llama_get_logits(context)
    if not pointer:
        raise LlamaError("this context computes no logits: load the file without embedding=True")
    return np.ctypeslib.as_array(pointer, (rows, vocabulary)).copy()
