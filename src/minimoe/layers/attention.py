"""Grouped-query attention without positional encoding, with an explicit KV state.

H query heads share G key/value heads (Ainslie et al. 2023). No rotary or other positions are applied: Nemotron-H
leaves order to its Mamba layers. Matches transformers ``NemotronHAttention``.

Legend: layers/__init__.py.  Q-heads H, KV-heads G here, head dim P.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from ..state import KVState, Span, append_kv


def attend(q_BHLP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor, mask_BLS: Tensor) -> Tensor:
    """The definition, written out: ``softmax(q k^T / sqrt(P) + mask) v`` with H / G queries to a key head.

    mask_BLS is True where query l may see key s; every query must see at least one. Returns [B, H, L, P].
    ``F.scaled_dot_product_attention(..., enable_gqa=True)`` computes the same without storing the scores.
    """
    B, H, L, P = q_BHLP.shape
    q_BGJLP = q_BHLP.unflatten(1, (k_BGSP.shape[1], -1))  # J query heads share one key head
    scores_BGJLS = q_BGJLP @ k_BGSP[:, :, None].transpose(-1, -2) / P**0.5
    scores_BGJLS = scores_BGJLS.masked_fill(~mask_BLS[:, None, None], -torch.inf)
    return (scores_BGJLS.softmax(-1) @ v_BGSP[:, :, None]).flatten(1, 2)


def causal_mask(span: Span, length: int, keys: int, device: torch.device) -> Tensor:
    """mask_BLS: key s is visible to query l if it is not later, and not of an earlier document.

    Rows that are all equally far share one mask, [1, L, S].
    Padding queries see the first keys too: their output is never read, but it must not be NaN.
    """
    key_S = torch.arange(keys, device=device)
    past = span.past[:1] if span.level else span.past
    past_B1 = torch.tensor(past, device=device)[:, None]
    position_BL = past_B1 + torch.arange(length, device=device)
    mask_BLS = key_S <= position_BL[:, :, None]
    if span.first_key_BL is not None:
        mask_BLS = mask_BLS & (key_S >= span.first_key_BL[:, :, None])
    return mask_BLS


def wants_equal_heads(q_BHLP: Tensor, mask: Tensor | None) -> bool:
    """Whether shared key heads would cost a GPU its fused kernel, and with it the memory of all scores.

    Of torch's kernels for CUDA the one that takes masks and float32 knows no shared heads (as of torch 2.13), and the
    one that knows shared heads takes neither. Keys and values once for each query head are far less than scores.
    """
    return q_BHLP.is_cuda and (mask is not None or q_BHLP.dtype not in (torch.float16, torch.bfloat16))


class Attention(nn.Module):
    """Causal grouped-query attention with projections.

    ``y, state = attention(x_BLD, state, span)``: ``state`` holds the keys and values of earlier calls (None: there
    were none); ``span`` says which tokens are real and where documents begin (None: all, and nowhere).
    The output is [B, L, D]; the state grows by 2 * G * P numbers a token.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(d, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, d, bias=False)

    def forward(
        self, x_BLD: Tensor, state: KVState | None = None, span: Span | None = None
    ) -> tuple[Tensor, KVState]:
        B, L, _ = x_BLD.shape
        if span is None:
            span = Span(state.lengths if state else (0,) * B, (L,) * B)
        q_BHLP, k_BGLP, v_BGLP = (
            project(x_BLD).view(B, L, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        state = append_kv(state, k_BGLP, v_BGLP, span)
        keys = span.longest + L
        k_BGSP, v_BGSP = state.buffer.k.narrow(2, 0, keys), state.buffer.v.narrow(2, 0, keys)
        # Two common cases need no mask: everything is new, or one query that sees all keys of every row.
        fresh = span.longest == 0 and span.first_key_BL is None
        last = L == 1 and span.level and span.first_key_BL is None
        mask = None
        if not (fresh or last):  # all layers of a call share one
            mask = span.shared("mask", lambda: causal_mask(span, L, keys, x_BLD.device)[:, None])
        if L == 1:
            # The queries that share a key head become rows of one product, so that a CPU reads each key once.
            q_BGJP = q_BHLP.view(B, k_BGSP.shape[1], -1, self.head_dim)
            y_BHLP = F.scaled_dot_product_attention(q_BGJP, k_BGSP, v_BGSP, attn_mask=mask).view_as(q_BHLP)
        else:
            if wants_equal_heads(q_BHLP, mask):
                k_BGSP, v_BGSP = (x.repeat_interleave(q_BHLP.shape[1] // x.shape[1], dim=1) for x in (k_BGSP, v_BGSP))
            y_BHLP = F.scaled_dot_product_attention(
                q_BHLP, k_BGSP, v_BGSP, attn_mask=mask, is_causal=fresh, enable_gqa=True
            )
        return self.o_proj(y_BHLP.transpose(1, 2).flatten(2)), state
