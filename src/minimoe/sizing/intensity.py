"""Work of one block of a model, in operations and bytes: where it stands under the roof. Imports no torch."""
from __future__ import annotations

from dataclasses import dataclass

from ..catalog.spec import ArchitectureSpec, Block, MoE
from .memory import state_bytes
from .parameters import count_parameters
from .roofline import step_flops
from .traffic import expected_experts


@dataclass(frozen=True)
class Work:
    """FLOPs, and the bytes that have to move for them."""

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """FLOP with each byte."""
        return self.flops / self.bytes


def block_work(
    block: Block, width: int, tokens: int = 1, context: int = 0, batch: int = 1, bytes_per_number: float = 4
) -> Work:
    """One block of a model of ``width``, which reads ``tokens`` new tokens of ``batch`` sequences after ``context`` others.

    FLOPs are those of :func:`~minimoe.sizing.roofline.step_flops`. The bytes are the least: the weights once (of routed
    experts the expected distinct ones), the input read and the output written once, keys and values of the context read
    and the new ones written, recurrent states read and written. All numbers take ``bytes_per_number`` (4 is float32).
    What stands between the products of a block is taken to stay in a cache.
    """
    spec = ArchitectureSpec("block", 1, width, (block,))
    head = batch * 2 * width  # of a vocabulary of one
    count = count_parameters(spec)
    numbers = float(count.total - count.by_kind["embedding"] - count.by_kind["head"] - width)  # and the last norm
    if isinstance(block, MoE):
        idle = 1 - expected_experts(block.experts, block.top_k, batch * tokens) / block.experts
        numbers -= idle * count.by_kind["routed_experts"]
    one_byte = {"kv_dtype": "fp8", "ssm_dtype": "fp8", "conv_dtype": "fp8"}
    state, empty = state_bytes(spec, context, batch, **one_byte), state_bytes(spec, 0, **one_byte)
    numbers += state.kv + batch * tokens * empty.kv_per_token + 2 * (state.ssm + state.conv)
    numbers += 2 * batch * tokens * width
    return Work(step_flops(spec, context, batch, tokens) - head, numbers * bytes_per_number)
