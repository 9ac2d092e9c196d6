"""Logits and greedy decoding of a ``llama_cpp.Llama``, always from an empty context, with an honest clock."""
from __future__ import annotations

import contextlib
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..ggml import batch
from ..ggml.library import LlamaError, library
from ..timings import Timings

if TYPE_CHECKING:
    from llama_cpp import Llama


def logits(llama: Llama, ids: Sequence[int]) -> np.ndarray:
    """Logits [L, V], float32, of every position of a fresh sequence: row p predicts token p + 1.

    Raises LlamaError for ids outside the vocabulary and for more tokens than the context holds.
    """
    ids = check_ids(llama, ids)
    with fresh(llama):
        rows = []
        for at in range(0, len(ids), llama.n_batch):
            part = ids[at : at + llama.n_batch]
            batch.decode(llama.ctx, part, at)
            rows.append(batch.logits(llama.ctx, len(part)))
        return np.concatenate(rows)


@dataclass(frozen=True)
class Continuation:
    """Result of :func:`greedy`: the new ids, why it ended ("stop" or "length"), and times."""

    ids: list[int]
    finish_reason: str
    timings: Timings = field(repr=False)


def greedy(
    llama: Llama, ids: Sequence[int], max_new_tokens: int = 64, stop: Iterable[int | Sequence[int]] = (),
    on_token: Callable[[int], None] | None = None, ignore_end: bool = False,
) -> Continuation:
    """Continue a prompt with the likeliest token each time, from an empty context.

    stop        ids or id sequences that end it; the file's end-of-text tokens do too, unless ``ignore_end``
    on_token    called with each id as soon as it is known; its time is not counted

    Ends as "length" also when the context is full.
    """
    api = library()
    ids = check_ids(llama, ids, taken=1)
    stops = [_sequence(end) for end in stop]
    room = min(whole("max_new_tokens", max_new_tokens), llama.n_ctx() - len(ids))
    vocab = api.llama_model_get_vocab(llama.model)
    new: list[int] = []
    steps: list[float] = []
    with fresh(llama):
        start = time.perf_counter()
        for at in range(0, len(ids), llama.n_batch):
            batch.decode(llama.ctx, ids[at : at + llama.n_batch], at, outputs="last")
        token = int(batch.logits(llama.ctx, 1)[0].argmax())  # waits for the device, so the clock is honest
        prefill_s = time.perf_counter() - start
        while True:
            new.append(token)
            if on_token:
                on_token(token)
            ended = not ignore_end and api.llama_vocab_is_eog(vocab, token)
            if ended or any(new[-len(end):] == end for end in stops):
                return Continuation(new, "stop", Timings(prefill_s, steps))
            if len(new) == room:
                return Continuation(new, "length", Timings(prefill_s, steps))
            start = time.perf_counter()
            batch.decode(llama.ctx, [token], len(ids) + len(new) - 1)
            token = int(batch.logits(llama.ctx, 1)[0].argmax())
            steps.append(time.perf_counter() - start)


@contextlib.contextmanager
def fresh(llama: Llama) -> Iterator[None]:
    """An empty context; and afterwards one that ``Llama`` knows to hold nothing of its own."""
    api = library()
    api.llama_memory_clear(api.llama_get_memory(llama.ctx), True)
    try:
        yield
    finally:
        llama.reset()


def check_open(llama: Llama) -> None:
    """Raise LlamaError for a Llama that was closed: its functions would read memory that is gone."""
    if llama._ctx.ctx is None:
        raise LlamaError("this Llama is closed: load the file again")


def check_ids(llama: Llama, ids: Sequence[int], taken: int = 0) -> list[int]:
    """The ids as a list. Raises LlamaError for one outside the vocabulary, for none, and for more than the context
    holds when ``taken`` places are."""
    check_open(llama)
    ids = in_vocabulary(llama, ids)
    if not ids:
        raise LlamaError("there are no tokens: give at least one id")
    if len(ids) + taken > llama.n_ctx():
        raise LlamaError(f"{len(ids)} tokens do not fit, the context has room for {llama.n_ctx() - taken}: "
                         "load the file with a larger one")
    return ids


def in_vocabulary(llama: Llama, ids: Sequence[int]) -> list[int]:
    """The ids as a list. Raises LlamaError for one outside the vocabulary, on which llama.cpp may abort."""
    try:
        ids = [operator.index(i) for i in ids]
    except TypeError:
        raise LlamaError("ids must be a list of whole-number token ids; encode text with tokenize(llama, text)") from None
    wrong = [i for i in ids if not 0 <= i < llama.n_vocab()]
    if wrong:
        raise LlamaError(f"token id {wrong[0]} is outside the vocabulary 0..{llama.n_vocab() - 1} of the file")
    return ids


def _sequence(ids: int | Sequence[int]) -> list[int]:
    try:
        ids = [operator.index(ids)]
    except TypeError:
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise LlamaError(f"stop={ids!r}: must be a list of ids and id lists") from None
    if not ids:
        raise LlamaError("stop holds an empty sequence: remove it")
    return ids


def whole(name: str, value: int) -> int:
    """The value, if it is a whole number above 0. Raises LlamaError, naming it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LlamaError(f"{name}={value!r}: must be a whole number, at least 1")
    return value
