"""llama.cpp as a runner: what llama-bench does, through llama-cpp-python.

Contexts are made with llama.cpp's own defaults, as llama-bench makes them (16-bit keys and values, flash attention where
the device has it, batches of 2,048 tokens in micro-batches of 512), not with those of the binding's class.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..ggml.amx import amx_is_broken
from ..ggml.library import LlamaError, library, log, native, reason
from ..runtime import llamacpp
from .variants import SEED

BATCH, MICRO_BATCH = 2048, 512  # tokens of a call, and of a pass
EXPERTS = r"blk\.{block}\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # what --n-cpu-moe matches


class LlamaRunner:
    """A GGUF file. ``gpu_layers`` -1: all of it on the GPU; ``cpu_moe``: but the experts of that many blocks."""

    def __init__(self, path: str, threads: int, gpu_layers: int, cpu_moe: int) -> None:
        log.echo = os.dup(2)  # an assertion's text, for whoever reads how this process ended
        self.api = api = library()
        if gpu_layers and not api.llama_supports_gpu_offload():
            raise LlamaError("this build of llama-cpp-python has no GPU support: minimoe doctor names one that has, "
                             "or take --device cpu")
        self.threads, self.notes, self.context = threads, {}, None
        if amx_is_broken():
            self.notes["extra buffers"] = "off, as this build's AMX code would end the process"
        with experts_in_ram(cpu_moe) as overrides:
            # no trial in a child before: this is a child
            self.llama = llamacpp.load(path, context=256, threads=threads, check=False, n_gpu_layers=gpu_layers, **overrides)
        self.llama._ctx.close()  # the binding's own context would take memory that the model's may need
        vocab = api.llama_model_get_vocab(self.llama.model)
        self.vocabulary, self.random = api.llama_vocab_n_tokens(vocab), np.random.default_rng(SEED)
        self.first = api.llama_vocab_bos(vocab) if api.llama_vocab_get_add_bos(vocab) else None

    def start(self, batch: int, depth: int, more: int) -> None:
        api = self.api
        if self.context is not None:
            api.llama_free(self.context)
            self.context = None
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = batch * (-(-(depth + more) // 256) * 256), batch
        settings.n_batch, settings.n_ubatch = max(BATCH, batch), MICRO_BATCH
        settings.n_threads = settings.n_threads_batch = self.threads
        with log.listen() as lines:
            self.context = api.llama_init_from_model(self.llama.model, settings)
        if not self.context:
            raise LlamaError(f"llama.cpp makes no context of {batch} x {depth + more} tokens: "
                             f"{reason(lines) or 'is there enough memory?'}")
        self.memory, self.batch, self.at = api.llama_get_memory(self.context), batch, 0
        self.saved, self.depth = [], 0
        if depth:
            self.read(depth)
            self.saved, self.depth = [self._save(row) for row in range(batch)], depth

    def begin(self) -> None:
        self.api.llama_memory_clear(self.memory, True)
        self.at = self.depth
        for row, bytes_ in enumerate(self.saved):
            if not self.api.llama_state_seq_set_data(self.context, bytes_, len(bytes_), row):
                raise LlamaError("llama.cpp does not take back the state that it saved: leave out --depth")

    def read(self, tokens: int) -> None:
        ids_BL = self.random.integers(0, self.vocabulary, (self.batch, tokens), dtype=np.int32)
        if self.at == 0 and self.first is not None:
            ids_BL[:, 0] = self.first
        most = max(1, BATCH // self.batch)
        for start in range(0, tokens, most):
            self._decode(ids_BL[:, start : start + most], last=start + most >= tokens)
        self.api.llama_synchronize(self.context)

    def step(self, ids: list[int] | None = None) -> None:
        if ids is None:
            return self.read(1)
        self._decode(np.array(ids, dtype=np.int32)[:, None], last=True)
        self.api.llama_synchronize(self.context)

    def likeliest(self) -> list[int]:
        outputs = [self.api.llama_get_logits_ith(self.context, row - self.batch) for row in range(self.batch)]
        return [int(np.ctypeslib.as_array(logits_V, (self.vocabulary,)).argmax()) for logits_V in outputs]

    def choose(self, kind: str, work: Callable[[], float]) -> None:
        pass

    def use(self, kind: str) -> None:
        pass

    def _decode(self, ids_BL: np.ndarray, last: bool) -> None:
        """The next tokens of each row, place by place; logits of the last place, if it is the ``last`` call."""
        rows, each = ids_BL.shape
        with log.listen() as lines:
            if rows == 1:  # llama.cpp counts the positions, and gives logits of the last token
                code = self.api.llama_decode(self.context, self.api.llama_batch_get_one(_pointer(ids_BL), each))
            else:
                code = self._decode_rows(ids_BL, last)
        if code:
            raise LlamaError(f"llama.cpp could not compute {rows} x {each} tokens: {reason(lines) or f'code {code}'}")
        self.at += each

    def _decode_rows(self, ids_BL: np.ndarray, last: bool) -> int:
        rows, each = ids_BL.shape
        batch = self.api.llama_batch_init(ids_BL.size, 0, 1)
        try:
            for n, (place, row) in enumerate((place, row) for place in range(each) for row in range(rows)):
                batch.token[n], batch.pos[n], batch.n_seq_id[n] = int(ids_BL[row, place]), self.at + place, 1
                batch.seq_id[n][0], batch.logits[n] = row, last and place == each - 1
            batch.n_tokens = ids_BL.size
            return self.api.llama_decode(self.context, batch)
        finally:
            self.api.llama_batch_free(batch)

    def _save(self, row: int) -> Any:
        size = self.api.llama_state_seq_get_size(self.context, row)
        room = (ctypes.c_uint8 * size)()
        if self.api.llama_state_seq_get_data(self.context, room, size, row) != size:
            raise LlamaError("llama.cpp cannot save this model's state: leave out --depth")
        return room


def _pointer(ids_BL: np.ndarray) -> Any:
    return ids_BL.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


@contextlib.contextmanager
def experts_in_ram(blocks: int) -> Iterator[dict[str, Any]]:
    """Keywords for :func:`minimoe.runtime.llamacpp.load` that keep the routed experts of the first ``blocks`` blocks in
    the host's memory: what llama.cpp's own programs do for --n-cpu-moe. Blocks without experts count too."""
    if not blocks:
        yield {}
        return

    class Override(ctypes.Structure):
        _fields_ = [("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p)]

    host = native("ggml_backend_cpu_buffer_type", ctypes.c_void_p)()
    array = (Override * (blocks + 1))()  # a pattern of NULL ends it
    for block in range(blocks):
        array[block].pattern, array[block].buffer_type = EXPERTS.format(block=block).encode(), host
    yield {"tensor_buft_overrides": ctypes.addressof(array)}  # read while the file is loaded, and not afterwards
