"""A config as GGUF keys, and back.

llama.cpp's keys describe the model; what it has no key for (chunk_size, the range that dt_bias was drawn from, ...)
is kept in a JSON text of our own, which llama.cpp passes over. Where both speak of a field, llama.cpp's key counts,
so a file that somebody edited is read as llama.cpp would read it. Keys as llama.cpp's converter writes them for
NVIDIA's releases (``conversion/nemotron.py``).
"""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from ..config import HybridConfig
from ..errors import MinimoeError

DENSE, MOE = "nemotron_h", "nemotron_h_moe"
OWN_CONFIG = "minimoe.config"
MAX_BLOCKS, MAX_EXPERTS = 512, 1024  # LLAMA_MAX_LAYERS, LLAMA_MAX_EXPERTS
_REQUIRED = object()


class GGUFError(MinimoeError):
    """A GGUF file that cannot be read, or a model that such a file cannot hold; the message says what to change."""


# ---------------------------------------------------------------------- what llama.cpp cannot hold
def check_config(config: HybridConfig) -> None:
    """Raise GGUFError for a config that llama.cpp would refuse, compute otherwise, or abort on."""
    pattern, mtp = config.hybrid_override_pattern, config.num_nextn_predict_layers
    for letter, name in (("M", "Mamba"), ("*", "attention")):
        if letter not in pattern:
            raise GGUFError(f"hybrid_override_pattern={pattern!r}: llama.cpp aborts on a Nemotron-H "
                            f"without {name} ({letter!r})")
    if "-" in pattern and "E" in pattern:
        raise GGUFError(f"hybrid_override_pattern={pattern!r}: llama.cpp takes all feed-forward blocks for experts "
                        "once there are any; use 'E' or '-', not both")
    if "-" in pattern and mtp:
        raise GGUFError(f"num_nextn_predict_layers=1 with hybrid_override_pattern={pattern!r}: the MTP block has experts, "
                        "so llama.cpp takes the '-' blocks for experts too; use 'E', or leave out the MTP block")
    if config.time_step_limit != (0.0, float("inf")):
        raise GGUFError(f"time_step_limit={config.time_step_limit}: llama.cpp never clamps dt; only (0, inf) computes alike")
    if len(pattern) + mtp > MAX_BLOCKS:
        raise GGUFError(f"hybrid_override_pattern: {len(pattern) + mtp} blocks with MTP; "
                        f"llama.cpp holds at most {MAX_BLOCKS}")
    if _has_experts(config) and config.n_routed_experts > MAX_EXPERTS:
        raise GGUFError(f"n_routed_experts={config.n_routed_experts}: llama.cpp holds at most {MAX_EXPERTS}")
    if config.head_dim == 1:
        raise GGUFError("head_dim=1: llama.cpp aborts on it without flash attention; it must be at least 2")
    for field, value in asdict(config).items():
        if isinstance(value, int) and value >= 2**32:
            raise GGUFError(f"{field}={value}: llama.cpp counts in 32 bits; it must be below {2**32}")
    for field in ("layer_norm_epsilon", "routed_scaling_factor"):
        value = getattr(config, field)
        if not float(np.finfo(np.float32).tiny) <= value <= float(np.finfo(np.float32).max):
            raise GGUFError(f"{field}={value}: llama.cpp keeps it in float32, which has no such number")


def _has_experts(config: HybridConfig) -> bool:
    return "E" in config.hybrid_override_pattern or config.num_nextn_predict_layers > 0


def architecture(config: HybridConfig) -> str:
    """llama.cpp's name for this kind of model."""
    return MOE if _has_experts(config) else DENSE


# ---------------------------------------------------------------------- writing
def write_config(writer: GGUFWriter, config: HybridConfig) -> None:
    """llama.cpp's keys for a config, and the whole of it as JSON."""
    mtp = config.num_nextn_predict_layers
    letters = config.hybrid_override_pattern + "X" * mtp  # X: the MTP block, attention and experts in one
    widths = {"-": config.intermediate_size, "E": config.moe_intermediate_size, "X": config.moe_intermediate_size}
    writer.add_block_count(len(letters))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([widths.get(letter, 0) for letter in letters])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([config.num_key_value_heads if letter in "*X" else 0 for letter in letters])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_rope_dimension_count(config.head_dim)  # unused: no positions are encoded
    writer.add_rope_scaling_finetuned(False)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.mamba_inner_size)
    writer.add_ssm_state_size(config.ssm_state_size)
    writer.add_ssm_time_step_rank(config.mamba_num_heads)  # llama.cpp's name for the number of heads
    writer.add_ssm_group_count(config.n_groups)
    if _has_experts(config):
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.moe_shared_expert_intermediate_size)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(config.routed_scaling_factor)
        if config.n_routed_experts > 1:  # llama.cpp aborts on as many groups as experts
            writer.add_expert_group_count(1)
            writer.add_expert_group_used_count(1)
        if config.moe_latent_size:
            writer.add_moe_latent_size(config.moe_latent_size)
    if mtp:
        writer.add_nextn_predict_layers(mtp)
    writer.add_string(OWN_CONFIG, json.dumps(config.to_dict()))


# ---------------------------------------------------------------------- reading
class Keys:
    """The keys of an open file. ``read`` takes whole names, the rest what stands behind the architecture's name."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.arch = self.read("general.architecture", str)
        if self.arch not in (DENSE, MOE):
            raise GGUFError(f"general.architecture={self.arch!r}: only {DENSE} and {MOE} are read")

    def read(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a key, which must be of ``kind``."""
        field = self._fields.get(name)
        if field is None:
            if default is _REQUIRED:
                raise GGUFError(f"key {name} is missing")
            return default
        try:
            value = field.contents()
        except UnicodeDecodeError:
            raise GGUFError(f"key {name} is no UTF-8") from None
        if not isinstance(value, kind) or kind is int and isinstance(value, bool):
            raise GGUFError(f"key {name} holds {str(value)[:40]!r}, which is no {kind.__name__}")
        return value

    def __contains__(self, name: str) -> bool:
        return f"{self.arch}.{name}" in self._fields

    def model(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        return self.read(f"{self.arch}.{name}", kind, default)

    def decimal(self, name: str, default: Any = _REQUIRED) -> float:
        """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.model(name, float, default))))

    def blocks(self, name: str, count: int) -> list[int]:
        """A whole number a block; a single one in the file counts for all."""
        field = self._fields.get(f"{self.arch}.{name}")
        if field is None or field.types[0] != GGUFValueType.ARRAY:
            return [self.model(name, int)] * count
        values = self.model(name, list)
        if len(values) < count or not all(isinstance(value, int) for value in values):
            raise GGUFError(f"key {self.arch}.{name} needs a whole number for each of the {count} blocks")
        return values[:count]

    def single(self, name: str, values: Sequence[int]) -> int:
        """The one value of all blocks that have one (0: none)."""
        found = sorted(set(values) - {0})
        if len(found) != 1:
            raise GGUFError(f"key {self.arch}.{name} holds {found or 'zeros'}: "
                            "HybridConfig has one size for all blocks of a kind")
        return found[0]


def read_config(keys: Keys, vocab_size: int, fingerprint: str | None) -> HybridConfig:
    """The config of a file of ours, or of one that llama.cpp's converter wrote."""
    count, mtp = keys.model("block_count", int), keys.model("nextn_predict_layers", int, 0)
    if not 0 <= mtp < count <= MAX_BLOCKS:
        raise GGUFError(f"key {keys.arch}.block_count={count} does not fit {keys.arch}.nextn_predict_layers={mtp}")
    experts = keys.model("expert_count", int, 0)
    kv_heads, widths = keys.blocks("attention.head_count_kv", count), keys.blocks("feed_forward_length", count)
    # as llama.cpp tells them apart: what has a width is a feed-forward block, what has key heads attention
    forward = "E" if experts else "-"
    letters = "".join(forward if width else "*" if kv else "M" for kv, width in zip(kv_heads, widths))
    epsilon = "attention.layer_norm_rms_epsilon"
    found: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": keys.model("embedding_length", int),
        "hybrid_override_pattern": letters[: count - mtp],
        "num_nextn_predict_layers": mtp,
        "max_position_embeddings": keys.model("context_length", int),
        "layer_norm_epsilon": keys.decimal(epsilon if epsilon in keys else "attention.layer_norm_epsilon"),
    }
    if any(kv_heads):
        found |= _attention(keys, kv_heads, found["hidden_size"])
    if "M" in letters:
        found |= _mamba(keys)
    if "-" in letters:
        found["intermediate_size"] = keys.single("feed_forward_length", widths)
    if "E" in letters:
        found |= _experts(keys, experts, widths)
    found = _stored_config(keys, found) | found
    return HybridConfig.from_dict(found if fingerprint is None else found | {"tokenizer_fingerprint": fingerprint})


def _attention(keys: Keys, kv_heads: list[int], hidden_size: int) -> dict[str, Any]:
    heads = keys.single("attention.head_count", keys.blocks("attention.head_count", len(kv_heads)))
    head_dim = keys.model("attention.key_length", int, hidden_size // heads)
    if keys.model("attention.value_length", int, head_dim) != head_dim:
        raise GGUFError(f"key {keys.arch}.attention.value_length differs from key_length; HybridConfig has one head_dim")
    kv_heads = keys.single("attention.head_count_kv", kv_heads)
    return {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}


def _mamba(keys: Keys) -> dict[str, Any]:
    inner, heads = keys.model("ssm.inner_size", int), keys.model("ssm.time_step_rank", int)
    if heads < 1 or inner % heads:
        raise GGUFError(f"key {keys.arch}.ssm.inner_size={inner} is no multiple of ssm.time_step_rank={heads}")
    return {
        "mamba_num_heads": heads,
        "mamba_head_dim": inner // heads,
        "n_groups": keys.model("ssm.group_count", int),
        "ssm_state_size": keys.model("ssm.state_size", int),
        "conv_kernel": keys.model("ssm.conv_kernel", int),
    }


def _experts(keys: Keys, experts: int, widths: list[int]) -> dict[str, Any]:
    used = keys.single("expert_used_count", keys.blocks("expert_used_count", len(widths)))
    width = "expert_feed_forward_length"
    # older files may lack it; llama.cpp falls back alike
    own = keys.blocks(width, len(widths)) if width in keys else [number // used for number in widths]
    return {
        "n_routed_experts": experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": keys.single(width, own),
        "moe_shared_expert_intermediate_size": keys.model("expert_shared_feed_forward_length", int),
        "moe_latent_size": keys.model("moe_latent_size", int, None),
        "norm_topk_prob": keys.model("expert_weights_norm", bool, False),
        "routed_scaling_factor": keys.decimal("expert_weights_scale", 1.0),
        "n_group": keys.model("expert_group_count", int, 1),
    }


def _stored_config(keys: Keys, found: dict[str, Any]) -> dict[str, Any]:
    """What the file holds of our own config. Takes numbers out of ``found`` that are only roundings of what is here."""
    text = keys.read(OWN_CONFIG, str, None)
    if text is None:
        ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
        return {field: keys.read(f"tokenizer.ggml.{name}_token_id", int, None) for field, name in ids.items()}
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict):
        raise GGUFError(f"key {OWN_CONFIG} is not a JSON object; export the model again")
    for name in ("layer_norm_epsilon", "routed_scaling_factor"):
        exact = stored.get(name)
        if isinstance(exact, float) and name in found and np.float32(exact) == np.float32(found[name]):
            del found[name]
    return stored
