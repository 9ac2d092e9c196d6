"""What the tests of GGUF files share: models of every kind, a tokenizer, and a look into a file."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from core_helpers import scramble, small_model

from minimoe import HybridConfig, HybridLM
from minimoe.data import Tokenizer

TEXTS = [Path(functools.__file__).read_text(encoding="utf-8"), "0123456789 déjà vu — 漢字 \r\n\t" * 30]


@functools.cache
def tokenizer(vocab_size: int = 300, pre: str = "qwen2") -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size, pre)


def model_of(pattern: str = "MEM*E", **changes: Any) -> HybridLM:
    """A small scrambled float32 model with an MTP block wherever one is possible, and room for the tokenizer."""
    mtp = {"num_nextn_predict_layers": 0 if "-" in pattern else 1}
    dtype = changes.pop("dtype", None)
    import torch

    return small_model(pattern, dtype=dtype or torch.float32, **({"vocab_size": 310} | mtp | changes))


def random_config(seed: int) -> HybridConfig:
    """Any shape that llama.cpp takes: dense or experts, latent or not, MTP or not, odd sizes, several groups.

    Groups of Mamba channels are at least eight wide: normalising a few numbers by themselves makes much of their
    rounding, in any program.
    """
    r = random.Random(seed)
    experts = r.random() < 0.6
    letters = [r.choice("M*E" if experts else "M*-") for _ in range(r.randint(1, 5))] + ["M", "*"] + ["E"] * experts
    r.shuffle(letters)
    kv_heads, groups, E = r.choice([1, 2, 3]), r.choice([1, 2, 3, 4]), r.randint(1, 9)
    return HybridConfig(
        vocab_size=r.randint(280, 330), hidden_size=r.choice([32, 33, 48, 50, 96]),
        hybrid_override_pattern="".join(letters),
        num_attention_heads=kv_heads * r.randint(1, 3), num_key_value_heads=kv_heads,
        head_dim=r.choice([6, 7, 8, 12, 32]), mamba_num_heads=groups * r.randint(1, 3),
        mamba_head_dim=r.choice([8, 9, 12, 16]), n_groups=groups, ssm_state_size=r.choice([4, 9, 16, 32]),
        conv_kernel=r.choice([2, 3, 4, 5]), chunk_size=r.choice([1, 3, 8, 16]), intermediate_size=r.choice([16, 40, 77]),
        n_routed_experts=E, num_experts_per_tok=r.randint(1, E), moe_intermediate_size=r.choice([8, 24, 31]),
        moe_shared_expert_intermediate_size=r.choice([16, 24, 33]), moe_latent_size=r.choice([None, None, 8, 12]),
        routed_scaling_factor=r.choice([1.0, 2.5, 0.5]), norm_topk_prob=r.random() < 0.7,
        layer_norm_epsilon=r.choice([1e-5, 1e-3]), num_nextn_predict_layers=int(experts and r.random() < 0.6),
        mtp_final_norm="layernorm", eos_token_id=None,
    )  # fmt: skip


def random_model(seed: int) -> HybridLM:
    return scramble(HybridLM(random_config(seed)), seed).eval()


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def keys(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def same_data(one: Path, other: Path) -> None:
    """Both files hold the same tensors: names, types, bytes."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tensor_type == b[name].tensor_type, name
        assert np.array_equal(a[name].data.view(np.uint8).ravel(), b[name].data.view(np.uint8).ravel()), name


def rewrite(
    source: Path, target: Path, architecture: str | None = None, change: Any = None, tensor: Any = None,
    extra: dict[str, tuple[Any, gguf.GGUFValueType]] | None = None,
) -> Path:
    """Copy a file key by key and tensor by tensor, as somebody else's program might write it.

    change(name, value) gives a key's new value, tensor(name, array) a tensor's new numbers; None leaves it out.
    extra has keys with their types, which take the place of those that are there.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, architecture or reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        value = field.contents()
        if name.startswith("GGUF.") or name == "general.architecture" or name in (extra or {}):
            continue
        value = change(name, value) if change else value
        if value is not None:
            kind = field.types[0]
            writer.add_key_value(name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    for name, (value, kind) in (extra or {}).items():
        writer.add_key_value(name, value, kind)
    for part in reader.tensors:
        data = tensor(part.name, part.data) if tensor else part.data
        if data is not None:
            kind = part.tensor_type if data.dtype == np.uint8 else None
            writer.add_tensor(part.name, np.ascontiguousarray(data), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
