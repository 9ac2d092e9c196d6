"""What a language model is made of, block by block: enough to count its bytes, whatever its family.

A :class:`HybridConfig` describes what this package can run. An :class:`ArchitectureSpec` describes what can
be *sized*: also models with sliding windows, gated experts, or a different width in every layer. A block is
what stands between two residual additions (an RMSNorm and one mixer): a classic transformer layer is two.

Imports no torch.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..config import ConfigError, HybridConfig


def _whole(part: object, *, zero: tuple[str, ...] = ()) -> None:
    """Every number of a block is a whole number above 0 (``zero``: fields that may be 0)."""
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if value is None or isinstance(value, (bool, str, tuple)):
            continue
        if not isinstance(value, int) or value < (0 if field.name in zero else 1):
            raise ConfigError(f"{type(part).__name__}.{field.name}={value!r}: must be a whole number above 0")


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention, no biases. ``sliding_window``: tokens kept, None for all of them."""

    heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None = None
    qk_norm: bool = False  # an RMSNorm over head_dim for the queries and one for the keys
    head_gate: bool = False  # a linear map d -> heads that scales each head's output

    def __post_init__(self) -> None:
        _whole(self)
        if self.heads % self.kv_heads:
            raise ConfigError(f"Attention.heads={self.heads}: must be divisible by kv_heads={self.kv_heads}")


@dataclass(frozen=True)
class Mamba2:
    """Mamba-2 mixer; the convolution has a bias, the linear maps have none."""

    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_kernel: int = 4

    def __post_init__(self) -> None:
        _whole(self)
        if self.heads % self.groups:
            raise ConfigError(f"Mamba2.heads={self.heads}: must be divisible by groups={self.groups}")

    @property
    def inner_size(self) -> int:
        """Width of the mixer: heads x head dim."""
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side."""
        return self.inner_size + 2 * self.groups * self.state_size


@dataclass(frozen=True)
class MLP:
    """Dense feed-forward: ``up, down``, or ``gate, up, down`` when gated."""

    width: int
    gated: bool = False

    def __post_init__(self) -> None:
        _whole(self)


@dataclass(frozen=True)
class MoE:
    """Mixture of experts. ``latent``: width that the routed experts read and write (None: the model's).

    The shared expert is one dense MLP of ``shared_width`` (0: none), gated like the routed ones. Width, top-k
    and number of experts belong to the block, so every layer can have its own.
    """

    experts: int
    top_k: int
    width: int
    gated: bool = False
    latent: int | None = None
    shared_width: int = 0
    router_bias: bool = False  # the correction bias of aux-loss-free balancing, one number an expert

    def __post_init__(self) -> None:
        _whole(self, zero=("shared_width",))
        if self.top_k > self.experts:
            raise ConfigError(f"MoE.top_k={self.top_k}: must be at most experts={self.experts}")


@dataclass(frozen=True)
class MTP:
    """One physical multi-token-prediction module.

    It joins the next token's embedding and the trunk's hidden state (an RMSNorm each, then a linear map
    2d -> d), runs ``blocks``, and ends in an RMSNorm. Embedding and head are the trunk's.
    """

    blocks: tuple[Attention | Mamba2 | MLP | MoE, ...]


Block = Attention | Mamba2 | MLP | MoE
KINDS: dict[str, type] = {"attention": Attention, "mamba2": Mamba2, "mlp": MLP, "moe": MoE}


@dataclass(frozen=True)
class ArchitectureSpec:
    """A model as typed blocks between an embedding and a head. ``context``: longest sequence it declares."""

    name: str
    vocab_size: int
    hidden_size: int
    blocks: tuple[Block, ...]
    tied_embeddings: bool = False
    mtp: tuple[MTP, ...] = ()
    context: int | None = None

    def __post_init__(self) -> None:
        _whole(self)
        if not self.blocks:
            raise ConfigError(f"ArchitectureSpec.blocks=(): {self.name} needs at least one block")
        for block in self.blocks:
            if isinstance(block, MoE) and block.latent is not None and block.latent >= self.hidden_size:
                raise ConfigError(f"MoE.latent={block.latent}: must be below hidden_size={self.hidden_size}")

    def count(self, kind: str) -> int:
        """How many blocks of a kind ("attention", "mamba2", "mlp", "moe") the trunk has."""
        return Counter(type(block) for block in self.blocks)[KINDS[kind]]


def spec_from_config(config: HybridConfig, name: str = "nemotron_h") -> ArchitectureSpec:
    """The spec of a Nemotron-H config, its MTP block included."""
    of_letter: dict[str, Block] = {}
    letters = set(config.hybrid_override_pattern)
    if config.num_nextn_predict_layers:
        letters |= set(config.mtp_hybrid_override_pattern)
    if "M" in letters:
        of_letter["M"] = Mamba2(
            config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size,
            config.conv_kernel,
        )  # fmt: skip
    if "*" in letters:
        of_letter["*"] = Attention(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    if "-" in letters:
        of_letter["-"] = MLP(config.intermediate_size)
    if "E" in letters:
        of_letter["E"] = MoE(
            config.n_routed_experts, config.num_experts_per_tok, config.moe_intermediate_size,
            latent=config.moe_latent_size, shared_width=config.moe_shared_expert_intermediate_size,
            router_bias=True,
        )  # fmt: skip
    mtp = ()
    if config.num_nextn_predict_layers:
        mtp = (MTP(tuple(of_letter[letter] for letter in config.mtp_hybrid_override_pattern)),)
    return ArchitectureSpec(
        name, config.vocab_size, config.hidden_size,
        tuple(of_letter[letter] for letter in config.hybrid_override_pattern),
        mtp=mtp, context=config.max_position_embeddings,
    )  # fmt: skip


def spec_from_dict(name: str, data: Mapping[str, Any]) -> ArchitectureSpec:
    """Read a spec from the catalogue's own JSON.

    ``layers`` is a list of ``{"times": n, "blocks": [block, ...]}``, ``mtp`` a list of ``{"blocks": [...]}``; the
    other keys are the fields of :class:`ArchitectureSpec`. A block is ``{"kind": "attention", ...}`` with the
    fields of its class, the name of an entry of ``shapes``, or ``{"like": name, ...}``: that entry with changes.
    """
    shapes = data.get("shapes", {})
    blocks: list[Block] = []
    for group in data["layers"]:
        blocks += _blocks(group["blocks"], shapes) * group.get("times", 1)
    return ArchitectureSpec(
        name, data["vocab_size"], data["hidden_size"], tuple(blocks),
        tied_embeddings=data.get("tied_embeddings", False),
        mtp=tuple(MTP(tuple(_blocks(module["blocks"], shapes))) for module in data.get("mtp", ())),
        context=data.get("context"),
    )  # fmt: skip


def _blocks(items: Sequence[str | Mapping[str, Any]], shapes: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    for item in items:
        fields = dict(shapes[item]) if isinstance(item, str) else {**shapes.get(item.get("like"), {}), **item}
        fields.pop("like", None)
        blocks.append(KINDS[fields.pop("kind")](**fields))
    return blocks


def as_spec(model: ArchitectureSpec | HybridConfig) -> ArchitectureSpec:
    """A spec from a spec or a config."""
    if isinstance(model, ArchitectureSpec):
        return model
    if isinstance(model, HybridConfig):
        return spec_from_config(model)
    raise TypeError(f"expected an ArchitectureSpec or a HybridConfig, got {type(model).__name__}")
