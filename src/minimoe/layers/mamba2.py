"""Mamba-2: a recurrence that can be read as attention with decay (Dao & Gu 2024, arXiv 2405.21060).

The letters of the paper, and ours: A -> A_H (one negative number a head), B -> Bmat, C -> Cmat, D -> skip_H,
the step size Delta -> dt. Two forms of one function:

    ssd_recurrent   the definition: one token after another, a state of P x N numbers a head
    ssd_chunked     the same numbers from matrix products: attention inside chunks, the recurrence between them

Legend: layers/__init__.py; J = H / G heads share one group's Bmat and Cmat, c counts chunks.
Matches transformers ``NemotronHMamba2Mixer`` with ``time_step_limit = (0, inf)``, and Megatron-LM's MambaMixer.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HybridConfig
from ..state import MambaState, Span
from .norm import GatedRMSNorm, at_least_float32, without_autocast


def ssd_recurrent(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, Bmat_BLGN: Tensor, Cmat_BLGN: Tensor,
    state_BHPN: Tensor, run_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in the dtype of its inputs (at least float32 in a model):

        S_t = exp(dt_t A) S_{t-1} + dt_t x_t Bmat_t^T        y_t = S_t Cmat_t

    dt = 0 leaves the state as it is. Where ``run_BL`` grows, a new document begins and S is cleared first
    (run 0 continues ``state_BHPN``). Returns y_BLHP and the last state.
    """
    heads = x_BLHP.shape[2] // Bmat_BLGN.shape[2]
    ys, run_B = [], torch.zeros_like(run_BL[:, 0]) if run_BL is not None else None
    for t in range(x_BLHP.shape[1]):
        Bmat_BHN, Cmat_BHN = (m[:, t].repeat_interleave(heads, 1) for m in (Bmat_BLGN, Cmat_BLGN))
        decay_BH = torch.exp(dt_BLH[:, t] * A_H)
        if run_BL is not None:
            decay_BH = decay_BH * (run_BL[:, t] == run_B)[:, None]
            run_B = run_BL[:, t]
        write_BHP = dt_BLH[:, t, :, None] * x_BLHP[:, t]
        state_BHPN = decay_BH[..., None, None] * state_BHPN + write_BHP[..., None] * Bmat_BHN[:, :, None]
        ys.append((state_BHPN @ Cmat_BHN[..., None]).squeeze(-1))
    return torch.stack(ys, 1), state_BHPN


def ssd_chunked(
    x_BLHP: Tensor, dt_BLH: Tensor, A_H: Tensor, Bmat_BLGN: Tensor, Cmat_BLGN: Tensor,
    state_BHPN: Tensor, chunk_size: int, run_BL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`ssd_recurrent` by matrix products, in chunks of Q tokens (the paper's section 6; any L, any Q).

    Unrolled, y_i = sum_{j<=i} exp(sum of dt A from j+1 to i) (Cmat_i . Bmat_j) dt_j x_j: attention whose softmax
    is replaced by a decay. Inside a chunk that is computed as written, Q^2 scores a group; everything before the
    chunk is summed up in one state, passed on by the recurrence once a chunk instead of once a token.
    """
    B, L, H, P = x_BLHP.shape
    G, N = Bmat_BLGN.shape[2:]
    J, Q = H // G, min(chunk_size, L)
    pad = -L % Q
    if pad:  # dt = 0 neither decays nor writes
        x_BLHP, Bmat_BLGN, Cmat_BLGN = (F.pad(m, (0, 0, 0, 0, 0, pad)) for m in (x_BLHP, Bmat_BLGN, Cmat_BLGN))
        dt_BLH = F.pad(dt_BLH, (0, 0, 0, pad))
        run_BL = None if run_BL is None else torch.cat([run_BL, run_BL[:, -1:].expand(B, pad)], 1)
    c = (L + pad) // Q

    write = (x_BLHP * dt_BLH[..., None]).view(B, c, Q, G, J, P).transpose(2, 3)  # B c G Q J P
    log_decay = (dt_BLH * A_H).view(B, c, Q, G, J).permute(0, 1, 3, 4, 2).cumsum(-1)  # B c G J Q, falling
    Bmat, Cmat = (m.view(B, c, Q, G, N).transpose(2, 3) for m in (Bmat_BLGN, Cmat_BLGN))  # B c G Q N
    # A decay of 1e-25 adds nothing, but its product with another such would be denormal, and those are slow.
    smallest = math.log(torch.finfo(log_decay.dtype).tiny) / 1.5

    # Inside the chunks. The causal mask goes on the scores of the group, of which there are J times fewer.
    decay = torch.exp((log_decay[..., :, None] - log_decay[..., None, :]).clamp(smallest, 0))  # B c G J Q Q
    scores = (Cmat @ Bmat.transpose(-1, -2)).tril()  # B c G Q Q
    from_start, to_end = torch.exp(log_decay.clamp_min(smallest)), decay[..., -1, :]  # B c G J Q
    chunk_decay = from_start[..., -1]  # B c G J
    if run_BL is not None:  # a score, a read or a write across the border of two documents counts nothing
        run = run_BL.view(B, c, 1, Q)
        before = F.pad(run[:, :-1, 0, -1], (1, 0))[:, :, None]  # B c 1: the run that the chunk's start state is of
        scores = scores * (run[..., :, None] == run[..., None, :])
        from_start = from_start * (run == before[..., None])[:, :, :, None]
        to_end = to_end * (run == run[..., -1:])[:, :, :, None]
        chunk_decay = chunk_decay * (run[..., -1] == before)[..., None]
    y = ((decay * scores[:, :, :, None]) @ write.transpose(3, 4)).transpose(3, 4)  # B c G Q J P

    # Between the chunks. With the decay on the x side, each group is one wide matmul for all of its heads.
    kept = (write * to_end.transpose(-1, -2)[..., None]).flatten(-2)  # B c G Q JP
    added = (kept.transpose(-1, -2) @ Bmat).view(B, c, H, P, N)
    starts = []
    for k in range(c):
        starts.append(state_BHPN)
        state_BHPN = torch.addcmul(added[:, k], state_BHPN, chunk_decay[:, k].reshape(B, H, 1, 1))
    start = torch.stack(starts, 1).view(B, c, G, J * P, N)
    y = y + (Cmat @ start.transpose(-1, -2)).view(B, c, G, Q, J, P) * from_start.transpose(-1, -2)[..., None]
    return y.transpose(2, 3).reshape(B, L + pad, H, P)[:, :L], state_BHPN


def causal_conv(x_BMC: Tensor, weight_C1K: Tensor, bias_C: Tensor, run_BM: Tensor | None = None) -> Tensor:
    """Depthwise causal convolution: ``y_t = bias + sum_k weight_k x_{t+k}`` over M = L + K - 1 inputs -> [B, L, C].

    ``run_BM`` stops it at the borders of documents.
    """
    K = weight_C1K.shape[-1]
    L = x_BMC.shape[1] - K + 1
    if run_BM is not None:
        taps = (
            x_BMC[:, k : k + L] * weight_C1K[:, 0, k] * (run_BM[:, k : k + L] == run_BM[:, K - 1 :])[..., None]
            for k in range(K)
        )
        return sum(taps, bias_C)
    if L == 1:  # one output is a weighted sum; starting a convolution costs more than that
        return (x_BMC * weight_C1K[:, 0].T).sum(1, keepdim=True) + bias_C
    # Channels stay last: as a conv2d over a transposed view this runs several times faster than conv1d on a CPU.
    x_BC1M = x_BMC.transpose(1, 2).unsqueeze(2)
    return F.conv2d(x_BC1M, weight_C1K.unsqueeze(2), bias_C, groups=len(bias_C)).squeeze(2).transpose(1, 2)


class Mamba2(nn.Module):
    """The Mamba-2 mixer: project in, convolve, run the recurrence, gate and normalise, project out.

    ``y, state = mamba(x_BLD, state, span)`` for any L >= 1; [B, L, D] -> [B, L, D]. The state has a fixed size:
    H * P * N numbers and K - 1 inputs of the convolution, whatever has been read.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.mamba_num_heads, config.mamba_head_dim
        self.groups, self.state_size = config.n_groups, config.ssm_state_size
        self.inner, self.conv_dim = config.mamba_inner_size, config.conv_dim
        self.chunk_size, self.dt_limit = config.chunk_size, config.time_step_limit
        self.in_proj = nn.Linear(config.hidden_size, self.inner + self.conv_dim + self.heads, bias=False)
        self.conv1d = nn.Conv1d(self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim)
        self.A_log = nn.Parameter(torch.zeros(self.heads))  # A = -exp(A_log) < 0: the state can only decay
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.norm = GatedRMSNorm(self.inner, self.groups, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=False)

    def empty_state(self, batch: int, like: Tensor) -> MambaState:
        """The state before the first token: zeros."""
        conv = like.new_zeros(batch, self.conv1d.kernel_size[0] - 1, self.conv_dim)
        ssm = at_least_float32(like.new_zeros(batch, self.heads, self.head_dim, self.state_size))
        return MambaState(conv, ssm)

    def forward(
        self, x_BLD: Tensor, state: MambaState | None = None, span: Span | None = None
    ) -> tuple[Tensor, MambaState]:
        B, L, _ = x_BLD.shape
        span = span or Span.whole(B, L)
        gate_BLI, xbc_BLC, dt_BLH = self.in_proj(x_BLD).split([self.inner, self.conv_dim, self.heads], -1)
        state = state or self.empty_state(B, xbc_BLC)

        window_BMC = torch.cat([state.conv_BKC.to(xbc_BLC.dtype), xbc_BLC], 1)
        run_BM = None if span.run_BL is None else F.pad(span.run_BL, (window_BMC.shape[1] - L, 0))
        xbc_BLC = F.silu(causal_conv(window_BMC, self.conv1d.weight, self.conv1d.bias, run_BM))
        conv_BKC = self._last_inputs(window_BMC, run_BM, span)

        bc = self.groups * self.state_size
        x_BLI, Bmat, Cmat = at_least_float32(xbc_BLC).split([self.inner, bc, bc], -1)
        x_BLHP = x_BLI.unflatten(-1, (self.heads, self.head_dim))
        Bmat_BLGN, Cmat_BLGN = (m.unflatten(-1, (self.groups, self.state_size)) for m in (Bmat, Cmat))
        dt_BLH = F.softplus(at_least_float32(dt_BLH) + self.dt_bias).clamp(*self.dt_limit)
        if span.valid_BL is not None:
            dt_BLH = dt_BLH * span.valid_BL[..., None]
        A_H = -torch.exp(at_least_float32(self.A_log))

        parts = x_BLHP, dt_BLH, A_H, Bmat_BLGN, Cmat_BLGN, state.ssm_BHPN
        with without_autocast(x_BLD):  # its products would be bfloat16, and the state carries their errors on
            if L == 1:
                y_BLHP, ssm_BHPN = ssd_recurrent(*parts, span.run_BL)
            else:
                y_BLHP, ssm_BHPN = ssd_chunked(*parts, self.chunk_size, span.run_BL)
        y_BLI = torch.addcmul(y_BLHP, x_BLHP, self.D[:, None].to(y_BLHP.dtype)).flatten(2)
        return self.out_proj(self.norm(y_BLI, gate_BLI).to(x_BLD.dtype)), MambaState(conv_BKC, ssm_BHPN)

    def _last_inputs(self, window_BMC: Tensor, run_BM: Tensor | None, span: Span) -> Tensor:
        """The K - 1 inputs that the next call's convolution will see, zero where they are of an older document."""
        kept, M = self.conv1d.kernel_size[0] - 1, window_BMC.shape[1]
        if not span.padded:
            last_BKC, run_BK = window_BMC[:, M - kept :], None if run_BM is None else run_BM[:, M - kept :]
            run_B1 = None if run_BM is None else run_BM[:, -1:]
        else:
            lengths_B1 = torch.tensor(span.lengths, device=window_BMC.device)[:, None]
            at_BK = lengths_B1 + torch.arange(kept, device=window_BMC.device)
            last_BKC = window_BMC.gather(1, at_BK[..., None].expand(-1, -1, window_BMC.shape[2]))
            run_BK = None if run_BM is None else run_BM.gather(1, at_BK)
            run_B1 = None if run_BM is None else run_BK[:, -1:]
        # a copy, so that the call's whole projection is not kept alive for three of its rows
        return last_BKC.clone() if run_BK is None else last_BKC * (run_BK == run_B1)[..., None]
