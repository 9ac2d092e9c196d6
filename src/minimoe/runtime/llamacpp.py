"""llama.cpp in this process: a GGUF file becomes a ``llama_cpp.Llama`` that tells what is wrong instead of dying.

:func:`load` gives the binding's own class, whole: everything that llama-cpp-python documents works on it. The
functions below read its logits and time it, always from an empty context.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..ggml.amx import amx_is_broken
from ..ggml.binding import model_defaults, sort_keywords, whole_tokenizer
from ..ggml.child import LlamaDied, run
from ..ggml.header import check_magic, explain
from ..ggml.library import LlamaError, library, log, reason
from .decoding import Continuation, Timings, check_open, greedy, in_vocabulary, logits, whole

if TYPE_CHECKING:
    from llama_cpp import Llama

__all__ = [
    "Continuation", "LlamaError", "Timings", "check_file", "detokenize", "fingerprint", "greedy", "load", "logits", "tokenize",
]  # fmt: skip
FINGERPRINT = "minimoe.tokenizer.fingerprint"  # metadata key; save_gguf writes it
_GRAIN = 256  # llama.cpp rounds a context up to this
_RESERVED = {  # keywords of Llama that load does not pass on, and why
    "model_path": "say path", "n_ctx": "say context", "n_threads": "say threads", "n_threads_batch": "say threads",
    "load_mtp": "say mtp", "load_mode": "say use_mmap", "verbose": "minimoe.ggml.library.log has the lines",
    "vocab_only": "llama.cpp aborts on a context without weights", "no_alloc": "llama.cpp aborts on a Llama without weights",
}  # fmt: skip
_checked: set[tuple[object, ...]] = set()


def load(
    path: str | os.PathLike[str], context: int = 512, threads: int = 1, exact: bool = False, mtp: bool = False,
    check: bool = True, fingerprint: str | None = None, **keywords: Any,
) -> Llama:
    """Open a GGUF file in llama.cpp.

    context      tokens of prompt and answer together, rounded up to a multiple of 256
    exact        F32 in the KV cache and no flash attention: logits agree with PyTorch to 1e-6 instead of 1e-3
    mtp          load the multi-token-prediction block too (minimoe.runtime.mtp needs it)
    check        first try the file in a child process, since llama.cpp aborts on some bad files; once a file
    fingerprint  refuse a file that was written with another tokenizer than this one
    keywords     any of ``Llama``'s (n_gpu_layers, logits_all, ...) and any field of llama_model_params that it has
                 no keyword for (use_extra_bufts, check_tensors, ...)

    Raises LlamaError in one line, with llama.cpp's own reason, for anything that cannot be loaded.
    """
    llama_cpp = library()
    path = check_magic(path)
    context, threads = whole("context", context), whole("threads", threads)
    passed, params = sort_keywords(keywords, _RESERVED)
    if exact:
        passed = _exactly(passed)
    if "use_extra_bufts" not in params and amx_is_broken():
        params["use_extra_bufts"] = False
    if check:
        check_file(path, mtp, keywords.get("kv_overrides"))
    with log.listen() as lines, model_defaults(params | {"load_mtp": bool(mtp)}):
        try:
            llama = llama_cpp.Llama(
                str(path), n_ctx=-(-context // _GRAIN) * _GRAIN, n_threads=threads, n_threads_batch=threads,
                verbose=False, **passed,
            )  # fmt: skip
        except Exception as error:  # the binding also parses what the file holds: metadata, chat template
            why = reason(lines) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise LlamaError(f"{path.name}: llama.cpp cannot load it: {why}") from None
    try:
        if mtp and not llama_cpp.llama_model_n_layer_nextn(llama.model):
            raise LlamaError(f"{path.name} has no MTP block: load it with mtp=False")
        if keywords.get("lora_path") and not llama._lora_adapter:  # the binding takes a NULL for an adapter
            raise LlamaError(f"{keywords['lora_path']}: llama.cpp cannot use it as an adapter: {reason(lines)}")
        _check_fingerprint(llama, path.name, fingerprint)
    except LlamaError:
        llama.close()
        raise
    llama.tokenizer_ = whole_tokenizer(llama)
    return llama


def _exactly(keywords: dict[str, Any]) -> dict[str, Any]:
    """F32 keys and values, and no flash attention: either alone changes nothing."""
    ruled = {"type_k": 0, "type_v": 0, "flash_attn": False}
    for name, value in ruled.items():
        if keywords.get(name, value) != value:
            raise LlamaError(f"{name}={keywords[name]!r} and exact=True exclude each other: leave one out")
    return keywords | ruled


def check_file(
    path: str | os.PathLike[str], mtp: bool = False, kv_overrides: Mapping[str, bool | int | float | str] | None = None
) -> None:
    """Load a file and compute one token in a child process. Raises LlamaError in one line if that fails or dies.

    A file that has passed is not tried again in this process until it changes.
    """
    path, overrides = check_magic(path).resolve(), dict(kv_overrides or {})
    wrong = [name for name, value in overrides.items() if not isinstance(value, (bool, int, float, str))]
    if wrong:
        raise LlamaError(f"kv_overrides: {wrong[0]} must be a truth value, a number or a text")
    library()  # says in this process, and at once, if it is missing
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, bool(mtp), tuple(overrides.items()))
    if key in _checked:
        return
    try:
        run(f"{__name__}:_try_file", path.name, path=str(path), mtp=bool(mtp), kv_overrides=overrides or None)
    except LlamaDied as death:
        why = explain(path)
        raise LlamaDied(f"{path.name}: {why}" if why else path.name, death.how, death.said) from None
    _checked.add(key)


def _try_file(path: str, mtp: bool, kv_overrides: dict[str, Any] | None) -> None:
    """In the child: on the CPU, with the plain buffers, which every build survives."""
    from .mtp import LlamaMTP

    with contextlib.closing(
        load(path, context=_GRAIN, mtp=mtp, check=False, use_extra_bufts=False, kv_overrides=kv_overrides)
    ) as llama:
        logits(llama, [0])
        if mtp:
            LlamaMTP(llama)([0], np.zeros((1, llama.n_embd()), np.float32))


def fingerprint(llama: Llama) -> str | None:
    """The tokenizer's fingerprint that the file carries, None if it carries none."""
    return llama.metadata.get(FINGERPRINT)


def _check_fingerprint(llama: Llama, name: str, wanted: str | None) -> None:
    carried = fingerprint(llama)
    if wanted is not None and carried != wanted:
        has = "carries no tokenizer fingerprint" if carried is None else f"was written with tokenizer {carried[:12]}"
        raise LlamaError(f"{name} {has}, not with {wanted[:12]}: token ids would mean other texts; use the tokenizer of the file")


def tokenize(llama: Llama, text: str, allow_special: bool = False) -> list[int]:
    """Token ids, without a beginning-of-text token. ``allow_special``: read "<|im_start|>" as that token, not as text."""
    check_open(llama)
    try:
        return llama.tokenize(text.encode("utf-8"), add_bos=False, special=allow_special)
    except UnicodeEncodeError as error:
        raise LlamaError(f"the text holds half a surrogate pair at character {error.start}: no tokenizer can encode it") from None


def detokenize(llama: Llama, ids: Sequence[int]) -> bytes:
    """The bytes of these tokens, special ones spelled out. They may end inside a character."""
    check_open(llama)
    return llama.detokenize(in_vocabulary(llama, ids), special=True)
