"""llama.cpp's own graph of the multi-token-prediction block, beside the trunk of the same file.

At position p the block reads the token x_p and the trunk's state h_{p-1} after the final norm (zeros at p = 0) and
predicts x_{p+1}; applied again, its own state takes h's place. Its final norm subtracts the mean here
(``mtp_final_norm="layernorm"`` in minimoe), where Megatron and vLLM take RMSNorm.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ggml import batch
from ..ggml.library import LlamaError, library, log, reason
from .decoding import check_ids, check_open, fresh

if TYPE_CHECKING:
    from llama_cpp import Llama


class LlamaMTP:
    """The MTP block of a file that was loaded with ``load(path, mtp=True)``.

    ``logits_LV, hidden_LD = block(ids, hidden_LD)`` reads on where the last call ended; :meth:`reset` empties it.
    """

    def __init__(self, llama: Llama) -> None:
        api = library()
        check_open(llama)
        # llama.cpp asserts instead of asking, and counts blocks that the file declares, loaded or not
        if not api.llama_model_n_layer_nextn(llama.model):
            raise LlamaError(f"{llama.model_path} has no MTP block")
        if not llama.model_params.load_mtp:
            raise LlamaError("the MTP block was not loaded: use load(path, mtp=True)")
        params = type(llama.context_params).from_buffer_copy(llama.context_params)
        params.ctx_type = api.LLAMA_CONTEXT_TYPE_MTP
        with log.listen() as lines:
            context = api.llama_init_from_model(llama.model, params)
        if not context:
            raise LlamaError(f"llama.cpp makes no MTP context of this file: {reason(lines) or reason(lines, 'warn')}")
        _nextn().llama_set_embeddings_nextn(context, True, False)
        self.length = 0  # tokens read since the last reset
        self._llama, self._contexts = llama, [context]
        # freed with the model at the latest: after it, llama.cpp would read memory that is gone
        llama._model._exit_stack.callback(_free, self._contexts)

    def trunk(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The trunk's logits [L, V] and its states [L, D] after the final norm, of a fresh sequence."""
        llama, ids = self._llama, check_ids(self._llama, ids)
        _nextn().llama_set_embeddings_nextn(llama.ctx, True, False)
        try:
            with fresh(llama):
                return self._read(llama.ctx, ids, 0, None)
        finally:
            _nextn().llama_set_embeddings_nextn(llama.ctx, False, False)

    def __call__(self, ids: Sequence[int], hidden_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logits [L, V] and the block's states [L, D] for tokens x_p with the states h_{p-1} beside them."""
        ids = check_ids(self._llama, ids, taken=self.length)
        hidden_LD = np.ascontiguousarray(hidden_LD, dtype=np.float32)
        wanted = (len(ids), self._llama.n_embd())
        if hidden_LD.shape != wanted:
            raise LlamaError(f"hidden has shape {hidden_LD.shape}, {len(ids)} tokens need {wanted}")
        out = self._read(self._context, ids, self.length, hidden_LD)
        self.length += len(ids)
        return out

    def draft(self, ids: Sequence[int], count: int) -> list[int]:
        """The token that the trunk finds likeliest after the prompt ``ids``, and ``count`` drafts after it, each from
        the block's own last state."""
        self.reset()
        logits_LV, hidden_LD = self.trunk(ids)
        self(ids, shift(hidden_LD))
        drafts, state = [int(logits_LV[-1].argmax())], hidden_LD[-1:]
        for _ in range(count):
            logits_LV, state = self(drafts[-1:], state)
            drafts.append(int(logits_LV[-1].argmax()))
        return drafts

    def _read(self, context: Any, ids: list[int], at: int, hidden_LD: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        logits, states = [], []
        for start in range(0, len(ids), self._llama.n_batch):
            part = ids[start : start + self._llama.n_batch]
            rows = None if hidden_LD is None else hidden_LD[start : start + len(part)]
            batch.decode(context, part, at + start, hidden_LD=rows)
            logits.append(batch.logits(context, len(part)))
            pointer = _nextn().llama_get_embeddings_nextn(context)
            states.append(np.ctypeslib.as_array(pointer, (len(part), self._llama.n_embd())).copy())
        return np.concatenate(logits), np.concatenate(states)

    def reset(self) -> None:
        """Forget everything read so far."""
        api = library()
        api.llama_memory_clear(api.llama_get_memory(self._context), True)
        self.length = 0

    def close(self) -> None:
        """Free the block's context; closing the Llama does so too."""
        _free(self._contexts)

    @property
    def _context(self) -> Any:
        if not self._contexts:
            raise LlamaError("this MTP block is closed: make another with LlamaMTP(llama)")
        return self._contexts[0]

    def __enter__(self) -> LlamaMTP:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _free(contexts: list[Any]) -> None:
    while contexts:
        library().llama_free(contexts.pop())


def shift(hidden_LD: np.ndarray) -> np.ndarray:
    """States h_p [L, D] to what stands beside token p: zeros, h_0, ..., h_{L-2}."""
    return np.concatenate([np.zeros_like(hidden_LD[:1]), hidden_LD[:-1]])


def _nextn() -> Any:
    library()
    from llama_cpp import llama_cpp_ext

    return llama_cpp_ext
