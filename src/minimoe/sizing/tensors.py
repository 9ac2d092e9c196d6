"""Every tensor of a model's GGUF file, from its shape alone: what llama.cpp's converter would write. Imports no torch.

llama.cpp's block is not a paper's layer. A Nemotron-H model has one mixer in each block (``blk.7`` is Mamba-2, attention
*or* experts), a classic transformer has attention and feed-forward together. Names and shapes as llama.cpp's loader asks
for them (``src/models/nemotron-h.cpp``, ``step35.cpp``, ``qwen3moe.cpp``) and its converter makes them
(``conversion/nemotron.py``, ``step3.py``, ``qwen.py``).
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from ..catalog.spec import MLP, ArchitectureSpec, Attention, Block, Mamba2, MoE, as_spec
from ..config import HybridConfig

Part = tuple[str, tuple[int, ...], str]  # name behind "blk.N.", dims, kind
_NEVER = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d")  # matrices that the quantiser leaves alone


@dataclass(frozen=True)
class TensorShape:
    """A tensor of a GGUF file.

    dims        in ggml's order: the row's length first, then how many rows, then how many matrices
    kind        as in ``count_parameters(...).by_kind``; "mtp" for all of a multi-token-prediction block
    block       N of ``blk.N``, None outside the blocks
    always_f32  whether it stays in float32 whatever the file's type is
    untouched   whether the quantiser leaves it in the type that the converter gave it. Beside those that are always
                float32 it is one: the router of a Nemotron-H MTP block, in 16 bits, because the converter looks for
                routers by a block number that it has not yet translated
    """

    name: str
    dims: tuple[int, ...]
    kind: str
    block: int | None
    always_f32: bool
    untouched: bool

    @property
    def columns(self) -> int:
        return self.dims[0]

    @property
    def numbers(self) -> int:
        return math.prod(self.dims)


def architecture(model: ArchitectureSpec | HybridConfig) -> str:
    """llama.cpp's name for a model of this kind.

    nemotron_h, nemotron_h_moe, step35, qwen3moe, qwen3, llama (Mixtral too), or "transformer", which is none of its names:
    attention and feed-forward pairs of another kind. Their tensors are named as in most such models.
    """
    spec = as_spec(model)
    every = spec.blocks + tuple(block for module in spec.mtp for block in module.blocks)
    experts = [block for block in every if isinstance(block, MoE)]
    if not _paired(spec):
        return "nemotron_h_moe" if experts else "nemotron_h"
    first = next(block for block in every if isinstance(block, Attention))
    if experts and first.head_gate:
        return "step35"
    if experts and (len(experts) < spec.count("attention") or any(block.shared_width for block in experts)):
        return "transformer"
    return ("qwen3moe" if experts else "qwen3") if first.qk_norm else "llama"


def gguf_tensors(model: ArchitectureSpec | HybridConfig, mtp: bool | Literal["only"] = False) -> tuple[TensorShape, ...]:
    """The tensors, in the order in which llama.cpp's quantiser goes through them: by block, then by name.

    ``mtp=True`` adds the multi-token-prediction blocks behind the last block, ``mtp="only"`` gives the file that holds
    nothing else but the embedding and the head they share (``mtp-*.gguf``, a sidecar). A model with a different expert
    width in every block gets none: the converter drops them.

    The numbers of all trunk tensors add up to ``count_parameters(model).total``, those of kind "mtp" to its ``.mtp``,
    with two exceptions, both of Step: ``rope_freqs.weight`` is computed, not trained, and each of its MTP modules brings
    an output matrix of its own, which the count leaves out.

    Raises
    ------
    TypeError
        for anything but an ArchitectureSpec or a HybridConfig.
    ValueError
        mtp is something else.
    """
    if mtp not in (True, False, "only"):
        raise ValueError(f"mtp={mtp!r}: must be True, False or 'only'")
    return _tensors(as_spec(model), mtp)


@cache
def _tensors(spec: ArchitectureSpec, mtp: bool | Literal["only"]) -> tuple[TensorShape, ...]:
    d, step = spec.hidden_size, architecture(spec) == "step35"
    layers = _layers(spec)
    ends: list[Part] = [("token_embd.weight", (d, spec.vocab_size), "embedding"), ("output_norm.weight", (d,), "norms")]
    if not spec.tied_embeddings:
        ends.append(("output.weight", (d, spec.vocab_size), "head"))
    if step:
        ends.append(("rope_freqs.weight", (_head_dim(spec) // 2,), "attention"))
    found = [_shape(name, dims, kind, None) for name, dims, kind in ends]
    for n, blocks in enumerate(layers if mtp != "only" else ()):
        found += [_shape(f"blk.{n}.{name}", dims, kind, n) for name, dims, kind in _block(blocks, d, _paired(spec))]
    for n, module in enumerate(spec.mtp if mtp and not _puzzle(spec) else (), start=len(layers)):
        parts = [*_block(module.blocks, d, _paired(spec), "post_attention_norm"), *_joint(d)]
        if step:
            parts.append(("nextn.shared_head_head.weight", (d, spec.vocab_size), "mtp"))
        found += [_shape(f"blk.{n}.{name}", dims, "mtp", n, folded=not step) for name, dims, _ in parts]
    return tuple(sorted(found, key=lambda tensor: (-1 if tensor.block is None else tensor.block, tensor.name)))


def block_count(model: ArchitectureSpec | HybridConfig, mtp: bool | Literal["only"] = False) -> int:
    """What a file's ``block_count`` says: blocks of the trunk, and of MTP where the file has them."""
    spec = as_spec(model)
    return len(_layers(spec)) + (len(spec.mtp) if mtp and not _puzzle(spec) else 0)


def _paired(spec: ArchitectureSpec) -> bool:
    """Attention and feed-forward in turn, so that two of ours are one block there."""
    return len(spec.blocks) % 2 == 0 and all(
        isinstance(one, Attention) and isinstance(other, (MLP, MoE)) for one, other in zip(spec.blocks[::2], spec.blocks[1::2])
    ) and any(getattr(block, "gated", False) for block in spec.blocks)


def _layers(spec: ArchitectureSpec) -> list[tuple[Block, ...]]:
    size = 2 if _paired(spec) else 1
    return [spec.blocks[at : at + size] for at in range(0, len(spec.blocks), size)]


def _puzzle(spec: ArchitectureSpec) -> bool:
    return not _paired(spec) and len({block.width for block in spec.blocks if isinstance(block, MoE)}) > 1


def _head_dim(spec: ArchitectureSpec) -> int:
    return next(block.head_dim for block in spec.blocks if isinstance(block, Attention))


def _shape(name: str, dims: tuple[int, ...], kind: str, block: int | None, folded: bool = False) -> TensorShape:
    matrix = len(dims) > 1 and math.prod(dims[1:]) > 1  # as ggml counts dimensions: [1024, 1] is a vector
    quantised = matrix and name.endswith("weight") and not any(part in name for part in _NEVER)
    missed = folded and matrix and name.endswith("ffn_gate_inp.weight")
    return TensorShape(name, dims, kind, block, not quantised and not missed, not quantised)


def _block(blocks: tuple[Block, ...], d: int, paired: bool, second_norm: str = "") -> Iterator[Part]:
    """The tensors of one block there: of one mixer, or of attention and a feed-forward."""
    for n, block in enumerate(blocks):
        norm = "attn_norm" if n == 0 else "ffn_norm" if paired else second_norm
        yield f"{norm}.weight", (d,), "norms"
        match block:
            case Attention():
                yield from _attention(block, d)
            case Mamba2():
                yield from _mamba2(block, d)
            case MLP():
                yield from _feed_forward(d, block.width, block.gated, "mlp", "")
            case MoE():
                yield from _experts(block, d)


def _attention(block: Attention, d: int) -> Iterator[Part]:
    queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
    for letter, width in (("q", queries), ("k", keys), ("v", keys)):
        yield f"attn_{letter}.weight", (d, width), "attention"
    yield "attn_output.weight", (queries, d), "attention"
    if block.qk_norm:
        yield "attn_q_norm.weight", (block.head_dim,), "attention"
        yield "attn_k_norm.weight", (block.head_dim,), "attention"
    if block.head_gate:
        yield "attn_gate.weight", (d, block.heads), "attention"


def _mamba2(block: Mamba2, d: int) -> Iterator[Part]:
    inner, conv = block.inner_size, block.conv_dim
    shapes: dict[str, tuple[int, ...]] = {
        "ssm_in.weight": (d, inner + conv + block.heads), "ssm_conv1d.weight": (block.conv_kernel, conv),
        "ssm_conv1d.bias": (conv,), "ssm_dt.bias": (block.heads,), "ssm_a": (1, block.heads), "ssm_d": (1, block.heads),
        "ssm_norm.weight": (inner // block.groups, block.groups), "ssm_out.weight": (inner, d),
    }  # fmt: skip
    for name, dims in shapes.items():
        yield name, dims, "mamba2"


def _feed_forward(d: int, width: int, gated: bool, kind: str, suffix: str, experts: tuple[int, ...] = ()) -> Iterator[Part]:
    for name in ("ffn_up", "ffn_gate") if gated else ("ffn_up",):
        yield f"{name}{suffix}.weight", (d, width, *experts), kind
    yield f"ffn_down{suffix}.weight", (width, d, *experts), kind


def _experts(block: MoE, d: int) -> Iterator[Part]:
    yield "ffn_gate_inp.weight", (d, block.experts), "router"
    if block.router_bias:
        yield "exp_probs_b.bias", (block.experts,), "router"
    yield from _feed_forward(block.latent or d, block.width, block.gated, "routed_experts", "_exps", (block.experts,))
    if block.latent:
        yield "ffn_latent_down.weight", (d, block.latent), "latent"
        yield "ffn_latent_up.weight", (block.latent, d), "latent"
    if block.shared_width:
        yield from _feed_forward(d, block.shared_width, block.gated, "shared_experts", "_shexp")


def _joint(d: int) -> Iterator[Part]:
    """What joins a multi-token-prediction block to the trunk: two norms, a projection, the norm before the head."""
    for name in ("enorm", "hnorm", "shared_head_norm"):
        yield f"nextn.{name}.weight", (d,), "mtp"
    yield "nextn.eh_proj.weight", (2 * d, d), "mtp"
