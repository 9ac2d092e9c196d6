"""The bytes that a model in one quant takes of a device and of RAM, as functions of context and split. Imports no torch."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..catalog.spec import ArchitectureSpec, Attention, as_spec
from ..config import HybridConfig
from .memory import state_bytes
from .roofline import UBATCH
from .weights import WeightBytes

PAD = 256  # llama.cpp rounds contexts and windows up to this


@dataclass(frozen=True)
class Placement:
    """What is where, for any context and any set of blocks whose routed experts are in RAM.

    The device has the weights but for the embedding, which llama.cpp looks up on the host, the states of ``batch``
    sequences, the compute buffer (:func:`compute_bytes`) and ``reserve``. With ``unified`` memory it has everything.
    """

    spec: ArchitectureSpec
    weights: WeightBytes
    batch: int
    kv_dtype: str
    unified: bool
    reserve: int

    @cached_property
    def experts(self) -> Counter[int]:
        """Bytes of routed experts by block."""
        sizes: Counter[int] = Counter()
        for tensor in self.weights.tensors:
            if tensor.kind == "routed_experts" and tensor.block is not None:
                sizes[tensor.block] += tensor.bytes
        return sizes

    def ram(self, blocks: Sequence[int] = ()) -> dict[str, int]:
        """Bytes in the host's memory, by name."""
        if self.unified:
            return {}
        experts = {"experts": sum(self.experts[block] for block in blocks)} if blocks else {}
        return {"embedding": self.weights.by_kind["embedding"]} | experts

    def device(self, context: int, blocks: Sequence[int] = ()) -> dict[str, int]:
        """Bytes on the device, by name; "compute" and "reserve" are estimates."""
        away = sum(self.ram(blocks).values())
        if self.spec.tied_embeddings and not self.unified:
            away -= self.weights.by_kind["embedding"]  # the head's copy of it stays
        state = state_bytes(self._allocated, pad(context), self.batch, self.kv_dtype)
        return {
            "weights": self.weights.total - away, "kv": state.kv, "ssm": state.ssm, "conv": state.conv,
            "compute": compute_bytes(self.spec, context), "reserve": self.reserve,
        }  # fmt: skip

    def needs(self, context: int, blocks: Sequence[int] = ()) -> int:
        return sum(self.device(context, blocks).values())

    def longest(self, memory: int, blocks: Sequence[int] = ()) -> int:
        """The longest context that fits, a multiple of 256; 0 if none does.

        By bisection, since windows make it no straight line.
        """
        low, high = 0, 1 << 16  # in units of PAD: 16M tokens
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.needs(middle * PAD, blocks) <= memory else (low, middle)
        return low * PAD

    @cached_property
    def _allocated(self) -> ArchitectureSpec:
        """Sliding windows as llama.cpp allocates them: a micro-batch longer, and rounded up."""
        def block(one: object) -> object:
            if not isinstance(one, Attention) or one.sliding_window is None:
                return one
            return replace(one, sliding_window=pad(one.sliding_window + UBATCH))

        return replace(self.spec, blocks=tuple(block(one) for one in self.spec.blocks))


def compute_bytes(model: ArchitectureSpec | HybridConfig, context: int, ubatch: int = UBATCH) -> int:
    """Estimate of llama.cpp's compute buffer: the intermediate results of a pass.

    What a micro-batch needs for its logits in float32, a mask over the context in 16 bits, and five activations of the model's
    width. llama.cpp reuses memory cleverly, so its own figure (a CPU build's, flash attention on) is a little lower: 0.66 to
    0.98 of this, for models of the catalogue between 1k and 1M tokens.
    """
    spec = as_spec(model)
    mask = 2 * pad(context) if spec.count("attention") else 0
    return ubatch * (4 * spec.vocab_size + mask + 20 * spec.hidden_size)


def pad(tokens: int) -> int:
    return -(-tokens // PAD) * PAD
