"""How many bytes a step must move between memory and processor. Imports no torch.

A weight is read once a step, however many tokens the step has: that is why tokens in a batch are cheap, and why a single
token is dear. What belongs to a sequence (keys and values, recurrent states) is moved once for each sequence.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from ..catalog.spec import ArchitectureSpec, MoE, as_spec
from ..config import HybridConfig
from ..errors import MinimoeError
from .memory import state_bytes
from .weights import WeightBytes, weight_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of one step by kind: ``vram`` where the model is, ``ram`` what was left in the host's memory.

    ``experts``: distinct experts that a MoE block is expected to read, a number a block (by the block's number in the
    GGUF file). On a machine with a single memory everything is in ``vram``, whatever that memory is.
    """

    vram: dict[str, float]
    ram: dict[str, float]
    experts: dict[int, float]

    @property
    def by_kind(self) -> dict[str, float]:
        return dict(Counter(self.vram) + Counter(self.ram))

    @property
    def total(self) -> float:
        return sum(self.vram.values()) + sum(self.ram.values())


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    r"""Distinct experts that ``tokens`` tokens choose together, on average.

    .. math:: E \left(1 - (1 - K/E)^b\right)

    A token leaves a given expert out with probability 1 - K/E, b tokens all do with its b-th power. This takes every
    expert for equally likely and tokens for independent. Real tokens agree more than that, so for text that belongs
    together this is an upper estimate.

    Raises
    ------
    MinimoeError
        unless 1 <= top_k <= experts and tokens >= 0.
    """
    if not 1 <= top_k <= experts:
        raise MinimoeError(f"top_k={top_k}: must be from 1 to experts={experts}")
    if tokens < 0:
        raise MinimoeError(f"tokens={tokens}: must be 0 or more")
    return experts * (1 - (1 - top_k / experts) ** tokens)


def step_traffic(
    model: ArchitectureSpec | HybridConfig,
    quant: str | WeightBytes = "BF16",
    context: int = 0,
    batch: int = 1,
    tokens: int = 1,
    kv_dtype: object = "f16",
    ram_blocks: Collection[int] | None = None,
) -> Traffic:
    """Bytes that one step moves at least, which reads ``tokens`` new tokens of each of ``batch`` sequences.

    - all weights but the two below: once, the head among them
    - routed experts: the share of :func:`expected_experts` at batch x tokens tokens
    - embedding: a row a token
    - ``kv``: the ``context`` tokens that are there are read, the new ones written; a layer with a sliding window reads
      its window only
    - ``ssm``, ``conv``: read and written, hence twice :func:`~minimoe.sizing.memory.state_bytes`

    tokens=1 is a step of decoding; a prompt is read with several hundred. MTP blocks are not counted. Activations are
    not either: they are small at these sizes, and most never leave a cache.

    Parameters
    ----------
    quant
        a name of :func:`~minimoe.sizing.weights.weight_bytes`, or what it returned.
    ram_blocks
        blocks whose routed experts are in the host's memory, as ``--cpu-moe`` and ``--n-cpu-moe`` put them there; the
        embedding table is then there too, because llama.cpp never moves it. None: there is one memory.

    Raises
    ------
    MinimoeError
        a number below its least, or a block that has no routed experts.
    """
    spec = as_spec(model)
    for name, value, least in (("context", context, 0), ("batch", batch, 1), ("tokens", tokens, 1)):
        if value < least:
            raise MinimoeError(f"{name}={value}: must be {least} or more")
    weights = weight_bytes(spec, quant) if isinstance(quant, str) else quant
    routed = expert_blocks(spec, weights)
    if missing := sorted(set(ram_blocks or ()) - set(routed)):
        raise MinimoeError(f"ram_blocks: block {missing[0]} has no routed experts; those that have: {_list(routed)}")
    rows = batch * tokens
    experts = {block: expected_experts(moe.experts, moe.top_k, rows) for block, moe in routed.items()}

    vram, ram = Counter[str](), Counter[str]()
    for tensor in weights.tensors:
        if tensor.kind == "mtp":
            continue
        place, moved = vram, float(tensor.bytes)
        if tensor.kind == "routed_experts":
            moved *= experts[tensor.block] / routed[tensor.block].experts
            place = ram if tensor.block in (ram_blocks or ()) else vram
        elif tensor.kind == "embedding":
            if spec.tied_embeddings:
                vram["head"] += moved  # llama.cpp keeps a second copy of the table beside the last layer
            moved *= min(1, rows * tensor.columns / tensor.numbers)
            place = vram if ram_blocks is None else ram
        place[tensor.kind] += moved

    state, empty = state_bytes(spec, context, batch, kv_dtype), state_bytes(spec, 0, batch, kv_dtype)
    vram.update(kv=state.kv + rows * empty.kv_per_token, ssm=2 * state.ssm, conv=2 * state.conv)
    return Traffic(*({kind: moved for kind, moved in place.items() if moved} for place in (vram, ram)), experts)


def expert_blocks(spec: ArchitectureSpec, weights: WeightBytes) -> dict[int, MoE]:
    """The blocks of the GGUF file that own routed experts, by number: the ids that llama.cpp's flags count."""
    numbers = sorted({tensor.block for tensor in weights.tensors if tensor.kind == "routed_experts"})
    return dict(zip(numbers, (block for block in spec.blocks if isinstance(block, MoE)), strict=True))


def _list(numbers: Collection[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
