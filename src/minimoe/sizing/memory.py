"""What a sequence leaves behind, in bytes: the KV cache that grows, the Mamba-2 state that does not.

Imports no torch.
"""
from __future__ import annotations

from dataclasses import dataclass

from ..catalog.spec import ArchitectureSpec, Attention, Mamba2, as_spec
from ..config import HybridConfig

# Bits a number. q8_0 and q4_0 are llama.cpp's blocks of 32 with a 16-bit scale: (32 * 8 + 16) / 32 = 8.5.
BITS: dict[str, float] = {
    "float64": 64, "float32": 32, "float16": 16, "bfloat16": 16, "float8_e4m3fn": 8, "float8_e5m2": 8,
    "f32": 32, "f16": 16, "bf16": 16, "fp8": 8, "q8_0": 8.5, "q5_1": 6, "q5_0": 5.5, "q4_1": 5, "q4_0": 4.5,
}  # fmt: skip


@dataclass(frozen=True)
class StateBytes:
    """Bytes of state of a batch of sequences; ``kv_per_token``: what one more token of one sequence adds."""

    kv: int
    ssm: int
    conv: int
    kv_per_token: int

    @property
    def total(self) -> int:
        return self.kv + self.ssm + self.conv


def state_bytes(
    model: ArchitectureSpec | HybridConfig,
    tokens: int,
    batch: int = 1,
    kv_dtype: object = "float16",
    ssm_dtype: object = "float32",
    conv_dtype: object = "float32",
    mtp: bool = False,
) -> StateBytes:
    r"""Bytes that ``batch`` sequences of ``tokens`` tokens each leave behind.

    .. math::

        \text{kv} &= \text{batch} \sum_{\text{attention}}
            2\, H_{kv} P \min(\text{tokens}, \text{window}) \, b_{kv} \\
        \text{ssm} &= \text{batch} \sum_{\text{Mamba-2}} H P N \, b_{ssm} \\
        \text{conv} &= \text{batch} \sum_{\text{Mamba-2}} (k - 1)(H P + 2 G N) \, b_{conv}

    with b in bytes a number. A layer with a sliding window keeps no token beyond it. ``kv_per_token`` is what
    the next token adds at this length, so layers whose window is full add nothing. ssm and conv do not depend
    on ``tokens`` (an empty sequence has them too, filled with zeros).

    A dtype is a name of :data:`BITS` or a torch dtype. The defaults are llama.cpp's: 16-bit keys and values,
    32-bit recurrent state (``llama_context_default_params``, ``llama_memory_recurrent``); transformers and
    :mod:`minimoe.state` keep the convolution's window in the model's own dtype. The state that MTP modules
    keep while they draft is counted with ``mtp=True``.

    Only what the arithmetic needs is counted: no padding, no buffer for tokens to come, no compute buffers.

    Raises
    ------
    ValueError
        tokens below 0, batch below 1, or an unknown dtype.
    TypeError
        for anything but an ArchitectureSpec or a HybridConfig.
    """
    spec = as_spec(model)
    if tokens < 0:
        raise ValueError(f"tokens={tokens}: must be 0 or more")
    if batch < 1:
        raise ValueError(f"batch={batch}: must be 1 or more")
    blocks = spec.blocks + tuple(block for module in spec.mtp for block in module.blocks if mtp)
    kv = per_token = ssm = conv = 0
    for block in blocks:
        if isinstance(block, Attention):
            numbers = 2 * block.kv_heads * block.head_dim
            window = block.sliding_window
            kv += numbers * (tokens if window is None else min(tokens, window))
            per_token += numbers if window is None or tokens < window else 0
        elif isinstance(block, Mamba2):
            ssm += block.heads * block.head_dim * block.state_size
            conv += (block.conv_kernel - 1) * block.conv_dim
    return StateBytes(
        kv=_bytes(batch * kv, kv_dtype), ssm=_bytes(batch * ssm, ssm_dtype),
        conv=_bytes(batch * conv, conv_dtype), kv_per_token=_bytes(per_token, kv_dtype),
    )  # fmt: skip


def _bytes(numbers: int, dtype: object) -> int:
    name = str(dtype).removeprefix("torch.")
    if name not in BITS:
        raise ValueError(f"dtype {name!r} is unknown; use one of {', '.join(BITS)}")
    return int(numbers * BITS[name] // 8)
