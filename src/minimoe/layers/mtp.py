"""Multi-token prediction: one small block that guesses the token after the next, and, applied again, the one after.

At position p it reads the token x_p and the trunk's state h_{p-1} of the position before, both normalised and
projected from 2D to D, runs attention and MoE, and hands the result to the trunk's own output head, which then
predicts x_{p+1}. Applied recursively, its own output takes the place of h.

Matches vLLM's ``nemotron_h_mtp.py`` and Megatron-LM (final norm: RMSNorm); ``mtp_final_norm="layernorm"`` matches
llama.cpp's ``nemotron-h-moe.cpp``. transformers drops these weights on load.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import HybridConfig
from ..state import KVState, Span
from .attention import Attention
from .moe import MoE
from .norm import LayerNorm, RMSNorm


class _AttentionEntry(nn.Module):
    """First half, named as checkpoints name it (``mtp.layers.0``)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_epsilon
        self.enorm, self.hnorm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.eh_proj = nn.Linear(2 * d, d, bias=False)
        self.norm = RMSNorm(d, eps)
        self.mixer = Attention(config)


class _MoEEntry(nn.Module):
    """Second half (``mtp.layers.1``)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_epsilon
        self.norm = RMSNorm(d, eps)
        self.mixer = MoE(config)
        final = RMSNorm if config.mtp_final_norm == "rmsnorm" else LayerNorm
        self.final_layernorm = final(d, eps)


class MTPBlock(nn.Module):
    """``h, state = mtp(embedded_BLD, hidden_BLD, state, span)``.

    embedded_BLD is the embedding of x_p, hidden_BLD is h_{p-1} (zeros at p = 0): the trunk's output after its final
    norm on the first application, this block's own output on every later one. Returns h, already normalised, for
    the trunk's output head, and the block's KV state.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_AttentionEntry(config), _MoEEntry(config)])

    def forward(
        self, embedded_BLD: Tensor, hidden_BLD: Tensor, state: KVState | None = None, span: Span | None = None
    ) -> tuple[Tensor, KVState]:
        first, second = self.layers
        x_BLD = first.eh_proj(torch.cat([first.enorm(embedded_BLD), first.hnorm(hidden_BLD)], -1))
        y_BLD, state = first.mixer(first.norm(x_BLD), state, span)
        x_BLD = x_BLD + y_BLD
        x_BLD = x_BLD + second.mixer(second.norm(x_BLD))
        return second.final_layernorm(x_BLD), state
