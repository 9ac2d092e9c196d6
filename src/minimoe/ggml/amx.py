"""Does this build of llama.cpp die in quantised prefill?

gcc before 13 compiles ggml's AMX code wrongly: it drops the stores that fill the tile configuration, and the first
tile instruction is illegal (ggml-org/llama.cpp#26954). Only quantised weights with more than one token get there, so
F32 files, decoding and a first try all work. The cure is ``use_extra_bufts = False`` or a build without AMX.
"""
from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

from ..cache import cache_folder
from .child import LlamaDied, run
from .library import LlamaError, library, library_files, system_info

TOKENS = 64  # of the trial prefill; one token alone takes another path


def cpu_has_amx() -> bool:
    """Whether the CPU has AMX for 8-bit integers. Linux only: elsewhere no compiler that is affected builds ggml."""
    if sys.platform != "linux":
        return False
    try:
        return re.search(r"^flags\s*:.*\bamx_int8\b", Path("/proc/cpuinfo").read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def amx_compiled() -> bool:
    """Whether llama.cpp was compiled with AMX. Raises LlamaError without llama-cpp-python."""
    return system_info().get("AMX_INT8", False)


@functools.cache
def amx_is_broken() -> bool:
    """Whether quantised prefill kills this build. Tried once in a child process, and remembered in the user's cache.

    Where it cannot be tried (no package gguf, no place for a file) the answer is True: slower, never deadly.
    """
    if not amx_compiled():
        return False
    key = _build()
    known = _remembered()
    if key in known:
        return known[key]
    try:
        try_prefill()
        broken = False
    except LlamaDied:
        broken = True
    except LlamaError:
        return True
    _remember(known | {key: broken})
    return broken


def try_prefill(extra_buffers: bool = True) -> None:
    """Quantised prefill of a tiny model in a child process. Raises LlamaDied where it kills the process."""
    run(f"{__name__}:prefill", "quantised prefill", timeout=120, extra_buffers=extra_buffers)


def prefill(extra_buffers: bool) -> bool:
    """In the child: the logits of ``TOKENS`` tokens are finite, for each of the two types tried."""
    import numpy as np

    from .batch import decode, logits

    api = library()
    for kind in ("Q8_0", "Q4_0"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trial.gguf")
            write_trial(path, kind)
            settings = api.llama_model_default_params()
            settings.use_extra_bufts = extra_buffers
            settings.n_gpu_layers = 0
            settings.load_mode = api.LLAMA_LOAD_MODE_NONE  # Windows does not delete a file that is mapped
            model = api.llama_model_load_from_file(path.encode(), settings)
            if not model:
                raise LlamaError("llama.cpp refuses the trial file of minimoe.ggml.amx")
            shape = api.llama_context_default_params()
            shape.n_ctx, shape.n_threads, shape.n_threads_batch = 256, 1, 1
            context = api.llama_init_from_model(model, shape)
            decode(context, [i % 64 for i in range(TOKENS)])
            if not np.isfinite(logits(context, TOKENS)).all():
                raise LlamaError("quantised prefill: logits are not finite")
            api.llama_free(context)
            api.llama_model_free(model)
    return True


def write_trial(path: str | os.PathLike[str], kind: str = "Q8_0") -> None:
    """The smallest Llama that llama.cpp takes: one block, no vocabulary, every weight of ggml's type ``kind``."""
    import numpy as np

    try:
        import gguf
    except ImportError:
        raise LlamaError('the package gguf is not installed: pip install "minimoe[llama]"') from None
    width, heads = 64, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(width)
    writer.add_tokenizer_model("none")
    random = np.random.default_rng(0)
    quant = gguf.GGMLQuantizationType[kind]
    for name in ("token_embd", "output", *(f"blk.0.{part}" for part in (
            "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))):  # fmt: skip
        weight = random.normal(0, width**-0.5, (width, width)).astype(np.float32)
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, quant), raw_dtype=quant)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _build() -> str:
    """A name for this build on this kind of CPU: its files' paths, sizes and times."""
    files = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in library_files()]
    return hashlib.sha256(json.dumps([files, cpu_has_amx()]).encode()).hexdigest()[:32]


def cache_file() -> Path:
    """Where the verdicts are kept."""
    return cache_folder() / "llama-builds.json"


def _remembered() -> dict[str, bool]:
    try:
        known = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, bool)} if isinstance(known, dict) else {}


def _remember(known: dict[str, bool]) -> None:
    target = cache_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f"{target.name}.{os.getpid()}")
        beside.write_text(json.dumps(known, indent=1), encoding="utf-8")
        os.replace(beside, target)
    except OSError:
        pass  # a home that cannot be written to: tried again next time
