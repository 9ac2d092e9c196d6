"""GGUF files for the tests of llama.cpp: good ones of our own models, and bad ones made from them."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from core_helpers import scramble

from minimoe import HybridConfig, HybridLM
from minimoe.data import Tokenizer
from minimoe.interop import save_gguf

ARCHITECTURE = "nemotron_h_moe"
VOCABULARY = 512
# every weight row a multiple of 256, so that k-quants are what they are called
_WIDE = dict(hidden_size=256, head_dim=64, mamba_head_dim=32, moe_intermediate_size=256,
             moe_shared_expert_intermediate_size=256, moe_latent_size=None)  # fmt: skip


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([inspect.getsource(textwrap), "naïve café — 100 % of it\n" * 20], VOCABULARY)


@functools.cache
def tiny_model() -> HybridLM:
    """A scrambled model with an MTP block that computes what llama.cpp's does."""
    return _model()


def _model(**changes: Any) -> HybridLM:
    changes = dict(vocab_size=VOCABULARY, mtp_final_norm="layernorm") | changes
    changes.setdefault("tokenizer_fingerprint", tokenizer().fingerprint)
    return scramble(HybridLM(HybridConfig.preset("tiny", **changes)), seed=3).eval()


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "tiny.gguf"
    save_gguf(tiny_model(), path, tokenizer())
    return path


@pytest.fixture(scope="session")
def plain_file(tmp_path_factory) -> Path:
    """The same sizes without an MTP block."""
    path = tmp_path_factory.mktemp("llama") / "plain.gguf"
    save_gguf(_model(num_nextn_predict_layers=0), path, tokenizer())
    return path


@pytest.fixture(scope="session")
def wide_file(tmp_path_factory) -> Path:
    """F32, rows of 256."""
    path = tmp_path_factory.mktemp("llama") / "wide.gguf"
    save_gguf(_model(**_WIDE), path, tokenizer())
    return path


def rewrite(
    source: Path, target: Path, fields: Mapping[str, Callable[[Any], Any]] | None = None,
    architecture: str = ARCHITECTURE, tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A copy with fields or tensors changed (None drops one), or under another architecture's name."""
    reader, fields, tensors = gguf.GGUFReader(source), dict(fields or {}), dict(tensors or {})
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        name = field.name.removeprefix(ARCHITECTURE + ".")
        value = fields.pop(name)(field.contents()) if name in fields else field.contents()
        if value is not None:
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name.replace(ARCHITECTURE, architecture), value, field.types[0], sub_type=inner)
    assert not fields, f"no such fields: {list(fields)}"
    for tensor in reader.tensors:
        data = tensors.pop(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    assert not tensors, f"no such tensors: {list(tensors)}"
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def same(value: Any) -> Callable[[Any], Any]:
    """``fields={"x": same(3)}``: 3 whatever it was, in every place of a list."""
    return lambda old: [value] * len(old) if isinstance(old, list) else value


def tensor_names(path: Path) -> list[str]:
    return [tensor.name for tensor in gguf.GGUFReader(path).tensors]


def header_size(path: Path) -> int:
    """Bytes before the first tensor."""
    return min(int(tensor.data_offset) for tensor in gguf.GGUFReader(path).tensors)
