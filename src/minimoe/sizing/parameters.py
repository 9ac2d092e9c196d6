"""How many numbers a model has, and how many of them one token touches. Imports no torch."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..catalog.spec import MLP, ArchitectureSpec, Attention, Block, Mamba2, MoE, as_spec
from ..config import HybridConfig


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters; see :func:`count_parameters`."""

    total: int
    active: int
    active_with_head: int
    active_with_embeddings: int
    mtp: int
    by_kind: dict[str, int]


def count_parameters(model: ArchitectureSpec | HybridConfig) -> ParameterCount:
    r"""Count a model's parameters, from its shape alone.

    ``total`` is everything but the multi-token-prediction modules, which are ``mtp`` (embedding and head are
    shared with the trunk and not counted again). The router's correction biases are counted, although
    training moves them without a gradient: checkpoints store them. ``by_kind`` adds up to ``total``.

    A token passes through all weights but those of the experts that its router did not choose:

    .. math::

        \text{active} = \text{total} - \text{embedding} - \text{head}
                        - \sum_{\text{MoE}} (E - K)\, p_{\text{expert}}

    ``active_with_head`` adds the V x d of the output head (the part that a step of decoding reads),
    ``active_with_embeddings`` the embedding as well. Reports print any of the three as "active"; with tied
    embeddings the last two are the same.

    Raises
    ------
    TypeError
        for anything but an ArchitectureSpec or a HybridConfig.

    Notes
    -----
    Block by block, with width d, after the tensors of released checkpoints (``nemotron_h``, ``qwen3_moe``):

    - norms: d a block, and d for the final norm
    - attention: d (H + 2 H_kv) P + H P d, with QK-norm 2 P more, with a head gate d H more
    - Mamba-2: d (2 I + 2 G N + H) + (k + 1)(I + 2 G N) + 3 H + I + I d, inner width I = H P, conv kernel k
    - MLP: 2 d F, or 3 d F when gated
    - MoE: E experts of 2 r F (3 r F gated) with r the latent size or d, router d E (and E biases),
      latent projections 2 d r, shared expert 2 d S (3 d S gated)
    - MTP: 2 d^2 + 3 d, and its blocks
    """
    spec = as_spec(model)
    d, table = spec.hidden_size, spec.vocab_size * spec.hidden_size
    kinds: Counter[str] = Counter(embedding=table, head=0 if spec.tied_embeddings else table, norms=d)
    idle = 0
    for block in spec.blocks:
        kinds.update(_block(block, d))
        if isinstance(block, MoE):
            idle += (block.experts - block.top_k) * _expert(block, d)
    mtp = sum(
        2 * d * d + 3 * d + sum(_block(block, d).total() for block in module.blocks) for module in spec.mtp
    )
    total = kinds.total()
    active = total - idle - kinds["embedding"] - kinds["head"]
    return ParameterCount(
        total=total,
        active=active,
        active_with_head=active + table,
        active_with_embeddings=active + kinds["embedding"] + kinds["head"],
        mtp=mtp,
        by_kind={kind: number for kind, number in kinds.items() if number},
    )


def _expert(block: MoE, d: int) -> int:
    return (3 if block.gated else 2) * (block.latent or d) * block.width


def _block(block: Block, d: int) -> Counter[str]:
    """Parameters of one block by kind, its pre-norm included."""
    kinds: Counter[str] = Counter(norms=d)
    match block:
        case Attention():
            queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
            kinds["attention"] = d * (queries + 2 * keys) + queries * d
            kinds["attention"] += 2 * block.head_dim * block.qk_norm + d * block.heads * block.head_gate
        case Mamba2():
            inner = block.inner_size
            in_proj = d * (inner + block.conv_dim + block.heads)  # the gate; x, B and C; dt
            conv = (block.conv_kernel + 1) * block.conv_dim
            per_head = 3 * block.heads  # A_log, D, dt_bias
            kinds["mamba2"] = in_proj + conv + per_head + inner + inner * d
        case MLP():
            kinds["mlp"] = (3 if block.gated else 2) * d * block.width
        case MoE():
            kinds["routed_experts"] = block.experts * _expert(block, d)
            kinds["shared_experts"] = (3 if block.gated else 2) * d * block.shared_width
            kinds["router"] = (d + block.router_bias) * block.experts
            kinds["latent"] = 2 * d * (block.latent or 0)
    return kinds
