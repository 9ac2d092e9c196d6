"""What a model must compute and read, counted from its shape: the bounds that measured times are held against.

Only what the mathematics needs: matrices, the causal half of attention's scores, the recurrence. Norms, activations,
the convolution, the router's sorting, and what a faster form computes twice are left out, so a share of the peak that
is taken from these counts never flatters.
"""
from __future__ import annotations

from minimoe import HybridConfig
from minimoe.sizing import count_parameters, state_bytes


def forward_flops(config: HybridConfig, batch: int, length: int, heads: int | None = None) -> float:
    """Floating-point operations of reading ``batch`` sequences of ``length`` tokens; a multiplication and the
    addition after it are two.

        tokens * 2 * active weights  +  heads * 2 * V * D
        + attention layers * 2 * 2 * H * P * (1 + 2 + ... + L)     scores, and their product with the values
        + Mamba-2 layers * L * 2 * 2 * H * P * N                   writing the state, and reading it

    heads   tokens a sequence that get logits (default: all; a prompt needs one)
    """
    heads = length if heads is None else heads
    weights = count_parameters(config).active * length + heads * config.vocab_size * config.hidden_size
    pattern = config.hybrid_override_pattern
    width = config.num_attention_heads * config.head_dim
    attention = pattern.count("*") * 2 * width * length * (length + 1) / 2
    recurrence = pattern.count("M") * 2 * config.mamba_inner_size * config.ssm_state_size * length
    return 2.0 * batch * (weights + attention + recurrence)


def training_flops(config: HybridConfig, batch: int, length: int) -> float:
    """A step: the forward pass, and twice as much for the gradients by weights and by inputs."""
    return 3 * forward_flops(config, batch, length)


def decoding_bytes(config: HybridConfig, context: int, dtype: str) -> float:
    """Bytes that one more token of one sequence moves: each weight that is at work once, the keys and values once, the
    recurrent state twice (read and written)."""
    size = {"float32": 4, "bfloat16": 2}[dtype]
    state = state_bytes(config, context, kv_dtype=dtype, conv_dtype=dtype)
    weights = count_parameters(config).active_with_head + config.hidden_size
    return float(weights * size + state.kv + 2 * (state.ssm + state.conv))
