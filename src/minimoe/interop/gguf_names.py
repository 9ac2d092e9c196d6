"""Where each tensor of a HybridLM lies in a GGUF file, and in which type llama.cpp's quantiser would leave it there.

llama.cpp counts axes from the fastest and calls a width a row; shapes here are numpy's, slowest axis first. Matches
``load_arch_tensors`` of llama.cpp's ``nemotron-h.cpp`` and ``tensor_allows_quantization`` of its ``llama-quant.cpp``.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..config import HybridConfig

# Names behind "model.layers.N." here -> behind "blk.N." there; a block kind each.
_ATTENTION = {f"mixer.{a}_proj.weight": f"attn_{b}.weight" for a, b in zip("qkvo", ("q", "k", "v", "output"))}
_LATENT = {
    "mixer.fc1_latent_proj.weight": "ffn_latent_down.weight",
    "mixer.fc2_latent_proj.weight": "ffn_latent_up.weight",
}
_MOE = {
    "mixer.gate.weight": "ffn_gate_inp.weight",
    "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mixer.experts.up_proj": "ffn_up_exps.weight",
    "mixer.experts.down_proj": "ffn_down_exps.weight",
    "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_MAMBA = {
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.dt_bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",  # there: A itself, -exp(A_log)
    "mixer.D": "ssm_d",
    "mixer.norm.weight": "ssm_norm.weight",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_MLP = {"mixer.up_proj.weight": "ffn_up.weight", "mixer.down_proj.weight": "ffn_down.weight"}
# The two layers of the MTP block are one block there, behind the last of the trunk.
_MTP = {
    "0.enorm.weight": "nextn.enorm.weight",
    "0.hnorm.weight": "nextn.hnorm.weight",
    "0.eh_proj.weight": "nextn.eh_proj.weight",
    "0.norm.weight": "attn_norm.weight",
    "1.norm.weight": "post_attention_norm.weight",
    "1.final_layernorm.weight": "nextn.shared_head_norm.weight",
}
_ENDS = {
    "model.embeddings.weight": "token_embd.weight",
    "model.norm_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Place:
    """``ours`` in :meth:`HybridLM.state_dict`, ``theirs`` in the file. ``layer`` counts blocks there (None: none)."""

    ours: str
    theirs: str
    layer: int | None = None

    @property
    def is_A(self) -> bool:
        """Whether the file has -exp of the numbers here; all other tensors are the same in both."""
        return self.theirs.endswith(".ssm_a")


def places(config: HybridConfig) -> Iterator[Place]:
    """Every tensor of a model of this config."""
    moe = _MOE | (_LATENT if config.moe_latent_size else {})
    kinds = {"M": _MAMBA, "*": _ATTENTION, "E": moe, "-": _MLP}
    for ours, theirs in _ENDS.items():
        yield Place(ours, theirs)
    for n, letter in enumerate(config.hybrid_override_pattern):
        for ours, theirs in ({"norm.weight": "attn_norm.weight"} | kinds[letter]).items():
            yield Place(f"model.layers.{n}.{ours}", f"blk.{n}.{theirs}", n)
    if config.num_nextn_predict_layers:
        n = config.num_hidden_layers
        parts = _MTP | {f"0.{k}": v for k, v in _ATTENTION.items()} | {f"1.{k}": v for k, v in moe.items()}
        for ours, theirs in parts.items():
            yield Place(f"mtp.layers.{ours}", f"blk.{n}.{theirs}", n)


def file_shape(place: Place, shape: tuple[int, ...], config: HybridConfig) -> tuple[int, ...]:
    """The shape there of a tensor that has ``shape`` here; the numbers lie in memory in the same order."""
    kind = place.theirs.split(".", 2)[-1]
    if kind == "ssm_conv1d.weight":
        return shape[0], shape[2]
    if kind in ("ssm_a", "ssm_d"):
        return shape[0], 1
    if kind == "ssm_norm.weight":
        return config.n_groups, shape[0] // config.n_groups
    return shape


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """How llama.cpp counts axes: [1, F, R] and [F, R] are one shape, and [1, R] is a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's quantiser touches this tensor: matrices, but no norms, routers or convolutions."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d")
    matrix = len(without_leading_ones(shape)) > 1
    return matrix and name.endswith("weight") and not any(part in name for part in kept)


def stored_type(name: str, shape: tuple[int, ...], wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type in a file of which ``wanted`` (F32, F16, BF16 or Q8_0) is the type: F16 for rows that no block fits."""
    if not is_quantised(name, shape):
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def stored_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor's data, without the padding behind it."""
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * size
