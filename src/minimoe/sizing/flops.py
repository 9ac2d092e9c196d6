"""How many floating-point operations one token costs, forward and in training. Imports no torch."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from ..catalog.spec import MLP, ArchitectureSpec, Attention, Block, Mamba2, MoE, as_spec
from ..config import HybridConfig

CHUNK = 128  # tokens of a chunk of the state-space layers, where a spec does not say (Nemotron 3's own)


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations of one token, a mean over the sequence; ``by_kind`` adds up to ``forward``."""

    by_kind: dict[str, float]

    @property
    def forward(self) -> float:
        return sum(self.by_kind.values())

    @property
    def training(self) -> float:
        """Forward and backward: the gradient of a product ``x W`` by x and the one by W cost as much as it does."""
        return 3 * self.forward


def flops_per_token(model: ArchitectureSpec | HybridConfig, length: int, mtp: bool = True) -> TokenFlops:
    r"""FLOPs of one token in a sequence of ``length`` tokens that is read as a whole; a multiply-add is two.

    Counted are matrix products and the convolution, as the fast forms in :mod:`minimoe.layers` do them:

    .. math::

        \text{weights} &= 2 \cdot \text{active parameters of matrices, head included} \\
        \text{attention\_scores} &= \sum_{\text{attention}} 4\, H P \,\bar{s}, \quad
            \bar{s} = \text{mean over } t = 1 \dots L \text{ of } \min(t, \text{window})
            \;\; (= (L + 1) / 2 \text{ without one}) \\
        \text{ssd} &= \sum_{\text{Mamba-2}} 2\, Q\, (G N + H P) + 4\, H P N, \quad Q = \min(\text{chunk}, L) \\
        \text{training} &= 3 \cdot \text{forward}

    The scores of queries with keys after them are not counted, because no fused kernel computes them. Inside a chunk
    of Q tokens all Q x Q scores are counted, because the chunked form multiplies them before it masks half of them.
    A router's choice counts K experts a token. With ``mtp`` every MTP module is counted: the projection of the joined
    halves, its blocks, and its own pass through the head (``mtp`` and ``mtp_head``).

    Not counted: norms, activations, softmax, decays, gates, sorting, the embedding's look-up, the optimizer, and
    whatever is computed a second time (activation checkpointing). What is measured against these counts is thus the
    share of useful work (MFU, Chowdhery et al. 2022, appendix B), which recomputing lowers.

    The chunk is the config's ``chunk_size``; a spec does not say one, and gets Nemotron 3's 128.

    Raises
    ------
    ValueError
        length below 1.
    TypeError
        for anything but an ArchitectureSpec or a HybridConfig.
    """
    spec = as_spec(model)
    if length < 1:
        raise ValueError(f"length={length}: must be 1 or more")
    chunk = min(model.chunk_size if isinstance(model, HybridConfig) else CHUNK, length)
    d, head = spec.hidden_size, 2.0 * spec.hidden_size * spec.vocab_size
    kinds: Counter[str] = Counter(head=head)
    for block in spec.blocks:
        kinds.update(_block(block, d, length, chunk))
    for module in spec.mtp if mtp else ():
        kinds["mtp"] += 2 * 2 * d * d + sum(_block(block, d, length, chunk).total() for block in module.blocks)
        kinds["mtp_head"] += head
    return TokenFlops({kind: float(number) for kind, number in kinds.items() if number})


def _block(block: Block, d: int, length: int, chunk: int) -> Counter[str]:
    """FLOPs a token of one block by kind."""
    kinds: Counter[str] = Counter()
    match block:
        case Attention():
            queries, keys = block.heads * block.head_dim, block.kv_heads * block.head_dim
            kinds["attention"] = 2 * d * (2 * queries + 2 * keys + block.heads * block.head_gate)
            kinds["attention_scores"] = 4 * queries * _mean_keys(length, block.sliding_window)
        case Mamba2():
            inner, groups = block.inner_size, block.groups * block.state_size
            kinds["mamba2"] = 2 * d * (inner + block.conv_dim + block.heads) + 2 * inner * d
            kinds["mamba2"] += 2 * block.conv_kernel * block.conv_dim
            kinds["ssd"] = 2 * chunk * (groups + inner) + 4 * inner * block.state_size
        case MLP():
            kinds["mlp"] = 2 * (3 if block.gated else 2) * d * block.width
        case MoE():
            matrices, latent = 3 if block.gated else 2, block.latent or 0
            kinds["routed_experts"] = 2 * matrices * block.top_k * (latent or d) * block.width
            kinds["shared_experts"] = 2 * matrices * d * block.shared_width
            kinds["router"] = 2 * d * block.experts
            kinds["latent"] = 2 * 2 * d * latent
    return kinds


def _mean_keys(length: int, window: int | None) -> float:
    """Keys that a query sees, itself included: the mean over its position."""
    full = min(window or length, length)  # from here on the window is full
    return (full * (full + 1) / 2 + (length - full) * full) / length
