"""GGUF files of any model's shape that take no room: a header that is true, and behind it a hole as long as the weights.

llama.cpp's quantiser decides by names, shapes and a few keys, so a dry run over such a file says what it would do with
the real one, and the loader checks every name and shape. Imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minimoe.catalog import MLP, ArchitectureSpec, Attention, Mamba2, MoE
from minimoe.sizing.tensors import architecture, block_count, gguf_tensors

_TYPES = {"F32": gguf.GGMLQuantizationType.F32, "BF16": gguf.GGMLQuantizationType.BF16}


def write_sparse(spec: ArchitectureSpec, path: Path, mtp: bool = False) -> Path:
    """A BF16 file of this spec, as llama.cpp's converter lays it out, with zeros that no disk stores."""
    arch, mtp = architecture(spec), mtp and block_count(spec, True) > block_count(spec)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(spec.name)
    writer.add_context_length(spec.context or 4096)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    blocks = list(spec.blocks) + [block for module in spec.mtp for block in module.blocks if mtp]
    (_write_hybrid if arch.startswith("nemotron") else _write_transformer)(writer, spec, blocks, mtp)
    size = 0
    for tensor in gguf_tensors(spec, mtp):
        kind = "F32" if tensor.always_f32 else "BF16"
        bytes_ = tensor.numbers * (4 if kind == "F32" else 2)
        writer.add_tensor_info(tensor.name, tensor.dims[::-1], np.dtype(np.float32), bytes_, raw_dtype=_TYPES[kind])
        size += math.ceil(bytes_ / 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = math.ceil(path.stat().st_size / 32) * 32
    os.truncate(path, start + size)
    return path


def _first(blocks: Sequence[Any], kind: type) -> Any:
    return next((block for block in blocks if isinstance(block, kind)), None)


def _write_hybrid(writer: gguf.GGUFWriter, spec: ArchitectureSpec, blocks: list[Any], mtp: bool) -> None:
    attention, mamba, moe = (_first(blocks, kind) for kind in (Attention, Mamba2, MoE))
    # an MTP block is attention and experts in one
    layers = [(block,) for block in spec.blocks] + [module.blocks for module in spec.mtp if mtp]
    writer.add_block_count(block_count(spec, mtp))
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv([getattr(_first(parts, Attention), "kv_heads", 0) for parts in layers])
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_rope_dimension_count(attention.head_dim)
    writer.add_ssm_conv_kernel(mamba.conv_kernel)
    writer.add_ssm_inner_size(mamba.inner_size)
    writer.add_ssm_state_size(mamba.state_size)
    writer.add_ssm_time_step_rank(mamba.heads)
    writer.add_ssm_group_count(mamba.groups)
    if mtp and spec.mtp:
        writer.add_nextn_predict_layers(len(spec.mtp))
    if not moe:
        writer.add_feed_forward_length([parts[0].width if isinstance(parts[0], MLP) else 0 for parts in layers])
        return
    widths = [getattr(_first(parts, MoE), "width", 0) for parts in layers]
    used = [getattr(_first(parts, MoE), "top_k", 0) for parts in layers]
    writer.add_feed_forward_length(widths)
    same = len(set(widths) - {0}) == 1
    if same:
        writer.add_expert_feed_forward_length(moe.width)
        writer.add_expert_used_count(moe.top_k)
    else:  # a number for every block, which the package gguf has no method for
        writer.add_array(f"{architecture(spec)}.expert_feed_forward_length", widths)
        writer.add_array(f"{architecture(spec)}.expert_used_count", used)
    writer.add_expert_count(moe.experts)
    writer.add_expert_shared_count(1)
    writer.add_expert_shared_feed_forward_length(moe.shared_width)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(2.5)
    if moe.experts > 1:
        writer.add_expert_group_count(1)
    if moe.latent:
        writer.add_moe_latent_size(moe.latent)


def _write_transformer(writer: gguf.GGUFWriter, spec: ArchitectureSpec, blocks: list[Any], mtp: bool) -> None:
    attentions, dense, moe = [b for b in blocks if isinstance(b, Attention)], _first(blocks, MLP), _first(blocks, MoE)
    writer.add_block_count(block_count(spec, mtp))
    writer.add_head_count([block.heads for block in attentions])
    writer.add_head_count_kv([block.kv_heads for block in attentions])
    writer.add_key_length(attentions[0].head_dim)
    writer.add_value_length(attentions[0].head_dim)
    writer.add_rope_dimension_count(attentions[0].head_dim)
    writer.add_feed_forward_length(dense.width if dense else moe.width)
    if moe:
        writer.add_expert_count(moe.experts)
        writer.add_expert_used_count(moe.top_k)
        writer.add_expert_feed_forward_length(moe.width)
    if architecture(spec) == "step35":
        writer.add_expert_shared_feed_forward_length(moe.shared_width)
        writer.add_sliding_window(next(b.sliding_window for b in attentions if b.sliding_window))
        writer.add_sliding_window_pattern([bool(block.sliding_window) for block in attentions])
        if mtp:
            writer.add_nextn_predict_layers(len(spec.mtp))


def in_child(function: str, path: Path, *arguments: Any) -> Any:
    """Call a function of this file in a process of its own, which llama.cpp may abort."""
    code = f"import json, sys, sparse_gguf; print(json.dumps(sparse_gguf.{function}(*json.loads(sys.argv[1]))))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    child = subprocess.run(
        [sys.executable, "-c", code, json.dumps([str(path), *arguments])], env=env, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return json.loads(child.stdout)


_LINE = re.compile(r"\[ *\d+/ *\d+\] +(\S+) +- \[[\d, ]+\], type = *(\w+), size = .*?(?:\((\w+)\))?$")


def dry_runs(path: str, quants: Sequence[str], importance: bool = False) -> dict[str, Any]:
    """What llama.cpp's quantiser would make of a file: {quant: {types, bytes, fallbacks, needs_importance}}, or {error}."""
    from minimoe.ggml.library import library, log
    from minimoe.ggml.quantizer import read_log

    api, found = library(), {}
    numbers = {re.sub(r"^LLAMA_FTYPE_(MOSTLY_|ALL_)?", "", name): getattr(api, name)
               for name in dir(api) if name.startswith("LLAMA_FTYPE_")}  # fmt: skip
    number = ctypes.c_float(1.0)
    matrix = (api.llama_model_imatrix_data * 2)()  # a matrix for no tensor: that there is one is all a dry run asks
    matrix[0].name, matrix[0].data, matrix[0].size = b"none", ctypes.pointer(number), 1
    for quant in quants:
        settings = api.llama_model_quantize_default_params()
        settings.ftype, settings.nthread, settings.dry_run = numbers[quant], 1, True
        if importance:
            settings.imatrix = matrix
        with log.listen() as lines:
            code = api.llama_model_quantize(os.fsencode(path), os.fsencode(os.devnull), settings)
        text = [line for _, line in lines]
        if code:
            found[quant] = {"error": " ".join(line for level, line in lines if level == "error")}
            continue
        matches = filter(None, map(_LINE.match, text))
        said = read_log(lines)
        found[quant] = {
            "types": {name: (after or before).upper() for name, before, after in (match.groups() for match in matches)},
            "bytes": said["tensor_bytes"],
            "fallbacks": {part["tensor"]: part["used"] for part in said["fallbacks"]},
            "needs_importance": any("will require an imatrix" in line for line in text),
        }
    return found


def loads(path: str, mtp: bool = False) -> dict[str, Any]:
    """Whether llama.cpp's loader takes a file's names and shapes for those of its architecture; nothing is read."""
    from minimoe.ggml.library import library, log

    api = library()
    settings = api.llama_model_default_params()
    settings.no_alloc, settings.load_mode, settings.load_mtp = True, api.LLAMA_LOAD_MODE_NONE, mtp
    with log.listen() as lines:
        model = api.llama_model_load_from_file(os.fsencode(path), settings)
    errors = [text for level, text in lines if level == "error"]
    if not model:
        return {"error": " ".join(errors)}
    return {"parameters": api.llama_model_n_params(model), "bytes": api.llama_model_size(model), "errors": errors}
