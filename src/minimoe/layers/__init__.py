"""The building blocks, one file per idea. The mathematics are functions; the modules only hold weights.

Shape suffixes, the same in every file and in the chapters:

    B batch    L length (tokens of this call)    D model width     V vocabulary
    H heads    P head dim                        K experts per token (top-k)
    N state    G groups                          Q chunk length    C convolution channels
    E experts  F feed-forward width              R latent width (or d without latent projections)
    T tokens of a batch in one line (B * L)      S key positions that a query may see
"""
from .attention import Attention, attend
from .mamba2 import Mamba2, ssd_chunked, ssd_recurrent
from .mlp import MLP, relu2
from .moe import MoE, experts_grouped, experts_loop, route, without_grouped_mm
from .mtp import MTPBlock
from .norm import GatedRMSNorm, RMSNorm, gated_rms_norm

__all__ = [
    "MLP", "Attention", "GatedRMSNorm", "MTPBlock", "Mamba2", "MoE", "RMSNorm", "attend", "experts_grouped", "experts_loop",
    "gated_rms_norm", "relu2", "route", "ssd_chunked", "ssd_recurrent", "without_grouped_mm",
]  # fmt: skip
