"""What a model's weights weigh as a GGUF file: llama.cpp's quantiser, followed tensor by tensor. Imports no torch."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from ..catalog.spec import ArchitectureSpec, Attention, MoE, as_spec
from ..config import HybridConfig
from .quants import (
    LOW,
    Place,
    QuantError,
    check_quant,
    demands_importance,
    fit,
    role_of,
    type_bytes,
    wanted_type,
)
from .tensors import TensorShape, block_count, gguf_tensors

ALIGNMENT = 32  # a file's tensors begin at multiples of this
SOURCE = "BF16"  # type of the file that is quantised, as releases are


@dataclass(frozen=True)
class SizedTensor:
    """A tensor in a quantised file. ``wanted`` is the recipe's type, ``type`` the one its rows allow."""

    name: str
    kind: str
    block: int | None
    columns: int
    numbers: int
    wanted: str
    type: str
    bytes: int


@dataclass(frozen=True)
class WeightBytes:
    """A model's tensors in one quant; see :func:`weight_bytes`. Sizes are bytes of tensor data.

    importance        whether the recipe is the one for an importance matrix
    needs_importance  whether llama.cpp refuses to write this file without one
    """

    model: str
    quant: str
    tensors: tuple[SizedTensor, ...]
    importance: bool
    needs_importance: bool

    @cached_property
    def total(self) -> int:
        """Bytes of tensor data, as llama.cpp's "quant size"; no header, no padding."""
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def padded(self) -> int:
        """The same with what fills up to the next tensor's place in a file: a file without its header."""
        return sum(-(-tensor.bytes // ALIGNMENT) * ALIGNMENT for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total / sum(tensor.numbers for tensor in self.tensors)

    @cached_property
    def by_kind(self) -> dict[str, int]:
        """Bytes by the kinds of ``count_parameters(...).by_kind``, and "mtp"."""
        return self._sums("kind")

    @cached_property
    def by_type(self) -> dict[str, int]:
        """Bytes by ggml type, the largest first."""
        return self._sums("type")

    @cached_property
    def fallbacks(self) -> tuple[SizedTensor, ...]:
        """The tensors that did not get the type meant for them, because its blocks do not divide their rows."""
        return tuple(tensor for tensor in self.tensors if tensor.wanted != tensor.type)

    def summary(self) -> str:
        """One line: size (decimal GB and GiB), bits a weight, and how many tensors fell back to what."""
        text = (f"{self.model} {self.quant}: {self.total / 1e9:.2f} GB ({self.total / 2**30:.2f} GiB), "
                f"{self.bits_per_weight:.2f} bits a weight")  # fmt: skip
        changes = Counter(f"{tensor.wanted} to {tensor.type}" for tensor in self.fallbacks)
        if changes:
            listed = ", ".join(f"{count} from {change}" for change, count in changes.most_common())
            text += f"; {len(self.fallbacks)} of {len(self.tensors)} tensors fell back: {listed}"
        return text + ("; needs an importance matrix" if self.needs_importance else "")

    def _sums(self, field: str) -> dict[str, int]:
        sums: Counter[str] = Counter()
        for tensor in self.tensors:
            sums[getattr(tensor, field)] += tensor.bytes
        return dict(sums.most_common())


def weight_bytes(
    model: ArchitectureSpec | HybridConfig, quant: str = "BF16", mtp: bool | Literal["only"] = False,
    importance: bool | None = None,
) -> WeightBytes:
    """The tensors of ``model`` as llama.cpp's quantiser would write them with the mixture ``quant``.

    model       a spec or a config; no weights are needed, only shapes
    quant       a name of ``sizing.quants.QUANTS``, in any case
    mtp         True: with the multi-token-prediction blocks; "only": the sidecar file that holds them
    importance  whether an importance matrix is at hand: it changes a few types of Q4_0, Q5_0, IQ4_NL, IQ4_XS and
                IQ3_XXS. None: only where llama.cpp refuses to go without

    A file is larger than ``padded`` by its header: keys, tensor names and, most of it, the vocabulary (7.9 MB for the
    131,072 tokens of Nemotron 3).

    Raises
    ------
    QuantError
        (a ValueError) for an unknown quant, and for a model with rows that llama.cpp has no type for.
    TypeError
        for anything but an ArchitectureSpec or a HybridConfig.
    """
    spec, name = as_spec(model), check_quant(quant)
    found = _weigh(spec, name, mtp, bool(importance))
    return _weigh(spec, name, mtp, True) if importance is None and found.needs_importance else found


@cache
def _weigh(spec: ArchitectureSpec, quant: str, mtp: bool | Literal["only"], importance: bool) -> WeightBytes:
    tensors = gguf_tensors(spec, mtp)
    sized, needs = [], False
    for tensor, role, place in _places(spec, tensors, quant, block_count(spec, mtp), importance):
        if tensor.untouched:
            wanted = kind = "F32" if tensor.always_f32 else SOURCE
        else:
            wanted = wanted_type(quant, role, place, tensor.columns, stacked=len(tensor.dims) > 2 and tensor.dims[2] > 1)
            try:
                kind = fit(wanted, tensor.columns)
            except QuantError as error:
                raise QuantError(f"{spec.name} cannot be made {quant}: {tensor.name}: {error}") from None
            needs |= demands_importance(quant, role, kind)
        size = type_bytes(kind, tensor.columns, tensor.numbers // tensor.columns)
        sized.append(SizedTensor(tensor.name, tensor.kind, tensor.block, tensor.columns, tensor.numbers, wanted, kind, size))
    return WeightBytes(spec.name, quant, tuple(sized), importance, needs)


def _places(
    spec: ArchitectureSpec, tensors: tuple[TensorShape, ...], quant: str, blocks: int, importance: bool
) -> Iterator[tuple[TensorShape, str, Place]]:
    """Each tensor with its role and its ``Place``.

    attn_v tensors are counted among themselves. A feed-forward tensor's number is its block's in a model with experts,
    and otherwise how many of its role came before; "of how many" is all blocks either way, so in a dense hybrid, where
    only some blocks have a feed-forward, the last eighth is never reached. The lowest quants count tensors in any model.
    """
    every = spec.blocks + tuple(block for module in spec.mtp for block in module.blocks)
    experts = max((block.experts for block in every if isinstance(block, MoE)), default=0)
    first = spec.blocks[0]
    grouped = isinstance(first, Attention) and first.heads // first.kv_heads >= 4
    roles = [role_of(tensor.name) for tensor in tensors]
    if "head" not in roles:  # the embedding is the head too
        roles = ["head" if role == "embedding" else role for role in roles]
    seen: Counter[str] = Counter()
    for tensor, role in zip(tensors, roles):
        index, count = seen[role], roles.count("attn_v") if role == "attn_v" else blocks
        if role.startswith("ffn") and experts > 1 and quant not in LOW:
            index = tensor.block or 0
        if not tensor.untouched:
            seen[role] += 1
        yield tensor, role, Place(index, count, grouped, experts, importance)

