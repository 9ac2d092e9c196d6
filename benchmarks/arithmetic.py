"""What a model must compute and read, counted from its shape: the bounds that measured times are held against.

Only what the mathematics needs: matrices, the causal half of attention's scores, the convolution, the recurrence. Norms,
activations, the router's sorting, and what a faster form computes twice are left out, so a share of the peak that is
taken from these counts never flatters.
"""
from __future__ import annotations

from minimoe import HybridConfig
from minimoe.sizing import count_parameters, flops_per_token, state_bytes


def forward_flops(config: HybridConfig, batch: int, length: int, heads: int | None = None) -> float:
    """Floating-point operations of reading ``batch`` sequences of ``length`` tokens, without the MTP block.

    As :func:`minimoe.sizing.flops_per_token` counts, but with Mamba-2 as its recurrence needs it: H * P * N products to
    write the state and as many to read it. The chunked form multiplies more.

    heads   tokens a sequence that get logits (default: all; a prompt needs one)
    """
    kinds = flops_per_token(config, length, mtp=False).by_kind
    recurrence = config.hybrid_override_pattern.count("M") * 4 * config.mamba_inner_size * config.ssm_state_size
    token = sum(number for kind, number in kinds.items() if kind not in ("head", "ssd")) + recurrence
    return batch * (length * token + (length if heads is None else heads) * kinds["head"])


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
