"""What ``llama_cpp.Llama`` lacks: parameters it has no keyword for, a refusal of keywords it does not know, and a
tokenizer that is whole. (llama-cpp-python 0.3.36.)"""
from __future__ import annotations

import contextlib
import ctypes
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from .library import LlamaError, library

_lock = threading.Lock()


def sort_keywords(
    keywords: Mapping[str, Any], reserved: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that ``Llama`` takes, and those that are fields of llama_model_params.

    ``reserved`` names keywords that the caller refuses, and why. Raises LlamaError for them and for unknown ones:
    Llama would swallow a misspelt keyword in silence.
    """
    api = library()
    known = set(inspect.signature(api.Llama.__init__).parameters) - {"self", "kwargs", *reserved}
    fields = {name for name, _ in api.llama_model_params._fields_} - known - set(reserved)
    for name in keywords:
        if name not in known | fields:
            why = reserved.get(name, "nor is it a field of llama_model_params")
            raise LlamaError(f"{name} is no keyword of load: {why}")
    return ({name: value for name, value in keywords.items() if name in known},
            {name: value for name, value in keywords.items() if name in fields})


@contextlib.contextmanager
def model_defaults(fields: Mapping[str, Any]) -> Iterator[None]:
    """Within, a ``Llama(...)`` that this thread makes starts from these fields of llama_model_params."""
    bindings, me = library().llama_cpp, threading.get_ident()
    with _lock:
        original = bindings.llama_model_default_params

        def defaults() -> Any:
            params = original()
            if threading.get_ident() == me:
                for name, value in fields.items():
                    setattr(params, name, value)
            return params

        bindings.llama_model_default_params = defaults
        try:
            yield
        finally:
            bindings.llama_model_default_params = original


def whole_tokenizer(llama: Any) -> Any:
    """A ``LlamaTokenizer`` that keeps tokens of more than 32 bytes, which the binding drops, and that raises
    LlamaError on a file without a vocabulary, where llama.cpp aborts."""
    from llama_cpp import LlamaTokenizer

    api, vocab, path = library(), llama._model.vocab, llama.model_path  # not llama: a cycle would keep its memory
    kind = api.llama_vocab_type(vocab)

    class Tokenizer(LlamaTokenizer):
        def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
            self.check()
            return super().tokenize(text, add_bos, special)

        def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
            self.check()
            text = b"".join(_piece(vocab, token, special) for token in tokens)
            # SentencePiece begins every text with a space, which the first token carries
            begins = kind == api.LLAMA_VOCAB_TYPE_SPM and tokens and tokens[0] == self._model.token_bos()
            return text.removeprefix(b" ") if begins else text

        def check(self) -> None:
            if kind == api.LLAMA_VOCAB_TYPE_NONE:
                raise LlamaError(f"{path} holds no tokenizer: give token ids, or save it with one")

    return Tokenizer(llama)


def _piece(vocab: Any, token: int, special: bool, size: int = 64) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    length = library().llama_token_to_piece(vocab, token, buffer, size, 0, special)
    return _piece(vocab, token, special, -length) if length < 0 else buffer.raw[:length]
