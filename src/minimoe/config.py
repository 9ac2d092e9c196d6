"""The shape of a hybrid model: sizes, layer pattern and presets. Imports no torch.

Field names are those of the released ``config.json`` files (``model_type: nemotron_h``), so a real config and
a config of ours are read by the same code.
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import MinimoeError

BLOCK_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
_LETTERS = {kind: letter for letter, kind in BLOCK_KINDS.items()} | {"mamba": "M", "attention": "*"}

# Fixed by the architecture: a config that sets one of these otherwise describes another model.
_REQUIRED_VALUES = {
    "use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False,
    "use_conv_bias": True, "mamba_hidden_act": "silu", "mlp_hidden_act": "relu2",
    "tie_word_embeddings": False, "n_group": 1, "topk_group": 1, "sliding_window": None,
    "attention_dropout": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip
# transformers' save_pretrained writes these spellings for the same fields.
_ALIASES = {
    "mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size",
    "mamba_dt_min": "time_step_min", "mamba_dt_max": "time_step_max", "mamba_dt_limit": "time_step_limit",
    "mamba_dt_init_floor": "time_step_floor", "num_local_experts": "n_routed_experts",
}  # fmt: skip


class ConfigError(MinimoeError):
    """A configuration that cannot work; the message names the field, its value and the rule."""


def _plain(value: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}; Python's json writes Infinity."""
    if isinstance(value, dict) and set(value) == {"__float__"}:
        return float(value["__float__"])
    return [_plain(v) for v in value] if isinstance(value, list) else value


_KINDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text", "None": "left out",
    "tuple[float, float]": "two numbers", "tuple[int, ...]": "a list of whole numbers",
}  # fmt: skip


def _is_of_type(value: object, annotation: str) -> bool:
    """Whether a value fits a field's annotation; a whole number is a float too, a truth value is no number."""
    words = annotation.split(" | ")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (
        value is None and "None" in words
        or isinstance(value, bool) and "bool" in words
        or isinstance(value, str) and "str" in words
        or number and "float" in words
        or number and isinstance(value, int) and "int" in words
        or isinstance(value, tuple) and "tuple[float, float]" in words
        and len(value) == 2 and all(_is_of_type(v, "float") for v in value)
        or isinstance(value, tuple) and "tuple[int, ...]" in words and all(_is_of_type(v, "int") for v in value)
    )


def _fail(field: str, value: object, rule: str) -> None:
    raise ConfigError(f"{field}={value!r}: {rule}")


def pattern_from_kinds(kinds: list[str], field: str = "layers_block_type") -> str:
    """``["linear_attention", "moe"]`` -> ``"ME"`` (also reads the older words "mamba" and "attention")."""
    for kind in kinds:
        if not isinstance(kind, str) or kind not in _LETTERS:
            _fail(field, kind, f"each entry must be one of {', '.join(_LETTERS)}")
    return "".join(_LETTERS[kind] for kind in kinds)


@dataclass(frozen=True)
class HybridConfig:
    """Sizes of a Nemotron-H model: Mamba-2, attention, MoE and MLP blocks in any order.

    ``hybrid_override_pattern`` has a letter a block: ``M`` Mamba-2, ``*`` attention, ``E`` mixture of experts,
    ``-`` dense MLP. Fields of kinds that the pattern does not use are ignored.

    Raises
    ------
    ConfigError
        names the field, its value and the rule it breaks.
    """

    vocab_size: int
    hidden_size: int
    hybrid_override_pattern: str
    # attention (grouped-query, no positional encoding)
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    # Mamba-2
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    n_groups: int = 8
    ssm_state_size: int = 128
    conv_kernel: int = 4
    chunk_size: int = 128
    time_step_min: float = 0.001  # the range that dt_bias is drawn from
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)  # what dt is clamped to
    # dense MLP
    intermediate_size: int = 0
    # mixture of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    n_shared_experts: int = 1
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    # multi-token prediction
    num_nextn_predict_layers: int = 0
    mtp_hybrid_override_pattern: str = "*E"
    mtp_final_norm: str = "rmsnorm"  # "layernorm" computes what llama.cpp does
    # the rest
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 262_144
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    tokenizer_fingerprint: str | None = None  # of the vocabulary that the weights were trained with

    # ------------------------------------------------------------------ derived sizes
    @property
    def mamba_inner_size(self) -> int:
        """Width of the Mamba-2 mixer: heads x head dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def expert_input_size(self) -> int:
        """Width that the routed experts read and write: the latent size, or d without one."""
        return self.moe_latent_size or self.hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return len(self.hybrid_override_pattern)

    @property
    def layers_block_type(self) -> list[str]:
        """The pattern in transformers' words."""
        return [BLOCK_KINDS[letter] for letter in self.hybrid_override_pattern]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-text ids, as a tuple whatever the file wrote."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    # ------------------------------------------------------------------ checks
    def __post_init__(self) -> None:
        for field in ("eos_token_id", "time_step_limit"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_of_type(value, field.type):
                _fail(field.name, value, "must be " + " or ".join(_KINDS[word] for word in field.type.split(" | ")))
        pattern, mtp = self.hybrid_override_pattern, self.mtp_hybrid_override_pattern
        if not pattern:
            _fail("hybrid_override_pattern", pattern, "needs at least one layer, for example 'MEM*E'")
        self._check_letters("hybrid_override_pattern", pattern)
        if self.num_nextn_predict_layers not in (0, 1):
            _fail("num_nextn_predict_layers", self.num_nextn_predict_layers, "must be 0 or 1 (one block, applied again and again)")
        if self.num_nextn_predict_layers:
            self._check_letters("mtp_hybrid_override_pattern", mtp)
            if mtp != "*E":
                _fail("mtp_hybrid_override_pattern", mtp, "must be '*E', the block that every released model has")
            pattern += mtp
        if self.mtp_final_norm not in ("rmsnorm", "layernorm"):
            _fail("mtp_final_norm", self.mtp_final_norm, "must be 'rmsnorm' or 'layernorm'")
        self._positive("vocab_size", "hidden_size", "max_position_embeddings")
        if not 0 < self.layer_norm_epsilon < 1:
            _fail("layer_norm_epsilon", self.layer_norm_epsilon, "must be above 0 and below 1")
        if not self.initializer_range > 0:
            _fail("initializer_range", self.initializer_range, "must be above 0")
        if "*" in pattern:
            self._check_attention()
        if "M" in pattern:
            self._check_mamba()
        if "-" in pattern:
            self._positive("intermediate_size")
        if "E" in pattern:
            self._check_moe()

    def _check_letters(self, field: str, pattern: str) -> None:
        unknown = sorted(set(pattern) - set(BLOCK_KINDS))
        if unknown:
            _fail(field, pattern, f"unknown letter {unknown[0]!r}; use M (Mamba-2), * (attention), E (MoE), - (MLP)")

    def _positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            if value <= 0:
                _fail(field, value, "must be a whole number above 0")

    def _check_attention(self) -> None:
        self._positive("num_attention_heads", "num_key_value_heads", "head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            _fail("num_attention_heads", self.num_attention_heads,
                  f"must be divisible by num_key_value_heads={self.num_key_value_heads}")

    def _check_mamba(self) -> None:
        self._positive("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel", "chunk_size")
        if self.mamba_num_heads % self.n_groups:
            _fail("mamba_num_heads", self.mamba_num_heads, f"must be divisible by n_groups={self.n_groups}")
        if self.conv_kernel < 2:
            _fail("conv_kernel", self.conv_kernel, "must be at least 2")
        low, high = self.time_step_limit
        if not 0 <= low < high:
            _fail("time_step_limit", self.time_step_limit, "must be (low, high) with 0 <= low < high")
        if not self.time_step_floor >= 0:
            _fail("time_step_floor", self.time_step_floor, "must be 0 or above")
        if not 0 < self.time_step_min <= self.time_step_max < math.inf:
            _fail("time_step_min", self.time_step_min, f"must be above 0 and at most time_step_max={self.time_step_max}")

    def _check_moe(self) -> None:
        self._positive("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
                       "moe_shared_expert_intermediate_size")
        if self.num_experts_per_tok > self.n_routed_experts:
            _fail("num_experts_per_tok", self.num_experts_per_tok, f"must be at most n_routed_experts={self.n_routed_experts}")
        if self.n_shared_experts != 1:
            _fail("n_shared_experts", self.n_shared_experts,
                  "must be 1; released files store several shared experts as one of their summed width")
        if self.moe_latent_size is not None:
            self._positive("moe_latent_size")
            if self.moe_latent_size >= self.hidden_size:
                _fail("moe_latent_size", self.moe_latent_size,
                      f"must be below hidden_size={self.hidden_size}; leave it out (None) for experts at full width")
        if not (math.isfinite(self.routed_scaling_factor) and self.routed_scaling_factor > 0):
            _fail("routed_scaling_factor", self.routed_scaling_factor, "must be above 0")

    # ------------------------------------------------------------------ in and out
    @classmethod
    def preset(cls, name: str, **changes: Any) -> "HybridConfig":
        """A named size: ``tiny`` (tests), ``small`` (the chapters), ``awkward`` (rows that no k-quant divides),
        ``base-12gb`` (a night on a 12 GB card). Keyword arguments replace single fields."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
        return cls(**(PRESETS[name] | changes))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "HybridConfig":
        """Read a ``nemotron_h`` config.json: released files, transformers' save_pretrained, or :meth:`to_dict`.

        Raises ConfigError for another model_type, for a missing size, and for a setting that this
        architecture does not have (biases, other activations, tied embeddings, routing groups).
        """
        config = {key: _plain(value) for key, value in config.items()}
        if config.get("model_type", "nemotron_h") != "nemotron_h":
            _fail("model_type", config["model_type"], "must be 'nemotron_h'")
        for alias, field in _ALIASES.items():
            if alias in config:
                config.setdefault(field, config[alias])
        for field, value in _REQUIRED_VALUES.items():
            if field in config and config[field] != value:
                _fail(field, config[field], f"must be {value!r}: Nemotron-H has no other form")
        if config.get("hybrid_override_pattern") is None:
            kinds = config.get("layers_block_type", config.get("layer_types"))
            if not isinstance(kinds, list):
                raise ConfigError("the config has neither hybrid_override_pattern nor layers_block_type: not a Nemotron-H config")
            config["hybrid_override_pattern"] = pattern_from_kinds(kinds)
        if "mtp_hybrid_override_pattern" not in config and config.get("mtp_layers_block_type"):
            config["mtp_hybrid_override_pattern"] = pattern_from_kinds(config["mtp_layers_block_type"], "mtp_layers_block_type")
        if "minimoe_time_step_min" in config:  # written by save_hf, which stores 0.0 for transformers' sake
            config["time_step_min"] = config["minimoe_time_step_min"]
        fields = {field.name for field in dataclasses.fields(cls)}
        missing = sorted(name for name in ("vocab_size", "hidden_size") if config.get(name) is None)
        if missing:
            raise ConfigError(f"the config lacks {missing[0]}")
        read = cls(**{key: value for key, value in config.items() if key in fields and value is not None
                      or key in ("bos_token_id", "eos_token_id", "pad_token_id")})
        declared = config.get("num_hidden_layers")
        if declared is not None and declared != read.num_hidden_layers:
            _fail("num_hidden_layers", declared, f"the pattern has {read.num_hidden_layers} letters")
        return read

    def to_dict(self) -> dict[str, Any]:
        """Every field, as :meth:`from_dict` reads it."""
        return {"model_type": "nemotron_h"} | dataclasses.asdict(self)

    def replace(self, **changes: Any) -> "HybridConfig":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


# Every weight row of "small" is a multiple of 256, the block of llama.cpp's k-quants; those of "awkward" are not,
# as Nano-30B's 2,688 and 1,856 are not. Four of 16 half-width experts cost what two of eight full-width ones would.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=320, hidden_size=64, hybrid_override_pattern="MEM*E", max_position_embeddings=4096,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16, chunk_size=16,
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=64, moe_latent_size=32, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
    "small": dict(
        vocab_size=2048, hidden_size=512, hybrid_override_pattern="MEM*ME", max_position_embeddings=16_384,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        mamba_num_heads=8, mamba_head_dim=64, n_groups=2, ssm_state_size=64, chunk_size=64,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=256,
        moe_shared_expert_intermediate_size=256, moe_latent_size=256, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
    "awkward": dict(
        vocab_size=2048, hidden_size=672, hybrid_override_pattern="MEM*ME", max_position_embeddings=16_384,
        num_attention_heads=12, num_key_value_heads=2, head_dim=56,
        mamba_num_heads=12, mamba_head_dim=56, n_groups=2, ssm_state_size=64, chunk_size=64,
        n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=336,
        moe_shared_expert_intermediate_size=336, moe_latent_size=336, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
    "base-12gb": dict(
        vocab_size=16_384, hidden_size=768, hybrid_override_pattern="MEMEM*EMEM*EME", max_position_embeddings=65_536,
        num_attention_heads=12, num_key_value_heads=2, head_dim=64,
        mamba_num_heads=24, mamba_head_dim=64, n_groups=8, ssm_state_size=128, chunk_size=128,
        n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=512,
        moe_shared_expert_intermediate_size=1024, moe_latent_size=256, routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
    ),
}  # fmt: skip
