"""GGUF files: what llama.cpp opens, and what it or NVIDIA's converter wrote.

F32, F16, BF16 and Q8_0 are written here, with the bytes that llama.cpp's quantiser would write. Every other name
stands for a mix of types that llama.cpp chooses itself, so llama.cpp's quantiser makes it.

gguf_names.py       which tensor is which, and its type
gguf_tensors.py     numbers to bytes and back
gguf_keys.py        the config
gguf_vocabulary.py  the tokenizer

(The package that reads and writes the container is called gguf too; all imports of it are absolute.)
"""
from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as GGMLType
from gguf import LlamaFileType as FileType
from torch import Tensor

from ..config import ConfigError, HybridConfig
from ..ggml import library
from ..ggml.quantizer import Fallback, Quantized, check_quant, quantize_file
from ..model import HybridLM
from .gguf_keys import GGUFError, Keys, architecture, check_config, read_config, write_config
from .gguf_names import Place, file_shape, is_quantised, places, stored_bytes, stored_type
from .gguf_tensors import OWN_A_LOG, decode, encode, own_A_logs, to_A_log
from .gguf_vocabulary import check_tokenizer, read_tokenizer, stored_fingerprint, write_tokenizer
from .huggingface import CheckpointError, pick_layers

if TYPE_CHECKING:
    from ..data import Tokenizer

DIRECT = {
    "F32": FileType.ALL_F32, "F16": FileType.MOSTLY_F16, "BF16": FileType.MOSTLY_BF16, "Q8_0": FileType.MOSTLY_Q8_0,
}  # fmt: skip


def save_gguf(
    model: HybridLM, path: str | os.PathLike[str], tokenizer: Tokenizer | None, quant: str = "F32",
    about: Mapping[str, str] | None = None,
) -> Quantized:
    """Write a file that llama.cpp opens unpatched and computes alike; returns its size and types.

    tokenizer  the one that the model was trained with. None: ids without text (llama.cpp's "no_vocab")
    quant      llama.cpp's spelling: F32, F16, BF16, Q8_0, Q4_K_M, ... Matrices get the type; norms, routers,
               convolutions and vectors stay F32, and rows that no block of the type divides fall back to another
    about      texts for the file's general.* keys: name, author, license, description, url, ...

    Tensors are written one by one, so there is no second copy of the model in memory; the file appears whole or not
    at all. Raises GGUFError for what llama.cpp cannot hold or would abort on, and LlamaError for a quant that it
    cannot make.
    """
    path, quant, config = Path(path), check_quant(quant), model.config
    if path.is_dir():
        raise GGUFError(f"{path} is a directory; give the name of a file")
    if model.lm_head.weight.is_meta:
        raise GGUFError("the model is on the meta device and has no weights to save")
    check_config(config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, config)
    if quant not in DIRECT:
        library()  # is it there at all? says so before the work
    about = {"name": path.stem} | dict(about or {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:
        made = Path(beside, f"new-{path.name}")
        if quant in DIRECT:
            done = _write(model, made, tokenizer, quant, about)
        else:
            source = Path(beside, path.name)  # the name that messages show
            _write(model, source, tokenizer, "BF16" if model.lm_head.weight.dtype == torch.bfloat16 else "F32", about)
            done = quantize_file(source, made, quant)
        os.replace(made, path)
    return done


def _write(model: HybridLM, path: Path, tokenizer: Tokenizer | None, quant: str, about: Mapping[str, str]) -> Quantized:
    config, tensors, wanted = model.config, model.state_dict(), GGMLType[quant]
    table: list[tuple[Place, tuple[int, ...], GGMLType]] = []
    fallbacks = []
    for place in places(config):
        shape = file_shape(place, tuple(tensors[place.ours].shape), config)
        kind = stored_type(place.theirs, shape, wanted)
        table.append((place, shape, kind))
        if kind != wanted and is_quantised(place.theirs, shape):
            fallbacks.append(Fallback(place.theirs, shape[-1], quant, kind.name))
    writer = gguf.GGUFWriter(path, architecture(config))
    try:
        writer.add_type("model")
        writer.add_size_label(_size_label(config, tensors))
        for name, text in about.items():
            writer.add_string(f"general.{name}", text)
        writer.add_file_type(DIRECT[quant])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_config(writer, config)
        A_logs = (tensors[place.ours].float().tolist() for place, *_ in table if place.is_A)
        writer.add_array(OWN_A_LOG, [number for block in A_logs for number in block])
        write_tokenizer(writer, tokenizer, config)
        for place, shape, kind in table:
            # the dtype only has to be none of bytes, or the writer would take the shape for one of bytes
            writer.add_tensor_info(place.theirs, shape, np.dtype(np.float32), stored_bytes(shape, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place, shape, kind in table:
            writer.write_tensor_data(encode(place, tensors[place.ours], shape, kind))
    except OSError as error:  # numpy says how many bytes it wrote, not why
        raise GGUFError(f"{path.name} could not be written ({error}); is the disk full?") from None
    finally:
        writer.close()
    size = sum(stored_bytes(shape, kind) for _, shape, kind in table)
    return Quantized(quant, size, path.stat().st_size, dict(Counter(kind.name for *_, kind in table)), fallbacks)


def _size_label(config: HybridConfig, tensors: Mapping[str, Tensor]) -> str:
    total = sum(tensor.numel() for tensor in tensors.values())
    experts = sum(tensor.numel() for name, tensor in tensors.items() if ".experts." in name)
    count = config.n_routed_experts if experts else 0
    return gguf.size_label(total, total - experts, experts // max(1, count), count)


# ---------------------------------------------------------------------- reading
def load_gguf(
    path: str | os.PathLike[str],
    layers: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[HybridLM, Tokenizer | None]:
    """The model and the tokenizer of a file: ours, or what llama.cpp's converter and quantiser wrote.

    layers   read only these blocks of the trunk (a number: the first so many), without the MTP block; the file is
             mapped, so the rest of it is not touched
    dtype    of the weights (None: float16 or bfloat16 if that is the file's type, else float32); the routers'
             correction biases stay at least float32

    The tokenizer is None for a file without text, and, with a warning, for a vocabulary that is not of this
    package's kind, as NVIDIA's are not. Raises GGUFError for a missing, foreign or damaged file, for a tensor that is
    missing or of a wrong shape, and for a vocabulary that was changed.
    """
    path = Path(path)
    try:
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise GGUFError(f"dtype={dtype!r} must be a torch dtype such as torch.bfloat16")
        reader = _open(path)
        keys = Keys(reader)
        if keys.read("split.count", int, 1) > 1:
            raise GGUFError("this is one part of several; join them first (llama-gguf-split --merge)")
        tokenizer = read_tokenizer(keys)
        model = _read_model(reader, keys, layers, dtype, device)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise GGUFError(f"its tokenizer has {tokenizer.vocab_size} tokens, its embedding {model.config.vocab_size}")
        return model, tokenizer
    except (GGUFError, ConfigError, CheckpointError) as error:
        raise GGUFError(f"{path}: {error}") from None


def _open(path: Path) -> gguf.GGUFReader:
    if not path.is_file():
        raise GGUFError("is a directory; give the file" if path.is_dir() else "no such file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:100]
        raise GGUFError(f"no GGUF file, or cut short or damaged; fetch or export it again ({reason})") from None
    if reader.byte_order != "I":
        raise GGUFError("written for machines of the other byte order; convert it (gguf-convert-endian)")
    return reader


def _read_model(
    reader: gguf.GGUFReader, keys: Keys, layers: int | Sequence[int] | None, dtype: torch.dtype | None,
    device: torch.device | str,
) -> HybridLM:
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = read_config(keys, int(_stored(stored, "token_embd.weight").shape[-1]), stored_fingerprint(keys))
    picked, A_logs = pick_layers(config, layers), own_A_logs(keys, config)
    if picked is not None:
        pattern = "".join(config.hybrid_override_pattern[i] for i in picked)
        config = config.replace(hybrid_override_pattern=pattern, num_nextn_predict_layers=0)
    if dtype is None:
        floats = {FileType.MOSTLY_F16: torch.float16, FileType.MOSTLY_BF16: torch.bfloat16}
        dtype = floats.get(keys.read("general.file_type", int, FileType.ALL_F32), torch.float32)
    try:
        model = HybridLM(config, device="meta")
    except (RuntimeError, OverflowError):
        raise GGUFError("its keys describe tensors beyond any memory; fetch or export it again") from None
    meta, wanted, taken = model.state_dict(), {}, set()
    for place in places(config):
        name = place.theirs
        if picked is not None and place.layer is not None:
            name = name.replace(f"blk.{place.layer}.", f"blk.{picked[place.layer]}.", 1)
        taken.add(name)
        shape = file_shape(place, tuple(meta[place.ours].shape), config)
        bias = place.ours.endswith("e_score_correction_bias")
        kind = torch.promote_types(dtype, torch.float32) if bias else dtype
        values = decode(_stored(stored, name), shape, torch.float32 if place.is_A else kind)
        if place.is_A:
            values = to_A_log(name, values.flatten(), A_logs.get(name)).to(kind)
        wanted[place.ours] = values.view(meta[place.ours].shape).to(device)
    foreign = [name for name in stored if name not in taken]
    if foreign and picked is None:
        raise GGUFError(f"tensor {foreign[0]} has no place in this architecture ({len(foreign)} such)")
    model.load_state_dict(wanted, assign=True)
    return model


def _stored(stored: Mapping[str, gguf.ReaderTensor], name: str) -> gguf.ReaderTensor:
    if name not in stored:
        raise GGUFError(f"tensor {name} is missing; is the file complete?")
    if not len(stored[name].shape):
        raise GGUFError(f"tensor {name} has no shape; fetch or export the file again")
    return stored[name]
